"""Profiles: what a setting is wanted for, as limits, an objective and margins of quality.

Those of the package are in a folder, by name; anybody's own is a YAML file with the same fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from sd35bench.disk import read_yaml
from sd35bench.errors import ConfigError

OBJECTIVES = ("fastest", "best-quality")
"""The fastest setting that is shown to be as good within the margin, or the best quality."""

BEST = "best"
"""The reference that stands for whichever setting within the limits is best."""

LIMITS = (
    *("latency_limit_s", "latency_mean_limit_s", "latency_p95_limit_s", "evaluations_limit"),
    *("memory_limit_bytes", "cost_limit_usd"),
)
"""Fields of a profile that no setting may be above; ``None`` is no limit."""
_FAILURES_LIMIT = 0.01
_GONE = "latency_limit_frac"
_QUALITIES = ("prompt_accuracy", "edit_quality", "clip_score")
"""What a choice can be made by (`pairs`), or what such a metric's name begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Limits, and what is wanted of the settings that are within them.

    Latency is limited in seconds, by its median, mean or 95th percentile; `evaluations_limit`
    limits the denoiser's evaluations an image, guidance's second half counted, and needs no clock.
    No limit is relative to the other settings of a study. Memory is in bytes (of the GPU where
    there is one); `cost_limit_usd` is per image, and `usd_per_hour` what an hour of this machine
    costs, without which only hosted services have a cost. `failures_limit` is the share of
    trials that may fail. `reference` is what "as good" means: `BEST`, or the name of a default (see
    `named_defaults`). `margins` maps metric names or their beginnings to what may be lost of them;
    a metric without a margin has 0: nothing may be.
    """

    name: str
    objective: str = "fastest"
    reference: str = BEST
    latency_limit_s: float | None = None
    latency_mean_limit_s: float | None = None
    latency_p95_limit_s: float | None = None
    evaluations_limit: float | None = None
    memory_limit_bytes: float | None = None
    cost_limit_usd: float | None = None
    usd_per_hour: float | None = None
    failures_limit: float = _FAILURES_LIMIT
    margins: Mapping[str, float] = field(default_factory=dict)

    def margin(self, metric: str) -> float:
        """Return the margin of a metric, in its units, by the longest beginning that is named."""
        known = [name for name in self.margins if metric.startswith(name)]
        return float(self.margins[max(known, key=len)]) if known else 0.0


def as_profiles(profiles: Mapping[str, Profile | Mapping[str, Any]]) -> list[Profile]:
    """Check profiles and freeze them, in the order given. Raises: ConfigError."""
    return [p if isinstance(p, Profile) else _freeze(name, p) for name, p in profiles.items()]


def load_profiles(folder: Path) -> dict[str, Profile]:
    """Read a folder's YAML files: preview, balanced, final first, then others by name.

    Raises: ConfigError for a file that is no profile.
    """
    order = ("preview", "balanced", "final")
    paths = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    names = [n for n in order if n in paths] + [n for n in paths if n not in order]
    if not names:
        raise ConfigError(f"profile: no YAML file in {folder}")
    return {p.name: p for p in (_read(paths[name]) for name in names)}


def load_profile(name: str, folder: Path, option: str = "--profile") -> Profile:
    """Read a profile by its name in `folder`, or from a YAML file; `option` opens a complaint.

    Raises: ConfigError where there is none, or it is none.
    """
    own = Path(name).expanduser()
    if own.suffix not in (".yaml", ".yml"):
        known = load_profiles(folder)
        if name in known:
            return known[name]
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{option}={name}: must be one of {', '.join(known)}, or a YAML file's path{hint}"
        )
    if not own.is_file():
        raise ConfigError(f"{option}={name}: there is no such file")
    return _read(own)


def _read(path: Path) -> Profile:
    """Read one YAML file; a complaint about a field says which file it is in."""
    try:
        raw = read_yaml(path)
    except ValueError as exc:
        raise ConfigError(f"profile: cannot read {path}: {exc}") from exc
    try:
        return _freeze(path.stem, raw)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc


def _freeze(name: str, raw: Any) -> Profile:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"profile {name}: expected keys and values, got {raw!r}")
    if raw.get(_GONE) is not None:
        raise ConfigError(
            f"profile.{_GONE}: a share of the slowest setting changed with every setting"
            " that a study has; give evaluations_limit (the vendor's default has 80) or"
            " latency_limit_s"
        )
    known = {f.name for f in fields(Profile)}
    unknown = sorted(set(raw) - known - {_GONE})
    if unknown:
        raise ConfigError(f"profile.{unknown[0]}: unknown; known: {', '.join(sorted(known))}")
    margins = raw.get("margins")
    given = {} if margins is None else margins
    if not isinstance(given, Mapping):
        raise ConfigError(f"profile.margins={given!r}: expected metric names with their margins")
    checked = {str(k): _number(f"margins.{k}", v, 0.0) for k, v in given.items()}
    _refuse_unknown(checked)
    return Profile(
        name=_word("name", raw, name, None),
        objective=_word("objective", raw, "fastest", OBJECTIVES),
        reference=_word("reference", raw, BEST, None),
        **{n: _limit(n, raw) for n in (*LIMITS, "usd_per_hour")},
        failures_limit=_share("failures_limit", raw, _FAILURES_LIMIT),
        margins=checked,
    )


def _word(
    field_name: str, raw: Mapping[str, Any], default: str, known: tuple[str, ...] | None
) -> str:
    """One of the known words; any name where they are not known here."""
    value = raw.get(field_name)
    if value is None:
        return default
    if not isinstance(value, str) or (known is not None and value not in known):
        of = "a name" if known is None else f"one of {', '.join(known)}"
        raise ConfigError(f"profile.{field_name}={value!r}: expected {of}")
    return value


def _refuse_unknown(margins: Mapping[str, float]) -> None:
    """Refuse margins of what no choice is made by: misspelt, one would leave its metric with 0."""
    for name in margins:
        if not any(name.startswith(q) or q.startswith(name) for q in _QUALITIES):
            raise ConfigError(
                f"profile.margins.{name}: no choice is made by it; known: {', '.join(_QUALITIES)}"
                " (or a name that begins so)"
            )


def _share(field_name: str, raw: Mapping[str, Any], default: float) -> float:
    value = raw.get(field_name)
    if value is None:
        return default
    share = _number(field_name, value, 0.0)
    if share > 1.0:
        raise ConfigError(f"profile.{field_name}={value!r}: expected a share, from 0 to 1")
    return share


def _limit(field_name: str, raw: Mapping[str, Any]) -> float | None:
    value = raw.get(field_name)
    return None if value is None else _number(field_name, value, 1e-9)


def _number(field_name: str, value: Any, least: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not number or value < least:
        above = "at least 0" if least == 0.0 else "above 0"
        raise ConfigError(f"profile.{field_name}={value!r}: expected a number {above}")
    return float(value)
