"""Picture files of every kind as a person sees them, and as nobody should."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from sd35bench.config import compose, freeze
from sd35bench.config.overrides import written
from sd35bench.errors import ConfigError
from sd35bench.metrics.reference import image_files, skipped_files
from sd35bench.pictures import decode_rgb, read_picture
from sd35bench.prompts import init_size, read_init_image

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


def test_a_colour_profile_is_converted():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    plain = Image.fromarray(RAMP)
    found = read_picture(saved(plain, icc_profile=profile))
    assert "colour" in found.done[0]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_picture(saved(plain, icc_profile=srgb)).pixels, RAMP)


def test_an_animation_is_refused_unless_its_first_frame_is_asked_for(tmp_path):
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP[::-1].copy())]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ConfigError, match=r"is an animation.*prompts\.first_frame=true"):
        read_init_image(path, "init_image")
    assert np.array_equal(decode_rgb(read_init_image(path, "init_image", True)[0]), RAMP)


def test_what_was_done_to_init_images_is_said(tmp_path):
    (tmp_path / "a.png").write_bytes(turned(6))
    settings = [
        f"init_image={tmp_path}/a.png",
        "backend=fake",
        "prompts=starter",
        "prompts.limit=1",
    ]
    notes = freeze(compose(written([*settings, "model=nano"]))).sweep.notes
    assert any("turned as its orientation tag says (1 of 1)" in note for note in notes)


def test_reference_folders_read_more_kinds_and_count_the_rest(tmp_path):
    for kind in ("tiff", "bmp", "gif", "png"):
        Image.fromarray(RAMP).save(tmp_path / f"a.{kind}")
    (tmp_path / "b.heic").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert [path.suffix for path in image_files(tmp_path)] == [".bmp", ".gif", ".png", ".tiff"]
    assert skipped_files(tmp_path) == {".heic": 1, ".txt": 1}
