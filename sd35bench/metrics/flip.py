"""LDR-FLIP: how different two images look to someone who flips between them, from 0 to 1.

NVIDIA's own implementation (the package `flip-evaluator`) does the work: contrast-sensitivity
filtering in YCxCz, HyAB distance in Hunt-adjusted L*a*b*, edge and point detection, and the final
exponent. No weights. Images smaller than the filters (about 35 pixels at 67 pixels per degree) are
continued by their border pixels.

The mean is taken here, in double precision: the library (1.7) adds up a million single-precision
errors one by one and gives 0.954 instead of 0.967 for black against white at 1024 x 1024.

Source: Andersson, Nilsson, Akenine-Moller, Oskarsson, Astrom and Fairchild 2020, "FLIP: A
Difference Evaluator for Alternating Images" (ACM CGIT 3(2)); github.com/NVlabs/flip.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.errors import MetricError
from sd35bench.metrics.base import Image, require_uint8_rgb

PIXELS_PER_DEGREE = 67.0
"""The paper's viewer: 0.7 m from a screen 0.7 m and 3840 pixels wide."""


def flip(image: Image, reference: Image, *, pixels_per_degree: float = PIXELS_PER_DEGREE) -> float:
    """Return the mean of `flip_map`: 0 for identical images, at most 1."""
    errors = flip_map(image, reference, pixels_per_degree=pixels_per_degree)
    return float(errors.mean(dtype=np.float64))


def flip_map(
    image: Image, reference: Image, *, pixels_per_degree: float = PIXELS_PER_DEGREE
) -> NDArray[np.float32]:
    """Return the error of each pixel, in [0, 1]: [H, W]; the two images may be swapped.

    Images are uint8 sRGB [H, W, 3]; more `pixels_per_degree` of visual angle (> 0) mean a viewer
    further away, who sees less.

    Raises: MetricError for images that are not uint8 RGB or of unlike sizes.
    """
    require_uint8_rgb([image, reference])
    if image.shape != reference.shape:
        raise MetricError(
            f"FLIP needs images of one size, got {list(image.shape)} and {list(reference.shape)}"
        )
    if not pixels_per_degree > 0:
        raise MetricError(f"pixels_per_degree={pixels_per_degree} must be greater than 0")
    import flip_evaluator  # ends the process on input that is refused above

    parameters: dict[str, Any] = {"ppd": float(pixels_per_degree)}
    test, truth = (np.ascontiguousarray(x, np.float32) / 255 for x in (image, reference))
    errors, _, _ = flip_evaluator.evaluate(
        truth, test, "LDR", applyMagma=False, computeMeanError=False, parameters=parameters
    )
    return np.clip(errors[:, :, 0], 0.0, 1.0)
