"""`tune`'s command line: axes as ranges and lists, the rest as `run` takes it, checked and frozen.

Every value of every axis goes through the checks of `run` before anything is made, once per backend
and preset: a setting that could not be asked for is refused here, not after an hour.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35bench.config.compose import compose
from sd35bench.config.files import choices, config_dir
from sd35bench.config.freeze import Job, freeze
from sd35bench.config.models import check_field
from sd35bench.config.overrides import check_overrides, written
from sd35bench.errors import ConfigError, nearest
from sd35bench.plan import SETTING_AXES
from sd35bench.recommend.profiles import Profile, load_profile
from sd35bench.study.store import Study
from sd35bench.tune.session import Budget, default_images
from sd35bench.tune.space import GRIDS, Axis, Space, spread
from sd35bench.tune.study_adapter import Source, StudyLab, shuffled
from sd35bench.types import Scalar, content_hash, to_json

CATEGORIES = (
    *("sampler", "backend", "skip_layer_guidance"),
    *("guidance", "guidance_interval", "step_cache"),
)
_LISTED = tuple(n for n in CATEGORIES if n not in ("backend", "skip_layer_guidance"))
"""Categories of which one job has every value; a preset has a job of its own."""
OWN = {"profile": "balanced", "trials": "", "images": "", "first": "8"}
"""What only `tune` takes, and the defaults."""

MOST_TRIALS = 32
FEWEST_FIRST = 4
_ALONE = "every image of a search is made alone, so that it is timed too: leave batch_size out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Everything a search needs; `jobs` and `sources` by backend and preset."""

    space: Space
    profile: Profile
    budget: Budget
    jobs: dict[tuple[Scalar, Scalar], Job]
    sources: dict[tuple[Scalar, Scalar], Source]
    about: dict[str, Any]

    @property
    def job(self) -> Job:
        """Any of the jobs: study, folder and prompts are those of all."""
        return next(iter(self.jobs.values()))


def read_tuning(overrides: Sequence[str], extra: Path | None = None) -> Tuning:
    """Check a command line and freeze what it asks for.

    Raises: ConfigError, one line, naming field, value and what is allowed.
    """
    own, axes, fixed = _sorted_out(overrides)
    space = Space(tuple(axes))
    if space.size < 2:
        raise ConfigError(
            "nothing to search: give an axis with more than one value, such as steps=4:28 or"
            " cfg=1:9 or sampler=euler,heun"
        )
    check_overrides(fixed, False, extra)
    profile = _profile(own["profile"], extra)
    jobs, sources = _frozen(space, fixed, extra)
    job = next(iter(jobs.values()))
    _check_jobs(jobs)
    _check_cost(profile, sources)
    first = _whole("first", own["first"], FEWEST_FIRST)
    prompts = len(next(iter(sources.values())).sweep.prompts)
    if prompts < first:
        raise ConfigError(
            f"first={first}: there are {prompts} prompts; give prompts.limit={first} or more, or a"
            f" smaller first (at least {FEWEST_FIRST})"
        )
    seeds = len(job.sweep.axes.get("seed", (0,)))
    per_prompt = seeds * len(job.sweep.axes.get("negative_prompt", ("",)))
    budget = _budget(own, space, prompts, per_prompt, first)
    about = {
        "axes": {axis.name: list(axis.values) for axis in space.axes},
        "profile": profile.name,
        "prompts": prompts,
        "first": first,
        "order_seed": job.sweep.order_seed,
        "loads": sorted(j.sweep.load.key for j in jobs.values()),
        **_held(profile, sources),
    }
    tuning = Tuning(
        space=space, profile=profile, budget=budget, jobs=jobs, sources=sources, about=about
    )
    _check_reference(tuning)
    return tuning


def _held(profile: Profile, sources: Mapping[tuple[Scalar, Scalar], Source]) -> dict[str, Any]:
    """What a study was tuned with besides its axes, so that going on cannot change it."""
    sweeps = [source.sweep for source in sources.values()]
    items = sweeps[0].prompts
    inits = [None if i.init_image is None else i.init_image.hex() for i in items]
    texts = [[i.prompt, i.negative_prompt, init] for i, init in zip(items, inits, strict=True)]
    rest = [[sorted(s.axes.items()), s.sizes, s.load.key] for s in sweeps]
    return {
        "profile asks": to_json(profile),
        "seeds": list(sweeps[0].axes.get("seed", (0,))),
        "negative prompts": list(sweeps[0].axes.get("negative_prompt", ("",))),
        "sizes": [list(size) for size in sweeps[0].sizes],
        "digest of the prompts": content_hash(texts)[:12],
        "digest of all settings": content_hash(to_json(rest))[:12],
    }


