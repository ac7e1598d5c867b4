"""From a model's configuration to its specification: a checkpoint found, or shapes for noise."""

from dataclasses import replace
from pathlib import Path

from sd35bench.architectures import random_digest, random_parts, random_suffix
from sd35bench.config.changes import read_changes
from sd35bench.config.models import ModelConf
from sd35bench.errors import ConfigError
from sd35bench.loading.checkpoint import (
    find_checkpoint,
    find_components,
    revision_of,
    settled_variant,
    whole_digest,
)
from sd35bench.types import NO_WEIGHTS, ModelSpec

ON_TOP = ("lora", "transformer", "vae", "variant")
"""What changes a checkpoint's weights."""


def model_spec(model: ModelConf, needs_weights: bool = True) -> ModelSpec:
    """Find the model's weights and name them by digest.

    Raises: ConfigError where they are not here, or where the fields contradict each other.
    """
    _refuse_contradictions(model)
    if not needs_weights:
        return _without_weights(model)
    if model.weights == "random":
        return _random_spec(model)
    changes = read_changes(model)
    replaced = {c.kind for c in changes if c.kind != "lora"}
    path = find_checkpoint(model.name, model.path, model.hub_id, model.gated, without=replaced)
    if path.is_file() and model.variant is not None:
        raise ConfigError(
            f"model.variant={model.variant}: it acts on a diffusers folder, and {path} is one file;"
            " leave one of them out"
        )
    variant = settled_variant(path, model.variant)
    components: Path | None = None
    if path.is_file():
        if model.family != "sd3":
            raise ConfigError(
                f"model.path={path}: {model.name} loads from a diffusers folder only; give one"
            )
        components = find_components(path, model.components, model.hub_id)
    elif model.components is not None:
        raise ConfigError(
            f"model.components={model.components}: it acts only with model.path=FILE.safetensors,"
            f" and {path} is a folder; leave one of them out"
        )
    return replace(
        _without_weights(model),
        path=str(path),
        weights_digest=whole_digest(
            path, components, [(c.kind, c.path, c.weight) for c in changes], variant
        ),
        changes=changes,
        variant=variant,
        components=None if components is None else str(components),
        revision=revision_of(path),
    )


def model_notes(model: ModelConf, needs_weights: bool) -> tuple[str, ...]:
    """Say in plain words what was asked for in vain."""
    if needs_weights:
        return ()
    asked = {
        "model.path": model.path is not None,
        "model.weights": model.weights != "checkpoint",
        "model.layers": model.layers is not None,
        **{f"model.{name}": getattr(model, name) is not None for name in ON_TOP},
    }
    return tuple(
        f"{name} has no effect: this backend reads no weights"
        for name, is_set in asked.items()
        if is_set
    )


def _refuse_contradictions(model: ModelConf) -> None:
    """Refuse fields that would not act."""
    if model.weights == "random":
        for name in ("path", "components", *ON_TOP):
            value = getattr(model, name)
            if value is not None:
                raise ConfigError(
                    f"model.{name}={value}: weights=random reads no checkpoint; leave one of them"
                    " out"
                )
        return
    for name, value in (("layers", model.layers), ("text_encoders", model.text_encoders)):
        if value not in (None, False):
            raise ConfigError(
                f"model.{name}={str(value).lower()}: it acts only with model.weights=random, a"
                " checkpoint has its own"
            )


def _random_spec(model: ModelConf) -> ModelSpec:
    """Name a random model by its shapes; asking for the model's own depth is no cut."""
    parts = random_parts(model.name, model.layers)
    own = random_parts(model.name, None)["transformer"]["num_layers"]
    layers = None if model.layers == own else model.layers
    return replace(
        _without_weights(model),
        name=model.name + random_suffix(layers, model.text_encoders),
        weights_digest=random_digest(parts, model.text_encoders),
        weights="random",
        layers=layers,
        text_encoders=model.text_encoders,
    )


def _without_weights(model: ModelConf) -> ModelSpec:
    """What a specification says before any weights are known."""
    return ModelSpec(
        name=model.name,
        path="",
        weights_digest=NO_WEIGHTS,
        max_sequence_length=model.max_sequence_length,
        target_latency_s=model.target_latency_s,
        family=model.family,
    )
