"""Picture files of any kind → uint8 RGB, the way a person sees them; torch-free.

One way for init images, reference folders, stored images, the server, and the child process that
decodes strangers' files (which holds no numpy, so `shown` is Pillow alone). Orientation tags are
applied, 16-bit and floating-point values scaled, transparency laid on white, colour profiles
converted to sRGB. A plain ``convert("RGB")`` does none of these: a turned photo stays turned, 16
bits become white, and transparent parts show colours that nobody was meant to see.
"""

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageCms, ImageOps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WHITE = "white"
LAID = "transparent parts laid on {}"
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ORIENTATION = 0x0112
PIXEL_ART_PX = 128
"""Images up to this size are shown without loss, and larger with square pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Pixels [H, W, 3], and what was done to the file's own values, in words."""

    pixels: "NDArray[np.uint8]"
    done: tuple[str, ...] = ()


def decode_rgb(data: bytes) -> "NDArray[np.uint8]":
    """Decode an image file's bytes to uint8 RGB [H, W, 3]; of an animation, the first frame.

    Raises: OSError, ValueError where it is no picture.
    """
    return read_picture(data).pixels


def read_picture(
    data: bytes, formats: tuple[str, ...] | None = None, background: str = WHITE
) -> Picture:
    """Decode, and say what was done; `background` is a colour that Pillow knows.

    Raises: OSError, SyntaxError, ValueError where it is no picture; DecompressionBombError.
    """
    import numpy as np

    done: list[str] = []
    with Image.open(io.BytesIO(data), formats=formats) as opened:
        if is_animated(opened):
            done.append("only the first frame is taken")
        pixels = np.asarray(shown(opened, done, background))
        return Picture(pixels=pixels, done=tuple(done))


def shown(image: Image.Image, done: list[str], background: str = WHITE) -> Image.Image:
    """The 8-bit RGB image that a person sees; what was done is added to `done`.

    Raises: ValueError for floating-point values outside of [0, 1].
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
        done.append("turned as its orientation tag says")
    return _srgb(_opaque(_eight_bit(image, done), done, background), done)


def is_animated(image: Image.Image) -> bool:
    """Whether a file holds more than one frame."""
    return getattr(image, "n_frames", 1) > 1


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) in px as it is seen; from 5 on, an orientation swaps the sides."""
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION, 1) >= 5 else (width, height)


def webp_uri(image: Image.Image, **lossy: Any) -> str:
    """Data URI of an image; without loss unless `lossy` says how."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **(lossy or {"lossless": True, "quality": 50, "method": 3}))
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _eight_bit(image: Image.Image, done: list[str]) -> Image.Image:
    """Scale wide greys to 8 bits; Pillow itself cuts them at 255."""
    if image.mode in WIDE_MODES:
        done.append("16 bits scaled to 8")
        # Half a level more, as the conversion to whole numbers cuts.
        return image.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L")
    if image.mode != "F":
        return image
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 1.0:
        raise ValueError("floating-point values must lie between 0 and 1")
    done.append("values from 0 to 1 scaled to 8 bits")
    return Image.fromarray(np.rint(values * 255.0).astype(np.uint8))


def _opaque(image: Image.Image, done: list[str], background: str) -> Image.Image:
    """Lay what is transparent on a colour."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image
    profile = image.info.get("icc_profile")
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        flat = layer.convert("RGB")
    else:
        done.append(LAID.format(background))
        flat = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
        flat = flat.convert("RGB")
    if profile is not None:
        flat.info["icc_profile"] = profile
    return flat


def _srgb(image: Image.Image, done: list[str]) -> Image.Image:
    """Convert by the embedded colour profile, if it fits and is another than sRGB."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(own).strip()
        if "sRGB" in name:
            return image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        done.append("its colour profile cannot be read and was left out")
        return image.convert("RGB")
    done.append(f"colours converted from {name} to sRGB")
    assert converted is not None
    return converted
