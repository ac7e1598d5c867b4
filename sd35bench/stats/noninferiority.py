"""Whether one setting is as good as others within a margin, and how many images would tell.

*Shown* means that the one-sided test of "worse by the margin or more" rejects at 2.5 %, which for
one comparison is the 95 % interval of the paired difference lying above minus the margin.

The best setting is not known, only the one that came out best, and the highest of several noisy
means is too high. So a candidate counts as good as the best only if it is shown to be as good as
*every* rival: the largest of its p-values tests that (an intersection-union test: Berger 1982,
"Multiparameter Hypothesis Testing and Acceptance Sampling"), whichever rival is truly the best.
Over the candidates these are corrected by Holm's method.

The number of images that would decide is that of a test of the difference that was seen, with the
spread that was seen: the prompts k at which ``distance sqrt(k) / sd >= t(k-1, level) + t(k-1,
power)`` (Chow, Shao and Wang 2008, "Sample Size Calculations in Clinical Research", section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt

from scipy import special

from sd35bench.stats.clustered import student
from sd35bench.stats.equivalence import holm
from sd35bench.stats.intervals import Interval

__all__ = [
    "POWER",
    "TAIL",
    "Tested",
    "against_all",
    "images_between",
    "p_within",
    "prompts_needed",
    "spread",
]

TAIL = 0.025
"""One-sided level of a 95 % interval's end."""

POWER = 0.8
"""How probable it is that the named number of images decides, if things are as they look."""

_MOST_PROMPTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Tested:
    """One candidate against all rivals: `rival` is the one that `p` (the largest) is against.

    `p_holm` is corrected for the number of candidates; `difference` is candidate minus rival.
    """

    rival: int
    difference: Interval
    p: float
    p_holm: float

    @property
    def shown(self) -> bool:
        """Whether the candidate is shown to be as good as every rival within the margin."""
        return self.p_holm < TAIL


def p_within(difference: Interval, margin: float) -> float:
    """One-sided p-value of "worse by the margin or more" for a paired difference; 1 without ends.

    More is better. `margin` >= 0 is what may be lost, in the units of `difference`.
    """
    if difference.low is None:
        return 1.0
    degrees = difference.clusters - 1
    error = (difference.value - difference.low) / float(student(degrees))
    above = difference.value + margin
    if error <= 0.0:
        return 0.0 if above > 0.0 else 1.0
    return float(special.stdtr(degrees, -above / error))


def against_all(
    candidates: Sequence[int], differences: dict[int, dict[int, Interval]], margin: float
) -> dict[int, Tested]:
    """Test every candidate against its rivals; `differences[i][j]` is candidate i minus rival j.

    A candidate without rivals is not tested.
    """
    tested = [i for i in candidates if differences[i]]
    rivals = {
        i: max(differences[i], key=lambda j: _order(differences[i][j], margin)) for i in tested
    }
    found = [p_within(differences[i][rivals[i]], margin) for i in tested]
    adjusted = holm(found)
    return {
        i: Tested(rivals[i], differences[i][rivals[i]], p, corrected)
        for i, p, corrected in zip(tested, found, adjusted, strict=True)
    }


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


def _order(difference: Interval, margin: float) -> tuple[float, float]:
    """Rivals by p-value, then by how far behind them the candidate is."""
    return (p_within(difference, margin), -difference.value)
