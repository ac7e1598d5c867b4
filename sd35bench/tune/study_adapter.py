"""Wishes turned into ordinary trials of an ordinary study, and read back from its records.

One purchase is one plan per backend: all settings of the round in blocks of one prompt each, so a
machine that slows down touches all of them alike. Every image is made alone, so every image is a
timed one too. A purchase loads each of its backends once: few, large rounds, not a warm worker,
keep the share of loading small (docs/log.md has what a load costs).
"""

import fcntl
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sd35bench.analysis.facts import facts
from sd35bench.analysis.grouping import PairKey, pair_prompt, setting_key
from sd35bench.analysis.pairs import EDIT_QUALITY, Candidate, Comparison, candidates, compare
from sd35bench.analysis.table import Row, Table, read_table
from sd35bench.disk import open_lock, try_flock
from sd35bench.errors import ConfigError, StudyLocked
from sd35bench.fields import FIELDS
from sd35bench.plan import SETTING_AXES, AxisValue, Batch, Plan, Sweep, expand, idle_guidance
from sd35bench.prompts import PromptItem
from sd35bench.recommend.named_defaults import NamedDefault, asks_for, check_name
from sd35bench.recommend.pareto import peak_bytes
from sd35bench.recommend.profiles import BEST, Profile
from sd35bench.study.store import Study
from sd35bench.tune.race import Evidence
from sd35bench.tune.space import Point, Space
from sd35bench.types import PromptRef, Record, Request, Scalar, Task, Trial, content_hash

_WAIT_S = 0.5
_MOSTLY = 0.5
"""A setting of whose images fewer than this share may be judged is one that failed."""

