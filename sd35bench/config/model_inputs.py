"""What a run asks of a hosted model's own inputs: `extra.NAME=VALUE` and `images.ROLE=FILE`.

A model's YAML declares its inputs; a field that it has not is left out, and the plan says so.
Where no job of a sweep has it, `unread` refuses it. Asking for a default is not asking: it is the
same image, and must be the same trial.
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sd35bench.config.models import BackendConf, ModelConf, RunConf
from sd35bench.errors import ConfigError
from sd35bench.plan import AxisValue
from sd35bench.prompts import read_init_image
from sd35bench.remote.inputs import EXTRA, IMAGE, Input, Schema, takes
from sd35bench.remote.providers import is_provider
from sd35bench.types import Scalar

Pairs = tuple[tuple[str, Any], ...]
_OURS = ("steps", "cfg", "output_format")
"""Fields that every request has, whose values run once where a model has no input for them."""


def declared(model: ModelConf) -> Schema:
    """A model's input schema as its YAML has it; empty for Stable Diffusion 3.5's.

    Raises: ConfigError for a default that is not in its own range.
    """
    found = []
    for name, conf in model.inputs.items():
        low, high = conf.range if conf.range else (None, None)
        item = Input(
            name=name,
            source=EXTRA + name if conf.field is None else conf.field,
            kind=conf.type,
            default=conf.default,
            low=low,
            high=high,
            choices=tuple(conf.choices),
            words=dict(conf.words),
            needs=conf.needs,
            required=conf.required,
            drawn=conf.drawn,
            local=conf.local,
        )
        if item.extra is not None:
            try:
                item.checked(item.default)
            except ValueError as exc:
                raise ConfigError(f"model.inputs.{name}.default={item.default}: {exc}") from exc
        found.append(item)
    return tuple(found)


def inputs_in_force(model: ModelConf, backend: BackendConf) -> Schema:
    """The schema where a hosted service makes the images; empty where they are made here."""
    return declared(model) if is_provider(backend.kind) else ()


def refuse_elsewhere(model: ModelConf | DictConfig, backend: BackendConf | DictConfig) -> None:
    """Refuse a model that has no local pipeline on a backend that cannot call it.

    Raises: ConfigError saying why, and which backends can.
    """
    if model.hosted_only is not None and backend.kind not in model.hosted:
        able = " or ".join(f"backend={name}" for name in model.hosted)
        raise ConfigError(f"model={model.name}: {model.hosted_only}; take {able}")


def settle_axes(conf: RunConf, schema: Schema, axes: dict[str, tuple[AxisValue, ...]]) -> list[str]:
    """Run once what the model has no input for; returns what the plan says of it."""
    notes = []
    own = {"steps": conf.model.steps, "cfg": float(conf.model.cfg), "output_format": "png"}
    for name in _OURS if schema else ():
        if not takes(schema, name) and axes.get(name, (own[name],)) != (own[name],):
            notes.append(f"{name} has no effect: {conf.model.name} has no input for it there")
            axes[name] = (own[name],)
    return notes


def own_axes(
    conf: RunConf, schema: Schema
) -> tuple[dict[str, tuple[Pairs, ...]], dict[str, bytes], list[str]]:
    """Axes of extras and of images, the images' files by digest, and what the plan says.

    Raises: ConfigError naming field, value and what is allowed.
    """
    notes: list[str] = []
    files: dict[str, bytes] = {}
    asked = {name: [conf.images[name]] for name in conf.images}
    asked |= {name: values for name, values in conf.axes.images.items() if values}
    images = {}
    for role, paths in _kept(conf, schema, IMAGE, asked, notes).items():
        read = [_file(f"{IMAGE}{role}", path, conf, files, notes) for path in paths]
        images[role] = tuple(dict.fromkeys(read))
    for item in schema:
        if item.required and item.role not in images:
            raise ConfigError(
                f"{item.source}: model={conf.model.name} needs it; give {item.source}=FILE"
            )
    given: dict[str, Sequence[Scalar]] = {name: [value] for name, value in conf.extra.items()}
    given |= {name: values for name, values in conf.axes.extra.items() if values}
    by_extra = {item.extra: item for item in schema if item.extra is not None}
    extras = {
        name: _checked(by_extra[name], values, schema, images)
        for name, values in _kept(conf, schema, EXTRA, given, notes).items()
    }
    defaults = {name: item.default for name, item in by_extra.items()}
    axes = {"extra": _product(extras, defaults), "images": _product(images, {})}
    for item in schema:
        if item.role in images and item.needs not in (None, *_sent(schema, images)):
            other = next(i.source for i in schema if i.name == item.needs)
            raise ConfigError(f"{item.source}: it acts only with {other}; give both")
    return {name: values for name, values in axes.items() if values != ((),)}, files, notes


def _sent(schema: Schema, images: Mapping[str, Any]) -> list[str]:
    """Wire names of the images that were given."""
    return [item.name for item in schema if item.role in images]


def _kept(
    conf: RunConf, schema: Schema, kind: str, given: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """What the model has an input for; a note for the rest."""
    kept = {name: values for name, values in given.items() if takes(schema, kind + name)}
    notes += [
        f"{kind}{name} has no effect: model={conf.model.name} on backend={conf.backend.name} has"
        " no such input"
        for name in given
        if name not in kept
    ]
    return kept


def _checked(
    item: Input, values: Sequence[Scalar], schema: Schema, images: Mapping[str, Any]
) -> tuple[Scalar, ...]:
    if item.needs is not None and item.needs not in _sent(schema, images):
        other = next(i.source for i in schema if i.name == item.needs)
        raise ConfigError(f"{item.source}={values[0]}: it acts only with {other}=FILE; give both")
    found = []
    for value in values:
        try:
            found.append(item.checked(value))
        except ValueError as exc:
            raise ConfigError(f"{item.source}={value}: {exc}") from exc
    return tuple(dict.fromkeys(found))


def _product(
    values: Mapping[str, Sequence[Any]], defaults: Mapping[str, Scalar]
) -> tuple[Pairs, ...]:
    """Every combination as pairs in order of name, without those that are defaults anyway."""
    names = sorted(values)
    combinations = itertools.product(*(values[name] for name in names))
    found = (
        tuple((n, v) for n, v in zip(names, each, strict=True) if (n, v) not in defaults.items())
        for each in combinations
    )
    return tuple(dict.fromkeys(found))


def _file(where: str, path: str, conf: RunConf, files: dict[str, bytes], notes: list[str]) -> str:
    """The digest of an input image's file, kept in `files`. Raises: ConfigError."""
    given = conf.prompts
    file = Path(path).expanduser()
    data, _ = read_init_image(file, where, given.first_frame, given.init_background)
    digest = hashlib.sha256(data).hexdigest()
    files[digest] = data
    notes.append(f"{where}: {digest[:8]} is {Path(path).name}")
    return digest


def has_input(name: str, model: DictConfig, backend: DictConfig) -> bool:
    """Whether a composed model on a backend reads a field of a request, an extra or an image.

    What runs here, and what takes Stable Diffusion 3.5's input, reads every field of a request.
    """
    own = name.startswith((EXTRA, IMAGE))
    if not is_provider(backend.kind) or not model.inputs:
        return not own
    return name in known_inputs(model, backend)


def known_inputs(model: DictConfig, backend: DictConfig) -> set[str]:
    """Our names of everything that a composed model on a backend has an input for."""
    declared = model.inputs if is_provider(backend.kind) else {}
    return {
        EXTRA + str(wire) if item.get("field") is None else item.field
        for wire, item in declared.items()
    }
