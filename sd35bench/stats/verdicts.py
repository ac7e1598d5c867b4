"""Whether a candidate is worse than allowed, and how many images would tell.

A margin says how much worse is still allowed, in the metric's own units. *Shown* means that the
one-sided test of "worse by the margin or more" rejects at 2.5 %, which for one comparison is the
95 % interval lying wholly on the good side of the margin. An interval wholly on the other side is
a failure, one across it is undecided. Equivalence is two such tests, one for each direction
(Schuirmann 1987: TOST). `p_within` is the test's p-value everywhere.

The gate: many tests that must all hold need no correction, as every one of them has to pass. Any
of them may fail it, so failures are corrected over the whole comparison (Holm 1979, "A Simple
Sequentially Rejective Multiple Test Procedure"). `decisive` is the interval that says the same as
the corrected verdict: its end lies beyond the margin exactly where Holm's method fails the figure.

The number of images that would decide is that of a test of the difference that was seen, with the
spread that was seen: the prompts k at which ``distance sqrt(k) / sd >= t(k-1, level) + t(k-1,
power)`` (Chow, Shao and Wang 2008, "Sample Size Calculations in Clinical Research", section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, sqrt

import numpy as np
from scipy import special

from sd35bench.stats.clustered import student
from sd35bench.stats.intervals import Interval

TAIL = 0.025
"""One-sided level of a 95 % interval's end."""

POWER = 0.8
"""How probable it is that the named number of images decides, if things are as they look."""

_MOST_PROMPTS = 1_000_000


class Verdict(StrEnum):
    """What a gate says of one figure, one dimension, or the whole."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    NOT_APPLICABLE = "not applicable"


class Direction(StrEnum):
    """Which way is worse: less, more, or any change beyond the margin."""

    LESS = "less"
    MORE = "more"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One figure's test: whether it passes, and how improbable its harm is within the margin.

    `p_fail` is the one-sided p-value of "no more harm than the margin"; 1 without an interval's
    end on the side of harm, where `can_fail` is False: no data of that kind would show any.
    """

    passes: bool
    p_fail: float
    can_fail: bool = True


def harm_of(effect: Interval, direction: Direction) -> list[Interval]:
    """Turn an effect (candidate minus baseline) into harms, which count upwards: one or two."""
    mirrored = Interval(
        -effect.value,
        None if effect.high is None else -effect.high,
        None if effect.low is None else -effect.low,
        effect.n,
        effect.clusters,
    )
    sides = {Direction.MORE: [effect], Direction.LESS: [mirrored]}
    return sides.get(direction, [effect, mirrored])


def judge(effect: Interval, margin: float, direction: Direction) -> Judgement:
    """Test an effect (candidate minus baseline) against a margin >= 0, both in one unit.

    With `Direction.BOTH`, passing is equivalence; either side can fail.
    """
    harms = harm_of(effect, direction)
    passes = all(h.high is not None and h.high <= margin for h in harms)
    p = min(1.0, len(harms) * min(p_within(h, -margin) for h in harms))
    return Judgement(passes, p, can_fail=any(h.low is not None for h in harms))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number; each may then be held against the level of them all."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_sizes(p_values: Sequence[float]) -> list[int]:
    """Of how many tests each is one where Holm decides on it: its level is `TAIL` over that.

    The m p-values are taken in order, each with those that are left; from the first that is not
    shown on, all have that one's number. These are the levels of the method's own confidence
    limits (Strassburger and Bretz 2008, "Compatible simultaneous lower confidence bounds").
    """
    order = np.argsort(p_values, kind="stable")
    sizes, left, shown = [1] * len(p_values), len(p_values), True
    for rank, index in enumerate(order):
        if shown:
            left = len(p_values) - rank
            shown = left * p_values[index] < TAIL
        sizes[index] = left
    return sizes


