"""The child process that decodes one image under limits; `images` starts it.

Run as ``python -P -m sd35bench.remote.image_decoder pixels|facts MAX_PIXELS MEMORY CPU_S``: the
file on stdin; on stdout one line of JSON, the facts or ``{"error": …}``, and after the facts, if
asked, the pixels as H * W * 3 bytes. It holds no numpy and little of ours, so that
it is there in a tenth of a second and its address space is nearly all for the image.
"""

import io
import json
import re
import resource
import sys
import warnings
from typing import Any

from PIL import Image

from sd35bench import words
from sd35bench.pictures import shown

_NAMES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


class _Refused(Exception):
    """The file is no image as wanted; the text says why."""


def read_picture(data: bytes, max_pixels: int) -> tuple[dict[str, Any], Image.Image]:
    """Decode the only picture in a file to 8-bit RGB, as a person sees it; so is its size.

    Raises: `_Refused`, `Image.DecompressionBombWarning` or `…Error` from the header of a file with
    more pixels, and whatever Pillow raises for one that is broken.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # over it a warning, over twice as much an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # these, malformed animations, odd metadata
        _refuse_truncated(data)
        with _open(data) as image:
            _refuse_frames(image)
            if image.format == "PNG":
                with _open(data) as whole:  # every chunk to the end, checksums included
                    whole.verify()
            seen, name = shown(image, []), _NAMES[str(image.format)]
            return {"format": name, "width": seen.width, "height": seen.height}, seen


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=tuple(_NAMES))


def _refuse_frames(image: Image.Image) -> None:
    """Refuse animations, and files of several pictures."""
    animated = getattr(image, "n_frames", 1) != 1 or getattr(image, "is_animated", False)
    apng = getattr(image, "custom_mimetype", None) == "image/apng" or "bbox" in image.info
    if animated or apng or image.format not in _NAMES:
        raise _Refused("it holds more than one picture, or an animation; one is wanted")


def _refuse_truncated(data: bytes) -> None:
    """Refuse what lacks its last bytes and is forgiven by decoders, which fill up with grey."""
    jpeg_ends = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # a thumbnail ends before a scan
    png_ends = b"IEND\xaeB`\x82" in data
    if not (jpeg_ends if data.startswith(b"\xff\xd8") else png_ends or data.startswith(b"RIFF")):
        raise _Refused("it is truncated: the end of the file is missing")


def _limit(memory_bytes: int, cpu_s: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),  # it has nothing to write but a pipe
    ):
        resource.setrlimit(kind, (limit, limit))


def main(what: str, max_pixels: int, memory_bytes: int, cpu_s: int) -> None:
    """Serve one file."""
    _limit(memory_bytes, cpu_s)
    pixels = b""
    try:
        facts, image = read_picture(sys.stdin.buffer.read(), max_pixels)
        if what == "pixels":
            pixels = image.tobytes()
    except _Refused as exc:
        facts = {"error": str(exc)}
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        facts = {"error": f"it has more than {words.count(max_pixels)} pixels"}
    except MemoryError:
        facts = {"error": f"it takes more than {words.size_in(memory_bytes, 'MiB', 0)} to decode"}
    except Exception as exc:  # a decoder's ways to fail are without number; all mean the same here
        why = re.sub(r"[^\x20-\x7e]+", " ", f"{type(exc).__name__}: {exc}")
        facts = {"error": f"it cannot be decoded: {why}"[:300]}
    sys.stdout.buffer.write(json.dumps(facts).encode() + b"\n" + pixels)


if __name__ == "__main__":
    main(sys.argv[1], *(int(word) for word in sys.argv[2:5]))
