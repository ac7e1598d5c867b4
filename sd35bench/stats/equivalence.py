"""Is the candidate worse than allowed? Non-inferiority, equivalence, and Holm's correction.

A margin says how much worse is still allowed, in the metric's own units. *Shown* means that the
95 % interval lies wholly on one side of the margin: each side is a one-sided test at 2.5 %. Harm
counts upwards: its interval above the margin is a failure, below it a pass, across it undecided.
Equivalence is two such tests, one for each direction (Schuirmann 1987: TOST).

Many tests that must all hold need no correction: to pass a gate, every one of them has to pass.
Any of them may fail it, so failures are corrected over the whole comparison (Holm 1979, "A Simple
Sequentially Rejective Multiple Test Procedure").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import special

from sd35bench.stats.clustered import student
from sd35bench.stats.intervals import Interval

__all__ = ["Direction", "Judgement", "Verdict", "decide", "harm_of", "holm", "judge", "worst"]

_TAIL = 0.025
"""One-sided level of a 95 % interval's end."""


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
    p = min(1.0, len(harms) * min(_p_above(h, margin) for h in harms))
    return Judgement(passes, p, can_fail=any(h.low is not None for h in harms))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number; each may then be held against the level of them all."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def decide(tested: Judgement, p_adjusted: float) -> Verdict:
    """Fail where harm beyond the margin is shown after correction, pass where its absence is."""
    if p_adjusted < _TAIL:
        return Verdict.FAIL
    return Verdict.PASS if tested.passes else Verdict.UNDECIDED


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several: a failure outweighs a doubt, a doubt a pass."""
    for verdict in (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS):
        if verdict in verdicts:
            return verdict
    return Verdict.NOT_APPLICABLE


def _p_above(harm: Interval, margin: float) -> float:
    """One-sided p-value of "harm is at most the margin", consistent with the interval's end.

    The end below the value is t standard errors away from it, which gives the scale.
    """
    if harm.low is None:
        return 1.0
    degrees = max(harm.clusters - 1, 1)
    error = (harm.value - harm.low) / float(student(degrees))
    excess = harm.value - margin
    if error <= 0.0:
        return 0.0 if excess > 0.0 else 1.0
    return float(special.stdtr(degrees, -excess / error))
