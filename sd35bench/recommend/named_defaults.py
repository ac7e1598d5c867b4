"""The defaults that others ship for this model, to hold a recommendation against.

They disagree with each other, which is why a recommendation by data is wanted. A study that has
one of them as a setting is compared with it on the same pairs; for one that it has not, the
command that adds it is given.

Sources: the model page of Eachlabs (40 steps, cfg 5, prompt_strength 0.85); diffusers 0.42.1, the
signatures of `StableDiffusion3Pipeline.__call__` and `StableDiffusion3Img2ImgPipeline.__call__`;
Stability AI's sd3.5 repository, `sd3_infer.py`, CONFIGS["sd3.5_medium"] (DPM++ 2M), and with its
skip-layer guidance at cfg 4. All of them leave the shift to the checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sd35bench.analysis.table import Row
from sd35bench.errors import ConfigError
from sd35bench.fields import FIELDS, SETTING, SIZE, asked_fields, completed
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import images_between
from sd35bench.types import Request, Task

_SKIP = {"scale": 2.5, "start": 0.01, "stop": 0.2}
PRESET = "stability"
"""What models call Stability's skip-layer guidance in their configuration; layers are their own."""

OWN_SHIFT = {None, 3.0}
"""The checkpoint's shift: unasked, or asked for as the value that it has."""

_FREE = ("max_sequence_length", *SIZE, "output_format", "output_quality")
"""What of a setting no default names; all else that a default does not name is as unasked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedDefault:
    """A default that somebody ships for one task."""

    name: str
    task: Task
    steps: int
    cfg: float
    source: str
    prompt_strength: float | None = None
    sampler: str = "euler"
    skips_layers: bool = False

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of a request that it names; skip-layer guidance is left to the command."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in FIELDS}


NAMED = (
    NamedDefault(
        name="vendor", task=Task.TEXT_TO_IMAGE, steps=40, cfg=5.0, source="Eachlabs' model page"
    ),
    NamedDefault(
        name="diffusers", task=Task.TEXT_TO_IMAGE, steps=28, cfg=7.0, source="diffusers 0.42.1"
    ),
    NamedDefault(
        name="stability",
        task=Task.TEXT_TO_IMAGE,
        steps=50,
        cfg=5.0,
        sampler="dpmpp_2m",
        source="Stability AI's script",
    ),
    NamedDefault(
        name="stability-slg",
        task=Task.TEXT_TO_IMAGE,
        steps=50,
        cfg=4.0,
        sampler="dpmpp_2m",
        skips_layers=True,
        source="Stability AI's script, with skip-layer guidance",
    ),
    NamedDefault(
        name="vendor",
        task=Task.IMAGE_TO_IMAGE,
        steps=40,
        cfg=5.0,
        prompt_strength=0.85,
        source="Eachlabs' model page",
    ),
    NamedDefault(
        name="diffusers",
        task=Task.IMAGE_TO_IMAGE,
        steps=50,
        cfg=7.0,
        prompt_strength=0.6,
        source="diffusers 0.42.1",
    ),
)


def check_name(name: str, task: Task) -> NamedDefault | None:
    """Return a named default of a task; ``None`` where only other tasks have it.

    Raises: ConfigError for a name that nobody has.
    """
    if name not in {d.name for d in NAMED}:
        known = ", ".join(dict.fromkeys(d.name for d in NAMED))
        raise ConfigError(f"profile.reference={name!r}: expected best, or one of {known}")
    return next((d for d in NAMED if d.name == name and d.task is task), None)


def asks_for(default: NamedDefault, request: Request) -> bool:
    """Whether a request asks for what a default does, prompt and size aside."""
    return _has(default, asked_fields(request))


def find_default(default: NamedDefault, rows: Sequence[Row], like: Row) -> Row | None:
    """Return the row of a named default on the backend of the row `like`; ``None`` without one."""
    found = [r for r in rows if _same_place(r, like) and _has(default, r.setting)]
    found.sort(key=lambda r: sum(r.setting[n] != like.setting[n] for n in _FREE))
    return found[0] if found else None


def not_applicable(default: NamedDefault, like: Row) -> str | None:
    """Why the backend of `like` cannot have this default; ``None`` where it can."""
    if like.records[0].trial.load.model.family != "sd3":
        return "another model's default"
    if like.hosted and (default.skips_layers or default.sampler != "euler"):
        return "a hosted service takes neither a sampler nor skip-layer guidance"
    return None


def request_with(default: NamedDefault, request: Request) -> Request:
    """The same prompt as the default asks; skip-layer guidance is left to the command."""
    return replace(request, **_values(default))


def verdict_beside(difference: Interval, margin: float, above: bool | None) -> str:
    """What the choice's quality is beside a default's, in words; more is better.

    `above`: whether held-out prompts show it to be better; ``None``: the difference is of the very
    prompts that it was chosen on, where the winner of many looks better than it is.
    """
    if difference.low is None or difference.high is None:
        return "not distinguishable: one prompt says nothing"
    if above:
        return "better"
    if above is None and difference.low > 0.0:
        return "higher here; held-out prompts would tell"
    if difference.low > -margin:
        return "as good within the margin"
    if difference.high < -margin:
        return "worse by more than the margin"
    if difference.high < 0.0:
        return "worse; whether by more than the margin is not decided"
    needed = images_between(difference, margin)
    number = (
        "no practicable number of images" if needed is None else f"about {needed['images']} more"
    )
    return f"not distinguishable with n={difference.n}; {number} would decide"


def _values(default: NamedDefault) -> dict[str, Any]:
    """What a request of the default asks for; skip-layer guidance is as unasked."""
    return {name: FIELDS[name].quiet for name in SETTING if name not in _FREE} | default.asked


def _same_place(row: Row, like: Row) -> bool:
    names = ("model", "weights_digest", "backend", "backend_options", "threads", *SIZE)
    return row.environment_id == like.environment_id and all(
        row.setting[name] == like.setting[name] for name in names
    )


def _has(default: NamedDefault, s: Mapping[str, Any]) -> bool:
    wanted = {"task": default.task.value, **_values(default), **completed({})}
    del wanted["shift"], wanted["skip_layer_guidance"]
    if any(s[n] != value for n, value in wanted.items()) or s["shift"] not in OWN_SHIFT:
        return False
    skip: dict[str, Any] | None = s["skip_layer_guidance"]
    if skip is None or not default.skips_layers:
        return skip is None and not default.skips_layers
    return all(skip[name] == value for name, value in _SKIP.items())