def _sorted_out(overrides: Sequence[str]) -> tuple[dict[str, str], list[Axis], list[str]]:
    """Sort a command line into what only tune takes, axes, and `run`'s own fields."""
    own, fixed = dict(OWN), []
    axes: dict[str, Axis] = {}
    given: set[str] = set()
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: expected NAME=VALUE, such as steps=4:28; see tune --help")
        if name in given:
            raise ConfigError(f"{name} is given twice: drop one")
        given.add(name)
        if name in OWN:
            own[name] = value
        elif name in GRIDS and (":" in value or "," in value):
            axes[name] = _numbers(name, value)
        elif name in CATEGORIES and "," in value:
            axes[name] = _words(name, value)
        elif name == "prompts.split" and value != "tune":
            raise ConfigError(
                f"prompts.split={value}: a search sees the tune split only, so that held-out"
                " prompts can confirm it; leave it out"
            )
        elif name in ("batch_size", "timed_limit") and value != "1":
            raise ConfigError(f"{name}={value}: {_ALONE}")
        elif name not in ("timed_limit", "prompts.split"):
            fixed.append(text)
    if "study" not in given:
        raise ConfigError("study: name the study that the search is kept in, such as study=tuned")
    order = (*GRIDS, *CATEGORIES)
    return own, [axes[name] for name in order if name in axes], fixed


def _numbers(name: str, value: str) -> Axis:
    """Read LOW:HIGH, LOW:HIGH:STEP or a comma list."""
    parts = [_number(name, text, value) for text in value.replace(":", ",").split(",")]
    if ":" in value:
        if "," in value or len(parts) not in (2, 3):
            raise ConfigError(f"{name}={value}: expected LOW:HIGH, LOW:HIGH:STEP or a list A,B,C")
        step = parts[2] if len(parts) == 3 else GRIDS[name]
        try:
            values = spread(parts[0], parts[1], step)
        except ValueError as exc:
            raise ConfigError(f"{name}={exc}") from exc
    else:
        values = tuple(sorted(set(parts)))
    whole = [int(v) if float(v).is_integer() else v for v in values]
    return Axis(name=name, values=tuple(check_field(name, v) for v in whole), ordered=True)


