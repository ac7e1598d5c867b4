"""The true shapes of models whose weights need not be here, as facts in JSON.

A part's JSON is its configuration in the diffusers or transformers format, with the class that
reads it under `_class_name`. What all of a family share lies in the family's folder, what is a
model's own in the model's; nano's come from its packaged weights.

Sources: the published configurations of stabilityai/stable-diffusion-3.5-medium, -large and
-large-turbo; tests hold the parameter counts to the published ones.
"""

import json
from pathlib import Path
from typing import Any

from sd35bench.errors import ConfigError
from sd35bench.types import ModelSpec, content_hash

ROOT = Path(__file__).parent
NANO = ROOT.parent / "nano" / "weights"
SHARED = "sd3"
PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "sana": "SanaPipeline",
    "pixart": "PixArtAlphaPipeline",
}
"""diffusers' class by family."""
TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = ("transformer", "vae", "scheduler", *TEXT_PARTS)
SEED = 0
"""The seed of every random model."""
FILLER_VERSION = 1
"""Raise it whenever `loading.random_weights` fills the same shapes with other values."""

Parts = dict[str, dict[str, Any]]


def architecture_names() -> list[str]:
    """Names of the models that can run on random weights."""
    own = {path.parent.name for path in ROOT.glob("*/transformer.json")}
    return sorted({*own, "nano"})


def read_architecture(name: str) -> Parts:
    """Return a model's configurations by part: transformer, VAE, scheduler, text encoders.

    Raises: ConfigError for a model whose shapes are not packaged.
    """
    if name not in architecture_names():
        known = ", ".join(architecture_names())
        raise ConfigError(f"model={name}: its shapes are not packaged; random weights have {known}")
    if name == "nano":
        return _nano()
    return {part: json.loads(_file(name, part).read_text()) for part in PARTS}


def random_parts(name: str, layers: int | None) -> Parts:
    """Return a model's configurations, cut to `layers` transformer blocks where that is given.

    Raises: ConfigError where the model has fewer.
    """
    parts = read_architecture(name)
    if layers is None:
        return parts
    own = parts["transformer"]
    if not 1 <= layers <= own["num_layers"]:
        raise ConfigError(f"model.layers={layers}: {name} has {own['num_layers']}; give 1 to that")
    dual = [layer for layer in own["dual_attention_layers"] if layer < layers]
    cut = {**own, "num_layers": layers, "dual_attention_layers": dual}
    return {**parts, "transformer": cut}


def random_suffix(layers: int | None, text_encoders: bool) -> str:
    """Return what tells a random model's name from that of its checkpoint."""
    depth = "" if layers is None else f"-{layers}-layers"
    return f"-random{depth}{'-text-encoders' if text_encoders else ''}"


def random_digest(parts: Parts, text_encoders: bool) -> str:
    """SHA-256 (hex) of all that decides a random model's values: shapes, seed and filler."""
    return content_hash([parts, text_encoders, SEED, FILLER_VERSION])


def architecture_name(spec: ModelSpec) -> str:
    """Return the name under which a random model's shapes are packaged."""
    return spec.name.removesuffix(random_suffix(spec.layers, spec.text_encoders))


def _file(name: str, part: str) -> Path:
    own = ROOT / name / f"{part}.json"
    return own if own.is_file() else ROOT / SHARED / f"{part}.json"


def _nano() -> Parts:
    """Read the configurations beside nano's weights, classes from its index."""
    index = json.loads((NANO / "model_index.json").read_text())
    parts: Parts = {}
    for part in PARTS:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        values = json.loads((NANO / part / name).read_text())
        parts[part] = {**values, "_class_name": index[part][1]}
    return parts
