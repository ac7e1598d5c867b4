"""What is chosen of the settings that a race left: `recommend`'s own rule, on what they share.

The choice is `recommend.choice.choose`'s, with all that a profile asks for. A cheaper setting has
to be shown to be within the margin of every rival left, or of the named default. Where none is
shown, the best mean within the limits is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sd35bench.analysis.pairs import Candidate, Comparison
from sd35bench.analysis.speed import starts_of
from sd35bench.recommend.choice import Choice, choose
from sd35bench.recommend.pareto import Speeds
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.decision import LEVEL, SAME_COST
from sd35bench.stats.latency import latency_interval
from sd35bench.tune.space import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """What `recommend` says of the settings left; the choice's indices are into `points`."""

    points: list[Point]
    comparison: Comparison
    speed: Speeds
    choice: Choice

    @property
    def chosen(self) -> Point:
        """The setting that is chosen."""
        return self.points[self.choice.chosen]

    @property
    def shown(self) -> bool:
        """Whether the chosen one is shown to be as good as it has to be.

        Within the margin of every other one left, or of the named default that it may itself be.
        """
        return len(self.points) > 1 and self.choice.unshown is None


def decide(
    points: Sequence[Point],
    comparison: Comparison,
    profile: Profile,
    *,
    reference: Point | None = None,
    level: float = LEVEL,
) -> Final | str:
    """Choose as `recommend` would; a text says why nothing can be chosen.

    `level` is that of this look (`stats.looks`): a race stops at the first answer that is shown.

    `points` [S] are those of the comparison's candidates.
    """
    speed = _speeds(comparison)
    named = None if reference is None else list(points).index(reference)
    choice = choose(comparison, speed, profile, named, level)
    if isinstance(choice, str):
        return choice
    return Final(points=list(points), comparison=comparison, speed=speed, choice=choice)


def settled(final: Final, profile: Profile) -> bool:
    """Whether more images could not change the answer by more than the margin allows.

    That is: the choice is shown to be as good, and where the fastest is wanted, none that is
    faster is left.
    """
    values, choice = final.speed.values, final.choice
    if not final.shown or profile.objective == "best-quality":
        return final.shown
    left = [i for i in range(len(values)) if i not in choice.limits.broken and i != choice.chosen]
    return not any(values[i] * (1.0 + SAME_COST) < values[choice.chosen] for i in left)


def _speeds(comparison: Comparison) -> Speeds:
    """Medians of what was timed on the comparison's prompts, with their upper ends."""
    found = [_median(c) for c in comparison.candidates]
    return Speeds("latency_s", [value for value, _ in found], [high for _, high in found])


def _median(candidate: Candidate) -> tuple[float, float | None]:
    starts = starts_of(candidate.lone_images(by_negative=True).values())
    found = latency_interval([[image.latency_s for image in start] for start in starts])
    return found.value, found.high
