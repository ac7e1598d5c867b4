"""Kernel distances between two sets of features, unbiased: KID and CMMD, each with an interval.

``MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y)``. Unlike the Fréchet distance the estimate has no
bias that depends on n, if every pair in it is of two *independent* images. Seeds of one prompt are
not, and neither are an image and a true render of its own prompt. So only pairs of unlike prompts
enter the three means. Where the reference is the prompts' own renders, the estimate then is a
U-statistic over prompts, in which what the prompts share cancels; with one image a prompt and any
other reference it is the usual U-statistic over images. All images are used at once, which is the
limit of infinitely many subsets; a subset size gives the literature's mean over seeded subsets.

The interval resamples prompts (with their renders) in the statistic's first-order expansion.
Drawing the images themselves with replacement would put a copy beside its original as a "pair" and
add the bias that the statistic avoids. The expansion's spread is too wide rather than too narrow
near a distance of 0, where the second order rules (by at most sqrt(2), in the degenerate case).
A reference that is not the prompts' own is taken as it is. Cost: n·m kernel values, in blocks.

Sources: Gretton et al. 2012 (JMLR 13), equation 3; Bińkowski et al. 2018 (arXiv 1801.01401), KID;
Jayasumana et al. 2024 (arXiv 2401.09603), CMMD.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.intervals import RESAMPLES, Interval, percentile_bounds, resampled_means

__all__ = [
    "Distance",
    "Kernel",
    "Sample",
    "Subsets",
    "gaussian_kernel",
    "kernel_distance",
    "kernel_interval",
    "polynomial_kernel",
]

Matrix = NDArray[np.float64]
Kernel = Callable[[Matrix, Matrix], Matrix]
"""Kernel values [n, m] of rows [n, d] and [m, d]."""

_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Features [n, d] and the prompt of each row [n]; ``None`` where rows have no prompts."""

    features: NDArray
    prompts: NDArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subsets:
    """How to take a mean over subsets instead of all pairs at once: their size, number and seed."""

    size: int
    count: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Distance:
    """MMD², and what each prompt's weight adds to it: [k], sum 0, for a weight of 1 + change."""

    value: float
    slopes: Matrix


@dataclass(frozen=True, slots=True)
class _Side:
    """Rows with the number of their prompt and their weight; rows of one number form no pair."""

    x: Matrix
    labels: NDArray[np.int64]
    weights: Matrix

    def rows(self, chosen: NDArray) -> "_Side":
        return _Side(self.x[chosen], self.labels[chosen], self.weights[chosen])


def polynomial_kernel(a: Matrix, b: Matrix) -> Matrix:
    """KID's kernel ``(a·b / d + 1)³``."""
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def gaussian_kernel(sigma: float) -> Kernel:
    """Return ``exp(-|a - b|² / 2 sigma²)``."""

    def kernel(a: Matrix, b: Matrix) -> Matrix:
        squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * (a @ b.T)
        return np.exp(-np.maximum(squared, 0.0) / (2.0 * sigma**2))

    return kernel


def kernel_distance(
    images: Sample, reference: Sample, kernel: Kernel, subsets: Subsets | None = None
) -> Distance:
    """Unbiased MMD² of two samples, and its slope in each prompt's weight.

    Prompts are numbered in order of `np.unique`. A reference whose prompts include all of the
    images' is paired with them and weighted like them; any other one stands for itself.
    """
    mine, other, k, paired = _sides(images, reference)
    value, slopes = _expansion(mine, other, kernel, k, paired)
    if subsets is not None:
        value = _subset_mean(mine, other, kernel, subsets)
    return Distance(value, slopes)


