"""Latency: medians and their ratios of few images, drift within a run, verdicts over starts.

Images of one process follow each other, and so do their times: a busy minute slows a dozen of
them. What one process gives is still not what the next one gives: two runs of the same code, hours
apart, were 15 and 23 % apart (docs/log.md, 2026-11-23), several times what their intervals said.

What is shown of a setting (`latency_interval`, `speed_interval`): over two or more process starts
Student's t over the starts' centres; within one start Student's t over its images, in the
logarithm, widened by what neighbours have in common. The centre is a mean without the fastest and
slowest fifth (Tukey and McLaughlin 1963), which a slow image now and then does not move. How alike
neighbours are cannot be seen in a few images, so they are taken to be as alike as the most alike
ones of a real study. Fewer than 4 images have no interval: it would hold on average only, being
far too wide or, where two times happen to agree, nothing at all. Coverage at n = 2 … 32:
docs/validity.md, `python -m tests.validity latencies`.

What a gate judges (`log_ratio`, `run_drift`): starts of both sides that follow each other make a
*couple*, which shares the machine's state; the interval is Student's t over the couples' log
ratios. One couple has no spread of its own and gets the one that a policy knows. Within a start
errors come from moving blocks of consecutive images (Künsch 1989), whose bootstrap variance is
known in closed form. Their length follows from the correlation of neighbours, so that there are 8
to 16 blocks. Where neighbours are so much alike that n images are worth too few unrelated ones, an
interval would be a guess, and none is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sd35bench.stats.clustered import mean_bounds, read_quantile, student
from sd35bench.stats.intervals import Interval

LEAST_IMAGES = 4
"""Images below which a latency has no interval."""
LEAST_FOR_MEAN = 64
"""Images below which a mean has none: one image in 20 that takes three times as long moves it by
10 %, and is missing in 66 % of samples of 8 and in 4 % of 64."""
LEAST_COUPLES = 3
"""Couples of starts from which on their own spread is used, and not that of either side's."""
_TRIM, _LEAST_TO_TRIM = 5, 8
"""One in so many images is left out at either end, from so many images on."""
_LARGEST_SEEN = 0.66
"""Correlation of neighbours in the most alike series of a real study (0.30 to 0.66)."""
_LEAST_FOR_LIKENESS, _LIKENESS_ERRORS = 16, 2.5
_LEAST_FOR_BLOCKS = 128
LEAST_SHARE = 0.25
"""A start with a smaller share of the largest one's images is no unit of its own."""

_MEDIAN, _LEAST_FOR_REACH = 0.5, 6
LEAST_FOR_DRIFT = 16
"""Images of one start, below which its drift is not asked for."""
_LARGEST_CORRELATION = 0.97
_BLOCK_FACTOR = 3.0
"""The rule's block length times this: measured, it under-covers by 2 points without (ADR 0010)."""
_FEWEST_BLOCKS, _MOST_BLOCKS = 8, 16
"""More blocks would be too short for what lasts longer than neighbours tell (busy spells)."""
_LEAST_WORTH, _LEAST_BEYOND = 16.0, 5.0
"""Unrelated images that related ones must be worth: in all, and beyond the quantile."""
_NOTABLE_CHANGE = 0.02
_FAR = 5.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviation of a log ratio between runs, and the degrees of freedom behind it.

    So many degrees as to be none means that it is taken as known.
    """

    sd: float
    degrees: int = 10_000


@dataclass(frozen=True, slots=True)
class RunDrift:
    """Relative change of the latency from a start's first image to its last.

    `drifting`: the interval excludes 0 and the change is more than 2 %.
    """

    change: Interval

    @property
    def drifting(self) -> bool:
        """Whether the machine or the backend became slower or faster while it was timed."""
        low, high = self.change.low, self.change.high
        if low is None or high is None or abs(self.change.value) <= _NOTABLE_CHANGE:
            return False
        return low > 0.0 or high < 0.0


@dataclass(frozen=True, slots=True)
class Centres:
    """Centres of m samples [m], how far their 95 % intervals reach [m], and Student's degrees."""

    value: Floats
    half: Floats
    degrees: int


