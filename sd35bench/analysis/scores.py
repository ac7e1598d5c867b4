"""Scores by metric, trial and image, whether they are a list or a large study's Parquet view."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sd35bench.columns import Floats, Records, Scores, Some, texts

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
    """One metric's scores of some records [n]: where there is one, and its value, NaN for none."""

    there: NDArray[np.bool_]
    values: Floats
    detail: Callable[[int], dict[str, Any]]

    @property
    def valued(self) -> NDArray[np.bool_]:
        """Where there is a number."""
        return self.there & ~np.isnan(self.values)

    def count(self, name: str) -> int:
        """How many have a detail that is true."""
        return sum(bool(self.detail(i).get(name)) for i in np.flatnonzero(self.there).tolist())


class ScoreIndex(Mapping[str, Mapping[Where, ScoreLike]]):
    """The last score of everything: by metric, then by trial key and image."""

    def __init__(self, scores: Iterable[ScoreLike]) -> None:
        """Of a view's scores a metric's are made only where they are asked for one by one."""
        self._view = scores if isinstance(scores, Scores) else None
        self._made: dict[str, dict[Where, ScoreLike]] = defaultdict(dict)
        self._aligned: dict[str, tuple[NDArray[np.int64], Floats]] = {}
        if self._view is None:
            for score in scores:
                self._made[score.metric][score.key, score.image] = score
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

    def found(self, metric: str, records: Some) -> Found:
        """One metric's scores of records, for the images that they have now."""
        if metric not in self._names:
            return Found(np.zeros(len(records), bool), np.full(len(records), np.nan), _nothing)
        if self._view is not None and isinstance(records, Records):
            return self._columns(metric, records)
        known, where = (
            self[metric],
            zip(texts(records, "key"), texts(records, "image"), strict=True),
        )
        scores = [known.get((key, image or "")) for key, image in where]
        values = [np.nan if s is None or s.value is None else s.value for s in scores]
        there = np.array([s is not None for s in scores], bool)

        def detail(number: int) -> dict[str, Any]:
            score = scores[number]
            return {} if score is None else score.detail

        return Found(there, np.array(values, np.float64), detail)

    def _columns(self, metric: str, records: Records) -> Found:
        assert self._view is not None
        if metric not in self._aligned:
            self._aligned[metric] = self._view.aligned(metric, records.columns)
        every, all_values = self._aligned[metric]
        codes, values = every[records.places], all_values[records.places]
        details = self._view.details()

        def detail(number: int) -> dict[str, Any]:
            return details[codes[number]]

        return Found(codes >= 0, values, detail)


def _nothing(_: int) -> dict[str, Any]:
    return {}
