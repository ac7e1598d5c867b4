"""Intervals clustered by prompt in closed form: what a verdict rests on.

Seeds of one prompt are not independent, so the prompt is the unit: every statistic is a ratio of
sums over prompts, and its error is that of its prompts' residuals, held against Student's t with
k - 1 degrees of freedom. Against the bootstraps (percentile, BCa, studentised) this was chosen by
measured coverage (docs/adr/0010-margins-and-intervals.md): as near to 95 % on every distribution
tried, no resampling noise, 2,000 times less work, and tails of any depth, which Holm's correction
needs and 2,000 resamples do not have.

Where values are skewed, Student's interval misses on the side of the long tail: a sample without
one of the rare large values has a mean and a spread that are both too small. So the ends are those
means that are t standard errors away *by the error that they would have*: the variance changes
with the mean by the third moment over the second, which holds exactly in every exponential family
(Morris 1982) and gives, but for a term of second order, Wilson's interval for single shares. A
sample's third moment says nothing sure where tails are heavy, so an end only moves away from the
mean, never nearer, except where all that tells lies on one side and the shape is known: rare
losses, shares near a bound.

The cores work on columns, so that thousands of repetitions are one call.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from sd35bench.stats.intervals import CONFIDENCE, Interval

FEW_TELLING = 2
"""Prompts that tell, below which a paired difference reaches as far as what was never seen."""
SAME_SIDE = 12
"""Prompts that tell, all to one side, where both are open: if one in five went to the other side,
chance would give this in 7 of 100 cases."""
_SAME = 1e-12

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Bounds:
    """A statistic's value and ends, each [m]: one per column."""

    value: Floats
    low: Floats
    high: Floats


def mean_t(
    values: ArrayLike, clusters: ArrayLike, *, bounds: tuple[float, float] | None = None
) -> Interval:
    """Return the mean over images of values [n], with an interval over their prompts [n].

    `bounds` are what a value can be at least and at most, where that is known. With fewer than two
    prompts there are no ends.
    """
    x = np.asarray(values, np.float64)
    sums, counts = _sums(x, clusters)
    if len(counts) < 2:
        return Interval(float(x.mean()), None, None, len(x), len(counts))
    found = mean_bounds(sums[:, None], counts, bounds=bounds)
    return _interval(found, len(x), len(counts))


def mean_bounds(
    sums: Floats, counts: Floats, *, bounds: tuple[float, float] | None = None
) -> Bounds:
    """Means of m columns from sums [k, m] and image counts [k] of at least two prompts.

    Where `bounds` are known, prompts that do not have the value of most are those that *tell*.
    Where none does, the ends are the exact ones for "never seen in k prompts".

    Source: Cochran 1977, "Sampling Techniques", section 6.3 (ratio estimator); Morris 1982,
    "Natural Exponential Families with Quadratic Variance Functions", section 3, for the change of
    the variance with the mean; Clopper and Pearson 1934 for what was never seen.
    """
    k = len(counts)
    value = sums.sum(axis=0) / counts.sum()
    error, skew = _errors(sums, counts, value), _skew(sums, counts, value)
    telling = None if bounds is None else _telling(sums / counts[:, None], bounds)
    t = student(k - 1 if telling is None else telling.degrees)
    inward = False if telling is None else telling.one_sided
    down, up = _reaches(t, skew, k, inward)
    low, high = value - down * error, value + up * error
    if bounds is None or telling is None:
        return Bounds(value, low, high)
    unseen = 1.0 - ((1.0 - CONFIDENCE) / 2) ** (1.0 / k)
    low = np.where(telling.few, np.minimum(low, value - (value - bounds[0]) * unseen), low)
    high = np.where(telling.few, np.maximum(high, value + (bounds[1] - value) * unseen), high)
    return Bounds(value, low.clip(*bounds), high.clip(*bounds))


def ratio_of_sums(above: ArrayLike, below: ArrayLike, clusters: ArrayLike) -> Interval:
    """Return the sum of `above` [n] over the sum of `below` [n], both positive and paired.

    The interval is made in the ratio's logarithm, so that swapped sides give its inverse.
    """
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    sums, _ = _sums(a, clusters)
    bases, _ = _sums(b, clusters)
    if len(sums) < 2:
        return Interval(float(a.sum() / b.sum()), None, None, len(a), len(sums))
    return _interval(ratio_bounds(sums[:, None], bases[:, None]), len(a), len(sums))


def ratio_bounds(above: Floats, below: Floats) -> Bounds:
    """Ratios of m columns' sums from at least two prompts' sums [k, m] of either side."""
    k, ratio = len(above), above.sum(axis=0) / below.sum(axis=0)
    error = _errors(above, below, ratio) / ratio
    down, up = _reaches(student(k - 1), _skew(above, below, ratio), k)
    return Bounds(ratio, ratio * np.exp(-down * error), ratio * np.exp(up * error))


def quantile_t(values: ArrayLike, clusters: ArrayLike, q: float) -> Interval:
    """Return the `q` quantile (0 < q < 1) over images [n], with an interval over prompts [n].

    An end that the sample is too small for is ``None``, and then so are both.
    """
    x = np.asarray(values, np.float64)
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    k = int(labels.max()) + 1
    value = float(np.quantile(x, q, method="hazen"))
    if k < 2:
        return Interval(value, None, None, len(x), k)
    found = quantile_bounds(x[:, None], labels, q)
    ends = (float(found.low[0]), float(found.high[0]))
    known = all(np.isfinite(ends))
    return Interval(value, *(ends if known else (None, None)), len(x), k)


