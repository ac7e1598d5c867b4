"""How far each setting's images are from the reference backend's, beside the noise floor.

Computed from the scores that `sd35bench.metrics.drift` left, without torch. A row's images are
those that its quality comes from (one batch size), each held against the reference's image of the
very same request. The reference against itself, with another batch size or thread count, is the
noise floor: a row is *beyond noise* where the lower end of its mean difference is above the floor's
upper end. Intervals are over prompts.

PSNR is that of the mean squared error over all pairs, so that identical pairs count and nothing is
infinite: a row of identical images only has ``None``, and an interval ends at what one level in one
sample of all its images would give. `max_abs` is the largest difference that was seen; a largest
value has no interval. `changed` is the share of pairs that are not bit-identical.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.grouping import cluster_labels
from sd35bench.analysis.table import Row, Table
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval, mean_interval
from sd35bench.types import Record, to_json

SHIFTS = ("shift_red", "shift_green", "shift_blue")
"""Mean signed difference of a channel in levels of 255: what is systematic, as noise cancels."""
_MEANS = ("mean_abs", "ssim", "flip", "latent_rel_first", "latent_rel_last")
_WHO = frozenset({"setting", "backend", "backend_options", "threads"})


@dataclass(frozen=True, slots=True)
class _Sample:
    """One scored record, the reference that it was held against, and what came of it."""

    row: Row
    record: Record
    reference_row: Row
    reference: Record
    detail: dict[str, Any]

    @property
    def is_noise(self) -> bool:
        """Whether it is the reference against itself."""
        return self.record.trial.load.backend == self.reference.trial.load.backend

    @property
    def conditions(self) -> tuple[str, int, str, int]:
        """Row and batch size on both sides; only samples alike in this are pooled."""
        sides = (self.row, self.record), (self.reference_row, self.reference)
        (mine, size), (theirs, other) = ((row.id, r.trial.batch_size) for row, r in sides)
        return mine, size, theirs, other


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure over `n` pairs; `ci95` are the ends over prompts, ``None`` where it has none."""

    value: float | None
    ci95: Sequence[float | None] | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRow:
    """What one row's pairs show, all of one batch size and of one kind of reference.

    `setting` are the row's fields; `identical` counts pairs of equal pixels. `figures` are
    `max_abs` and `mean_abs` (levels of 255), `psnr_db`, `ssim`, `flip`, `latent_rel_first`,
    `latent_rel_last`, `changed` (share of pairs), and `lpips`, `cvvdp_jod` and `SHIFTS` where
    measured. `beyond_noise` is ``None`` without a floor or an interval. `what` says in which
    condition the reference's own trials differ: "batch size 16 instead of 1"; only rows of the
    noise floor have it.
    """

    setting: dict[str, Any]
    id: str
    batch_size: int
    reference_id: str
    reference_backend: str
    reference_batch_size: int
    reference_threads: int
    same_environment: bool
    n_pairs: int
    n_prompts: int
    identical: int
    figures: dict[str, Figure]
    beyond_noise: bool | None = None
    what: str | None = None

    def as_json(self) -> dict[str, Any]:
        """One flat object: the setting's fields, the row's own, and a figure by each name."""
        found = to_json(self)
        setting, figures = found.pop("setting"), found.pop("figures")
        beyond, what = found.pop("beyond_noise"), found.pop("what")
        said = {"beyond_noise": beyond} if what is None else {"what": what}
        return setting | found | figures | said


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSummary:
    """The drift of a study under one metric.

    `reference` has the fields of its setting that all rows share (others ``None``).
    """

    study: str
    metric: str
    reference: dict[str, Any]
    rows: list[DriftRow]
    noise_floor: list[DriftRow]
    warnings: list[str]


def drift_document(study: Any, table: Table) -> dict[str, Any]:
    """`drift_summary` as `show --json` prints it; empty where none was scored.

    Returns: ``{"study", "metric", "reference", "rows", "noise_floor", "warnings"}``; rows and the
    entries of `noise_floor` are those of `DriftRow.as_json`.
    """
    found = drift_summary(study, table)
    if found is None:
        return {}
    return {
        "study": found.study,
        "metric": found.metric,
        "reference": found.reference,
        "rows": [row.as_json() for row in found.rows],
        "noise_floor": [row.as_json() for row in found.noise_floor],
        "warnings": found.warnings,
    }


