"""What a search asks of whoever makes its images: `lab.StudyLab`, or a surface of known truth."""

from collections.abc import Hashable, Sequence
from typing import Protocol

from sd35bench.analysis.pairs import Comparison
from sd35bench.recommend.profiles import Profile
from sd35bench.tune.race import Evidence
from sd35bench.tune.space import Point


class Lab(Protocol):
    """Makes images of settings on prompts, and says what they gave."""

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        ...

    @property
    def images_per_prompt(self) -> int:
        """Images of one setting and prompt: the seeds."""
        ...

    @property
    def objectives(self) -> int:
        """3 where a backend costs money, else 2: quality and latency."""
        ...

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What quality can be at least and at most."""
        ...

    def identity(self, point: Point) -> Hashable:
        """Equal for points that ask for the same images."""
        ...

    def buy(self, points: Sequence[Point], prompts: range) -> None:
        """Make and score what is missing of these settings on these prompts."""
        ...

    def seen(self, points: Sequence[Point]) -> dict[Point, Evidence]:
        """What is known of these settings, on all prompts."""
        ...

    def margin(self, profile: Profile) -> float:
        """The profile's margin in units of quality."""
        ...

    def reference(self, profile: Profile) -> Point | None:
        """The named default that the profile holds settings against; ``None``: the best."""
        ...

    def compared(self, points: Sequence[Point], prompts: int) -> tuple[list[Point], Comparison]:
        """Put settings side by side on the first prompts; those with too few images are left out.

        Returns: the points of the comparison's candidates, and the comparison.
        """
        ...