def latency_interval(starts: Sequence[ArrayLike]) -> Interval:
    """Return the median of latencies; `clusters` counts the process starts that it is over.

    Args:
        starts: seconds of each process start, in the order of time; at least one value in all.

    With one start the interval is that of the start's own median: what the next start gives may lie
    outside.
    """
    kept = [x for x in (np.asarray(s, np.float64) for s in starts) if len(x)]
    pooled = np.concatenate(kept)
    value, n = float(np.median(pooled)), len(pooled)
    counted = counted_starts(kept)
    if n < LEAST_IMAGES:
        return Interval(value, None, None, n, len(counted))
    if len(counted) == 1 and n >= _LEAST_FOR_BLOCKS:
        found = block_quantile(pooled, _MEDIAN)
        if found.low is not None and found.high is not None:
            return Interval(value, min(found.low, value), max(found.high, value), n, 1)
    # Parts of a hosted call may be 0 or, as what is left of it, less.
    logs = float(pooled.min()) > 0.0
    found = centres([(np.log(x) if logs else x)[:, None] for x in counted])
    ends = [float((found.value + side * found.half)[0]) for side in (-1, 1)]
    low, high = (float(np.exp(end)) if logs else end for end in ends)
    if not logs and pooled.min() >= 0.0:
        low = max(low, 0.0)
    return Interval(value, min(low, value), max(high, value), n, len(counted))


def mean_latency(starts: Sequence[ArrayLike]) -> Interval:
    """Return the mean of latencies, with an interval from `LEAST_FOR_MEAN` images on.

    Args:
        starts: seconds of each process start, in the order of time; at least one value in all.
    """
    kept = [x for x in (np.asarray(s, np.float64) for s in starts) if len(x)]
    pooled = np.concatenate(kept)
    value, n, counted = float(pooled.mean()), len(pooled), counted_starts(kept)
    if n < LEAST_FOR_MEAN:
        return Interval(value, None, None, n, len(counted))
    found = mean_bounds(pooled[:, None], np.ones(n))
    wider = float(np.sqrt(_worth(likeness(pooled[:, None]))[0]))
    down, up = (wider * float(end[0]) for end in (value - found.low, found.high - value))
    if len(counted) > 1:
        means = np.array([x.mean() for x in counted])
        half = float(_from_spread(means.std(ddof=1) / np.sqrt(len(means)), len(means) - 1))
        down, up = max(down, half), max(up, half)
    return Interval(value, value - down, value + up, n, len(counted))


def counted_starts(starts: Sequence[Floats]) -> list[Floats]:
    """The starts that are units of their own; all images as one, where only one start is."""
    least = LEAST_SHARE * max(map(len, starts))
    counted = [x for x in starts if len(x) >= least]
    return counted if len(counted) > 1 else [np.concatenate(list(starts))]


def centres(starts: Sequence[Floats]) -> Centres:
    """Centres of m columns from the values of each start [n_i, m], in the order of time.

    Over several starts the half is that of the starts' spread, and no less than that of the images
    within them: two starts may agree by chance. One start has its images alone.
    """
    if len(starts) == 1:
        return _of_one_start(starts[0])
    found = [_trimmed(x) for x in starts]
    each = np.stack([start.value for start in found])
    between = _from_spread(each.std(axis=0, ddof=1) / np.sqrt(len(each)), len(each) - 1)
    return Centres(each.mean(axis=0), np.maximum(between, _within(found)), len(each) - 1)


