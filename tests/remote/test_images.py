"""Images from elsewhere: told by their bytes, decoded in a process that dies with its limits."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import sd35bench.remote.images as images
from sd35bench.errors import InvalidImage, RemoteError
from sd35bench.remote.image_decoder import read_picture
from sd35bench.remote.images import BadImage, ImageFacts, check_image, decode_image, sniff
from sd35bench.study.store import decode_rgb

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@pytest.fixture(autouse=True)
def own_pixel_cap(monkeypatch):
    """The decoder sets Pillow's cap for its process, which here is every test's."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    ramp = np.add.outer(np.arange(height) * 5, np.arange(width) * 3) % 256
    channels = np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1).astype(np.uint8)
    return Image.fromarray(channels).convert(mode)


def file(image: Image.Image, name: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *extra: bytes, rows: bytes = b"") -> bytes:
    """A PNG that says it has this size, whatever rows it has."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    idat = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + idat + chunk(b"IEND", b"")


def frames(name: str, **options) -> bytes:
    more = [picture().rotate(180)]
    return file(picture(), name, save_all=True, append_images=more, **options)


def webp_of(width: int, height: int) -> bytes:
    """A WEBP whose canvas says this size around a small picture."""
    inner = file(picture(), "WEBP")[12:]
    sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sizes + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose frame header says this size."""
    data = bytearray(file(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_image_is_told_and_decoded_as_the_store_does(kind: str):
    data = file(picture(), FORMATS[kind])
    assert sniff(data) == kind
    assert check_image(data) == ImageFacts(format=kind, width=40, height=24)
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, decode_rgb(data))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((mode, "PNG") for mode in ("L", "RGBA", "P", "1", "LA")),
        *((mode, "JPEG") for mode in ("L", "CMYK")),
        ("RGBA", "WEBP"),
    ],
)
def test_every_mode_becomes_rgb(mode: str, name: str):
    data = file(picture(mode=mode), name)
    facts, image = read_picture(data, 10_000)
    assert (facts["width"], facts["height"]) == (40, 24)
    np.testing.assert_array_equal(np.asarray(image), decode_rgb(data))


def test_a_turned_photo_has_the_size_that_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file(picture(), "JPEG", exif=exif)
    assert check_image(data) == ImageFacts(format="jpg", width=24, height=40)
    np.testing.assert_array_equal(decode_image(data), decode_rgb(data))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"GIF89a", b"BM", b"%PDF-1.7", b"<svg/>", b"RIFF0000WAVE", b"\x89PNG"],
    ids=repr,
)
def test_other_files_are_refused_without_a_child(data: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images.subprocess, "run", lambda *a, **k: pytest.fail("a child started"))
    with pytest.raises(BadImage, match="no PNG, JPEG or WEBP"):
        check_image(data)


def test_bad_image_is_both_an_invalid_image_and_a_remote_error():
    assert issubclass(BadImage, InvalidImage)
    assert issubclass(BadImage, RemoteError)


LARGE = {
    "png": png_of(4097, 4096),
    "png-thin": png_of(2**31 - 1, 1),
    "png-bomb": png_of(30_000, 30_000, rows=bytes(10_000_000)),
    "jpg": jpeg_of(65_000, 65_000),
    "webp": webp_of(16_000, 16_000),
}


@pytest.mark.parametrize("data", LARGE.values(), ids=LARGE)
def test_too_many_pixels_is_an_error(data: bytes):
    with pytest.raises(Exception, match="decompression bomb"):
        read_picture(data, images.MAX_PIXELS)


def test_pixel_cap_is_exact_and_comes_before_decoding():
    data = file(picture())
    assert check_image(data, max_pixels=40 * 24).width == 40
    with pytest.raises(BadImage, match="pixels"):
        check_image(data, max_pixels=40 * 24 - 1)
    for cap in (9_999, 4_999):  # the second is the error of more than twice as many
        with pytest.raises(BadImage, match="pixels"):
            check_image(png_of(100, 100), max_pixels=cap)
    broken = png_of(100, 100)  # no rows: decoding it would fail otherwise
    with pytest.raises(BadImage, match="cannot be decoded"):
        check_image(broken)


ANIMATED = {
    "webp": frames("WEBP", lossless=True),
    "apng": frames("PNG"),
    "apng-default": frames("PNG", default_image=True),
    "apng-one-frame": png_of(1, 1, chunk(b"acTL", struct.pack(">II", 1, 0)), rows=bytes(4)),
    "apng-no-frames": png_of(1, 1, chunk(b"acTL", struct.pack(">II", 0, 0)), rows=bytes(4)),
    "apng-frame-control": png_of(
        2,
        1,
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0)),
        rows=bytes(7),
    ),
    "mpo": frames("MPO"),
}


@pytest.mark.parametrize("data", ANIMATED.values(), ids=ANIMATED)
def test_more_than_one_frame_is_refused(data: bytes):
    with pytest.raises(Exception, match=r"more than one picture|Invalid APNG"):
        read_picture(data, 10_000)


