"""One side of a comparison as columns: what one setting's trials left, from a study or a file.

A pair is two trials with the same prompt, negative prompt, seed, size and init image, whatever else
differs; a prompt is a cluster. Both are kept as 64-bit hashes, so that a million trials are matched
by sorting numbers and a committed baseline need not carry the prompts. A chance clash of two pairs
among a million trials has a probability of 3e-8.

A set metric has no value of its own for an image; what `score` keeps for each names the features'
extractor, the statistic and the reference. They are read when a comparison asks for them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.drift import drift_summary
from sd35bench.analysis.facts import GUARD
from sd35bench.analysis.grouping import cluster_key, pair_key, weights_text
from sd35bench.analysis.reference import Reference, read_reference
from sd35bench.analysis.set_metrics import FRECHET
from sd35bench.analysis.table import Row, Table, read_table, repeated_seeds
from sd35bench.errors import ConfigError
from sd35bench.fields import ASKED, describe
from sd35bench.prompts import same_prompt
from sd35bench.types import Record, Status

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


_PLACE = ("model", "weights_digest", "backend_options", "threads")
"""What else may tell two settings apart that were asked the same of one backend."""


def named_weights(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The field that tells weights apart: their files' names where those differ, else `name`."""
    texts = (mine.get("weights"), theirs.get("weights"))
    return (
        "weights" if name == "weights_digest" and None not in texts and len({*texts}) > 1 else name
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One process start and the peaks of its memory in bytes; ``None`` is unknown.

    `speed` is its median canary, relative to the machine's best.
    """

    id: str
    started_at: str
    peak_vram_bytes: int | None = None
    peak_rss_bytes: int | None = None
    speed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """One setting's trials, in the order of time; columns are [n].

    `failed` are trials without a usable image: an error, a refused image, a seed without effect, or
    a trial that was given up before it was tried, since what it was to make is not there either.
    `latency_s` is NaN where the image was not made alone, `start` an index into `starts` or -1.
    `metrics` are NaN where a metric has no value; `sets` are set metrics; `images` are digests of
    the images that quality comes from. `floor_levels` is the upper end of the noise floor (levels
    of 255), where the study measured one; `random_weights` that quality means nothing. `elsewhere`
    are the pairs of this setting that ran in another environment and are in no other column, and
    `elsewhere_differs` the fields in which that one differs. `beside` are the settings of the same
    study, which the title tells this one from.
    """

    study: str
    setting: dict[str, Any]
    environment: dict[str, Any]
    pairs: NDArray[np.uint64]
    prompts: NDArray[np.uint64]
    failed: NDArray[np.bool_]
    latency_s: NDArray[np.float64]
    start: NDArray[np.int64]
    starts: tuple[Start, ...]
    metrics: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    sets: dict[str, SetScore] = field(default_factory=dict)
    images: tuple[str | None, ...] = ()
    floor_levels: float | None = None
    random_weights: bool = False
    elsewhere: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    elsewhere_differs: tuple[str, ...] = ()
    beside: tuple[Mapping[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """The setting's hash."""
        return str(self.setting["setting"])

    @property
    def title(self) -> str:
        """What a person calls it."""
        asked = {name: self.setting[name] for name in ASKED}
        twins = [
            b for b in self.beside if all(b[n] == self.setting[n] for n in ("backend", *ASKED))
        ]
        named = dict.fromkeys(
            named_weights(n, self.setting, b)
            for n in _PLACE
            for b in twins
            if b[n] != self.setting[n]
        )
        parts = [self.setting["backend"], describe(asked, self.beside)]
        return ", ".join([*parts, *(f"{name} {self.setting[name]}" for name in named)])

    def of_start(self, index: int) -> NDArray[np.float64]:
        """Latencies of lone images that one start made, in the order of time."""
        taken = self.latency_s[self.start == index]
        return taken[np.isfinite(taken)]


@dataclass(frozen=True, slots=True)
class Matched:
    """Rows of both sides that belong together: indices [n] and the prompt's number [n]."""

    baseline: NDArray[np.int64]
    candidate: NDArray[np.int64]
    clusters: NDArray[np.int64]


def match_pairs(
    baseline: Side, candidate: Side, of: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None
) -> Matched:
    """Match rows by pair; `of` says which rows of either side take part (default: all).

    A pair that one side has several times (at several batch sizes) counts once, with its first.
    """
    sides = (baseline, candidate)
    masks = of if of is not None else tuple(np.ones(len(s.pairs), bool) for s in sides)
    rows = [np.flatnonzero(mask) for mask in masks]
    found = np.intersect1d(baseline.pairs[rows[0]], candidate.pairs[rows[1]], return_indices=True)
    mine, theirs = rows[0][found[1]], rows[1][found[2]]
    clusters = np.unique(candidate.prompts[theirs], return_inverse=True)[1]
    return Matched(mine, theirs, clusters)


def has_image(side: Side) -> NDArray[np.bool_]:
    """Which rows [n] have an image that quality comes from."""
    return np.array([image is not None for image in side.images], bool)


def same_files(baseline: Side, candidate: Side, matched: Matched) -> NDArray[np.bool_]:
    """Which matched pairs [n] have an image on both sides, and the very same file."""
    rows = zip(matched.baseline, matched.candidate, strict=True)
    images = ((baseline.images[i], candidate.images[j]) for i, j in rows)
    return np.array([a is not None and a == b for a, b in images], bool)


def match_sides(
    baselines: Sequence[Side], candidates: Sequence[Side]
) -> tuple[list[tuple[Side, Side]], list[Side]]:
    """Say which setting is held against which, and which ones of either have no counterpart.

    One baseline is held against every candidate. Of several, each candidate against the one that
    was asked the same, on the same backend where more than one was.

    Raises: ConfigError where nothing belongs together.
    """
    if len(baselines) == 1:
        return [(baselines[0], c) for c in candidates], []
    pairs: list[tuple[Side, Side]] = []
    for candidate in candidates:
        alike = [b for b in baselines if _asked(b) == _asked(candidate)]
        same = [b for b in alike if b.setting["backend"] == candidate.setting["backend"]]
        chosen = alike if len(alike) == 1 else same
        if len(chosen) == 1:
            pairs.append((chosen[0], candidate))
    taken = {id(side) for pair in pairs for side in pair}
    left = [s for s in (*baselines, *candidates) if id(s) not in taken]
    if not pairs:
        raise ConfigError(
            "nothing to compare: no setting of the candidate was asked what one of the baseline"
            f" was; baseline: {_listed(baselines)}; candidate: {_listed(candidates)}; compare"
            " studies with one setting each, or sweep the same settings in both"
        )
    return pairs, left


def read_sides(study: Any) -> list[Side]:
    """Read a study's settings as sides (`sd35bench.study.store.Study`).

    Of a setting that ran in several environments, the one with the most trials is taken: figures
    from unlike environments are never pooled. Which pairs the others have is kept beside.
    """
    table = read_table(study)
    floors, reader = _floors(study, table), cache(study.features)
    by_setting: dict[str, list[Row]] = {}
    for row in table.rows:
        by_setting.setdefault(row.setting["setting"], []).append(row)
    sides: list[Side] = []
    for rows in by_setting.values():
        row = max(rows, key=lambda r: len(r.records))
        others = [other for other in rows if other is not row]
        side = _with_elsewhere(_side(study, table, row, floors), table, others)
        sides.append(replace(side, sets=_sets(study, table, row, reader)))
    return told_apart(sides)


def told_apart(sides: Sequence[Side]) -> list[Side]:
    """Let the sides of one study know each other's settings, so that no two have one title."""
    settings = tuple(side.setting for side in sides)
    return [replace(side, beside=settings) for side in sides]


def merge_starts(side: Side, others: Sequence[Side]) -> Side:
    """Add other runs of the same setting in the same environment: their times, not their images.

    What ran in another environment is kept in mind as what a study has elsewhere is.
    """
    alike = [o for o in others if o.id == side.id]
    kept = [o for o in alike if o.environment == side.environment]
    apart = [o for o in alike if o.environment != side.environment]
    if apart:
        pairs = np.concatenate([side.elsewhere, *(o.pairs for o in apart)])
        differs = (*side.elsewhere_differs, *_unlike(side, [o.environment for o in apart]))
        names = tuple(dict.fromkeys(differs))
        side = replace(side, elsewhere=np.unique(pairs), elsewhere_differs=names)
    if not kept:
        return side
    parts = [side, *kept]
    offsets = np.cumsum([0, *(len(p.starts) for p in parts)])
    more = sum(len(o.pairs) for o in kept)
    start = [np.where(p.start < 0, -1, p.start + o) for p, o in zip(parts, offsets, strict=False)]
    return replace(
        side,
        pairs=np.concatenate([p.pairs for p in parts]),
        prompts=np.concatenate([p.prompts for p in parts]),
        failed=np.concatenate([p.failed for p in parts]),
        latency_s=np.concatenate([p.latency_s for p in parts]),
        start=np.concatenate(start),
        starts=tuple(s for p in parts for s in p.starts),
        metrics={n: np.append(v, np.full(more, np.nan)) for n, v in side.metrics.items()},
        sets={
            n: replace(v, rows=np.append(v.rows, np.zeros(more, bool)))
            for n, v in side.sets.items()
        },
        images=(*side.images, *(None for _ in range(more))),
    )


def _with_elsewhere(side: Side, table: Table, others: Sequence[Row]) -> Side:
    """Keep in mind what ran in other environments, which no figure of this side contains."""
    records = [r for row in others for r in row.records]
    ids = dict.fromkeys(r.session_id for r in records if r.session_id in table.sessions)
    differs = _unlike(side, [table.sessions[name].environment for name in ids])
    pairs = np.array([_hash(pair_key(r.trial)) for r in records], np.uint64)
    return replace(side, elsewhere=np.unique(pairs), elsewhere_differs=differs)


def _unlike(side: Side, places: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of what differs between a side's environment and others."""
    known = dict.fromkeys(k for place in (side.environment, *places) for k in place)
    here = side.environment
    return tuple(k for k in known if any(p.get(k) != here.get(k) for p in places))


def _side(study: Any, table: Table, row: Row, floors: Mapping[str, float]) -> Side:
    records = _in_time(row)
    ids = list(dict.fromkeys(r.session_id for r in records if r.session_id in table.sessions))
    number = {name: i for i, name in enumerate(ids)}
    timed = {r.trial.key for r in row.timed}
    judged = {r.trial.key for r in row.quality_records()}
    keys = [r.trial.key for r in records]
    latency = [
        r.timings.latency_s if r.timings is not None and r.trial.key in timed else np.nan
        for r in records
    ]
    return Side(
        study=study.name,
        setting={**row.setting, "weights": weights_text(row.records[0].trial.load)},
        environment=dict(table.sessions[ids[-1]].environment) if ids else {},
        pairs=np.array([_hash(pair_key(r.trial)) for r in records], np.uint64),
        prompts=np.array([_hash(cluster_key(r.trial)) for r in records], np.uint64),
        failed=_failed(table, records),
        latency_s=np.array(latency, np.float64),
        start=np.array([number.get(r.session_id, -1) for r in records], np.int64),
        starts=tuple(_start(table, name, records) for name in ids),
        metrics=_metrics(table, records, judged),
        images=tuple(r.image if k in judged else None for r, k in zip(records, keys, strict=True)),
        floor_levels=floors.get(row.id),
        random_weights=row.random_weights,
    )


def _in_time(row: Row) -> list[Record]:
    return sorted(row.records, key=lambda r: r.started_at)


def _sets(study: Any, table: Table, row: Row, reader: FeatureReader) -> dict[str, SetScore]:
    judged = {r.trial.key for r in row.quality_records()}
    return read_set_scores(study, table, _in_time(row), judged, reader)


def _start(table: Table, name: str, records: Sequence[Record]) -> Start:
    memories = [r.memory for r in records if r.session_id == name and r.memory is not None]
    vram = [m.peak_vram_bytes for m in memories if m.peak_vram_bytes is not None]
    return Start(
        id=name,
        started_at=table.sessions[name].started_at,
        peak_vram_bytes=max(vram, default=None),
        peak_rss_bytes=max((m.peak_rss_bytes for m in memories), default=None),
        speed=table.speed.get(name),
    )


def _failed(table: Table, records: Sequence[Record]) -> NDArray[np.bool_]:
    """Trials without a usable image; a file that was deleted later is no failure."""
    repeated = repeated_seeds([r for r in records if r.status is Status.OK])
    guards = [table.score(GUARD, r) for r in records]
    return np.array(
        [
            r.status is not Status.OK or r.image in repeated or (g is not None and not g.value)
            for r, g in zip(records, guards, strict=True)
        ],
        bool,
    )


def _metrics(
    table: Table, records: Sequence[Record], judged: set[str]
) -> dict[str, NDArray[np.float64]]:
    """Per-image metrics that have a value for at least one image; drift is a dimension of its own.

    Set metrics keep a value for no single image, so they are not among them.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for name in sorted(table.scores):
        if name == GUARD or name.split("_")[0] == "drift":
            continue
        scores = [table.score(name, r) if r.trial.key in judged else None for r in records]
        values = [np.nan if s is None or s.value is None else s.value for s in scores]
        column = np.array(values, np.float64)
        if np.isfinite(column).any():
            found[name] = column
    return found


def _floors(study: Any, table: Table) -> dict[str, float]:
    """Row id → upper end of the noise floor that the study measured for what the row was asked."""
    drift = drift_summary(study, table)
    noise = () if drift is None else drift.noise_floor
    measured: list[tuple[Any, float]] = [
        ([row.setting[k] for k in ASKED], end)
        for row in noise
        if (ends := row.figures["mean_abs"].ci95) is not None and (end := ends[1]) is not None
    ]
    found: dict[str, float] = {}
    for row in table.rows:
        asked = [row.setting[k] for k in ASKED]
        ends = [end for what, end in measured if what == asked]
        if ends:
            found[row.id] = max(ends)
    return found


def prompt_hash(prompt: str) -> int:
    """How a side keeps a text-to-image prompt."""
    return _hash((same_prompt(prompt), None))


def _hash(key: tuple[Any, ...]) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def _asked(side: Side) -> list[Any]:
    return [side.setting[k] for k in ASKED]


def _listed(sides: Sequence[Side]) -> str:
    names = [s.title for s in sides]
    return "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