def quantile_bounds(values: Floats, labels: NDArray[np.int64], q: float) -> Bounds:
    """Quantiles of m columns [n, m] by prompt labels [n], 0 to k - 1; unknown ends are infinite.

    The share below the quantile has an error over prompts; its ends, read off the sample's own
    quantiles, are the interval's.

    Source: Woodruff 1952, "Confidence Intervals for Medians and Other Position Measures".
    """
    ordered = np.sort(values, axis=0)
    value = read_quantile(ordered, np.full(values.shape[1], q))
    below = (values <= value).astype(np.float64)
    counts = np.bincount(labels).astype(np.float64)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, labels, below)
    half = student(len(counts) - 1) * _errors(sums, counts, below.mean(axis=0))
    return Bounds(value, read_quantile(ordered, q - half), read_quantile(ordered, q + half))


def read_quantile(ordered: Floats, q: ArrayLike) -> Floats:
    """Read quantiles q [m] off sorted columns [n, m]; outside of what n can tell, infinite.

    Hazen's rule: the i-th of n values is the (i - 1/2)/n quantile.
    """
    n, columns = ordered.shape
    position = np.asarray(q, np.float64) * n - 0.5
    below = np.clip(np.floor(position), 0, max(n - 2, 0)).astype(np.int64)
    weight = np.clip(position - below, 0.0, 1.0)
    column = np.arange(columns)
    above = np.minimum(below + 1, n - 1)
    read = ordered[below, column] * (1 - weight) + ordered[above, column] * weight
    return np.where(position < 0.0, -np.inf, np.where(position > n - 1.0, np.inf, read))


def student(degrees: float | Floats) -> Floats:
    """Student's t for a two-sided interval."""
    return special.stdtrit(degrees, 0.5 + CONFIDENCE / 2)


def _reaches(
    t: Floats, skew: Floats, k: int, inward: NDArray[np.bool_] | bool = False
) -> tuple[Floats, Floats]:
    """How many standard errors [m] the ends lie below and above a mean of k prompts.

    An end is nearer than `t` only where `inward`.
    """
    pull = t * t * skew / (2.0 * np.sqrt(k))
    reach = np.hypot(t, pull)
    down, up = reach - pull, reach + pull
    return np.where(inward, down, np.maximum(down, t)), np.where(inward, up, np.maximum(up, t))


def _errors(sums: Floats, counts: Floats, value: Floats) -> Floats:
    """Standard errors [m] of ratios `value` [m] of sums [k, m] to counts [k] or [k, m]."""
    k = len(counts)
    residuals = _residuals(sums, counts, value) / counts.mean(axis=0)
    return np.sqrt(np.square(residuals).sum(axis=0) / (k - 1) / k)


def _skew(sums: Floats, counts: Floats, value: Floats) -> Floats:
    """Skewness [m] of the prompts' residuals; 0 where there is no spread."""
    residuals = _residuals(sums, counts, value)
    squares = np.square(residuals)
    second, third = squares.mean(axis=0), (squares * residuals).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(second > 0.0, third / second**1.5, 0.0)


def _residuals(sums: Floats, counts: Floats, value: Floats) -> Floats:
    return sums - value * (counts if counts.ndim == 2 else counts[:, None])


@dataclass(frozen=True, slots=True)
class _Telling:
    """What the prompts that differ from most say of each column [m].

    `few`: too few to say how far the rest may be. `one_sided`: none can be on the other side, or
    so many are on one that chance did not put them there. `degrees` of freedom of their spread.
    """

    few: NDArray[np.bool_]
    one_sided: NDArray[np.bool_]
    degrees: Floats


def _telling(means: Floats, bounds: tuple[float, float]) -> _Telling:
    """Sort out columns of prompts' means [k, m].

    Where most prompts agree, a few of unlike sizes make an uncertain spread, whose degrees of
    freedom are twice its square over its variance (Satterthwaite 1946).
    """
    middle = np.median(means, axis=0)
    away = means - middle
    above, below = (away > _SAME).sum(axis=0), (away < -_SAME).sum(axis=0)
    number = above + below
    at_bound = (middle <= bounds[0] + _SAME) | (middle >= bounds[1] - _SAME)
    crowd = (np.minimum(above, below) == 0) & (number >= SAME_SIDE)
    squares = np.square(away)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.square(squares).sum(axis=0) / squares.sum(axis=0) ** 2 - 1.0 / number
        uncertain = (variance > _SAME) & (number < len(means) / 2)
        degrees = np.where(uncertain, 2.0 / variance, np.inf)
    return _Telling(
        few=number < np.where(at_bound, 1, FEW_TELLING),
        one_sided=at_bound | crowd,
        degrees=np.minimum(degrees, len(means) - 1.0),
    )


def _sums(values: Floats, clusters: ArrayLike) -> tuple[Floats, Floats]:
    labels = np.asarray(clusters)
    if not _are_dense(labels):
        labels = np.unique(labels, return_inverse=True)[1]
    sums = np.bincount(labels, weights=values).astype(np.float64)
    return sums, np.bincount(labels).astype(np.float64)


def _are_dense(labels: NDArray[Any]) -> bool:
    """Whether labels are 0 to k - 1, each there: what sorting them would give, 10 times as fast."""
    if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(labels):
        return False
    return bool(np.bincount(labels).all())


def _interval(found: Bounds, n: int, clusters: int) -> Interval:
    return Interval(float(found.value[0]), float(found.low[0]), float(found.high[0]), n, clusters)
