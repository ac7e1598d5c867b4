"""Policies: which dimensions a gate judges, which it requires, and how much worse is allowed.

A dimension that a policy does not name is not judged. One that it requires and that could not be
measured fails: a gate that cannot see must not let everything through. What was measured and
remains undecided passes with a warning, unless the policy says `undecided: fail`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from sd35bench.analysis.equivalence import Direction
from sd35bench.analysis.latency import Spread
from sd35bench.analysis.quality import facts
from sd35bench.errors import ConfigError

__all__ = ["DIMENSIONS", "Dimension", "MetricMargin", "Policy", "as_policy", "load_policy"]

DIMENSIONS = ("latency", "memory", "failures", "quality", "drift")
_MARGINS = {
    "latency": ("p50", "p95"),
    "memory": ("peak_vram_bytes", "peak_rss_bytes"),
    "failures": ("failed",),
    "drift": ("mean_abs",),
}
"""Figures that each dimension has; those of quality are metrics' names or their beginnings."""
_RATIOS = frozenset({"latency", "memory"})
_KEYS = {
    "latency": {"required", "margins", "start_spread", "start_spread_degrees"},
    "memory": {"required", "margins", "noise"},
    "failures": {"required", "margins"},
    "quality": {"required", "margins"},
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
    starts, `floor_levels` the noise floor of drift where no study measured one.
    """

    required: bool
    margins: Mapping[str, MetricMargin]
    spread: Spread | None = None
    noise: float | None = None
    floor_levels: float | None = None

    def margin(self, figure: str) -> MetricMargin | None:
        """Return a figure's margin by the longest beginning that is named; ``None`` for none."""
        known = [name for name in self.margins if figure.startswith(name)]
        return self.margins[max(known, key=len)] if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A gate's rules; `undecided_fails` says what an undecided dimension does."""

    name: str
    undecided_fails: bool = False
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
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"--policy={name}: cannot read {path}: {exc}") from exc
    return as_policy(path.stem, raw)


def as_policy(name: str, raw: Any) -> Policy:
    """Check a policy and freeze it. Raises: ConfigError, naming the field."""
    given = _mapping("policy", raw)
    _known("policy", given, {"name", "undecided", "dimensions"})
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
    least = 1.0 if name in _RATIOS else 0.0
    frozen = {k: _margin(f"{where}.margins.{k}", k, v, least) for k, v in margins.items()}
    return Dimension(
        required=required,
        margins={k: _directed(name, k, v) for k, v in frozen.items()},
        spread=_spread(where, given) if name == "latency" else None,
        noise=_number(f"{where}.noise", given.get("noise", 1.02), 1.0)
        if name == "memory"
        else None,
        floor_levels=_floor(where, given),
    )


def _margin(where: str, figure: str, raw: Any, least: float) -> MetricMargin:
    """A number, or a mapping with `margin` and `direction`."""
    worse = Direction.LESS if facts(figure).higher_is_better else Direction.MORE
    if not isinstance(raw, Mapping):
        return MetricMargin(_number(where, raw, least), worse)
    _known(where, raw, {"margin", "direction"})
    direction = raw.get("direction", worse)
    if direction not in tuple(Direction):
        raise ConfigError(f"{where}.direction={direction!r}: must be less, more or both")
    return MetricMargin(_number(f"{where}.margin", raw.get("margin"), least), Direction(direction))


def _directed(dimension: str, figure: str, margin: MetricMargin) -> MetricMargin:
    """Outside of quality, more is worse: seconds, bytes, failures, differences."""
    return margin if dimension == "quality" else MetricMargin(margin.margin, Direction.MORE)


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
