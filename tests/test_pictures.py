"""Picture files of every kind as a person sees them, and as nobody should."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd35bench.config import compose, freeze
from sd35bench.config.models import check_field
from sd35bench.config.overrides import written
from sd35bench.errors import ConfigError
from sd35bench.metrics.reference import image_files, skipped_files
from sd35bench.pictures import decode_rgb, read_picture
from sd35bench.plan import expand
from sd35bench.prompts import init_size, read_init_image
from sd35bench.remote.image_decoder import read_picture as of_strangers

RAMP = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def bare(data: bytes) -> np.ndarray:
    """The mutant: what was done before."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def turned(orientation: int) -> bytes:
    image = Image.fromarray(RAMP[:2])
    exif = image.getexif()
    exif[0x0112] = orientation
    return saved(image, exif=exif)


def test_a_turned_photo_is_upright():
    data = turned(6)
    assert np.array_equal(decode_rgb(data), np.rot90(RAMP[:2], -1))
    assert init_size(data) == (2, 4)
    assert not np.array_equal(bare(data), decode_rgb(data)[:2])


def wide() -> bytes:
    return saved(Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)))


def clear() -> bytes:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 200
    pixels[0, :, 3] = (0, 51, 255)
    return saved(Image.fromarray(pixels))


def indexed() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    return saved(image, transparency=1)


@pytest.mark.parametrize(
    ("data", "levels", "done"),
    [
        (wide(), [[0] * 3, [100] * 3, [255] * 3], "16 bits scaled"),
        (clear(), [[255, 255, 255], [244, 204, 204], [200, 0, 0]], "laid on white"),
        (indexed(), [[10, 20, 30], [255, 255, 255]], "laid on white"),
        (saved(Image.new("1", (1, 1), 1)), [[255, 255, 255]], None),
        (saved(Image.new("LA", (1, 1), (40, 255))), [[40, 40, 40]], None),
        (saved(Image.new("CMYK", (1, 1), (0, 0, 0, 255)), "TIFF"), [[0, 0, 0]], None),
        (saved(Image.fromarray(np.array([[0.5]], np.float32)), "TIFF"), [[128] * 3], "from 0 to 1"),
    ],
    ids=["16-bit", "alpha", "palette", "1-bit", "opaque", "CMYK", "float"],
)
def test_every_mode_comes_out_right_and_is_said(data, levels, done):
    found = read_picture(data)
    assert found.pixels.dtype == np.uint8
    assert np.abs(found.pixels[0].astype(int) - levels).max() <= 1
    assert (done is None) == (found.done == ())
    assert done is None or done in found.done[0]


@pytest.mark.parametrize("data", [wide(), clear(), indexed()], ids=["16-bit", "alpha", "palette"])
def test_mutant_that_only_converts_shows_something_else(data):
    assert not np.array_equal(bare(data), decode_rgb(data))


def linear_profile() -> bytes:
    """sRGB's primaries with levels in proportion to light: tags of a matrix profile, ICC.1:2001."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    line = b"curv\0\0\0\0\0\0\0\0"  # no entry: the identity
    name = b"linear light\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78
    tags = {
        b"desc": text + b"\0" * (-len(text) % 4),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), line),
    }
    at, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, body in tags.items():
        table += tag + struct.pack(">2I", at + len(data), len(body))
        data += body
    head = struct.pack(
        *(">I4s4s4s4s12s4s4s4s24s3i48s", at + len(data), b"", b"\2\x10\0\0", b"mntr", b"RGB "),
        *(b"XYZ ", b"", b"acsp", b"", b"", 63190, 65536, 54061, b""),
    )
    return head + table + data


def test_a_colour_profile_is_converted():
    """Half of the light is level 188 of sRGB, and level 128 without the conversion."""
    grey = Image.new("RGB", (2, 1), (128, 128, 128))
    found = read_picture(saved(grey, icc_profile=linear_profile()))
    assert found.done == ("colours converted from linear light to sRGB",)
    assert np.abs(found.pixels.astype(int) - 188).max() <= 1
    assert bare(saved(grey, icc_profile=linear_profile())).max() == 128  # the mutant
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_picture(saved(Image.fromarray(RAMP), icc_profile=srgb)).pixels, RAMP)
    broken = read_picture(saved(grey, icc_profile=linear_profile()[:200]))
    assert (broken.pixels.max(), "left out" in broken.done[0]) == (128, True)


def test_an_animation_is_refused_unless_its_first_frame_is_asked_for(tmp_path):
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1].copy())]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ConfigError, match=r"is an animation.*prompts\.first_frame=true"):
        read_init_image(path, "init_image")
    assert np.array_equal(decode_rgb(read_init_image(path, "init_image", True)[0]), RAMP)


def test_what_was_done_to_init_images_is_said_and_in_the_record(tmp_path):
    (tmp_path / "a.png").write_bytes(turned(6))
    settings = [
        f"init_image={tmp_path}/a.png",
        "backend=fake",
        "prompts=starter",
        "prompts.limit=1",
    ]
    sweep = freeze(compose(written([*settings, "model=nano"]))).sweep
    assert any("turned as its orientation tag says (1 of 1)" in note for note in sweep.notes)
    (trial,) = expand(sweep).trials
    assert trial.prompt.init_done == ("turned as its orientation tag says",)


def test_a_transparent_init_image_lies_on_the_colour_that_is_asked_for(tmp_path):
    path = tmp_path / "clear.png"
    path.write_bytes(clear())
    plain, done = read_init_image(path, "init_image")
    assert (plain, done) == (path.read_bytes(), ("transparent parts laid on white",))
    data, done = read_init_image(path, "init_image", background="#0000ff")
    assert done == ("transparent parts laid on #0000ff",)
    assert decode_rgb(data).tolist() == [[[0, 0, 255], [40, 0, 204], [200, 0, 0]]]
    path.write_bytes(saved(Image.fromarray(RAMP)))  # nothing of it can be seen here
    assert read_init_image(path, "init_image", background="red") == (path.read_bytes(), ())
    assert check_field("prompts.init_background", "#0000ff") == "#0000ff"
    with pytest.raises(ConfigError, match="init_background=blurple: must be a colour"):
        check_field("prompts.init_background", "blurple")


@pytest.mark.parametrize("data", [turned(6), wide(), clear(), indexed()], ids=list("twci"))
def test_strangers_files_and_the_servers_init_images_are_seen_alike(data, monkeypatch):
    """The child that decodes them and our own decoder: one photo is one image on every way in."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    facts, image = of_strangers(data, 10_000)
    assert np.array_equal(np.asarray(image), decode_rgb(data))
    assert (facts["height"], facts["width"]) == decode_rgb(data).shape[:2]


def test_reference_folders_read_more_kinds_and_count_the_rest(tmp_path):
    for kind in ("tiff", "bmp", "gif", "png", "avif"):
        Image.fromarray(RAMP).save(tmp_path / f"a.{kind}")
    (tmp_path / "b.heic").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    there = [path.suffix for path in image_files(tmp_path)]
    assert there == [".avif", ".bmp", ".gif", ".png", ".tiff"]
    assert skipped_files(tmp_path) == {".heic": 1, ".txt": 1}
