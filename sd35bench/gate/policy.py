"""Policies: which dimensions a gate judges, which it requires, and how much worse is allowed.

A dimension that a policy does not name is not judged. One that it requires and that could not be
measured fails: a gate that cannot see must not let everything through. So does a metric that it
names there, unless `optional` lists it or it cannot judge the task. What was measured and remains
undecided passes with a warning, unless the policy says `undecided: fail`. What the baseline made
and the candidate did not is outside of every figure: `coverage` says how much of it must be there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from sd35bench.analysis.facts import added_class, facts, known_metrics
from sd35bench.disk import read_yaml
from sd35bench.errors import ConfigError
from sd35bench.stats.latency import Spread
from sd35bench.stats.verdicts import Direction

DIMENSIONS = ("latency", "memory", "failures", "quality", "drift")
_MARGINS = {
    "latency": ("p50", "p95"),
    "memory": ("peak_vram_bytes", "peak_rss_bytes"),
    "failures": ("failed",),
    "drift": ("mean_abs", "shift", "changed"),
}
"""Figures that each dimension has; those of quality are metrics' names or their beginnings."""
_RATIOS = frozenset({"latency", "memory"})
_KEYS = {
    "latency": {"required", "margins", "start_spread", "start_spread_degrees"},
    "memory": {"required", "margins", "noise"},
    "failures": {"required", "margins"},
    "quality": {"required", "margins", "optional"},
    "drift": {"required", "margins", "floor_levels"},
}


@dataclass(frozen=True, slots=True)
class MetricMargin:
    """How much of a figure may be lost, and which way is worse.

    `margin` is in the figure's unit; for latency and memory a ratio above 1.
    """

    margin: float
    direction: Direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """What a policy wants of one dimension.

    `spread` is that of latency between runs, `noise` the ratio of memory peaks between process
    starts, `floor_levels` the noise floor of drift where the baseline measured none, `optional` the
    metrics that are judged where there is a score and do not apply where there is none.
    """

    required: bool
    margins: Mapping[str, MetricMargin]
    spread: Spread | None = None
    noise: float | None = None
    floor_levels: float | None = None
    optional: frozenset[str] = frozenset()

    def named(self, figure: str) -> str | None:
        """Return the longest beginning of a figure's name that has a margin; ``None`` for none."""
        return max((n for n in self.margins if figure.startswith(n)), key=len, default=None)

    def margin(self, figure: str) -> MetricMargin | None:
        """Return a figure's margin, by the longest beginning that is named; ``None`` for none."""
        name = self.named(figure)
        return None if name is None else self.margins[name]

    def needs(self, name: str, task: str) -> bool:
        """Whether a metric that the margins name must have been scored for images of a task."""
        judges = facts(name).task in (None, task)
        return self.required and name not in self.optional and judges


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A gate's rules; `undecided_fails` says what an undecided dimension does.

    `coverage` is the share of the baseline's settings, and of each one's pairs, that the candidate
    must have recorded, from 0 to 1.
    """

    name: str
    undecided_fails: bool = False
    coverage: float = 1.0
    dimensions: Mapping[str, Dimension] = field(default_factory=dict)


def load_policy(name: str, folder: Path) -> Policy:
    """Read a policy by its name in `folder`, or from a YAML file.

    Raises: ConfigError where there is none, or it is none.
    """
    own = Path(name)
    path = own if own.suffix in (".yaml", ".yml") else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ConfigError(f"--policy={name}: no such file; known: {known}, or a YAML file's path")
    try:
        raw = read_yaml(path)
    except ValueError as exc:
        raise ConfigError(f"--policy={name}: cannot read {path}: {exc}") from exc
    return as_policy(path.stem, raw)


def as_policy(name: str, raw: Any) -> Policy:
    """Check a policy and freeze it. Raises: ConfigError, naming the field."""
    given = _mapping("policy", raw)
    _known("policy", given, {"name", "undecided", "coverage", "dimensions"})
    undecided = given.get("undecided", "pass")
    if undecided not in ("pass", "fail"):
        raise ConfigError(f"policy.undecided={undecided!r}: must be pass or fail")
    dimensions = _mapping("policy.dimensions", given.get("dimensions"))
    _known("policy.dimensions", dimensions, set(DIMENSIONS))
    if not dimensions:
        raise ConfigError(f"policy.dimensions: name at least one of {', '.join(DIMENSIONS)}")
    return Policy(
        name=str(given.get("name", name)),
        undecided_fails=undecided == "fail",
        coverage=_share("policy.coverage", given.get("coverage", 1.0)),
        dimensions={k: _dimension(k, dimensions[k]) for k in DIMENSIONS if k in dimensions},
    )


def _dimension(name: str, raw: Any) -> Dimension:
    where = f"policy.dimensions.{name}"
    given = _mapping(where, raw)
    _known(where, given, _KEYS[name])
    required = given.get("required", False)
    if not isinstance(required, bool):
        raise ConfigError(f"{where}.required={required!r}: must be true or false")
    margins = _mapping(f"{where}.margins", given.get("margins"))
    if not margins:
        raise ConfigError(f"{where}.margins: name at least one figure")
    if name in _MARGINS:
        _known(f"{where}.margins", margins, set(_MARGINS[name]))
    else:
        _require_metrics(f"{where}.margins", margins)
    return Dimension(
        required=required,
        margins={k: _margin(f"{where}.margins.{k}", name, k, v) for k, v in margins.items()},
        spread=_spread(where, given) if name == "latency" else None,
        noise=_number(f"{where}.noise", given.get("noise", 1.02), 1.0)
        if name == "memory"
        else None,
        floor_levels=_floor(where, given),
        optional=_optional(where, given, margins),
    )


def _margin(where: str, dimension: str, figure: str, raw: Any) -> MetricMargin:
    """A number, or a mapping with `margin` and, for a metric of quality, `direction`."""
    least = 1.0 if dimension in _RATIOS else 0.0
    worse = _worse(dimension, figure)
    if not isinstance(raw, Mapping):
        return MetricMargin(_number(where, raw, least), worse)
    if dimension != "quality" and "direction" in raw:
        raise ConfigError(
            f"{where}.direction={raw['direction']!r}: more {dimension} is always worse; leave it"
            " out (a direction belongs to a metric of quality)"
        )
    _known(where, raw, {"margin", "direction"})
    direction = raw.get("direction", worse)
    if direction not in tuple(Direction):
        raise ConfigError(f"{where}.direction={direction!r}: must be less, more or both")
    return MetricMargin(_number(f"{where}.margin", raw.get("margin"), least), Direction(direction))


def _worse(dimension: str, figure: str) -> Direction:
    """Which way is worse: outside of quality more of it (seconds, bytes, failures, differences).

    Of what only describes an image (sharpness) neither is better, so any change is meant, and so is
    a shift of the colours, which has a sign.
    """
    if figure == "shift":
        return Direction.BOTH
    if dimension != "quality":
        return Direction.MORE
    known = facts(figure)
    if not known.ranks:
        return Direction.BOTH
    return Direction.LESS if known.higher_is_better else Direction.MORE


def _require_metrics(where: str, margins: Mapping[str, Any]) -> None:
    """Refuse what is no metric's name or its continuation: a misspelt one would never be judged."""
    known = [name for name in known_metrics() if name != "drift"]
    for name in margins:
        if name.startswith("drift"):
            raise ConfigError(f"{where}.{name}: drift is a dimension of its own; name it there")
        if not name.startswith(tuple(known)):
            raise ConfigError(f"{where}.{name}: no metric; known: {', '.join(known)}")
        added_class(name)  # which way is worse is not guessed where a plug-in cannot be asked


