"""Sharpness and contrast of an image by itself: descriptions, not qualities.

Both are of luma ``Y = 0.299 R + 0.587 G + 0.114 B`` in levels of 255, gamma-encoded as the file is.
Sharpness is the variance of its Laplacian (the 4-neighbour kernel [0 1 0; 1 -4 1; 0 1 0], without
the outermost pixels) in squared levels: noise raises it as much as detail does. Contrast is the
standard deviation of Y / 255. They say *that* something changed (a decoder that blurs, guidance
that burns), compare images of one size only, and are not ranked.

Sources: Pech-Pacheco et al. 2000 (variance of the Laplacian); Peli 1990 (RMS contrast); ITU-R
BT.601 (luma).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sd35bench.errors import ConfigError
from sd35bench.metrics.base import Image, ImageMetric, Value, require_uint8_rgb
from sd35bench.types import Record

_WEIGHTS = np.array([0.299, 0.587, 0.114])


class LumaMetric(ImageMetric):
    """Sharpness or contrast of each image."""

    remedy = "it describes any image of trained weights"

    def __init__(self, name: str, measure: Callable[[Image], float | None]) -> None:
        self.name = name
        self._measure = measure

    def score_images(
        self, images: Sequence[Image], records: Sequence[Record], inits: Sequence[Image | None]
    ) -> list[Value]:
        """One value per image; ``None`` for one too small to have a Laplacian."""
        found = (self._measure(image) for image in images)
        return [Value(v, {} if v is not None else {"reason": "below 3 pixels"}) for v in found]


def load(name: str) -> LumaMetric:
    """Load `sharpness` or `contrast`; they have no options. Raises: ConfigError for another."""
    known: dict[str, Callable[[Image], float | None]]
    known = {"sharpness": sharpness, "contrast": contrast}
    if name not in known:
        raise ConfigError(f"metric={name!r} is unknown; did you mean {name.split('_')[0]}?")
    return LumaMetric(name, known[name])


def luma(image: Image) -> NDArray[np.float64]:
    """Luma [H, W] in levels of 255. Raises: MetricError for anything but uint8 RGB."""
    require_uint8_rgb([image])
    return image.astype(np.float64) @ _WEIGHTS


def sharpness(image: Image) -> float | None:
    """Variance of the Laplacian of luma, in squared levels; ``None`` below 3 pixels a side."""
    y = luma(image)
    if min(y.shape) < 3:
        return None
    middle = y[1:-1, 1:-1]
    return float((y[:-2, 1:-1] + y[2:, 1:-1] + y[1:-1, :-2] + y[1:-1, 2:] - 4.0 * middle).var())


def contrast(image: Image) -> float:
    """Standard deviation of luma over 255, in [0, 0.5]."""
    return float(luma(image).std() / 255.0)