@pytest.mark.parametrize("kind", [*FORMATS, "progressive"])
def test_truncated_files_are_refused_at_every_length(kind: str):
    options = {"progressive": True} if kind == "progressive" else {}
    whole = file(picture(), FORMATS.get(kind, "JPEG"), **options)
    read_picture(whole, 10_000)
    taken = []
    for length in range(len(whole)):
        try:
            read_picture(whole[:length], 10_000)
        except Exception:
            continue
        taken.append(length)
    assert taken == []


def test_truncated_jpeg_with_a_thumbnail_of_its_own_is_refused():
    exif = Image.Exif()
    exif[0x010E] = file(picture(8, 8), "JPEG").decode("latin-1")  # a whole JPEG before the scan
    whole = file(picture(), "JPEG", exif=exif)
    read_picture(whole, 10_000)
    with pytest.raises(Exception, match="truncated"):
        read_picture(whole[:-2], 10_000)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_file_is_a_typed_error(kind: str):
    with pytest.raises(BadImage):
        check_image(file(picture(), FORMATS[kind])[:-30])


def test_wrong_checksum_is_refused():
    data = bytearray(file(picture()))
    data[data.index(b"IEND") - 5] ^= 1  # of the last chunk of pixels, which decoders do not check
    with pytest.raises(SyntaxError, match="checksum"):
        read_picture(bytes(data), 10_000)
    with pytest.raises(BadImage, match="checksum"):
        check_image(bytes(data))


def text_bomb() -> bytes:
    """A PNG of 64 kB whose text chunk takes 64 MiB."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    return png_of(1, 1, chunk(b"zTXt", b"k\0\0" + packed), rows=bytes(4))


def profile_bomb() -> bytes:
    packed = zlib.compress(bytes(64 * 2**20), 9)
    return png_of(1, 1, chunk(b"iCCP", b"k\0\0" + packed), rows=bytes(4))


def many_texts() -> bytes:
    info = PngImagePlugin.PngInfo()
    packed = zlib.compress(bytes(2**20 - 10), 9)
    for number in range(80):
        info.add(b"zTXt", b"k%d\0\0" % number + packed)
    return file(picture(), pnginfo=info)


@pytest.mark.parametrize("bomb", [text_bomb, profile_bomb, many_texts], ids=lambda b: b.__name__)
def test_text_and_profile_bombs_are_refused(bomb):
    data = bomb()
    assert len(data) < 200_000
    with pytest.raises(BadImage, match=r"too large|Too much memory"):
        check_image(data)


def test_child_s_memory_is_limited(monkeypatch: pytest.MonkeyPatch):
    data = file(Image.new("RGB", (3000, 3000)))
    assert check_image(data).width == 3000
    monkeypatch.setattr(images, "_MEMORY_BYTES", 64 * 2**20)
    with pytest.raises(BadImage, match="64 MiB"):
        check_image(data)


def scan_bomb(scans: int) -> bytes:
    """A progressive JPEG that goes over all its coefficients again and again."""
    data = file(Image.new("L", (4096, 4096)), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def test_child_s_time_is_limited(monkeypatch: pytest.MonkeyPatch):
    data = scan_bomb(20_000)
    assert len(data) < 1_000_000
    monkeypatch.setattr(images, "_CPU_S", 1)
    with pytest.raises(BadImage, match="1 s of CPU"):
        check_image(data)


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, does: str) -> None:
    """Put a shell script in the child's place."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(images.sys, "executable", str(script))


def test_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(images, "_WALL_S", 0.2)
    pretend(monkeypatch, tmp_path, "exec sleep 5")
    with pytest.raises(BadImage, match=r"within 0\.2 s"):
        check_image(file(picture()))


def test_child_that_dies_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, "kill -SEGV $$")
    with pytest.raises(BadImage, match="ended with code -11"):
        check_image(file(picture()))


def test_child_that_cannot_start_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images.sys, "executable", "/nonexistent/python")
    with pytest.raises(RemoteError, match="cannot be started") as caught:
        check_image(file(picture()))
    assert not isinstance(caught.value, InvalidImage)


def test_child_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = tmp_path / "seen"
    monkeypatch.setenv("EACHLABS_API_KEY", "canary")
    pretend(monkeypatch, tmp_path, f"env > {seen}")
    with pytest.raises(BadImage):
        check_image(file(picture()))
    assert "PATH=" in seen.read_text()
    assert "canary" not in seen.read_text()


def test_child_is_out_of_reach_of_the_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A Ctrl-C must not make a good image look bad."""
    seen = tmp_path / "seen"
    pretend(monkeypatch, tmp_path, f"cut -d' ' -f6 /proc/$$/stat > {seen}")
    with pytest.raises(BadImage):
        check_image(file(picture()))
    assert int(seen.read_text()) != os.getsid(0)


def test_child_holds_neither_numpy_nor_torch():
    code = "import sys, sd35bench.remote.image_decoder; print(sorted(sys.modules))"
    out = images.subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert "'PIL.Image'" in out
    assert "'numpy'" not in out
    assert "'torch'" not in out
