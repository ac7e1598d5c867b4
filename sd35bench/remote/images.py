"""Images that strangers made: what they are, from their bytes, without harm from decoding them.

Decoding runs in a child process that dies with its limits (`image_decoder`). Why not here: a cap
on the pixels bounds what a picture takes once decoded, and neither the time of decoding it nor what
a hole in a C decoder may do. A JPEG of 0.66 MB with 20,000 progressive scans of 4096 x 4096 px was
not done after 120 s, in C code that no thread can be stopped in. The child has a cap on its CPU
seconds and its address space, may not write files, and sees nothing of the parent's environment,
where the key may be.

Cost, on one core of a 2-core CPU machine with Pillow 13: 70 to 90 ms a file for the child (30 more
since it converts colour profiles), beside 12 to 47 ms for decoding 1024 x 1024 px; no timing of
ours contains it. Address space at the largest size allowed, 4096 x 4096 px: 187 MiB (PNG, JPEG),
224 (progressive CMYK), 282 (PNG with 62 text chunks of 1 MiB that come as 1 kB each), 294 (WEBP),
under 400 (a transparent PNG that is turned and has a profile), so 768 are allowed: that leaves room
for a file of 64 MiB three times over.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35bench import words
from sd35bench.errors import InvalidImage, RemoteError

MAX_PIXELS = 4096 * 4096
_MEMORY_BYTES = 768 * 2**20
_CPU_S = 10
_WALL_S = 60.0
"""A machine may be busy: the CPU seconds are the limit, this ends what waits for nothing."""
_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")


class BadImage(InvalidImage, RemoteError):
    """Bytes from elsewhere that are no single image within the limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """What an image file is, by its bytes: `format` is png, jpg or webp; the size is in px."""

    format: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """The format that a file's first bytes announce: png, jpg, webp or none of them."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Say what an image file is, having decoded all of it; blocks for about 0.1 s.

    Raises: BadImage for another format, more pixels, more than one picture, a truncated or broken
    file, one that takes too much memory or time.
    """
    facts, _ = _decode(data, "facts", max_pixels)
    return facts


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file to uint8 RGB [H, W, 3], as the store does.

    Raises: BadImage, as `check_image`.
    """
    facts, pixels = _decode(data, "pixels", MAX_PIXELS)
    shape = (facts.height, facts.width, 3)
    if len(pixels) != facts.height * facts.width * 3:
        raise BadImage(f"the image decoder gave {len(pixels)} bytes for {shape}")
    return np.frombuffer(pixels, np.uint8).reshape(shape).copy()


def _decode(data: bytes, what: str, max_pixels: int) -> tuple[ImageFacts, bytes]:
    if sniff(data) is None:
        raise BadImage(f"no PNG, JPEG or WEBP file: it begins with {data[:16]!a}")
    command = [sys.executable, "-P", "-m", "sd35bench.remote.image_decoder"]
    try:
        child = subprocess.run(
            [*command, what, str(max_pixels), str(_MEMORY_BYTES), str(_CPU_S)],
            input=data,
            capture_output=True,
            timeout=_WALL_S,
            check=False,
            start_new_session=True,  # a Ctrl-C is the parent's; the image is no worse for it
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
    except subprocess.TimeoutExpired as exc:
        raise BadImage(f"the image was not decoded within {_WALL_S:g} s") from exc
    except OSError as exc:
        raise RemoteError(f"the image decoder cannot be started: {exc}") from exc
    line, _, pixels = child.stdout.partition(b"\n")
    if child.returncode != 0 or not line:
        raise BadImage(
            f"the image decoder ended with code {child.returncode}: the image takes more than"
            f" {_CPU_S} s of CPU or {words.size_in(_MEMORY_BYTES, 'MiB', 0)}, or breaks the decoder"
        )
    return _facts(json.loads(line)), pixels


def _facts(said: dict[str, Any]) -> ImageFacts:
    if "error" in said:
        raise BadImage(f"the image is refused: {said['error']}")
    return ImageFacts(format=said["format"], width=said["width"], height=said["height"])
