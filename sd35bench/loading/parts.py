"""Parts that a user puts in the place of a model's own: another denoiser, another autoencoder.

A folder is loaded as diffusers does, shards and variants included. A file is told by its names:
diffusers' or the original layout, with or without the prefixes that all-in-one files have.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd35bench.core.model import Weights
from sd35bench.errors import BackendError
from sd35bench.loading.checkpoint import DENOISER_PREFIXES
from sd35bench.loading.empty import build_empty
from sd35bench.loading.folders import LOAD_ERRORS, load_diffusers_part, quiet_loading
from sd35bench.loading.formats import gguf_types, read_tensors, widen
from sd35bench.loading.single_file import assign, original_transformer, original_vae
from sd35bench.types import Change, ModelSpec

DENOISER_FIRST = ("joint_blocks.", "transformer_blocks.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
VAE_FIRST = ("decoder.conv_in.",)
CLASSES = {"transformer": "SD3Transformer2DModel", "vae": "AutoencoderKL"}


def replaced_parts(
    spec: ModelSpec, dtype: torch.dtype, dequantised: dict[str, str]
) -> dict[str, nn.Module]:
    """Load every part that takes the place of the model's own; says in `dequantised` what it was.

    Raises: BackendError for a part that cannot be loaded, or is of another kind of model.
    """
    own = Path(spec.path if spec.components is None else spec.components)
    found: dict[str, nn.Module] = {}
    for change in spec.changes:
        if change.kind not in CLASSES:
            continue
        try:
            with quiet_loading():
                found[change.kind] = _load(change, own, dtype, dequantised)
        except LOAD_ERRORS as exc:
            raise BackendError(
                f"model.{change.kind}={change.path} cannot be loaded: {exc}; give one that was made"
                f" for {spec.name}"
            ) from exc
    return found


def _load(change: Change, own: Path, dtype: torch.dtype, dequantised: dict[str, str]) -> nn.Module:
    path, kind = Path(change.path), change.kind
    wanted = _class_of(own, kind)
    if path.is_dir():
        found = json.loads((path / "config.json").read_text()).get("_class_name")
        if found != wanted:
            raise ValueError(f"it holds a {found}, the model has a {wanted}")
        return load_diffusers_part(path, wanted, dtype)
    prefixes, first = (
        (DENOISER_PREFIXES, DENOISER_FIRST) if kind == "transformer" else (VAE_PREFIXES, VAE_FIRST)
    )
    weights = read_tensors(path, prefixes, first)
    said = gguf_types(path) if path.suffix == ".gguf" else widen(weights, lambda _: dtype)
    if said:
        dequantised[kind] = said
    return _BUILD[kind](weights, own / kind, wanted, dtype)


def _class_of(own: Path, kind: str) -> str:
    """The part's class in the model's index; SD3's where the index does not have the part."""
    entry = json.loads((own / "model_index.json").read_text()).get(kind)
    return entry[1] if isinstance(entry, list) and entry[1] is not None else CLASSES[kind]


def _transformer(weights: Weights, own: Path, wanted: str, dtype: torch.dtype) -> nn.Module:
    if any(name.startswith("joint_blocks.") for name in weights):
        if wanted != CLASSES["transformer"]:
            raise ValueError(f"it holds SD3's denoiser, the model has a {wanted}")
        return original_transformer(weights, dtype)
    return _in_diffusers_layout(weights, own, wanted, dtype)


def _vae(weights: Weights, own: Path, wanted: str, dtype: torch.dtype) -> nn.Module:
    if any(name.startswith("decoder.up.") for name in weights):
        return original_vae(own, weights, dtype)
    return _in_diffusers_layout(weights, own, wanted, dtype)


def _in_diffusers_layout(weights: Weights, own: Path, wanted: str, dtype: torch.dtype) -> Any:
    """Build the part by the model's own configuration, which such a file does not have."""
    config = json.loads((own / "config.json").read_text())
    model = build_empty({**config, "_class_name": wanted})
    return assign(model, weights, dtype, own)


_BUILD: dict[str, Callable[[Weights, Path, str, torch.dtype], nn.Module]] = {
    "transformer": _transformer,
    "vae": _vae,
}