SourceKey = tuple[Scalar, Scalar]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One backend with one preset of skip-layer guidance, frozen and validated.

    `sweep` has one value on every axis but the searched ones; `values` maps an axis's values to
    what a request says for them (asking for the model's own shift is asking for none).
    """

    sweep: Sweep
    usd_per_image: float
    values: Mapping[str, Mapping[Scalar, AxisValue]]


class StudyLab:
    """Makes images of settings on prompts, in a study, and says what they gave."""

    def __init__(
        self,
        study: Study,
        space: Space,
        sources: Mapping[SourceKey, Source],
        run: Callable[[Plan], None],
        score: Callable[[], Any],
    ) -> None:
        """`sources` by backend and preset; `run` makes a plan, `score` scores what is missing."""
        self._study, self._space, self._sources = study, space, sources
        self._run, self._score = run, score
        self._any = next(iter(sources.values()))
        self._items: tuple[PromptItem, ...] = self._any.sweep.prompts
        self._trials: dict[Point, Trial] = {}
        self._numbers: dict[Any, int] = {}
        self._metric: str | None = None
        self._scored = False
        self._found: dict[str, Candidate] = {}
        for number, trial in enumerate(self._first_trials()):
            key = (trial.request.prompt, trial.request.init_image)
            self._numbers.setdefault(key, number)

    @property
    def space(self) -> Space:
        """What is searched."""
        return self._space

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(self._items)

    @property
    def prompt_ref(self) -> PromptRef:
        """Where the prompts are from: the first one's."""
        return self._items[0].ref

    @property
    def task(self) -> Task:
        """Image-to-image where the prompts have init images."""
        edit = self._items[0].init_image is not None
        return Task.IMAGE_TO_IMAGE if edit else Task.TEXT_TO_IMAGE

    @property
    def images_per_prompt(self) -> int:
        """Seeds and negative prompts."""
        axes = self._any.sweep.axes
        return len(axes.get("seed", (0,))) * len(axes.get("negative_prompt", ("",)))

    @property
    def objectives(self) -> int:
        """3 where a backend costs money, else 2."""
        return 3 if any(s.usd_per_image > 0 for s in self._sources.values()) else 2

    @property
    def metric(self) -> str:
        """The objective, known once something was scored."""
        assert self._metric is not None
        return self._metric

    @property
    def bounds(self) -> tuple[float, float] | None:
        """What the objective can be at least and at most."""
        return (0.0, 1.0) if self.metric == EDIT_QUALITY else facts(self.metric).bounds

    def margin(self, profile: Profile) -> float:
        """The profile's margin for the objective."""
        return profile.margin(self.metric)

    def reference(self, profile: Profile) -> Point | None:
        """The named default that the profile holds settings against; ``None``: the best.

        Raises: ConfigError where it is not in the space.
        """
        return reference_point(profile, self._space, self.task, lambda p: self.trial(p).request)

    def identity(self, point: Point) -> Hashable:
        """Equal for points that ask for the same images: a strength counts as its steps."""
        trial = self.trial(point)
        request = replace(trial.request, prompt_strength=None)
        return (trial.load.key, request, trial.request.effective_steps)

    def trial(self, point: Point) -> Trial:
        """A point's trial on the first prompt."""
        if point not in self._trials:
            self._trials[point] = self._expand(point, self._items[:1]).trials[0]
        return self._trials[point]

    def plans(self, points: Sequence[Point], prompts: range) -> list[Plan]:
        """One plan per load, of all these settings on these prompts."""
        items = self._items[prompts.start : prompts.stop]
        by_load: dict[str, list[Plan]] = {}
        for point in points:
            plan = self._expand(point, items)
            by_load.setdefault(plan.load.key, []).append(plan)
        return [self._merged(plans) for plans in by_load.values()]

    def make(self, points: Sequence[Point], prompts: range) -> None:
        """Make and score what is missing; waits where another worker makes it already.

        Raises: what running and scoring raise.
        """
        plans = self.plans(points, prompts)
        if len(plans) > 1:  # workers that share a study start with different backends
            turn = time.time_ns() // 1000 % len(plans)
            plans = plans[turn:] + plans[:turn]
        for plan in plans:
            self._patiently(plan)
        self.score()

    def score(self) -> None:
        """Score what is missing; waits where another worker does."""
        with open_lock(self._study.path / ".lock-score") as handle:
            while not try_flock(handle, fcntl.LOCK_EX):
                time.sleep(_WAIT_S)
            self._score()
            self._scored = True

    def seen(self, points: Sequence[Point]) -> dict[Point, Evidence]:
        """What the study's records and scores say of these settings.

        Raises: ConfigError where the same setting was run in two environments, or where nothing
        that can judge these images was scored.
        """
        wanted = {setting_key(self.trial(p)): p for p in points}
        table = read_table(self._study)
        rows: dict[str, Row] = {}
        for row in table.rows:
            name = row.setting["setting"]
            if name not in wanted or not row.usable:
                continue
            if name in rows:
                raise ConfigError(
                    f"study {self._study.name!r} was made in two environments (another machine, or"
                    " other code): their figures are not comparable; use another study name"
                )
            rows[name] = row
        self._found = self._judged(table, list(rows.values())) if rows else {}
        return {p: self._evidence(p, self._found.get(name)) for name, p in wanted.items()}

    def compared(self, points: Sequence[Point], prompts: int) -> tuple[list[Point], Comparison]:
        """What `seen` saw last of these settings, as `recommend` compares them.

        On the first prompts alone, whatever else the study has. Settings with too few images are
        left out. Returns: the points of the comparison's candidates, and the comparison.
        """
        names = {setting_key(self.trial(p)): p for p in points}
        found = [self._early(self._found[name], prompts) for name in names if name in self._found]
        compared = compare(self.metric, found) if len(found) > 1 else self._alone(found[0])
        return [names[c.row.setting["setting"]] for c in compared.candidates], compared

    def _early(self, found: Candidate, prompts: int) -> Candidate:
        """A candidate as if only the first so many prompts had been made."""

        def is_early(prompt: str, init: str | None) -> bool:
            return self._numbers.get((prompt, init), prompts) < prompts

        def early(records: Sequence[Record]) -> list[Record]:
            asked = [r.trial.request for r in records]
            kept = [is_early(request.prompt, request.init_image) for request in asked]
            return [r for r, keep in zip(records, kept, strict=True) if keep]

        row = replace(
            found.row,
            records=early(found.row.records),
            timed=early(found.row.timed),
            usable=early(found.row.usable),
        )
        return replace(
            found,
            row=row,
            quality={k: v for k, v in found.quality.items() if is_early(*pair_prompt(k))},
            latency_s={k: v for k, v in found.latency_s.items() if is_early(*pair_prompt(k))},
        )

    def _alone(self, found: Candidate) -> Comparison:
        """One setting, which has nothing to be compared with."""
        outcomes = found.outcomes()
        keys = list(outcomes)
        order: dict[int, int] = {}
        prompts = [order.setdefault(self._numbers[pair_prompt(k)], len(order)) for k in keys]
        quality = np.array([list(outcomes.values())])
        return Comparison(self.metric, [found], quality, keys, np.array(prompts, np.int64), [])

    def _judged(self, table: Table, rows: list[Row]) -> dict[str, Candidate]:
        try:
            self._metric, judged = candidates(table, rows, self.task)
        except ConfigError:
            if self._scored:
                raise
            return {}  # a killed worker, or a living one, made them and has not scored them yet
        return {c.row.setting["setting"]: c for c in judged}

    def _source(self, point: Point) -> Source:
        preset = self._space.value(point, "skip_layer_guidance")
        return self._sources[self._space.value(point, "backend"), preset]

    def _expand(self, point: Point, items: tuple[PromptItem, ...]) -> Plan:
        source = self._source(point)
        axes = dict(source.sweep.axes)
        for name, value in self._space.named(point).items():
            if name in source.values:
                key = "skip_layer_guidance" if name == "skip_layer_scale" else name
                axes[key] = (source.values[name][value],)
        (cfg,) = axes["cfg"]
        assert isinstance(cfg, int | float)
        if cfg <= 1:
            axes["cfg"] = (1.0,)  # guidance is off below too: one image, one key
        setting = {name: axes[name][0] for name in SETTING_AXES if name in axes}
        for name in idle_guidance(setting, items[0].init_image is not None):
            axes[name] = (FIELDS[name].quiet,)
        return expand(replace(source.sweep, axes=axes, prompts=items, notes=()))

    def _merged(self, plans: Sequence[Plan]) -> Plan:
        """Many settings' plans as one: a block per prompt and seed, each in random order."""
        seed = self._any.sweep.order_seed
        keyed = [
            (_block(seed, b), content_hash(b.trials[0].key), b) for p in plans for b in p.batches
        ]
        keyed.sort(key=lambda entry: entry[:2])
        return Plan(
            load=plans[0].load,
            batches=tuple(batch for _, _, batch in keyed),
            inits={digest: data for p in plans for digest, data in p.inits.items()},
        )

    def _patiently(self, plan: Plan) -> None:
        """Run a plan as soon as no other worker runs this load on the study."""
        while True:
            try:
                return self._run(plan)
            except StudyLocked:
                time.sleep(_WAIT_S)

    def _first_trials(self) -> list[Trial]:
        """One trial per prompt, in the prompts' order."""
        point = self._space.nearest({})
        return [self._expand(point, (item,)).trials[0] for item in self._items]

    def _evidence(self, point: Point, found: Candidate | None) -> Evidence:
        usd = self._source(point).usd_per_image
        nothing = np.full(self.prompts, np.nan)
        if found is None:
            return Evidence(quality=nothing, latency_s=nothing, usd=usd)
        outcomes, lost = found.outcomes(), found.row.excluded.total()
        if len(outcomes) < _MOSTLY * (len(outcomes) + lost):
            return Evidence(quality=nothing, latency_s=nothing, usd=usd)
        return Evidence(
            quality=self._by_prompt(outcomes),
            latency_s=self._by_prompt(found.latency_s),
            failed=self._failed(found),
            usd=usd,
            peak_bytes=peak_bytes(found),
            work=found.work,
        )

    def _failed(self, found: Candidate) -> np.ndarray:
        """Share of a prompt's images that failed [P]."""
        counts = np.zeros(self.prompts)
        for record in found.failed:
            request = record.trial.request
            number = self._numbers.get((request.prompt, request.init_image))
            if number is not None:
                counts[number] += 1
        return counts / self.images_per_prompt

    def _by_prompt(self, values: Mapping[PairKey, float]) -> np.ndarray:
        """Means over a prompt's images [P]; NaN without any."""
        sums, counts = np.zeros(self.prompts), np.zeros(self.prompts)
        for key, value in values.items():
            number = self._numbers.get(pair_prompt(key))
            if number is not None:  # the study may hold other prompts too
                sums[number] += value
                counts[number] += 1
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def shuffled(sweep: Sweep) -> Sweep:
    """Put a sweep's prompts in seeded random order, so that the first ones stand for all.

    Prompts that are alike in everything asked for are one.
    """
    once: dict[str, PromptItem] = {}
    for item in sweep.prompts:
        init = None if item.init_image is None else item.init_image.hex()
        name = content_hash([sweep.order_seed, item.prompt, item.negative_prompt, init])
        once.setdefault(name, item)
    return replace(sweep, prompts=tuple(once[name] for name in sorted(once)))


def _block(seed: int, batch: Batch) -> str:
    r = batch.trials[0].request
    return content_hash([seed, r.prompt, r.negative_prompt, r.seed, r.init_image])


def reference_point(
    profile: Profile, space: Space, task: Task, request: Callable[[Point], Request]
) -> Point | None:
    """Find the point that asks for what the profile's named default does; ``None`` for the best.

    Of several backends that have it, the first. `request` says what a point asks for.

    Raises: ConfigError where the default is for another task, or is not among what is searched.
    """
    if profile.reference == BEST:
        return None
    default = check_name(profile.reference, task)
    if default is None:
        raise ConfigError(
            f"profile {profile.name}: reference={profile.reference} has no default for"
            f" {task.value}; use a profile with reference: best"
        )
    for point in _like(default, space):
        if asks_for(default, request(point)):
            return point
    raise ConfigError(
        f"profile {profile.name}: reference={profile.reference} ({_words(default)}) is not among"
        " the settings that are searched, so nothing could be held against it; put it on the axes,"
        " or use a profile with reference: best"
    )


def _like(default: NamedDefault, space: Space) -> list[Point]:
    """Points that have the default's values on the axes that name them alike."""
    fixed = default.asked
    values = [
        [v for v in axis.values if axis.name not in fixed or v == fixed[axis.name]]
        for axis in space.axes
    ]
    return list(itertools.product(*values))


def _words(default: NamedDefault) -> str:
    parts = [f"steps={default.steps}", f"cfg={default.cfg:g}", f"sampler={default.sampler}"]
    if default.prompt_strength is not None:
        parts.append(f"prompt_strength={default.prompt_strength:g}")
    if default.skips_layers:
        parts.append("with skip-layer guidance")
    return ", ".join(parts)
