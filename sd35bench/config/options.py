"""Options whose names a YAML declares: those of a backend, and those of metrics.

Beside `options` a YAML has `allowed`: for each option its choices, or its type as one word.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from sd35bench.config.fields import nearest
from sd35bench.config.files import choices, config_dir
from sd35bench.config.overrides import parse
from sd35bench.errors import ConfigError
from sd35bench.types import Scalar

__all__ = ["checked_options", "metric_options"]

TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "bool": (bool,),
}


def checked_options(
    owner: str, options: Mapping[str, Any], allowed: Mapping[str, Any]
) -> dict[str, Scalar]:
    """Return the options in order of name, each checked; `owner` opens messages ("backend").

    Raises: ConfigError naming option, value and what is allowed.
    """
    return {
        name: _checked(f"{owner}.{name}", options[name], _allowed(owner, name, allowed))
        for name in sorted(options)
    }


def metric_options(overrides: Sequence[str]) -> dict[str, dict[str, Scalar]]:
    """Read ``metric.fid.reference=…`` and the like: family -> its options, without nulls.

    Raises: ConfigError for an unknown metric or option, or a wrong value.
    """
    found: dict[str, dict[str, Scalar]] = {}
    for name in choices("metric"):
        conf: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "metric" / f"{name}.yaml"))
        found[conf["family"]] = _metric(name, conf, overrides)
    known = [f"metric.{name}." for name in found]
    for text in overrides:
        if not text.startswith(tuple(known)):
            raise ConfigError(
                f"{text}: expected metric.NAME.OPTION=VALUE with NAME one of {', '.join(found)}"
            )
    return {family: options for family, options in found.items() if options}


def _metric(name: str, conf: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Scalar]:
    options, allowed = dict(conf.get("options", {})), conf.get("allowed", {})
    prefix = f"metric.{name}."
    for text in overrides:
        if text.startswith(prefix):
            override = parse(text)
            options[override.get_key_element().removeprefix(prefix)] = override.value()
    given = {key: value for key, value in options.items() if value is not None}
    return checked_options(f"metric.{name}", given, allowed)


def _allowed(owner: str, name: str, allowed: Mapping[str, Any]) -> Any:
    if name not in allowed:
        known = ", ".join(sorted(allowed)) if allowed else "none"
        raise ConfigError(
            f"{owner}.{name}: no such option; there are: {known}{nearest(name, allowed)}"
        )
    return allowed[name]


def _checked(name: str, value: Any, allowed: Any) -> Scalar:
    if isinstance(allowed, str):
        types = TYPES[allowed]
        right = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        said = f"of type {allowed}"
    else:
        right = any(value == a and type(value) is type(a) for a in allowed)
        said = "one of " + ", ".join(f"{a}" for a in allowed)
    if not right:
        raise ConfigError(f"{name}={value}: must be {said}")
    return float(value) if allowed == "float" else value