def speed_centres(
    above: Sequence[Floats], below: Sequence[Floats], couples: Sequence[tuple[int, int]]
) -> Centres:
    """How much larger m columns of `above` are than `below`, both by process start [n_i, m].

    Couples of starts are compared one by one where there are three or more; else all starts of one
    side with all of the other, with one spread for both (Student 1908). One start on either side
    has no spread, and only what is within them.
    """
    found = [[_trimmed(x) for x in side] for side in (above, below)]
    if len(above) == len(below) == 1:
        one, other = (_of_one_start(side[0]) for side in (above, below))
        degrees = min(one.degrees, other.degrees)
        return Centres(one.value - other.value, np.hypot(one.half, other.half), degrees)
    tops, bottoms = (np.stack([start.value for start in side]) for side in found)
    if len(couples) >= LEAST_COUPLES:
        ratios = np.stack([tops[i] - bottoms[j] for i, j in couples])
        degrees, error = len(ratios) - 1, ratios.std(axis=0, ddof=1) / np.sqrt(len(ratios))
        value = ratios.mean(axis=0)
    else:
        value, degrees = tops.mean(axis=0) - bottoms.mean(axis=0), len(tops) + len(bottoms) - 2
        power = sum(np.square(c - c.mean(axis=0)).sum(axis=0) for c in (tops, bottoms))
        error = np.sqrt(power / degrees * (1 / len(tops) + 1 / len(bottoms)))
    within = np.hypot(*(_within(side) for side in found))
    return Centres(value, np.maximum(_from_spread(error, degrees), within), degrees)


def likeness(series: Floats) -> Floats:
    """Correlation of neighbours [m] that series [n, m] are taken to have.

    2.5 standard errors above what is seen, but no more than a real study's largest one, unless
    more is seen. Below 16 values nothing is seen.

    Source: Kendall 1954 for the estimate's bias.
    """
    n, centred = len(series), series - series.mean(axis=0)
    power = np.square(centred).sum(axis=0)
    if n < _LEAST_FOR_LIKENESS:
        return np.full(power.shape, _LARGEST_SEEN)
    found = (centred[1:] * centred[:-1]).sum(axis=0) / np.where(power > 0.0, power, 1.0)
    found = found + (1.0 + 4.0 * found) / n
    careful = np.minimum(found + _LIKENESS_ERRORS / np.sqrt(n), _LARGEST_SEEN)
    return np.clip(np.maximum(found, careful), 0.0, _LARGEST_CORRELATION)


@dataclass(frozen=True, slots=True)
class _Trimmed:
    """A start's centres [m] and their errors [m] if its images were unrelated.

    `drawn` are the images [n, m], drawn in to the range of those that were kept.
    """

    value: Floats
    error: Floats
    degrees: int
    drawn: Floats


def _trimmed(series: Floats) -> _Trimmed:
    """Trimmed means of series [n, m] with their Winsorised errors.

    Source: Tukey and McLaughlin 1963, "Less Vulnerable Confidence and Significance Procedures for
    Location Based on a Single Sample".
    """
    n = len(series)
    cut = n // _TRIM if n >= _LEAST_TO_TRIM else 0
    ordered = np.sort(series, axis=0)
    value, degrees = ordered[cut : n - cut].mean(axis=0), n - 2 * cut - 1
    drawn = np.clip(series, ordered[cut], ordered[n - 1 - cut])
    if degrees < 1:
        return _Trimmed(value, np.full(value.shape, np.inf), 0, drawn)
    error = drawn.std(axis=0, ddof=1) / ((1 - 2 * cut / n) * np.sqrt(n))
    return _Trimmed(value, error, degrees, drawn)


def _of_one_start(series: Floats) -> Centres:
    """Centres of series [n, m] of one start, whose errors are widened by the likeness."""
    found = _trimmed(series)
    if found.degrees < 1:
        return Centres(found.value, found.error, 0)
    error = found.error * np.sqrt(_worth(likeness(found.drawn)))
    return Centres(found.value, _from_spread(error, found.degrees), found.degrees)


def _within(starts: Sequence[_Trimmed]) -> Floats:
    """The least half [m] that the mean of the starts' centres has, by what is within them."""
    known = [start for start in starts if start.degrees > 0]
    if not known:
        return np.zeros(starts[0].value.shape)
    power = sum(np.square(start.error) for start in known) / len(known) / len(starts)
    return _from_spread(np.sqrt(power), sum(start.degrees for start in known))


def _worth(correlation: Floats) -> Floats:
    """Related values that are worth one unrelated one, where neighbours correlate so [m]."""
    return (1.0 + correlation) / (1.0 - correlation)


def _from_spread(error: Floats, degrees: int) -> Floats:
    return student(degrees) * error


