"""Check a command line's overrides one by one, before Hydra composes anything; and options.

Hydra's own refusals are several lines long, so typos, unknown choices and comma lists without -m
are refused here, by name. Values are held against the models' own types and ranges, which saves the
half second of composing; what YAML files say meets them in `models.read`. Options are
those of a backend and of metrics, whose names a YAML declares: beside `options` it has `allowed`,
for each option its choices, or its type as one word.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from sd35bench import plugins
from sd35bench.config.files import check_group_file, choices, config_dir, file_state, group_file
from sd35bench.config.models import FIELDS, BackendConf, check_field
from sd35bench.errors import ConfigError, nearest
from sd35bench.remote.inputs import EXTRA, IMAGE
from sd35bench.types import Scalar

FREE_TEXTS = ("negative_prompt",)
"""Fields whose values are nobody's numbers, lists or interpolations."""
FILE_LISTS = ("model.lora",)
"""Fields whose commas are between files: one value, not several."""
PROMPTS_GIVEN = "prompts.texts"
RAY_OPTIONS = ("ray.init.", "ray.actor.")
"""Names that begin so are Ray's own, which the engine holds against what Ray has."""
OTHER_NAMES = {
    "guidance_scale": "cfg",
    "cfg_scale": "cfg",
    "num_inference_steps": "steps",
    "sampling_steps": "steps",
    "negative": "negative_prompt",
    "scheduler": "sampler",
    "sampler_name": "sampler",
    "strength": "prompt_strength",
    "denoise": "prompt_strength",
    "denoising_strength": "prompt_strength",
    "num_images_per_prompt": "batch_size",
    "generator": "seed",
}
"""What other tools call our fields."""
WORKERS = ("workers=", "threads=", "engine=", "ray.")
"""What begins so says on which workers images are scored."""
GROUP_NAMES = ("model", "backend", "prompts", "experiment")
OWN_INPUTS = (EXTRA, IMAGE)
"""What names begin with that only a model's YAML knows (`inputs`)."""
LOAD_AXES = ("model", "backend", "threads")
"""What decides a load: sweeping these makes one job per combination."""

TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "bool": (bool,),
}


def check_overrides(overrides: Sequence[str], multirun: bool, extra: Path | None = None) -> None:
    """Refuse the first override that cannot be right; `extra` is the user's own YAML folder.

    Raises: ConfigError, one line.
    """
    for text in written(overrides):
        override = parse(text)
        name = override.get_key_element().lstrip("+")
        if name.lstrip("+~").startswith(("hydra", PROMPTS_GIVEN, *RAY_OPTIONS)):
            continue
        if name.startswith(OWN_INPUTS):
            sweep_values(override)
            if override.is_sweep_override():
                _check_sweep(name, text.lstrip("+"), multirun)
            continue
        _check_prefix(override, text)
        _check_name(name, text)
        values = sweep_values(override)
        if override.is_sweep_override():
            _check_sweep(name, text, multirun)
            if name in LOAD_AXES and len(set(values)) < len(values):
                raise ConfigError(f"{text}: each {name} runs once; leave the repeated one out")
        for value in values:
            if name in GROUP_NAMES:
                _check_choice(name, value, extra)
            elif name in FIELDS:
                check_field(name, value)


# What a person types, as Hydra reads it -----------------------------------------------------------


