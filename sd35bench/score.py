"""Images of a study to scores in its store: each image is read once, and embedded once, ever.

Guards come first: an image that is constant, black or of the wrong size gets a refusal under the
name `guard` and no other score. What is there already is not made again, so scoring twice does
nothing, and a killed run loses at most the last `_FLUSH` images' work. Set metrics leave a row per
image that names its features' extractor and its reference; the distance is computed by `analysis`.
Drift holds an image against another one of the study, which is remembered from just before.

What is there is looked up in columns (`study.columns`): of a large study only records that
something is still wanted of are read as a whole, but for drift, which pairs all of them.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import GUARD, declared
from sd35bench.analysis.grouping import HELD_OUT, of_requests, request_codes, setting_codes, tasks
from sd35bench.analysis.scores import ScoreIndex, ScoreLike
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
    is_own,
    judged,
)
from sd35bench.metrics.reference import keep_reference
from sd35bench.metrics.selection import select_metrics
from sd35bench.study.columns import (
    Places,
    Some,
    among,
    coded,
    grouped,
    is_ref,
    is_text,
    numbers,
    pick,
    samples,
    split,
    texts,
)
from sd35bench.study.store import Score, Study
from sd35bench.types import Record, Status
from sd35bench.workers.waiting import result_of

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
    """What is there, what is missing, and what was made.

    Records of `ok`, all that ended OK with an image, are known by their places in it.
    """

    def __init__(self, study: Study, by_name: bool, spread: "Spread | None") -> None:
        self.study, self.by_name, self.spread = study, by_name, spread
        self.out: deque[tuple[str, list[str], Future[np.ndarray]]] = deque()
        everything = study.records()
        made = is_text(everything, "status", Status.OK) & (coded(everything, "image")[0] >= 0)
        self.ok: Some = pick(everything, made)
        self.index = ScoreIndex(study.scores())
        guards = self.index.found(GUARD, self.ok)
        self.bad = guards.there & ~(np.abs(guards.values) > 0.0)
        self.excluded: dict[Where, str] = {
            (s.key, s.image): str(s.detail["reason"]) for s in self.index.refusals(GUARD)
        }
        gone = ~among(self.ok, "image", study.images().whole)
        self.bad |= gone
        named = (texts(pick(self.ok, gone), name).tolist() for name in ("key", "image"))
        self.missing_files: set[Where] = {*zip(*named, strict=True)}
        self.scored = {GUARD: guards.there}
        self.kept: dict[str, dict[Where, Score]] = defaultdict(dict)
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

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each trial's record, by key."""
        return {key: place for place, key in enumerate(texts(self.ok, "key").tolist())}

    @property
    def sound(self) -> Places:
        """Places of the records whose image nothing speaks against so far."""
        return np.flatnonzero(~self.bad)

    @property
    def records(self) -> Some:
        """OK records whose image nothing speaks against so far."""
        return pick(self.ok, self.sound)

    def add(self, metric: Metric) -> None:
        """Take a metric in, with the features that are kept for it."""
        self.metrics[metric.name], self.declared[metric.name] = metric, declared(metric)
        if isinstance(metric, FeatureMetric | SetMetric):
            metric.extractor.spread = self.spread
        if isinstance(metric, PairMetric):
            self.pairings[metric.name] = metric.pairing(self.records)
        else:
            found = self.index.found(metric.name, self.ok)
            by_features = isinstance(metric, FeatureMetric)
            about = {"features": metric.extractor.name} if by_features else {}
            self.scored[metric.name] = found.has(about)
        if isinstance(metric, SetMetric) or (
            isinstance(metric, FeatureMetric) and len(self.todo(metric))
        ):
            name = metric.extractor.name
            if name not in self.features:
                self.features[name] = self.study.features(name)

    def todo(self, metric: Metric) -> Places:
        """Records that a metric applies to and has no score for, from these very weights."""
        sound = self.sound
        if isinstance(metric, PairMetric):
            return sound[[self._stale(metric, r) for r in pick(self.ok, sound)]]
        return self._judged(metric, sound[~self.scored[metric.name][sound]])

    def _judged(self, metric: Metric, places: Places) -> Places:
        return places[judged(metric, pick(self.ok, places))[1]]

    def _score(self, metric: str, where: Where) -> ScoreLike | None:
        """The last score of an image, of this run or an earlier one."""
        return self.kept[metric].get(where, self.index.get(metric, {}).get(where))

    def _stale(self, metric: PairMetric, record: Record) -> bool:
        """Whether a record has a reference, and no score against this very one."""
        reference = self._beside(metric, record)
        if reference is None:
            return False
        score = self._score(metric.name, _where(record))
        about = metric.about(record, reference)
        return score is None or any(score.detail.get(k) != v for k, v in about.items())

    def _beside(self, metric: PairMetric, record: Record) -> Record | None:
        """The best reference whose image is there and that nothing speaks against so far."""
        for other in self.pairings[metric.name].get(record.trial.key, ()):
            if self.bad[self.places[other.trial.key]]:
                continue
            try:
                self.study.image_path(_where(other)[1])
            except StoreError:
                self._miss(other)
                continue
            return other
        return None

    def _miss(self, record: Record) -> None:
        """Take in that a record's image is not there, or not whole."""
        self.missing_files.add(_where(record))
        self.bad[self.places[record.trial.key]] = True

    # Looking at images -------------------------------------------------------------------------

    def look(self, progress: Progress | None) -> None:
        """Read every image that something still needs, once, in batches of one size."""
        wanted = {GUARD: ~self.bad & ~self.scored[GUARD]}
        for metric in self.metrics.values():
            unseen = self._unseen(metric)
            if isinstance(metric, ImageMetric):
                metric.prepare(pick(self.ok, unseen))
            wanted[metric.name] = np.zeros(len(self.ok), bool)
            wanted[metric.name][unseen] = True
        near = np.flatnonzero(np.logical_or.reduce([*wanted.values()]))
        sizes = self._sizes(near)
        order = np.lexsort((request_codes(pick(self.ok, near)), sizes))
        seen = 0
        for batch in _same_size(near[order], sizes[order]):
            self._batch(batch, wanted)
            seen += len(batch)
            if sum(map(len, self.rows.values())) + sum(map(len, self.fresh.values())) > _FLUSH:
                self.flush()
            if progress is not None:
                progress(seen, len(near))
        self._take_rows(0)
        self.flush()

    def _sizes(self, places: Places) -> Places:
        """A number for the size that each record asked for, which sorts as width and height do."""
        codes, sizes = of_requests(
            pick(self.ok, places), "size", lambda r: r.width << 32 | r.height
        )
        return sizes.astype(np.int64)[codes]

    def _unseen(self, metric: Metric) -> Places:
        """Records whose image a metric, or what extracts its features, has to look at.

        A set metric needs all features, also where its rows are there: their file may be damaged.
        """
        if not isinstance(metric, FeatureMetric | SetMetric):
            return self.todo(metric)
        if isinstance(metric, SetMetric):
            wanted = self._judged(metric, self.sound)
        else:
            wanted = self.todo(metric)
        kept = self.features.get(metric.extractor.name, {})
        return wanted[~among(pick(self.ok, wanted), "image", kept)]

    def _batch(self, places: Places, wanted: Mapping[str, NDArray[np.bool_]]) -> None:
        read = zip(places.tolist(), pick(self.ok, places), strict=True)
        pairs = [(p, r, i) for p, r in read if (i := self._healthy(r)) is not None]
        for metric in self.metrics.values():
            part = [(r, i) for place, r, i in pairs if wanted[metric.name][place]]
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
        try:
            image = self.read(record.image)
        except (StoreError, OSError):
            self._miss(record)
            return None
        place = self.places[record.trial.key]
        if not self.scored[GUARD][place]:
            reason = guard_image(image, record)
            detail = {} if reason is None else {"reason": reason}
            self.keep(GUARD, record, Value(float(reason is None), detail))
            if reason is not None:
                self.excluded[_where(record)] = reason
                self.bad[place] = True
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
            self._keep_rows(name, digests, result_of(rows))

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
            there = self._score(metric.name, _where(record))
            paired = record.trial.key in self.pairings[metric.name]
            if there is not None and there.value is not None and not paired:
                self.keep(metric.name, record, Value(None, {"reason": "no reference for it"}))

    def _score_features(self, metric: FeatureMetric) -> None:
        places = self.todo(metric)
        for start in range(0, len(places), _FLUSH):
            part = [*pick(self.ok, places[start : start + _FLUSH])]
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
        places = self._judged(metric, self.sound)
        mine = pick(self.ok, places)
        held_out = is_ref(mine, "split", HELD_OUT)
        scores = self.index.found(metric.name, mine)
        for members in split(grouped(tasks(mine)[0], held_out, self._sizes(places))[0]):
            group = pick(mine, members)
            try:
                detail = self._reference(metric, group) | self.declared[metric.name]
            except MetricError as exc:
                if self.by_name:
                    raise
                # A default that cannot be had must not cost the scores that can.
                self.refused[metric.name] = str(exc)
                continue
            for record in pick(group, ~scores.has(detail, whole=True)[members]):
                self.keep(metric.name, record, Value(None, detail))

    def _reference(self, metric: SetMetric, group: Some) -> dict[str, Any]:
        """Make the reference if it is missing and some setting has images enough to use it."""
        extractor, least = metric.extractor.name, metric.min_images
        detail: dict[str, Any] = {"extractor": extractor, "reference": None, "min_images": least}
        if metric.statistic is not None:
            detail |= {"statistic": metric.statistic, "parameters": metric.parameters}
        alike, _ = grouped(setting_codes(group)[0], numbers(group, "batch_size"))
        if np.bincount(alike).max() < least:
            return detail
        asked = samples(group) if is_own(metric) else group
        name = f"{extractor}-{metric.reference_key(asked)}"
        keep_reference(self.study, metric, name, asked)
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
        self.kept[metric][key, image] = score
        if metric in self.scored:
            self.scored[metric][self.places[key]] = True
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
            "images": len(self.sound),
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


def _same_size(places: Places, sizes: Places) -> Iterator[Places]:
    """Batches of at most `_BATCH` neighbours of one size."""
    for part in np.split(places, np.flatnonzero(np.diff(sizes)) + 1):
        for start in range(0, len(part), _BATCH):
            yield part[start : start + _BATCH]
