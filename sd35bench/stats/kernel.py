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

Which of two sets is nearer to the reference (`kernel_difference`): both sides show the same prompts
with the same seeds. The candidate's MMD² minus the baseline's is *one* U-statistic over prompts:
the mean over pairs of unlike prompts i, j of

    h(i, j) = k(b_i, b_j) - k(a_i, a_j) - k(b_i, y_j) - k(y_i, b_j) + k(a_i, y_j) + k(y_i, a_j)

with the images a of the baseline, b of the candidate and y of the reference; the reference's own
term falls out. What a prompt's images have in common cancels, and with no pair inside a prompt the
value has no bias at any n. Where the reference is the prompts' own renders they are resampled with
the prompt; any other reference is taken as it is, and y_j is all of it.

The delete-one jackknife over prompts gives the variance J, in which the statistic's second order is
counted twice (Efron and Stein 1981). Near the reference, and where the sides are alike, the second
order is most of it, and the interval would be a quarter too wide or more. So one such part,
``Q = 2 Σ (h - h̄)² / (k (k - 1))²``, is taken away; what is left is unbiased, and held at Q/2 or
more. The interval is Student's t with k - 1 degrees of freedom; docs/validity.md has its coverage.

Cost: six kernel values for each pair of images, in blocks.

Sources: Gretton et al. 2012 (JMLR 13), equation 3; Bińkowski et al. 2018 (arXiv 1801.01401), KID;
Jayasumana et al. 2024 (arXiv 2401.09603), CMMD; Bounliphone et al. 2016 (arXiv 1511.04581), two
distances from one reference; Sutherland and Deka 2019 (arXiv 1906.02104), the second order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import student
from sd35bench.stats.intervals import RESAMPLES, Interval, percentile_bounds, resampled_means

Matrix = NDArray[np.float64]
Kernel = Callable[[Matrix, Matrix], Matrix]
"""Kernel values [n, m] of rows [n, d] and [m, d]."""

