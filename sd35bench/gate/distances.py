"""How far the images of two sides are from each other, where the gate judges drift.

The drift that `score` keeps is between backends of one study; a gate holds one study's images
against another's, or against a baseline's. Files with the same digest are the same image and are
not opened.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd35bench.gate.sides import Matched, Side
from sd35bench.pictures import decode_rgb

FindImage = Callable[[str], Path | None]
"""Path of an image by its digest; ``None`` where it is not there."""


class ImageDistances:
    """Differences of matched images in levels of 255; each pair is opened once."""

    def __init__(self, baseline: FindImage, candidate: FindImage) -> None:
        """Where either side's images are found."""
        self._find = (baseline, candidate)
        self._known: dict[tuple[str, str], NDArray[np.float64]] = {}

    def __call__(
        self, baseline: Side, candidate: Side, matched: Matched
    ) -> NDArray[np.float64] | str:
        """Distances [n, 4] of matched images, or why they cannot be measured.

        The mean absolute difference, and the mean signed one of red, green and blue.

        One missing file refuses them all: the identical ones alone would make drift look small.
        """
        digests = [
            (str(baseline.images[i]), str(candidate.images[j]))
            for i, j in zip(matched.baseline, matched.candidate, strict=True)
        ]
        unlike = [d for d in dict.fromkeys(digests) if d[0] != d[1]]
        for find, name, side in zip(self._find, ("baseline", "candidate"), (0, 1), strict=True):
            missing = sum(find(pair[side]) is None for pair in unlike)
            if missing:
                return (
                    f"{missing} of {len(digests)} images of the {name} differ and are not there;"
                    " keep its study, or make the baseline with --images"
                )
        return np.array([self._distance(*pair) for pair in digests], np.float64).reshape(-1, 4)

    def _distance(self, mine: str, theirs: str) -> NDArray[np.float64]:
        if mine == theirs:
            return np.zeros(4)
        if (mine, theirs) not in self._known:
            paths = [find(digest) for find, digest in zip(self._find, (mine, theirs), strict=True)]
            a, b = (decode_rgb(path.read_bytes()) for path in paths if path is not None)
            self._known[mine, theirs] = image_difference(a, b)
        return self._known[mine, theirs]


def image_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far an image `b` [h, w, 3] is from `a`, [4] in levels of 255.

    The mean absolute difference, and the mean signed one (b minus a) of red, green and blue. NaN
    for images of unlike sizes, which are no pair.
    """
    if a.shape != b.shape:
        return np.full(4, np.nan)
    change = np.subtract(b, a, dtype=np.int16)
    means = change.mean(axis=(0, 1), dtype=np.float64)
    return np.array([np.abs(change).mean(dtype=np.float64), *means])
