"""Latency between two sides: quantiles over time, drift within a run, verdicts over process starts.

Images of one process follow each other, and so do their times: a busy minute slows a dozen of
them. Within a start errors therefore come from moving blocks of consecutive images (Künsch 1989),
whose bootstrap variance is known in closed form. Their length follows from the correlation of
neighbours, so that there are 8 to 16 blocks. Where neighbours are so much alike that n images are
worth too few unrelated ones, an interval would be a guess, and none is given.

What one process gives is still not what the next one gives: two runs of the same code, hours
apart, were 15 and 23 % apart (docs/log.md, 2026-11-23), several times what their intervals said.
So the unit of a verdict is the process start. Starts of both sides that follow each other make a
*couple*, which shares the machine's state; the interval is Student's t over the couples' log
ratios. One couple has no spread of its own and gets the one that a policy knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sd35bench.stats.clustered import read_quantile, student
from sd35bench.stats.intervals import Interval

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


def couple_starts(baseline: Sequence[str], candidate: Sequence[str]) -> list[tuple[int, int]]:
    """Couple process starts of both sides that follow each other in time, each at most once.

    Times are ISO 8601 in UTC. A B A B gives two couples, A B B A two, A A B B one: what ran in
    blocks of its own side shares no state with the other.
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
    mine, theirs = (_within(x, q) for x in (b, a))
    value = float(np.log(mine.value / theirs.value))
    between = float(student(spread.degrees)) * spread.sd
    clusters = spread.degrees + 1
    if mine.low is None or mine.high is None or theirs.low is None or theirs.high is None:
        return Interval(value, None, None, len(b), clusters)
    down = np.log(mine.value / mine.low), np.log(theirs.high / theirs.value), between
    up = np.log(mine.high / mine.value), np.log(theirs.value / theirs.low), between
    low, high = value - float(np.hypot.reduce(down)), value + float(np.hypot.reduce(up))
    return Interval(value, low, high, len(b), clusters)


def _within(x: Floats, q: float) -> Interval:
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