def block_quantile(latency_s: ArrayLike, q: float) -> Interval:
    """Return the `q` quantile of latencies [n] in the order of time; `clusters` counts blocks.

    The ends are ``None`` where n images cannot tell them: the quantile is too near the sample's
    end, or neighbours are too much alike.

    Source: Woodruff 1952 for the ends; Künsch 1989, "The Jackknife and the Bootstrap for General
    Stationary Observations", for the error of the share below.
    """
    x = np.asarray(latency_s, np.float64)
    value = float(np.quantile(x, q, method="hazen"))
    error, blocks = block_error(x <= value)
    if blocks < 2 or _too_alike(x, min(q, 1.0 - q)):
        return Interval(value, None, None, len(x), blocks)
    half = float(student(blocks - 1)) * error
    column = np.sort(x)[:, None]
    low, high = (float(read_quantile(column, [at])[0]) for at in (q - half, q + half))
    if not (np.isfinite(low) and np.isfinite(high)):
        return Interval(value, None, None, len(x), blocks)
    return Interval(value, low, high, len(x), blocks)


def block_error(series: ArrayLike, fitted: int = 1) -> tuple[float, int]:
    """Return the standard error of a series' mean [n] by moving blocks, and how many blocks fit.

    `fitted` is how many parameters, the mean included, were taken from the same n values.
    """
    x = np.asarray(series, np.float64)
    n, centred = len(x), x - x.mean()
    length = _block_length(centred)
    if n < 2 * length or n < 2:
        return float("inf"), 1
    total = np.concatenate([[0.0], np.cumsum(centred)])
    means = (total[length:] - total[:-length]) / length
    # What was fitted takes its share of the blocks' spread, which the last factor makes up for.
    variance = float(np.square(means).mean()) * length / n / (1.0 - fitted * length / n)
    return float(np.sqrt(variance)), n // length


def run_drift(latency_s: ArrayLike) -> RunDrift | None:
    """Measure how latencies [n] of one start changed with time; ``None`` for too few.

    The slope of the log latencies over their order, with errors from moving blocks; single
    outliers (a garbage collection, another process) are drawn in to 5 robust deviations.
    """
    x = np.log(np.asarray(latency_s, np.float64))
    n = len(x)
    if n < LEAST_FOR_DRIFT:
        return None
    middle = np.median(x)
    reach = _FAR * 1.4826 * float(np.median(np.abs(x - middle)))
    if reach > 0.0:
        x = np.clip(x, middle - reach, middle + reach)
    time = np.linspace(-0.5, 0.5, n)
    slope = float(time @ x / (time @ time))
    pull = time * (x - x.mean() - slope * time)
    error, blocks = block_error(pull, fitted=2)
    if blocks < 3:
        return None
    half = float(student(blocks - 2)) * error * n / float(time @ time)
    value, low, high = (float(np.expm1(v)) for v in (slope, slope - half, slope + half))
    return RunDrift(Interval(value, low, high, n, blocks))


def couple_starts(baseline: Sequence[Any], candidate: Sequence[Any]) -> list[tuple[int, int]]:
    """Couple process starts of both sides that follow each other in time, each at most once.

    Times are whatever sorts as they do: ISO 8601 in UTC, or ranks. A B A B gives two couples,
    A B B A two, A A B B one: what ran in blocks of its own side shares no state with the other.
    """
    timeline = sorted(
        [(at, 0, i) for i, at in enumerate(baseline)]
        + [(at, 1, i) for i, at in enumerate(candidate)]
    )
    found: list[tuple[int, int]] = []
    waiting: tuple[int, int] | None = None
    for _, side, index in timeline:
        if waiting is not None and waiting[0] != side:
            found.append((waiting[1], index) if side == 1 else (index, waiting[1]))
            waiting = None
        else:
            waiting = (side, index)
    return found


