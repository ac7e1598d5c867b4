"""What a set metric of one side is computed from: which images, their features, the reference.

A set metric has no value of its own for an image; what `score` keeps for each names the features'
extractor, the statistic and the reference. They are read when a comparison asks for them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.reference import Reference, read_reference
from sd35bench.analysis.set_metrics import FRECHET
from sd35bench.analysis.table import Table
from sd35bench.types import Record

__all__ = ["FeatureReader", "Features", "SetScore", "feature_reader", "read_set_scores"]

Features = Mapping[str, NDArray[np.float32]]
"""Features [d] by image digest."""
FeatureReader = Callable[[str], Features]
"""Reads an extractor's features."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetScore:
    """A set metric of one side; `rows` [n] says which of the side's images have it.

    `reference` is its name, a content hash; ``None`` where there were too few images for any.
    `read_reference` is ``None`` where only a file of the side is there, which does not hold it.
    """

    extractor: str
    statistic: str
    min_images: int
    reference: str | None
    rows: NDArray[np.bool_]
    read_features: Callable[[], Features]
    read_reference: Callable[[], Reference] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)


def read_set_scores(
    study: Any, table: Table, records: Sequence[Record], judged: set[str], reader: FeatureReader
) -> dict[str, SetScore]:
    """Set metrics of a side's records by name; `judged` are the trials that quality comes from."""
    found: dict[str, SetScore] = {}
    for name in sorted(table.scores):
        scores = (table.score(name, r) if r.trial.key in judged else None for r in records)
        first = next((s for s in scores if s is not None), None)
        if first is None or "extractor" not in first.detail:
            continue  # a metric of single images
        details = [_detail(table, name, r) if r.trial.key in judged else None for r in records]
        # Held-out prompts have a reference of their own: the one that most images have counts.
        common = Counter(d["reference"] for d in details if d is not None).most_common(1)[0][0]
        last = next(d for d in reversed(details) if d is not None and d["reference"] == common)
        rows = np.array([d == last for d in details], bool)
        found[name] = _score(study, last, rows, reader)
    return found


def feature_reader(study: Any) -> FeatureReader:
    """Read a study's features, each extractor's once."""
    return cache(study.features)


def _detail(table: Table, name: str, record: Record) -> dict[str, Any] | None:
    score = table.score(name, record)
    return None if score is None else score.detail


def _score(
    study: Any, detail: dict[str, Any], rows: NDArray[np.bool_], reader: FeatureReader
) -> SetScore:
    extractor, name = detail["extractor"], detail["reference"]
    return SetScore(
        extractor=extractor,
        statistic=detail.get("statistic", FRECHET),
        min_images=detail["min_images"],
        reference=name,
        rows=rows,
        read_features=lambda: reader(extractor),
        read_reference=lambda: read_reference(study, name),
        parameters=detail.get("parameters", {}),
    )
