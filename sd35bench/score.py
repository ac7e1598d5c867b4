"""Images of a study to scores in its store: each image is read once, and embedded once, ever.

Guards come first: an image that is constant, black or of the wrong size gets a refusal under the
name `guard` and no other score. What is there already is not made again, so scoring twice does
nothing, and a killed run loses at most the last `_FLUSH` images' work. Set metrics leave a row per
image that names its features' extractor and its reference; the distance is computed by `analysis`.
Drift holds an image against another one of the study, which is remembered from just before.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35bench.analysis.facts import GUARD, declared
from sd35bench.analysis.settings import HELD_OUT, setting_key
from sd35bench.analysis.table import DAMAGED, MISSING
from sd35bench.errors import MetricError, StoreError
from sd35bench.metrics.base import (
    Extractor,
    FeatureMetric,
    Image,
    ImageMetric,
    Latents,
    Metric,
    Pair,
    PairMetric,
    SetMetric,
    Value,
    judges,
)
from sd35bench.metrics.reference import keep_reference
from sd35bench.metrics.selection import select_metrics
from sd35bench.store import Score, Study
from sd35bench.types import Record, Status

if TYPE_CHECKING:
    from sd35bench.workers.features import Spread

Progress = Callable[[int, int], None]
"""Called with images done and images to do."""

_BATCH = 64
# Images of one request are neighbours, so that a reference is read once: as many backends as that
# may share a request before it is read again.
_REMEMBERED = 32
_FLUSH = 1024
# An 8-bit JPEG or WEBP of one flat colour may differ by a level or two within itself.
_FLAT_LEVELS = 3
_BLACK_LEVEL = 8

Where = tuple[str, str]
"""Trial key and image digest."""


def score_study(
    study: Study,
    metrics: Sequence[str | Metric] | None = None,
    progress: Progress | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    spread: "Spread | None" = None,
) -> dict[str, Any]:
    """Add the scores that are missing; ``metrics=None`` means each model's and task's defaults.

    Args:
        study: where the images are and the scores go.
        metrics: names (`fid`, `clip_score_nano` …) or loaded metrics.
        progress: called after each batch of images.
        options: by metric family, what its module's `load` takes (``{"fid": {"reference": …}}``).
        spread: workers that embed images; ``None`` embeds them here. This process alone writes.

    Returns: ``{"study", "images", "scored": {metric: new}, "embedded": {extractor: new},
    "excluded": {reason: count}, "damaged": [files], "refused": {metric: why}, "notes": {metric:
    what it leaves out}, "total"}``; `total` counts new scores and features, 0 when nothing was
    missing.

    Raises: MetricError where a metric that was asked for by name cannot be had, or is one of
    quality and all there is was made with random weights; a default like that is in `refused`.
    """
    job = _Job(study, metrics is not None, spread)
    selection = select_metrics(metrics, job.records, {} if options is None else options)
    job.refused = selection.refused
    for metric in selection.metrics:
        job.add(metric)
    job.look(progress)
    job.finish()
    return job.counts()


def guard_image(image: Image, record: Record) -> str | None:
    """Say why an image must not be scored, or ``None``.

    A service's size was checked when it came: it can be one that `remote.accept_size` takes, or of
    a model that cannot be told any.
    """
    request = record.trial.request
    if record.remote is None and image.shape[:2] != (request.height, request.width):
        height, width = image.shape[:2]
        return f"wrong size {width}x{height}, asked {request.width}x{request.height}"
    if int(image.max()) < _BLACK_LEVEL:
        return "black image"
    pixels = image.reshape(-1, 3)
    if int((pixels.max(0) - pixels.min(0)).max()) <= _FLAT_LEVELS:
        return "constant image"
    return None


class _Job:
    """What is there, what is missing, and what was made."""

    def __init__(self, study: Study, by_name: bool, spread: "Spread | None") -> None:
        self.study, self.by_name, self.spread = study, by_name, spread
        self.out: deque[tuple[str, list[str], Future[np.ndarray]]] = deque()
        self.ok = [r for r in study.records() if r.status is Status.OK and r.image is not None]
        self.done: dict[str, dict[Where, Score]] = defaultdict(dict)
        for score in study.scores():
            self.done[score.metric][score.key, score.image] = score
        self.excluded = {w: str(s.detail["reason"]) for w, s in self._guards() if not s.value}
        whole = study.images().whole
        self.missing_files = {_where(r) for r in self.ok if r.image not in whole}
        self.made: Counter[str] = Counter()
        self.embedded: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.metrics: dict[str, Metric] = {}
        self.declared: dict[str, dict[str, Any]] = {}
        self.pairings: dict[str, Mapping[str, Sequence[Record]]] = {}
        self.read = lru_cache(maxsize=_BATCH + _REMEMBERED)(study.read_image)
        self.features: dict[str, dict[str, np.ndarray]] = {}
        self.rows: dict[str, list[Score]] = defaultdict(list)
        self.fresh: dict[str, list[tuple[str, np.ndarray]]] = defaultdict(list)

    def _guards(self) -> Iterable[tuple[Where, Score]]:
        return list(self.done[GUARD].items())

    @property
    def records(self) -> list[Record]:
        """OK records whose image nothing speaks against so far."""
        out = self.excluded.keys() | self.missing_files
        return [r for r in self.ok if _where(r) not in out]

    def add(self, metric: Metric) -> None:
        """Take a metric in, with the features that are kept for it."""
        self.metrics[metric.name], self.declared[metric.name] = metric, declared(metric)
        if isinstance(metric, FeatureMetric | SetMetric):
            metric.extractor.spread = self.spread
        if isinstance(metric, PairMetric):
            self.pairings[metric.name] = metric.pairing(self.records)
        if isinstance(metric, SetMetric) or (
            isinstance(metric, FeatureMetric) and self.todo(metric)
        ):
            name = metric.extractor.name
            if name not in self.features:
                self.features[name] = self.study.features(name)

    def todo(self, metric: Metric) -> list[Record]:
        """Records that a metric applies to and has no score for, from these very weights."""
        done = self.done[metric.name]
        if isinstance(metric, FeatureMetric):
            name = metric.extractor.name
            done = {w: s for w, s in done.items() if s.detail.get("features") == name}
        if isinstance(metric, PairMetric):
            return [r for r in self.records if self._stale(metric, r)]
        return [r for r in self.records if _where(r) not in done and judges(metric, r)]

    def _stale(self, metric: PairMetric, record: Record) -> bool:
        """Whether a record has a reference, and no score against this very one."""
        reference = self._beside(metric, record)
        if reference is None:
            return False
        score = self.done[metric.name].get(_where(record))
        about = metric.about(record, reference)
        return score is None or any(score.detail.get(k) != v for k, v in about.items())

    def _beside(self, metric: PairMetric, record: Record) -> Record | None:
        """The best reference whose image is there and that nothing speaks against so far."""
        for other in self.pairings[metric.name].get(record.trial.key, ()):
            where = _where(other)
            if where in self.excluded or where in self.missing_files:
                continue
            try:
                self.study.image_path(where[1])
            except StoreError:
                self.missing_files.add(where)
                continue
            return other
        return None

    # Looking at images -------------------------------------------------------------------------

    def look(self, progress: Progress | None) -> None:
        """Read every image that something still needs, once, in batches of one size."""
        needs: dict[Where, list[str]] = defaultdict(list)
        by_where = {_where(r): r for r in self.records}
        for where in by_where:
            if where not in self.done[GUARD]:
                needs[where].append(GUARD)
        for metric in self.metrics.values():
            unseen = list(self._unseen(metric))
            if isinstance(metric, ImageMetric):
                metric.prepare(unseen)
            for record in unseen:
                needs[_where(record)].append(metric.name)
        place: dict[Any, int] = {}
        for record in by_where.values():
            place.setdefault(record.trial.request, len(place))
        ordered = [by_where[w] for w in needs]
        ordered.sort(key=lambda r: (_size(r), place[r.trial.request]))
        seen = 0
        for batch in _same_size(ordered):
            self._batch(batch, needs)
            seen += len(batch)
            if sum(map(len, self.rows.values())) + sum(map(len, self.fresh.values())) > _FLUSH:
                self.flush()
            if progress is not None:
                progress(seen, len(ordered))
        self._take_rows(0)
        self.flush()

    def _unseen(self, metric: Metric) -> list[Record]:
        """Records whose image a metric, or what extracts its features, has to look at.

        A set metric needs all features, also where its rows are there: their file may be damaged.
        """
        if not isinstance(metric, FeatureMetric | SetMetric):
            return self.todo(metric)
        if isinstance(metric, SetMetric):
            wanted = [r for r in self.records if judges(metric, r)]
        else:
            wanted = self.todo(metric)
        kept = self.features.get(metric.extractor.name, {})
        return [r for r in wanted if r.image not in kept]

    def _batch(self, records: list[Record], needs: Mapping[Where, list[str]]) -> None:
        pairs = [(r, i) for r in records if (i := self._healthy(r)) is not None]
        for metric in self.metrics.values():
            part = [(r, i) for r, i in pairs if metric.name in needs[_where(r)]]
            if not part:
                continue
            if isinstance(metric, ImageMetric):
                self._score_images(metric, part)
            elif isinstance(metric, PairMetric):
                self._score_pairs(metric, part)
            elif isinstance(metric, FeatureMetric | SetMetric):
                self._embed(metric.extractor, part)

    def _healthy(self, record: Record) -> Image | None:
        """Read an image and guard it; ``None`` if it must not be scored."""
        assert record.image is not None
        where = _where(record)
        try:
            image = self.read(record.image)
        except (StoreError, OSError):
            self.missing_files.add(where)
            return None
        if where not in self.done[GUARD]:
            reason = guard_image(image, record)
            detail = {} if reason is None else {"reason": reason}
            self.keep(GUARD, record, Value(float(reason is None), detail))
            if reason is not None:
                self.excluded[where] = reason
                return None
        return image

    def _score_images(self, metric: ImageMetric, part: list[tuple[Record, Image]]) -> None:
        records, images = [r for r, _ in part], [i for _, i in part]
        inits: list[Image | None] = [None] * len(part)
        if metric.needs_init:
            digests = [r.trial.request.init_image for r in records]
            inits = [None if d is None else self.study.read_init(d) for d in digests]
        for record, value in zip(records, metric.score_images(images, records, inits), strict=True):
            self.keep(metric.name, record, value)

    def _score_pairs(self, metric: PairMetric, part: list[tuple[Record, Image]]) -> None:
        for record, image in part:
            reference = self._beside(metric, record)
            while reference is not None and (other := self._healthy(reference)) is None:
                reference = self._beside(metric, record)  # the next best
            if reference is None:
                continue
            latents = [self._latents(r) for r in (record, reference)]
            pair = Pair(
                image=image, reference=other, latents=latents[0], reference_latents=latents[1]
            )
            value = metric.score_pair(pair)
            detail = value.detail | metric.about(record, reference)
            self.keep(metric.name, record, Value(value.value, detail))

    def _latents(self, record: Record) -> Latents | None:
        try:
            return None if record.latents is None else self.study.read_latents(record.latents)
        except StoreError:
            return None  # they are a side of drift, not what it stands on

    def _embed(self, extractor: Extractor, part: list[tuple[Record, Image]]) -> None:
        name = extractor.name
        kept, out = self.features[name], {d for n, ds, _ in self.out if n == name for d in ds}
        images = {r.image: i for r, i in part if r.image is not None}
        new = {d: i for d, i in images.items() if d not in kept and d not in out}
        if not new:
            return
        self.embedded[name] += len(new)
        if self.spread is None:
            self._keep_rows(name, list(new), extractor.embed(list(new.values())))
            return
        files = [self.study.read_image_file(digest) for digest in new]
        self.out.append((name, list(new), self.spread.ask(extractor, files)))
        self._take_rows(self.spread.most_out)

    def _take_rows(self, most: int) -> None:
        """Wait, in the order of asking, until at most `most` batches are with workers."""
        while len(self.out) > most:
            name, digests, rows = self.out.popleft()
            self._keep_rows(name, digests, rows.result())

    def _keep_rows(self, name: str, digests: list[str], rows: np.ndarray) -> None:
        for digest, row in zip(digests, rows, strict=True):
            self.features[name][digest] = row
            self.fresh[name].append((digest, row))

    # From features -----------------------------------------------------------------------------

    def finish(self) -> None:
        """Score what needs features only, and give set metrics their reference."""
        for metric in self.metrics.values():
            if isinstance(metric, FeatureMetric):
                self._score_features(metric)
            elif isinstance(metric, SetMetric):
                self._place(metric)
            elif isinstance(metric, PairMetric):
                self._withdraw(metric)
        self.flush()

    def _withdraw(self, metric: PairMetric) -> None:
        """Take back scores of records that have no reference any more, or have become it."""
        for record in self.records:
            there = self.done[metric.name].get(_where(record))
            paired = record.trial.key in self.pairings[metric.name]
            if there is not None and there.value is not None and not paired:
                self.keep(metric.name, record, Value(None, {"reason": "no reference for it"}))

    def _score_features(self, metric: FeatureMetric) -> None:
        records = self.todo(metric)
        for start in range(0, len(records), _FLUSH):
            part = records[start : start + _FLUSH]
            kept = self.features[metric.extractor.name]
            rows = np.stack([kept[r.image] for r in part if r.image is not None])
            for record, value in zip(part, metric.score_features(rows, part), strict=True):
                detail = value.detail | {"features": metric.extractor.name}
                self.keep(metric.name, record, Value(value.value, detail))

    def _place(self, metric: SetMetric) -> None:
        """Name extractor and reference in a row per image.

        One reference per task and size, held-out prompts apart: settings that were not made on
        them would lie farther from a reference that has them.
        """
        groups: dict[Any, list[Record]] = defaultdict(list)
        for record in self.records:
            if judges(metric, record):
                held_out = record.trial.prompt.split == HELD_OUT
                groups[record.trial.request.task, held_out, *_size(record)].append(record)
        done = self.done[metric.name]
        for group in groups.values():
            try:
                detail = self._reference(metric, group) | self.declared[metric.name]
            except MetricError as exc:
                if self.by_name:
                    raise
                # A default that cannot be had must not cost the scores that can.
                self.refused[metric.name] = str(exc)
                continue
            for record in group:
                there = done.get(_where(record))
                if there is None or there.detail != detail:
                    self.keep(metric.name, record, Value(None, detail))

    def _reference(self, metric: SetMetric, group: list[Record]) -> dict[str, Any]:
        """Make the reference if it is missing and some setting has images enough to use it."""
        extractor, least = metric.extractor.name, metric.min_images
        detail: dict[str, Any] = {"extractor": extractor, "reference": None, "min_images": least}
        if metric.statistic is not None:
            detail |= {"statistic": metric.statistic, "parameters": metric.parameters}
        sizes = Counter((setting_key(r.trial), r.trial.batch_size) for r in group)
        if max(sizes.values()) < least:
            return detail
        name = f"{extractor}-{metric.reference_key(group)}"
        keep_reference(self.study, metric, name, group)
        return detail | {"reference": name}

    # Keeping -----------------------------------------------------------------------------------

    def keep(self, metric: str, record: Record, value: Value) -> None:
        """Queue one score for the store."""
        key, image = _where(record)
        if value.value is not None and not isfinite(value.value):
            value = Value(None, value.detail | {"reason": f"the metric gave {value.value}"})
        detail = value.detail | self.declared.get(metric, {})
        score = Score(metric=metric, key=key, image=image, value=value.value, detail=detail)
        self.rows[metric].append(score)
        self.done[metric][key, image] = score
        self.made[metric] += metric != GUARD

    def flush(self) -> None:
        """Write what is queued: features first, since scores refer to them."""
        for extractor, pairs in self.fresh.items():
            digests, rows = [d for d, _ in pairs], np.stack([row for _, row in pairs])
            self.study.put_features(extractor, digests, rows)
        self.fresh.clear()
        for metric, scores in self.rows.items():
            self.study.append_scores(metric, scores)
        self.rows.clear()

    def counts(self) -> dict[str, Any]:
        """Summarise what was done."""
        scored = {name: n for name, n in self.made.items() if n}
        excluded = Counter(self.excluded.values())
        named = {image for _, image in self.missing_files}
        damaged_files = self.study.images().damaged if named else ()
        paths = [path for path in damaged_files if path.name.partition(".")[0] in named]
        damaged = {path.name.partition(".")[0] for path in paths}
        for _, image in self.missing_files:
            excluded[DAMAGED if image in damaged else MISSING] += 1
        return {
            "study": self.study.name,
            "images": len(self.records),
            "scored": scored,
            "embedded": dict(self.embedded),
            "excluded": dict(excluded),
            "damaged": sorted(str(path.relative_to(self.study.path)) for path in paths),
            "refused": self.refused,
            "notes": {name: m.note for name, m in self.metrics.items() if m.note},
            "total": sum(scored.values()) + sum(self.embedded.values()),
        }


def _where(record: Record) -> Where:
    return record.trial.key, str(record.image)


def _size(record: Record) -> tuple[int, int]:
    return record.trial.request.width, record.trial.request.height


def _same_size(records: Sequence[Record]) -> Iterable[list[Record]]:
    """Batches of at most `_BATCH` neighbours of one size."""
    batch: list[Record] = []
    for record in records:
        if batch and (len(batch) == _BATCH or _size(batch[0]) != _size(record)):
            yield batch
            batch = []
        batch.append(record)
    if batch:
        yield batch
