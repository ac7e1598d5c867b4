"""What an experiment is: a run that leaves figures, each with the bound that it is held against.

A figure without a bound is only told. Everything that the page says in digits is a figure of a
`Result`, and a result is a JSON file that a run wrote.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sd35bench.machine.measure import environment

__all__ = ["PACKAGES", "Experiment", "Figure", "Result", "measure"]

MOST_SEEN = 20
PACKAGES = ("httpx2", "fastapi", "uvicorn", "starlette", "hypothesis", "schemathesis")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure; `least` and `most` bound it, both included.

    `out_of` names the figure that says over how many tries a count of failures was taken.
    """

    name: str
    value: float | str
    least: float | None = None
    most: float | None = None
    out_of: str | None = None

    @property
    def is_bounded(self) -> bool:
        return self.least is not None or self.most is not None

    @property
    def holds(self) -> bool:
        """Whether it is within its bounds; what could not be measured is not."""
        if not self.is_bounded:
            return True
        if isinstance(self.value, str) or math.isnan(self.value):
            return False
        low = -math.inf if self.least is None else self.least
        high = math.inf if self.most is None else self.most
        return low <= self.value <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One experiment. `run(scale, folder)` gives its figures, and what it saw going wrong.

    `did`, `fails_if`, `shows_not` are the page's words on it, without digits that a run decides.
    `parallel`: it can share the machine with others; `sleeps`: it costs them next to nothing.
    """

    name: str
    title: str
    did: str
    fails_if: str
    shows_not: str
    run: Callable[[float, Path], tuple[Sequence[Figure], Sequence[str]]]
    parallel: bool = True
    sleeps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of an experiment left."""

    name: str
    scale: float
    at: str
    seconds: float
    environment: dict[str, Any]
    figures: tuple[Figure, ...]
    seen: tuple[str, ...] = field(default=())

    @property
    def holds(self) -> bool:
        return all(figure.holds for figure in self.figures)

    @property
    def broken(self) -> list[str]:
        """The figures out of bounds, then what was seen going wrong."""
        out = [f"{figure.name}: {figure.value}" for figure in self.figures if not figure.holds]
        return [*out, *self.seen]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        values = json.loads(path.read_text())
        figures = tuple(Figure(**each) for each in values.pop("figures"))
        return cls(**{**values, "figures": figures, "seen": tuple(values["seen"])})


def measure(experiment: Experiment, scale: float, folder: Path) -> Result:
    """Run an experiment in an empty `folder` of its own."""
    at, started = datetime.now(UTC), time.monotonic()
    here = environment()
    figures, seen = experiment.run(scale, folder)
    packages = {name: version(name) for name in PACKAGES}
    return Result(
        name=experiment.name,
        scale=scale,
        at=at.isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        environment={**here, **packages},
        figures=tuple(figures),
        seen=tuple(text[:300] for text in seen[:MOST_SEEN]),
    )
