"""One figure of a gate: a number of both sides, and the effect between them with its interval."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35bench.gate.policy import MetricMargin
from sd35bench.stats.intervals import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of both sides; ``None`` is unknown.

    `kind` is "difference" or "ratio"; the effect of a ratio is its logarithm. `allowed` is the
    margin on the effect's scale; `span` what an effect can be at least and at most, where that is
    known. `note` says what the reader must know, or why there is no effect; `unmeasured` that one
    side lacks it; `needed` that the policy requires it by name, so that it could not be measured
    where neither side has it.

    `unchanged`: no pair differs, so that no test could show harm, whatever its level. `certain`:
    what was seen is the answer without any error, as for images that are the same files.
    """

    name: str
    unit: str
    kind: str
    margin: MetricMargin
    allowed: float
    baseline: float | None = None
    candidate: float | None = None
    effect: Interval | None = None
    unmeasured: bool = False
    needed: bool = False
    span: tuple[float, float] | None = None
    unchanged: bool = False
    certain: bool = False
    note: str | None = None

    @property
    def absent(self) -> bool:
        """Whether neither side has it."""
        return self.effect is None and not self.unmeasured


def ratio(name: str, unit: str, margin: MetricMargin) -> Callable[..., Figure]:
    """Return a maker of a figure whose effect is a ratio, from what was found."""

    def make(**found: Any) -> Figure:
        allowed = float(np.log(margin.margin))
        return Figure(name=name, unit=unit, kind="ratio", margin=margin, allowed=allowed, **found)

    return make


def difference(name: str, unit: str, margin: MetricMargin) -> Callable[..., Figure]:
    """Return a maker of a figure whose effect is a difference, from what was found."""

    def make(**found: Any) -> Figure:
        return Figure(
            name=name, unit=unit, kind="difference", margin=margin, allowed=margin.margin, **found
        )

    return make


def missing(make: Callable[..., Figure], values: list[float | None], why: str) -> Figure:
    """A figure that one side lacks, or both; `why` has a place for the side's name."""
    lacking = [n for n, v in zip(("baseline", "candidate"), values, strict=True) if v is None]
    both = len(lacking) != 1
    note = why.format("baseline and the candidate" if both else lacking[0])
    return make(baseline=values[0], candidate=values[1], unmeasured=not both, note=note)