def decisive(
    effect: Interval, direction: Direction, size: int, span: tuple[float, float] | None = None
) -> Interval:
    """Move the ends on the side of harm out to the level at which harm was tested.

    Args:
        effect: candidate minus baseline, with its 95 % interval.
        direction: which way is worse; with `Direction.BOTH` both ends are of harm.
        size: of how many tests the figure was one (`holm_sizes`).
        span: what the effect can be at least and at most, where that is known.
    """
    tests = size * (2 if direction is Direction.BOTH else 1)
    below = 1 if direction is Direction.LESS else tests
    above = 1 if direction is Direction.MORE else tests
    return widened(effect, below, above, span)


def widened(
    effect: Interval, below: int, above: int, span: tuple[float, float] | None = None
) -> Interval:
    """Move the ends of a 95 % interval to the level of one of `below` and of `above` tests."""
    if effect.low is None or effect.high is None:
        return effect
    degrees = max(effect.clusters - 1, 1)
    reaches = [special.stdtrit(degrees, 1.0 - TAIL / size) for size in (below, above)]
    down, up = (float(reach / student(degrees)) for reach in reaches)
    low = effect.value - down * (effect.value - effect.low)
    high = effect.value + up * (effect.high - effect.value)
    if span is not None:
        low, high = max(low, span[0]), min(high, span[1])
    return Interval(effect.value, low, high, effect.n, effect.clusters)


def decide(tested: Judgement, p_adjusted: float) -> Verdict:
    """Fail where harm beyond the margin is shown after correction, pass where its absence is."""
    if p_adjusted < TAIL:
        return Verdict.FAIL
    return Verdict.PASS if tested.passes else Verdict.UNDECIDED


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several: a failure outweighs a doubt, a doubt a pass."""
    for verdict in (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS):
        if verdict in verdicts:
            return verdict
    return Verdict.NOT_APPLICABLE


def p_within(difference: Interval, margin: float) -> float:
    """One-sided p-value of "worse by the margin or more" for a difference; 1 without a lower end.

    More is better; `margin` is what may be lost, in the units of `difference`. Of a harm, which
    counts upwards, ``p_within(harm, -margin)`` is that of "no more harm than the margin". The end
    below the value is t standard errors away from it, which gives the scale.
    """
    if difference.low is None:
        return 1.0
    degrees = max(difference.clusters - 1, 1)
    error = (difference.value - difference.low) / float(student(degrees))
    above = difference.value + margin
    if error <= 0.0:
        return 0.0 if above > 0.0 else 1.0
    return float(special.stdtr(degrees, -above / error))


def spread(difference: Interval) -> float | None:
    """Standard deviation of a paired difference between prompts; ``None`` without an interval."""
    if difference.low is None:
        return None
    error = (difference.value - difference.low) / float(student(difference.clusters - 1))
    return error * sqrt(difference.clusters)


def prompts_needed(
    sd: float, distance: float, tail: float = TAIL, power: float = POWER
) -> int | None:
    """Prompts at which a difference this far from the margin is decided; ``None`` beyond 10^6.

    `sd` is that of the paired difference between prompts, in the units of `distance` >= 0.
    """
    if distance <= 0.0:
        return None
    if sd <= 0.0:
        return 2

    def decided(k: int) -> bool:
        needed = special.stdtrit(k - 1, 1 - tail) + special.stdtrit(k - 1, power)
        return distance * sqrt(k) >= sd * needed

    start = (sd / distance * (special.ndtri(1 - tail) + special.ndtri(power))) ** 2
    if start > _MOST_PROMPTS:
        return None
    k = max(2, ceil(start))
    while not decided(k):
        k += 1
    return k


def images_between(
    difference: Interval, margin: float, tail: float = TAIL
) -> dict[str, int] | None:
    """More prompts, and images for both sides, that would decide whether it is within the margin.

    ``None`` where no practicable number would: the difference seen lies on the margin itself.
    """
    sd = spread(difference)
    if sd is None:
        return None
    needed = prompts_needed(sd, abs(difference.value + margin), tail)
    if needed is None:
        return None
    more = max(1, needed - difference.clusters)
    return {"prompts": more, "images": 2 * ceil(more * difference.n / difference.clusters)}
