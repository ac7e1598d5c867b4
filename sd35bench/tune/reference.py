"""The named default that a profile holds settings against, as a point of what is searched."""

import itertools
from collections.abc import Callable

from sd35bench.errors import ConfigError
from sd35bench.recommend.named_defaults import NamedDefault, asks_for, check_name
from sd35bench.recommend.profiles import BEST, Profile
from sd35bench.tune.space import Point, Space
from sd35bench.types import Request, Task


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
    fixed = {
        "steps": default.steps,
        "cfg": default.cfg,
        "prompt_strength": default.prompt_strength,
        "sampler": default.sampler,
    }
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
