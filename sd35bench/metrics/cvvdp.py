"""ColorVideoVDP: how different two images look, in JOD (10: alike; 1 less: 75 % of viewers see it).

The authors' package `cvvdp` (module `pycvvdp`) does the work, where it is installed; its viewer is
that of a 4K monitor, "standard_4k".

Source: Mantiuk, Hanji, Ashraf, Asano and Chapiro 2024, "ColorVideoVDP: A visual difference
predictor for image, video and display distortions" (ACM TOG 43(4)); github.com/gfxdisp.
"""

import importlib
import importlib.metadata
import importlib.util
from functools import cached_property
from typing import Any

from sd35bench.errors import MetricError
from sd35bench.metrics.base import Image, require_uint8_rgb

DISPLAY = "standard_4k"


class Cvvdp:
    """The predictor for one display; loaded with the first pair of images."""

    @property
    def version(self) -> str:
        """The package's version, which a score depends on."""
        try:
            return importlib.metadata.version("cvvdp")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    def __call__(self, image: Image, reference: Image) -> float:
        """JOD of two uint8 RGB images of one size, 10 for equal ones. Raises: MetricError."""
        require_uint8_rgb([image, reference])
        if image.shape != reference.shape:
            raise MetricError("ColorVideoVDP needs images of one size")
        return float(self._predictor.predict(image, reference, dim_order="HWC")[0])

    @cached_property
    def _predictor(self) -> Any:
        return importlib.import_module("pycvvdp").cvvdp(display_name=DISPLAY, quiet=True)


def find_cvvdp() -> Cvvdp | None:
    """The predictor, where its package is installed."""
    return None if importlib.util.find_spec("pycvvdp") is None else Cvvdp()
