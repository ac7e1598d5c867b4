"""What is known of each metric's numbers: direction, bounds, and how a row's value is computed.

Per-image metrics are means with intervals over prompts. Set metrics are computed here from
features that `score` kept, against a reference file that `score` made; below the extractor's
minimum number of images there is no value, and the entry says how many it needs.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.frechet import Gaussian, frechet_interval
from sd35bench.analysis.intervals import Interval, mean_interval
from sd35bench.analysis.settings import cluster_key
from sd35bench.analysis.table import Row, ScoreLike, Table
from sd35bench.errors import StoreError
from sd35bench.types import Record

__all__ = [
    "MetricFacts",
    "Reference",
    "cluster_labels",
    "facts",
    "read_reference",
    "reference_path",
    "row_metric",
    "write_reference",
]


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """Whether more is better, and what a value can be at least and at most where that is known."""

    higher_is_better: bool
    bounds: tuple[float, float] | None = None


_FACTS = {
    "prompt_accuracy": MetricFacts(True, (0.0, 1.0)),
    "init_kept": MetricFacts(True, (0.0, 1.0)),
    "clip_score": MetricFacts(True, (-100.0, 100.0)),
    "fid": MetricFacts(False),
    # No bounds: where all are identical the interval is a point, not "never seen in k prompts".
    "drift": MetricFacts(False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What a set metric is held against: `name` is its file's stem, `source` says what it is.

    `min_images` is the least number of images for which the extractor's distance is given.
    """

    name: str
    gaussian: Gaussian
    source: str
    min_images: int


def facts(metric: str) -> MetricFacts:
    """Return what is known of a metric by the longest known beginning of its name."""
    known = [prefix for prefix in _FACTS if metric.startswith(prefix)]
    return _FACTS[max(known, key=len)] if known else MetricFacts(True)


def reference_path(study: Any, name: str) -> Path:
    """Where a study keeps the reference of this name."""
    return study.path / "references" / f"{name}.npz"


def write_reference(study: Any, reference: Reference) -> None:
    """Keep a reference under the study; written whole or not at all."""
    path = reference_path(study, reference.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    with open(part, "wb") as file:
        np.savez(
            file,
            mean=reference.gaussian.mean,
            cov=reference.gaussian.cov,
            n=reference.gaussian.n,
            source=reference.source,
            min_images=reference.min_images,
        )
    part.replace(path)


def read_reference(study: Any, name: str) -> Reference:
    """Read a kept reference. Raises: StoreError if it is gone."""
    path = reference_path(study, name)
    if not path.exists():
        raise StoreError(f"{path} is missing; delete the study's scores/ and score it again")
    return _read_reference(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=16)
def _read_reference(path: Path, _mtime_ns: int) -> Reference:
    with np.load(path) as data:
        gaussian = Gaussian(data["mean"], data["cov"], int(data["n"]))
        return Reference(
            name=path.stem,
            gaussian=gaussian,
            source=str(data["source"]),
            min_images=int(data["min_images"]),
        )


def row_metric(study: Any, table: Table, row: Row, metric: str) -> dict[str, Any]:
    """Compute one metric of one row: value, ci95, n, n_prompts, and what else it has to say."""
    found = [(r, s) for r in row.quality_records() if (s := table.score(metric, r)) is not None]
    if not found:
        return _nothing("not applicable, or not scored: no image of this setting has it")
    if "extractor" in found[0][1].detail:
        return _set_metric(study, found)
    valued = [(r, s.value) for r, s in found if s.value is not None]
    if not valued:
        return _nothing(str(found[0][1].detail.get("reason", "no value for any image")))
    entry = _entry(_mean(metric, valued))
    entry["levels"] = _levels(metric, valued)
    truncated = sum(bool(s.detail.get("truncated")) for _, s in found)
    if truncated:
        entry["truncated_prompts"] = truncated
    return entry


def cluster_labels(records: list[Record]) -> NDArray[np.int64]:
    """Give each record its prompt's number (with its init image), in order of appearance: [n]."""
    numbers: dict[Any, int] = {}
    keys = (cluster_key(r.trial) for r in records)
    return np.array([numbers.setdefault(k, len(numbers)) for k in keys], np.int64)


def _mean(metric: str, valued: list[tuple[Record, float]]) -> Interval:
    labels = cluster_labels([r for r, _ in valued])
    return mean_interval([v for _, v in valued], labels, bounds=facts(metric).bounds)


def _levels(metric: str, valued: list[tuple[Record, float]]) -> dict[str, Any] | None:
    by_level: dict[str, list[tuple[Record, float]]] = {}
    for record, value in valued:
        if record.trial.prompt.level is not None:
            by_level.setdefault(record.trial.prompt.level, []).append((record, value))
    if not by_level:
        return None
    return {level: _entry(_mean(metric, part)) for level, part in sorted(by_level.items())}


def _set_metric(study: Any, found: list[tuple[Record, ScoreLike]]) -> dict[str, Any]:
    detail = found[-1][1].detail
    extractor, name, need = detail["extractor"], detail["reference"], detail["min_images"]
    records = [r for r, s in found if s.detail == detail]
    if name is None or len(records) < need:
        reason = f"refused: {extractor} needs {need} images, there are {len(records)}"
        return _nothing(reason) | {"n": len(records), "needs": need}
    reference = read_reference(study, name)
    kept = _features(study, extractor)
    features = np.stack([kept[str(r.image)] for r in records])
    interval = frechet_interval(features, cluster_labels(records), reference.gaussian)
    about = {"reference": reference.name, "reference_source": reference.source}
    return _entry(interval) | about | {"reference_n": reference.gaussian.n}


_FEATURES: dict[tuple[str, str], tuple[int, dict[str, NDArray]]] = {}


def _features(study: Any, extractor: str) -> dict[str, NDArray]:
    """Return an extractor's kept features; they are read again only when files were added."""
    folder = study.path / "features" / extractor
    files = sum(1 for _ in folder.glob("*.npz"))
    key = (str(study.path.resolve()), extractor)
    if key not in _FEATURES or _FEATURES[key][0] != files:
        _FEATURES.clear()  # one study's features at a time
        _FEATURES[key] = (files, study.features(extractor))
    return _FEATURES[key][1]


def _entry(interval: Interval) -> dict[str, Any]:
    return {
        "value": interval.value,
        "ci95": interval.ci95,
        "n": interval.n,
        "n_prompts": interval.clusters,
    }


def _nothing(reason: str) -> dict[str, Any]:
    return {"value": None, "ci95": None, "n": 0, "n_prompts": 0, "reason": reason}