def written(overrides: Sequence[str]) -> list[str]:
    """Write out what is short on a command line, and every free text so that Hydra leaves it alone.

    `backend.dtype=bf16` sets `backend.options.dtype`; `extra.NAME` is added to its node, as is
    what Ray and launchers of Hydra take; each
    `prompt=TEXT` is one prompt; a file of prompts implies `prompts=file`. Idempotent but for free
    texts: apply it once.

    Raises: ConfigError for an empty prompt, and for prompts given in two ways.
    """
    found = [_one(text) for text in overrides if not text.startswith("prompt=")]
    given = [text.removeprefix("prompt=") for text in overrides if text.startswith("prompt=")]
    names = {text.partition("=")[0]: text for text in overrides}
    if given:
        own = [names[name] for name in ("prompts", "prompts.path") if name in names]
        if own:
            raise ConfigError(f"prompt= and {own[0]}: give prompts in one way only")
        if not all(text.strip() for text in given):
            raise ConfigError("prompt=: the prompt is empty")
        texts = ",".join(quoted(_unquoted(text).strip()) for text in given)
        return ["prompts=given", *found, f"{PROMPTS_GIVEN}=[{texts}]"]
    if "prompts.path" in names and not {"prompts", "experiment"} & names.keys():
        return ["prompts=file", *found]
    return found


def quoted(text: str) -> str:
    """A text as Hydra and OmegaConf give it back to the letter, whatever it holds.

    Backslashes count only before a quotation mark, an interpolation or the end.
    """
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), text) + '"'


def _one(text: str) -> str:
    name, equals, value = text.partition("=")
    if name in FREE_TEXTS and equals:
        return f"{name}={','.join(quoted(piece) for piece in _pieces(value))}"
    if name in FILE_LISTS and value not in ("", "null"):
        return f"{name}={quoted(_unquoted(value))}"
    if text.startswith(OWN_INPUTS):
        return f"++{text}"
    if name.lstrip("+").startswith((*RAY_OPTIONS, "hydra.launcher.")):
        return f"++{text.lstrip('+')}"  # nobody knows all options of Ray and of launchers
    head, dot, rest = text.partition(".")
    option = rest.partition("=")[0].partition(".")[0]
    short = head == "backend" and dot and option not in BackendConf.model_fields
    return f"backend.options.{rest}" if short else text


def _pieces(value: str) -> list[str]:
    """A comma list's texts; a comma inside quotation marks divides nothing."""
    pieces = re.findall(r"\s*(\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|[^,]*)\s*(?:,|\Z)", value)
    pieces = pieces[:-1] if len(pieces) > 1 and not value.endswith(",") else pieces
    return [_unquoted(piece.strip()) for piece in pieces]


def _unquoted(text: str) -> str:
    """The text inside one pair of quotation marks, read as Hydra reads it."""
    found = re.fullmatch(r"([\"'])((?:(?!\1)[^\\]|\\.)*)\1", text, re.DOTALL)
    if found is None:
        return text
    mark, inside = found.groups()
    return re.sub(rf"(\\+)({mark}|\Z)", lambda m: m[1][: len(m[1]) // 2] + m[2], inside)


def parse(text: str) -> Override:
    """Parse one override. Raises: ConfigError if it is not NAME=VALUE."""
    if "=" not in text and not text.startswith("~"):
        raise ConfigError(f"{text!r}: expected NAME=VALUE, such as steps=28; see --help")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as exc:
        name, _, value = text.partition("=")
        raise ConfigError(
            f"{name}: cannot read the value {value!r}; put special characters in quotes:"
            f" '{name}=\"{value}\"'"
        ) from exc


def sweep_values(override: Override) -> list[Any]:
    """An override's values as Python values; one unless it is a sweep.

    Raises: ConfigError for a continuous interval.
    """
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.get_key_element()}: a grid needs single values, such as 1,2,4 or"
                " range(1,5)"
            )
        return [_plain(value) for value in _iterate(override)]
    return [_plain(override.value())]


def _iterate(override: Override) -> list[Any]:
    try:
        return list(override.sweep_iterator())
    except (HydraException, AssertionError, TypeError) as exc:
        raise ConfigError(
            f"{override.input_line}: cannot be expanded; give the values as a comma list"
        ) from exc


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def _check_prefix(override: Override, text: str) -> None:
    if override.is_add() or override.is_force_add() or override.is_delete():
        bare = text.lstrip("+~")
        raise ConfigError(f"{text}: fields are neither added nor deleted; write {bare}")


