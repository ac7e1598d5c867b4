"""Which of two sets is nearer to a reference by a kernel distance: KID and CMMD, paired.

Both sides show the same prompts with the same seeds. The candidate's MMD² minus the baseline's is
*one* U-statistic over prompts: the mean over pairs of unlike prompts i, j of

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

Sources: Gretton et al. 2012 (JMLR 13), equation 3; Bounliphone et al. 2016 (arXiv 1511.04581), two
distances from one reference; Sutherland and Deka 2019 (arXiv 1906.02104), the second order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import student
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel_distance import Kernel, Sample

__all__ = ["Twins", "kernel_difference"]

Matrix = NDArray[np.float64]

_BLOCK_ELEMENTS = 4_000_000


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
    if reference.prompts is None or not np.isin(known, reference.prompts).all():
        return None
    kept = np.isin(reference.prompts, known)
    labels = np.searchsorted(known, np.asarray(reference.prompts)[kept])
    grouped, order = _group(np.asarray(reference.features)[kept], labels)
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