def drift_summary(study: Any, table: Table) -> DriftSummary | None:
    """Sum up the drift of a study (`study.store.Study`); ``None`` where none was scored."""
    names = sorted(n for n in table.scores if n == "drift" or n.startswith("drift_"))
    found = {name: _samples(table, name) for name in names}
    name = next((n for n in names if found[n][0]), None)
    if name is None:
        return None
    samples, stale = found[name]
    pooled, warnings = _pool(samples)
    noise = [(part[0], _drift_row(part)) for part in pooled if part[0].is_noise]
    rows = [
        replace(row, beyond_noise=_beyond(part[0], row, noise))
        for part in pooled
        if not part[0].is_noise
        for row in [_drift_row(part)]
    ]
    floor = [replace(row, what=_what(first)) for first, row in noise]
    if stale:
        warnings.append(f"{stale} drift scores left out: their reference is gone; score again")
    others = [n for n in names if n != name and found[n][0]]
    if others:
        warnings.append(f"shown is {name}; there is also {', '.join(others)}")
    return DriftSummary(
        study=study.name,
        metric=name,
        reference=_common([s.reference_row.setting for s in samples]),
        rows=sorted(rows, key=_order),
        noise_floor=sorted(floor, key=_order),
        warnings=warnings + _missing(rows, floor),
    )


def psnr_db(mse: float) -> float | None:
    """Peak signal-to-noise ratio of a mean squared error in squared levels; ``None`` for 0."""
    return None if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def _samples(table: Table, metric: str) -> tuple[list[_Sample], int]:
    """Pair each scored record with its reference; count those whose reference is another now."""
    usable = {r.trial.key: (row, r) for row in table.rows for r in row.usable}
    found, stale = [], 0
    for row, record in usable.values():
        score = table.score(metric, record)
        if score is None or score.value is None:
            continue
        there = usable.get(score.detail["reference_key"])
        if there is None or there[1].image != score.detail["reference_image"]:
            stale += 1
        else:
            found.append(_Sample(row, record, *there, score.detail))
    return found, stale


def _pool(samples: Iterable[_Sample]) -> tuple[list[list[_Sample]], list[str]]:
    """Group samples of like conditions: all of the noise's, of a row's the largest group."""
    alike: dict[tuple[str, int, str, int], list[_Sample]] = defaultdict(list)
    for sample in samples:
        alike[sample.conditions].append(sample)
    pooled, warnings = [], []
    by_row: dict[str, list[list[_Sample]]] = defaultdict(list)
    for part in alike.values():
        first = part[0]
        if first.is_noise:
            pooled.append(part)
        elif first.record.trial.batch_size == first.row.quality_batch_size:
            by_row[first.row.id].append(part)
    for parts in by_row.values():
        largest = max(parts, key=len)
        pooled.append(largest)
        left = sum(map(len, parts)) - len(largest)
        if left:
            warnings.append(
                f"{_named(largest[0].row)}: {left} of its pairs left out: their reference ran with"
                " another batch size or thread count, or elsewhere"
            )
    return pooled, warnings


def _drift_row(part: Sequence[_Sample]) -> DriftRow:
    first = part[0]
    labels = cluster_labels([s.record for s in part])
    figures = {
        "max_abs": Figure(max(s.detail["max_abs"] for s in part), None, len(part)),
        "psnr_db": _psnr(part),
        **{name: _mean(part, name) for name in _MEANS},
        "changed": _changed(part, labels),
    }
    optional = {name: _mean(part, name) for name in ("lpips", "cvvdp_jod")}
    optional |= {name: _mean(part, name, mean_t) for name in SHIFTS}
    return DriftRow(
        setting=first.row.setting,
        id=first.row.id,
        batch_size=first.record.trial.batch_size,
        reference_id=first.reference_row.id,
        reference_backend=first.reference_row.setting["backend"],
        reference_batch_size=first.reference.trial.batch_size,
        reference_threads=first.reference.trial.load.threads,
        same_environment=first.row.environment_id == first.reference_row.environment_id,
        n_pairs=len(part),
        n_prompts=int(labels.max()) + 1,
        identical=sum(s.detail["mse"] == 0 for s in part),
        figures=figures | {k: v for k, v in optional.items() if v.n},
    )