def _check_name(name: str, text: str) -> None:
    if name in FIELDS or name in GROUP_NAMES or name.startswith(("backend.", "axes.")):
        return  # a backend's options are checked against its YAML, axes against their fields
    leaf = name.rpartition(".")[2]
    known = [*FIELDS, *GROUP_NAMES]
    meant = leaf if leaf in FIELDS else OTHER_NAMES.get(name)
    hint = f"; did you mean {meant}?" if meant is not None else nearest(name, known)
    raise ConfigError(f"{text}: unknown field {name!r}{hint} (see run --help)")


def _check_sweep(name: str, text: str, multirun: bool) -> None:
    sweepable = name in LOAD_AXES or name.startswith(OWN_INPUTS)
    sweepable = sweepable or (name in FIELDS and FIELDS[name].axis)
    is_text = name in FIELDS and FIELDS[name].is_text
    if not multirun:
        quote = " (or quote a text that holds a comma: " + _quoted(name, text) + ")"
        raise ConfigError(
            f"{text}: several values need -m{quote if is_text else ''}"
            if sweepable
            else f"{text}: {name} takes one value{quote if is_text else ''}"
        )
    if not sweepable:
        why = "run once per value into the same study"
        if name == "init_image":
            why = "put one line per image in a prompt file with an init_image column"
        elif is_text:
            why += "; a text that holds a comma goes in quotes: " + _quoted(name, text)
        raise ConfigError(f"{text}: {name} cannot be swept; {why}")


def _quoted(name: str, text: str) -> str:
    value = text.partition("=")[2]
    return f"'{name}=\"{value}\"'"


def _check_choice(group: str, value: Any, extra: Path | None) -> None:
    if value is None and group == "experiment":
        return
    known = choices(group, extra)
    if value not in known:
        word = f"{value}"
        raise ConfigError(
            f"{group}={word}: must be one of {', '.join(known)}{nearest(word, known)}"
        )


# Options ----------------------------------------------------------------------------------------


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


def metric_options(
    overrides: Sequence[str], extra: Path | None = None
) -> dict[str, dict[str, Scalar]]:
    """Read ``metric.fid.reference=…`` and the like: family -> its options, without nulls.

    A YAML of the user's own folder `extra` may have `kind`, the place of a plug-in's class, which
    its family stands for from here on.

    Raises: ConfigError for an unknown metric or option, or a wrong value.
    """
    found: dict[str, dict[str, Scalar]] = {}
    for name in choices("metric", extra):
        conf = _metric_file(name, extra)
        found[conf["family"]] = _metric(name, conf, overrides)
    known = [*(f"metric.{name}." for name in found), *WORKERS]
    for text in overrides:
        if not text.startswith(tuple(known)):
            raise ConfigError(
                f"{text}: expected metric.NAME.OPTION=VALUE with NAME one of {', '.join(found)}"
            )
    return {family: options for family, options in found.items() if options}


def _metric_file(name: str, extra: Path | None) -> Mapping[str, Any]:
    """Read one metric's YAML. Raises: ConfigError for what it may not carry."""
    path = group_file("metric", name, extra)
    assert path is not None
    if not path.is_relative_to(config_dir()):
        check_group_file(path, path.parents[1])
    conf: Any = copy.deepcopy(_parsed(*file_state(path)))
    if not isinstance(conf, dict) or not isinstance(conf.get("family"), str):
        raise ConfigError(f"{path}: `family`, the metric's name, is missing")
    unknown = sorted(conf.keys() - {"family", "kind", "options", "allowed"})
    if unknown:
        raise ConfigError(f"{path}: {unknown[0]}: unknown field; there are kind, options, allowed")
    if "kind" in conf:
        plugins.name_place("metrics", conf["family"], f"{conf['kind']}")
    return conf


@lru_cache(256)
def _parsed(path: str, *_: int) -> Any:
    """The plain values of a file; the rest of its state has it parsed anew when it changed."""
    return OmegaConf.to_container(OmegaConf.load(path))


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