def log_ratio(
    baseline: Sequence[Floats], candidate: Sequence[Floats], q: float, spread: Spread
) -> Interval | None:
    """Log ratio of the `q` quantile, candidate over baseline, from coupled starts.

    Args:
        baseline: latencies of each couple's baseline start, in the order of time.
        candidate: of its candidate start, in the same order of couples.
        q: the quantile, 0 < q < 1.
        spread: between runs, used where there is one couple only.

    Returns: an interval whose `clusters` are the couples (for one couple, the degrees of freedom of
    the spread plus 1); ``None`` without a couple.
    """
    if not baseline:
        return None
    n = sum(map(len, candidate))
    if len(baseline) == 1:
        return _one_couple(baseline[0], candidate[0], q, spread)
    ratios = np.array(
        [
            np.log(np.quantile(b, q, method="hazen") / np.quantile(a, q, method="hazen"))
            for a, b in zip(baseline, candidate, strict=True)
        ]
    )
    couples, value = len(ratios), float(ratios.mean())
    half = float(student(couples - 1) * ratios.std(ddof=1) / np.sqrt(couples))
    return Interval(value, value - half, value + half, n, couples)


def _one_couple(a: Floats, b: Floats, q: float, spread: Spread) -> Interval:
    """Within-start errors of both sides and the known spread between runs, added in squares.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures", for
    the difference of two quantities with unsymmetric intervals.
    """
    mine, theirs = (_reach(x, q) for x in (b, a))
    value = float(np.log(mine.value / theirs.value))
    between = float(student(spread.degrees)) * spread.sd
    clusters = spread.degrees + 1
    if mine.low is None or mine.high is None or theirs.low is None or theirs.high is None:
        return Interval(value, None, None, len(b), clusters)
    down = np.log(mine.value / mine.low), np.log(theirs.high / theirs.value), between
    up = np.log(mine.high / mine.value), np.log(theirs.value / theirs.low), between
    low, high = value - float(np.hypot.reduce(down)), value + float(np.hypot.reduce(up))
    return Interval(value, low, high, len(b), clusters)


def _reach(x: Floats, q: float) -> Interval:
    """A start's quantile; a median whose error is not known is somewhere in all that was timed.

    A gate without an interval would let any slowdown through. The reach of 6 or more unrelated
    times holds the median in 97 % and more; where 24 to 128 related ones (0.6, 0.9) have no error,
    it did in 91 to 100 % of 500 samples, and the spread between runs comes on top.
    """
    found = block_quantile(x, q)
    if found.low is not None or q != _MEDIAN or len(x) < _LEAST_FOR_REACH:
        return found
    return Interval(found.value, float(x.min()), float(x.max()), found.n, found.clusters)


def _too_alike(x: Floats, beyond: float) -> bool:
    """Whether a series [n] of related values is worth too few to say where a share `beyond` lies.

    By the correlation of neighbours' ranks, corrected for its bias (Kendall 1954), where it is more
    than two standard errors; n values of an autoregression of first order are worth
    n (1 - rho) / (1 + rho).
    """
    n, ordered = len(x), np.sort(x)
    ends = (np.searchsorted(ordered, x, side) for side in ("left", "right"))
    ranks = sum(ends, start=np.zeros(n))
    ranks -= ranks.mean()
    power = float(ranks @ ranks)
    correlation = float(ranks[1:] @ ranks[:-1]) / power if power > 0.0 else 0.0
    if correlation * np.sqrt(n) <= 2.0:
        return False
    rho = min(correlation + (1.0 + 4.0 * correlation) / n, _LARGEST_CORRELATION)
    worth = n * (1.0 - rho) / (1.0 + rho)
    return worth < _LEAST_WORTH or worth * beyond < _LEAST_BEYOND


def _block_length(centred: Floats) -> int:
    """Length that is best for a series whose neighbours correlate like these [n].

    Source: Bühlmann and Künsch 1999 for an autoregression of first order; at most n/8, so that
    there are blocks to compare, and at least n/16.
    """
    n, power = len(centred), float(centred @ centred)
    if n < 3 or power <= 0.0:
        return 1
    correlation = float(centred[1:] @ centred[:-1]) / power
    rho = min(max(correlation, 0.0), _LARGEST_CORRELATION)
    best = (6.0 * rho**2 / (1.0 - rho**2) ** 2 * n) ** (1.0 / 3.0)
    longest, shortest = max(1, n // _FEWEST_BLOCKS), max(1, n // _MOST_BLOCKS)
    return int(np.clip(np.ceil(_BLOCK_FACTOR * best), shortest, longest))