def _changed(part: Sequence[_Sample], labels: NDArray[np.int64]) -> Figure:
    """Share of pairs that are not bit-identical."""
    flags = [float(s.detail["mse"] != 0) for s in part]
    share = mean_t(flags, labels, bounds=(0.0, 1.0))
    return Figure(share.value, share.ci95, share.n)


def _mean(
    part: Sequence[_Sample],
    name: str,
    interval_of: Callable[[list[float], NDArray[np.int64]], Interval] = mean_interval,
) -> Figure:
    """Mean of one figure over the pairs that have it."""
    there = [s for s in part if s.detail.get(name) is not None]
    if not there:
        return Figure(None, None, 0)
    labels = cluster_labels([s.record for s in there])
    interval = interval_of([s.detail[name] for s in there], labels)
    return Figure(interval.value, interval.ci95, interval.n)


def _psnr(part: Sequence[_Sample]) -> Figure:
    """PSNR of the pairs' mean squared error; its ends are the error's, the other way round."""
    mse = _mean(part, "mse")
    if mse.value is None or mse.value == 0:
        return Figure(None, None, len(part))
    ends = None
    if mse.ci95 is not None:
        request = part[0].record.trial.request
        least = 1.0 / (3 * request.width * request.height * len(part))
        ends = [psnr_db(max(end, least)) for end in reversed(mse.ci95) if end is not None]
    return Figure(psnr_db(mse.value), ends, len(part))


def _what(sample: _Sample) -> str:
    """Say in which condition the reference's own trials differ."""
    mine, theirs = sample.record.trial, sample.reference.trial
    said = []
    if mine.batch_size != theirs.batch_size:
        said.append(f"batch size {mine.batch_size} instead of {theirs.batch_size}")
    threads = mine.load.threads
    if threads != theirs.load.threads:
        plural = "" if threads == 1 else "s"
        said.append(f"{threads} thread{plural} instead of {theirs.load.threads}")
    return " and ".join(said)


def _beyond(
    sample: _Sample, row: DriftRow, noise: Iterable[tuple[_Sample, DriftRow]]
) -> bool | None:
    """Whether a row's mean difference is above that of noise at its setting."""
    ends = [r.figures["mean_abs"].ci95 for s, r in noise if _asked(s) == _asked(sample)]
    upper = [end[1] for end in ends if end is not None and end[1] is not None]
    own = row.figures["mean_abs"].ci95
    return None if not upper or own is None or own[0] is None else own[0] > max(upper)


def _asked(sample: _Sample) -> dict[str, Any]:
    """A sample's setting apart from who ran it."""
    asked = {k: v for k, v in sample.row.setting.items() if k not in _WHO}
    # A hosted service does not tell its weights; it was paired with its model's by name.
    return asked | {"weights_digest": sample.reference_row.setting["weights_digest"]}


def _common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The fields that all settings share; ``None`` where they differ."""
    first = settings[0]
    return {k: v if all(s[k] == v for s in settings) else None for k, v in first.items()}


def _missing(rows: Sequence[DriftRow], floor: Sequence[DriftRow]) -> list[str]:
    found = []
    # Of images that are the same in every pixel there is nothing to explain.
    rows = [row for row in rows if row.identical < row.n_pairs]
    if rows and not floor:
        found.append(
            "no noise floor: the reference did not run with another batch size or thread count;"
            " run it so too (noise_floor=NAME), or small drift cannot be told from noise"
        )
    apart = sum(not row.same_environment for row in rows)
    if apart:
        found.append(
            f"{apart} settings ran in another environment than their reference: their drift is"
            " also that of machine and versions"
        )
    return found


def _named(row: Row) -> str:
    return f"{row.setting['backend']} ({row.id})"


def _order(row: DriftRow) -> tuple[Any, ...]:
    asked = row.setting
    strength = -1.0 if asked["prompt_strength"] is None else asked["prompt_strength"]
    return (
        asked["model"],
        asked["task"] != "text-to-image",
        asked["width"] * asked["height"],
        asked["steps"],
        asked["cfg"],
        strength,
        asked["backend"],
        row.id,
        row.batch_size,
    )