def kernel_interval(
    images: Sample,
    reference: Sample,
    kernel: Kernel,
    *,
    subsets: Subsets | None = None,
    scale: float = 1.0,
    resamples: int = RESAMPLES,
) -> Interval:
    """MMD² times `scale`, with an interval over prompts; none with a single prompt.

    Values and intervals may be negative: an unbiased estimate of 0 is below it half the time.
    """
    n = len(images.features)
    found = kernel_distance(images, reference, kernel, subsets)
    value, k = scale * found.value, 1 if images.prompts is None else len(found.slopes)
    if images.prompts is None or len(np.unique(images.prompts)) < 2:
        return Interval(value, None, None, n, 1)
    slopes = scale * k * found.slopes[:, None]
    draws = value + resampled_means(slopes, np.ones(k), resamples=resamples)[:, 0]
    low, high = percentile_bounds(draws, k)
    return Interval(value, float(low), float(high), n, k)


def _sides(images: Sample, reference: Sample) -> tuple[_Side, _Side, int, bool]:
    """Number the prompts over both sides: the images' k first, then the reference's rows."""
    x, y = (np.asarray(s.features, np.float64) for s in (images, reference))
    known = None if images.prompts is None else np.unique(images.prompts)
    if known is None or len(known) < 2:  # one prompt: its images are the sample
        known, labels = np.arange(len(x)), np.arange(len(x))
        theirs = None
    else:
        labels = np.searchsorted(known, np.asarray(images.prompts))
        theirs = reference.prompts
    k = len(known)
    mine = _Side(x, labels, np.ones(len(x)))
    if theirs is not None and np.isin(known, theirs).all():
        kept = np.isin(theirs, known)
        numbers = np.searchsorted(known, np.asarray(theirs)[kept])
        share = np.bincount(labels, minlength=k) / np.bincount(numbers, minlength=k)
        return mine, _Side(y[kept], numbers, share[numbers]), k, True
    return mine, _Side(y, k + np.arange(len(y)), np.ones(len(y))), k, False


def _expansion(
    mine: _Side, other: _Side, kernel: Kernel, k: int, paired: bool
) -> tuple[float, Matrix]:
    xx, slopes_xx = _mean(mine, mine, kernel)
    yy, slopes_yy = _mean(other, other, kernel)
    xy, slopes_xy = _mean(mine, other, kernel)
    slopes = slopes_xx[:k] - 2.0 * slopes_xy[:k]
    if paired:
        slopes = slopes + slopes_yy[:k]
    return xx + yy - 2.0 * xy, slopes


def _mean(a: _Side, b: _Side, kernel: Kernel) -> tuple[float, Matrix]:
    """Weighted mean of the kernel over pairs of unlike number; its slope in each number's weight.

    The slope [numbers] counts both ends of a pair; those of a reference's own rows are not used.
    """
    numbers = int(max(a.labels.max(), b.labels.max())) + 1
    of_a = np.bincount(a.labels, weights=a.weights, minlength=numbers)
    of_b = np.bincount(b.labels, weights=b.weights, minlength=numbers)
    pairs_a, pairs_b = of_a * (of_b.sum() - of_b), of_b * (of_a.sum() - of_a)
    total = float(pairs_a.sum())
    rows, columns = np.empty(len(a.x)), np.zeros(len(b.x))
    step = max(1, _BLOCK_ELEMENTS // len(b.x))
    for start in range(0, len(a.x), step):
        part = slice(start, start + step)
        values = kernel(a.x[part], b.x)
        values[a.labels[part, None] == b.labels[None, :]] = 0.0
        rows[part] = values @ b.weights
        columns += a.weights[part] @ values
    sums_a = np.bincount(a.labels, weights=a.weights * rows, minlength=numbers)
    sums_b = np.bincount(b.labels, weights=b.weights * columns, minlength=numbers)
    value = float(sums_a.sum()) / total
    return value, (sums_a + sums_b - value * (pairs_a + pairs_b)) / total


def _subset_mean(mine: _Side, other: _Side, kernel: Kernel, subsets: Subsets) -> float:
    rng = np.random.default_rng(subsets.seed)
    found = []
    for _ in range(subsets.count):
        a, b = (
            side.rows(rng.choice(len(side.x), min(subsets.size, len(side.x)), replace=False))
            for side in (mine, other)
        )
        found.append(_mean(a, a, kernel)[0] + _mean(b, b, kernel)[0] - 2 * _mean(a, b, kernel)[0])
    return float(np.mean(found))
