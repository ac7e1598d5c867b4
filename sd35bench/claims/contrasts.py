"""Contrasts and what a set of claims makes of them: supported, refuted, or inconclusive at this n.

A claim is one or several *contrasts*, each an effect that the claim says is there, written so that
the claimed direction is up, with the least effect that would count (`least`; negative where the
claim is "not worse than"). Two one-sided tests share that threshold: an effect shown above it
speaks for the claim, one shown below it against, and an interval across it says nothing yet.

A claim is supported if *all* its contrasts are shown above: no correction is due inside it (an
intersection-union test: Berger 1982). Any contrast shown below refutes it, so inside the claim
those p-values are multiplied by their number (Bonferroni). Over the claims of a study both kinds
are corrected by Holm's method, so that in at most 2.5 % of studies any true claim is called
refuted, and in at most 2.5 % any false one supported.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import (
    TAIL,
    holm,
    holm_sizes,
    p_within,
    prompts_needed,
    spread,
    widened,
)


class Verdict(StrEnum):
    """What a study says of a claim."""

    SUPPORTED = "supported"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"
    NOT_TESTABLE = "not testable"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a contrast: what it is, and its mean where that says something."""

    label: str
    value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """An effect in the claimed direction, and the least of it that counts.

    `unit` is "share", "points", "dB" or "levels" for a difference, and "ratio" for the logarithm
    of a ratio, which is how `effect` and `least` are kept then. `images` are all that it rests on.
    `paired` says whether both sides have the same prompts and seeds.
    """

    name: str
    effect: Interval
    least: float
    unit: str
    images: int
    sides: tuple[Side, ...] = ()
    paired: bool = True

    @property
    def p_above(self) -> float:
        """One-sided p-value of "the effect is at most `least`"; 1 without an interval."""
        return p_within(self.effect, -self.least)

    @property
    def p_below(self) -> float:
        """One-sided p-value of "the effect is at least `least`"; 1 without an interval."""
        return p_within(mirrored(self.effect), self.least)


@dataclass(frozen=True, slots=True)
class Judged:
    """One claim's verdict with its p-values, corrected over the study's claims.

    `intervals` are those of its contrasts that the verdict follows from: a lower end at the level
    at which support was tested, an upper one at that of refuting. All lower ends lie above what
    counts exactly where the claim is supported, some upper one below exactly where it is refuted.
    """

    verdict: Verdict
    p_supported: float
    p_refuted: float
    intervals: tuple[Interval, ...] = ()


def judge_claims(claims: Sequence[Sequence[Contrast]]) -> list[Judged]:
    """Judge claims together; each has at least one contrast."""
    above = [max(c.p_above for c in claim) for claim in claims]
    below = [min(1.0, len(claim) * min(c.p_below for c in claim)) for claim in claims]
    corrected = zip(holm(above), holm(below), holm_sizes(above), holm_sizes(below), strict=True)
    return [
        Judged(
            _verdict(supported, refuted),
            supported,
            refuted,
            tuple(widened(c.effect, tests, others * len(claim)) for c in claim),
        )
        for claim, (supported, refuted, tests, others) in zip(claims, corrected, strict=True)
    ]


def more_images(claim: Sequence[Contrast], tail: float = TAIL) -> int | None:
    """Images, on top of those there, that would decide a claim if its effects are as they look.

    With 80 % power per contrast; ``None`` where no practicable number would, because an effect
    lies on its threshold or has no interval. Where all effects lie above their thresholds every
    contrast has to be shown, else the one below that is shown with the fewest images.
    """
    against = [c for c in claim if c.effect.value < c.least]
    if against:
        needs = [n for c in against if (n := _more(c, tail / len(claim))) is not None]
        return _rounded(min(needs)) if needs else None
    needs = [_more(c, tail) for c in claim]
    return None if None in needs else _rounded(max(n for n in needs if n is not None))


def _rounded(count: int) -> int:
    """Up, to two digits: a number of images that rests on a guess says no more."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return ceil(count / unit) * unit


def mirrored(effect: Interval) -> Interval:
    """The effect counted the other way."""
    low = None if effect.high is None else -effect.high
    high = None if effect.low is None else -effect.low
    return Interval(-effect.value, low, high, effect.n, effect.clusters)


def _more(contrast: Contrast, tail: float) -> int | None:
    effect = contrast.effect
    above = effect.value >= contrast.least
    sd = spread(effect if above else mirrored(effect))
    if sd is None:
        return None
    needed = prompts_needed(sd, abs(effect.value - contrast.least), tail)
    if needed is None:
        return None
    return max(0, ceil(contrast.images * (needed / effect.clusters - 1)))


def _verdict(p_supported: float, p_refuted: float) -> Verdict:
    if p_supported < TAIL:
        return Verdict.SUPPORTED
    return Verdict.REFUTED if p_refuted < TAIL else Verdict.INCONCLUSIVE