def _number(name: str, text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise ConfigError(
            f"{name}={whole}: expected numbers as LOW:HIGH, LOW:HIGH:STEP or a list A,B,C"
        ) from exc


def _words(name: str, value: str) -> Axis:
    words = tuple(dict.fromkeys(value.split(",")))
    if "" in words:
        raise ConfigError(f"{name}={value}: an empty value; give a list such as A,B")
    return Axis(name=name, values=words, ordered=False)


def _profile(name: str, extra: Path | None) -> Profile:
    """A profile from a YAML file, of the user's own folder, or of the package."""
    own = None if extra is None else extra / "profile" / f"{name}.yaml"
    if own is not None and own.is_file():
        name = str(own)
    return load_profile(name, config_dir() / "profile", "profile")


def _budget(own: dict[str, str], space: Space, prompts: int, per_prompt: int, first: int) -> Budget:
    trials = min(MOST_TRIALS, space.size)
    if own["trials"]:
        trials = min(_whole("trials", own["trials"], 2), space.size)
    images = default_images(space, prompts, per_prompt, trials)
    least = 4 * first * per_prompt
    if own["images"]:
        images = _whole("images", own["images"], 1)
        if images < least:
            raise ConfigError(
                f"images={images}: must be at least {least}: two settings on {first} prompts, and"
                " as many again to decide between them"
            )
    return Budget(trials=trials, images=max(images, least), first=first)


def _whole(name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{name}={text}: must be a whole number of at least {least}")
    return int(text)


def _frozen(
    space: Space, fixed: list[str], extra: Path | None
) -> tuple[dict[tuple[Scalar, Scalar], Job], dict[tuple[Scalar, Scalar], Source]]:
    """Freeze one job per backend and preset, with every value of every other axis."""
    jobs: dict[tuple[Scalar, Scalar], Job] = {}
    sources: dict[tuple[Scalar, Scalar], Source] = {}
    by_name = {axis.name: axis for axis in space.axes}
    backends = by_name["backend"].values if "backend" in by_name else (None,)
    presets = (None,)
    if "skip_layer_guidance" in by_name:
        presets = by_name["skip_layer_guidance"].values
    if "backend" in by_name:
        for name in backends:
            if name not in choices("backend", extra):
                known = choices("backend", extra)
                raise ConfigError(
                    f"backend={name}: must be one of {', '.join(known)}{nearest(str(name), known)}"
                )
    for backend in backends:
        for preset in presets:
            lists = {n: a.values for n, a in by_name.items() if n in GRIDS or n in _LISTED}
            if preset == "none":
                lists.pop("skip_layer_scale", None)
            asked = [*fixed, "prompts.split=tune"]
            asked += [] if backend is None else [f"backend={backend}"]
            asked += [] if preset is None else [f"skip_layer_guidance={preset}"]
            asked += [f"axes.{n}=[{','.join(map(str, v))}]" for n, v in lists.items()]
            job = freeze(compose(written(asked), extra))
            key = backend, preset
            jobs[key] = job
            sources[key] = _source(job, lists)
    return jobs, sources


def _source(job: Job, lists: dict[str, tuple[Scalar, ...]]) -> Source:
    """Map each axis's values to what freezing made of them, one to one."""
    frozen = dict(job.sweep.axes)
    values = {}
    for name, asked in lists.items():
        key = "skip_layer_guidance" if name == "skip_layer_scale" else name
        values[name] = dict(zip(asked, frozen[key], strict=True))
        frozen[key] = frozen[key][:1]
    for name in SETTING_AXES:
        if len(frozen.get(name, (None,))) > 1:
            raise ConfigError(
                f"{name} has several values in the experiment: give them on the command line, as"
                f" {name}=A,B,C"
            )
    if len(job.sweep.sizes) > 1 or job.sweep.batch_sizes != (1,):
        raise ConfigError(f"one size, and batch_size=1: {_ALONE}")
    sweep = dataclasses.replace(shuffled(job.sweep), axes=frozen)
    return Source(sweep=sweep, usd_per_image=job.engine.price.usd_per_image, values=values)


def _check_jobs(jobs: dict[tuple[Scalar, Scalar], Job]) -> None:
    """Refuse what one race cannot hold. Raises: ConfigError."""
    sweeps = [job.sweep for job in jobs.values()]
    if len({job.engine.price.is_billed for job in jobs.values()}) > 1:
        raise ConfigError(
            "backend: hosted services and local backends are not raced against each other, since a"
            " service's latency is also that of the network; tune them in two studies"
        )
    if any(sweep.load.model.weights == "random" for sweep in sweeps):
        raise ConfigError(
            "model.weights=random: its images say nothing about quality, so there is nothing to"
            " tune; use a checkpoint"
        )
    tasks = {item.init_image is None for sweep in sweeps for item in sweep.prompts}
    if len(tasks) > 1:
        raise ConfigError("prompts: some have an init image and some have none; tune one task")


def _check_cost(profile: Profile, sources: Mapping[tuple[Scalar, Scalar], Source]) -> None:
    """Refuse a limit that no image could be held against. Raises: ConfigError."""
    if profile.cost_limit_usd is None or profile.usd_per_hour is not None:
        return
    if any(source.usd_per_image <= 0 for source in sources.values()):
        raise ConfigError(
            f"profile {profile.name}: cost_limit_usd={profile.cost_limit_usd:g}, and what an image"
            " costs here is unknown; give the profile usd_per_hour, what an hour of this machine"
            " costs"
        )


def _check_reference(tuning: Tuning) -> None:
    """Refuse a profile whose named default is not among what is searched. Raises: ConfigError."""
    lab = StudyLab(
        Study(tuning.job.results_dir / tuning.job.study),
        tuning.space,
        tuning.sources,
        _nothing_runs,
        _nothing_runs,
    )
    lab.reference(tuning.profile)


def _nothing_runs(*_: Any) -> None:
    raise AssertionError("nothing is made before a search starts")