_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Features [n, d] and the prompt of each row [n]; ``None`` where rows have no prompts."""

    features: NDArray
    prompts: NDArray | None = None

    def of_prompts(self, known: NDArray) -> tuple[Matrix, NDArray[np.int64]] | None:
        """Rows of these prompts (sorted) with their numbers; ``None`` where it lacks one."""
        if self.prompts is None or not np.isin(known, self.prompts).all():
            return None
        kept = np.isin(self.prompts, known)
        numbers = np.searchsorted(known, np.asarray(self.prompts)[kept])
        return np.asarray(self.features, np.float64)[kept], numbers


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


@dataclass(frozen=True, slots=True)
class Twins:
    """Features [n, d] of both sides, row by row of the same prompt [n] and seed."""

    baseline: NDArray
    candidate: NDArray
    prompts: NDArray


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Rows [n, d] in the order of their prompts, and where each prompt's rows begin: [k]."""

    x: Matrix
    starts: NDArray[np.int64]

    def part(self, first: int, last: int) -> "_Grouped":
        """The rows of prompts first to last - 1."""
        ends = np.append(self.starts, len(self.x))
        chosen = slice(ends[first], ends[last])
        return _Grouped(self.x[chosen], self.starts[first:last] - self.starts[first])


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of h, summed over images: by prompt [k], squared, and times the number of image pairs."""

    by_prompt: Matrix
    squares: float
    products: float


def kernel_difference(
    twins: Twins, reference: Sample, kernel: Kernel, *, scale: float = 1.0
) -> Interval:
    """MMD² of the candidate minus that of the baseline, times `scale`, with a paired interval.

    A reference whose prompts include all of the images' is paired with them; any other one stands
    for itself. With fewer than 3 prompts there are no ends.
    """
    known, labels = np.unique(np.asarray(twins.prompts), return_inverse=True)
    a, b = (_group(x, labels)[0] for x in (twins.baseline, twins.candidate))
    counts, k = np.bincount(labels).astype(np.float64), len(known)
    renders = _renders(reference, known, counts)
    if renders is None:
        found = _sums(_foreign_rows(a, b, reference, kernel, counts), counts)
    else:
        found = _sums(_paired_rows(a, b, renders, kernel), counts)
    total = counts.sum() ** 2 - np.square(counts).sum()
    value = float(found.by_prompt.sum() / total)
    if k < 3:
        return Interval(scale * value, None, None, len(labels), k)
    half = float(student(k - 1) * np.sqrt(_variance(found, counts, value, total)))
    ends = (scale * (value - half), scale * (value + half))
    return Interval(scale * value, *ends, len(labels), k)


def _variance(found: _Sums, counts: Matrix, value: float, total: float) -> float:
    """Unbiased variance of the difference over prompts, at least half of its second order."""
    k = len(counts)
    slopes = 2.0 * (found.by_prompt - value * counts * (counts.sum() - counts)) / total
    jackknife = float(np.square(slopes).sum()) * k / (k - 1)
    pairs = np.square(counts).sum() ** 2 - (counts**4).sum()  # Σ over i ≠ j of (n_i n_j)²
    spread = found.squares - 2.0 * value * found.products + value**2 * pairs
    second = 2.0 * max(0.0, float(spread)) / total**2
    return max(jackknife - second, second / 2.0)


def _sums(rows: Iterator[tuple[int, Matrix]], counts: Matrix) -> _Sums:
    """Reduce blocks of rows of h [prompts, k]; a prompt with itself is no pair."""
    by_prompt = np.empty(len(counts))
    squares = products = 0.0
    for first, block in rows:
        own = np.arange(len(block))
        block[own, first + own] = 0.0
        here = slice(first, first + len(block))
        by_prompt[here] = block.sum(axis=1)
        squares += float(np.square(block).sum())
        products += float(counts[here] @ block @ counts)
    return _Sums(by_prompt, squares, products)


def _paired_rows(
    a: _Grouped, b: _Grouped, renders: tuple[_Grouped, Matrix], kernel: Kernel
) -> Iterator[tuple[int, Matrix]]:
    """Rows of h where each prompt has renders of its own, weighted like its images."""
    y, weights = renders
    for first, last in _blocks(a, len(a.x) + len(y.x)):
        mine, theirs, own = (g.part(first, last) for g in (a, b, y))
        ends = np.append(y.starts, len(y.x))
        share = weights[ends[first] : ends[last]]
        there = kernel(theirs.x, y.x) - kernel(mine.x, y.x)
        back = kernel(own.x, b.x) - kernel(own.x, a.x)
        yield (
            first,
            _reduce(kernel(theirs.x, b.x) - kernel(mine.x, a.x), mine.starts, a.starts)
            - _reduce(there * weights, mine.starts, y.starts)
            - _reduce(back * share[:, None], own.starts, a.starts),
        )


def _foreign_rows(
    a: _Grouped, b: _Grouped, reference: Sample, kernel: Kernel, counts: Matrix
) -> Iterator[tuple[int, Matrix]]:
    """Rows of h where the reference is not the prompts' own."""
    y = np.asarray(reference.features, np.float64)
    nearer = np.empty(len(a.x))
    step = max(1, _BLOCK_ELEMENTS // len(y))
    for start in range(0, len(a.x), step):
        part = slice(start, start + step)
        nearer[part] = (kernel(b.x[part], y) - kernel(a.x[part], y)).mean(axis=1)
    by_prompt = np.add.reduceat(nearer, a.starts)
    for first, last in _blocks(a, len(a.x)):
        mine, theirs = (g.part(first, last) for g in (a, b))
        within = _reduce(kernel(theirs.x, b.x) - kernel(mine.x, a.x), mine.starts, a.starts)
        here = slice(first, last)
        yield (
            first,
            within - np.outer(by_prompt[here], counts) - np.outer(counts[here], by_prompt),
        )


def _renders(reference: Sample, known: NDArray, counts: Matrix) -> tuple[_Grouped, Matrix] | None:
    """The reference's rows of these prompts with their weights [m]; ``None`` if it lacks one."""
    own = reference.of_prompts(known)
    if own is None:
        return None
    rows, labels = own
    grouped, order = _group(rows, labels)
    return grouped, (counts / np.bincount(labels))[labels[order]]


def _group(x: NDArray, labels: NDArray[np.int64]) -> tuple[_Grouped, NDArray[np.int64]]:
    """Put rows in the order of their prompts' numbers; the order [n] too."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    return _Grouped(np.asarray(x, np.float64)[order], np.cumsum(counts) - counts), order


def _blocks(a: _Grouped, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of prompts whose rows times `width` are of bounded size."""
    ends = np.append(a.starts, len(a.x))
    most, first = max(1, _BLOCK_ELEMENTS // width), 0
    while first < len(a.starts):
        last = int(np.searchsorted(ends, ends[first] + most, side="right")) - 1
        last = min(max(last, first + 1), len(a.starts))
        yield first, last
        first = last


def _reduce(values: Matrix, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Matrix:
    """Sums of an image-by-image table over the prompts of its rows and of its columns."""
    return np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