def _optional(where: str, given: Mapping[str, Any], margins: Mapping[str, Any]) -> frozenset[str]:
    names = given.get("optional", [])
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise ConfigError(f"{where}.optional={names!r}: expected a list of names with a margin")
    for name in names:
        if name not in margins:
            raise ConfigError(f"{where}.optional={name!r}: has no margin; give it one or leave it")
    return frozenset(names)


def _spread(where: str, given: Mapping[str, Any]) -> Spread:
    sd = _number(f"{where}.start_spread", given.get("start_spread"), 0.0)
    degrees = given.get("start_spread_degrees")
    if degrees is None:
        return Spread(sd)
    if not isinstance(degrees, int) or isinstance(degrees, bool) or degrees < 1:
        raise ConfigError(f"{where}.start_spread_degrees={degrees!r}: must be a whole number >= 1")
    return Spread(sd, degrees)


def _floor(where: str, given: Mapping[str, Any]) -> float | None:
    floor = given.get("floor_levels")
    return None if floor is None else _number(f"{where}.floor_levels", floor, 0.0)


def _share(where: str, value: Any) -> float:
    share = _number(where, value, 0.0)
    if share > 1.0:
        raise ConfigError(f"{where}={value!r}: a share, from 0 to 1")
    return share


def _mapping(where: str, raw: Any) -> Mapping[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {raw!r}")
    return {str(k): v for k, v in raw.items()}


def _known(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]}: unknown; known: {', '.join(sorted(known))}")


def _number(where: str, value: Any, least: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not number or value < least:
        raise ConfigError(f"{where}={value!r}: expected a number of at least {least:g}")
    return float(value)
