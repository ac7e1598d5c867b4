"""Scores by metric, trial and image, whether they are a list or a large study's Parquet view."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import foreign_metrics, take_declared
from sd35bench.study.columns import Floats, Records, Some, texts
from sd35bench.study.latest import Scores

Where = tuple[str, str]
"""Trial key and image digest."""


class ScoreLike(Protocol):
    """One metric's value for one trial's image, as the store keeps it."""

    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def image(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float | None: ...  # noqa: D102
    @property
    def detail(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Found:
    """One metric's scores of some records [n]: the number of its detail, and its value.

    A record without a score has -1 and NaN, one whose score is no number NaN alone.
    """

    codes: NDArray[np.int64]
    values: Floats
    details: Sequence[dict[str, Any]]

    @property
    def there(self) -> NDArray[np.bool_]:
        """Where there is a score."""
        return self.codes >= 0

    @property
    def valued(self) -> NDArray[np.bool_]:
        """Where there is a number."""
        return self.there & ~np.isnan(self.values)

    def detail(self, number: int) -> dict[str, Any]:
        """What the score of one record says besides its value; one without a score is an error."""
        return self.details[self.codes[number]]

    def has(self, about: Mapping[str, Any], whole: bool = False) -> NDArray[np.bool_]:
        """Where there is a score whose detail has these entries; `whole`: and no others."""
        fits = [
            detail == about if whole else all(detail.get(k) == v for k, v in about.items())
            for detail in self.details
        ]
        return np.array([*fits, False], bool)[self.codes]

    def count(self, name: str) -> int:
        """How many have a detail that is true."""
        codes, counts = np.unique(self.codes[self.there], return_counts=True)
        found = zip(codes.tolist(), counts.tolist(), strict=True)
        return sum(count for code, count in found if self.details[code].get(name))


class ScoreIndex(Mapping[str, Mapping[Where, ScoreLike]]):
    """The last score of everything: by metric, then by trial key and image."""

    def __init__(self, scores: Iterable[ScoreLike]) -> None:
        """Of a view's scores a metric's are made only where they are asked for one by one."""
        self._view = scores if isinstance(scores, Scores) else None
        self._made: dict[str, dict[Where, ScoreLike]] = defaultdict(dict)
        if self._view is None:
            for score in scores:
                self._made[score.metric][score.key, score.image] = score
                take_declared((score.detail,))
        elif foreign_metrics(self._view.metrics()):
            take_declared(self._view.details())
        self._names = list(self._made) if self._view is None else self._view.metrics()

    def __getitem__(self, metric: str) -> Mapping[Where, ScoreLike]:
        if metric not in self._names:
            raise KeyError(metric)
        if metric not in self._made and self._view is not None:
            made = self._made[metric]
            for score in self._view.of(metric):
                made[score.key, score.image] = score
        return self._made[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def refusals(self, metric: str) -> list[ScoreLike]:
        """The scores of a metric that are 0, or no number."""
        if self._view is not None:
            return [*self._view.refusals(metric)]
        return [score for score in self.get(metric, {}).values() if not score.value]

    def found(self, metric: str, records: Some) -> Found:
        """One metric's scores of records, for the images that they have now."""
        if metric not in self._names:
            return Found(np.full(len(records), -1), np.full(len(records), np.nan), ())
        if self._view is not None and isinstance(records, Records):
            return self._columns(metric, records)
        known = self[metric]
        where = zip(texts(records, "key"), texts(records, "image"), strict=True)
        scores = [known.get((key, image or "")) for key, image in where]
        values = [np.nan if s is None or s.value is None else s.value for s in scores]
        codes = np.where([s is not None for s in scores], np.arange(len(scores)), -1)
        details = [{} if s is None else s.detail for s in scores]
        return Found(codes.astype(np.int64), np.array(values, np.float64), details)

    def _columns(self, metric: str, records: Records) -> Found:
        assert self._view is not None
        codes, values = self._view.aligned(metric, records.columns)
        return Found(codes[records.places], values[records.places], self._view.details())
