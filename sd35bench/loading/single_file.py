"""Loading one safetensors file in the original SD3 layout, with what it lacks from a folder.

The transformer's configuration shows in the shapes of its weights, as it does to Stability's own
script; every other part is configured by its JSON in the components. Keys are renamed by diffusers'
own conversions. Every weight must find its parameter and every parameter its weight: diffusers'
`from_single_file` drops what it does not know and leaves what is missing, so it is not used.

Source of the layout: Stability-AI/sd3.5, `sd3_infer.py` and `mmditx.py`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from torch import nn

from sd35bench.architectures import PIPELINES
from sd35bench.core.model import Weights
from sd35bench.core.weights import config_of_stability, read_file
from sd35bench.errors import BackendError, ConfigError
from sd35bench.loading.checkpoint import LAYOUT, parts_in_file, parts_of_components
from sd35bench.loading.empty import build_empty, dtype_of, restore_buffers
from sd35bench.loading.folders import (
    LOAD_ERRORS,
    load_diffusers_part,
    load_text_part,
    quiet_loading,
    read_index,
    refuse_missing,
)
from sd35bench.loading.formats import widen

TIED = {"encoder.embed_tokens.weight": "shared.weight"}
"""T5's embedding has two names and is stored once."""


def load_single_file(
    path: Path,
    components: Path,
    dtype: torch.dtype,
    replaced: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Load an SD3 pipeline from a file in the original layout; never from the network.

    `components`: a folder in diffusers' format with the scheduler, the tokenizers, each part's
    configuration, and the weights of the parts that the file does not bring. `replaced`: parts
    that are there already. What was stored in fp8 is said in the pipeline's `dequantised`.

    Raises: BackendError for a broken file or folder, for weights too few or too many.
    """
    try:
        brought = parts_in_file(path)
        needed = parts_of_components(path, components)
    except ConfigError as exc:
        raise BackendError(str(exc)) from exc
    index = read_index(components, needed, replaced)
    if index.get("_class_name") != PIPELINES["sd3"]:
        raise BackendError(
            f"model.components={components} holds a {index.get('_class_name')}; give one of"
            f" {PIPELINES['sd3']}"
        )
    parts: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    parts |= replaced
    dequantised: dict[str, str] = {}

    def wide(name: str) -> torch.dtype:  # T5's output projections stay in fp32 under fp16
        return torch.float32 if dtype is torch.float16 and ".wo." in name else dtype

    with quiet_loading():
        try:
            if "transformer" not in replaced:
                weights = read_file(path, brought["transformer"])
                dequantised["transformer"] = widen(weights, lambda _: dtype)
                parts["transformer"] = original_transformer(weights, dtype)
            for name in needed.keys() - replaced.keys():
                weights = read_file(path, brought[name]) if name in brought else None
                if weights is not None:
                    dequantised[name] = widen(weights, wide)
                parts[name] = _part(components / name, index[name], weights, dtype)
        except LOAD_ERRORS as exc:
            raise BackendError(
                f"model.path={path} cannot be loaded with model.components={components}: {exc};"
                " give the file and the components of one model"
            ) from exc
    pipe: Any = StableDiffusion3Pipeline(**parts)
    pipe.dequantised = {name: said for name, said in dequantised.items() if said}
    return pipe


def transformer_config(weights: Weights) -> dict[str, Any]:
    """Read diffusers' configuration of the transformer off its weights; keys without prefix.

    `sample_size` shows nowhere; it only decides a default size, and every request has its own.
    """
    config = config_of_stability(weights)
    return {
        "sample_size": 128,
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.layers,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.heads,
        "joint_attention_dim": config.context_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.position_side,
        "dual_attention_layers": list(config.dual),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def original_transformer(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Build SD3's denoiser from weights in the original layout, which are taken out of `weights`.

    Raises: ValueError, BackendError for weights too few or too many.
    """
    config = transformer_config(weights)
    keys = set(weights)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(weights)  # takes what it knows
    _refuse_leftover("transformer", set(weights) & keys)
    model = build_empty({**config, "_class_name": "SD3Transformer2DModel"})
    return assign(model, converted, dtype, Path("transformer"))


def _part(folder: Path, entry: list[str], weights: Weights | None, dtype: torch.dtype) -> Any:
    """Load a part from the file's weights and its configuration, or wholly from its folder."""
    library, name = entry
    if weights is None:
        if folder.name.startswith("text_encoder"):
            return load_text_part(folder, name, dtype)
        part_class: Any = getattr(diffusers if library == "diffusers" else transformers, name)
        if not issubclass(part_class, nn.Module):
            return part_class.from_pretrained(folder, local_files_only=True)
        return load_diffusers_part(folder, name, dtype)
    if library == "diffusers":
        return original_vae(folder, weights, dtype)
    return _text_encoder(name, folder, weights, dtype)


def original_vae(folder: Path, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Build an autoencoder from weights in the original layout and a folder's configuration.

    Raises: ValueError, BackendError for weights too few or too many.
    """
    config = json.loads((folder / "config.json").read_text())
    model: Any = build_empty({"_class_name": "AutoencoderKL", **config})
    prefix = LAYOUT["vae"]
    original = {f"{prefix}{key}": value for key, value in weights.items()}
    converted = convert_ldm_vae_checkpoint(original, dict(model.config))
    if len(converted) != len(weights):
        raise ValueError(f"{len(weights)} weights of the VAE became {len(converted)}")
    return assign(model, converted, dtype, folder)


def _text_encoder(name: str, folder: Path, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Build a text encoder; the original's names are transformers' own."""
    config = json.loads((folder / "config.json").read_text())
    model: Any = build_empty({**config, "_class_name": name})
    wanted = model.state_dict()
    if "text_projection.weight" in wanted and "text_projection.weight" not in weights:
        # Stability's CLIP-L file has none; its script takes the identity.
        weights["text_projection.weight"] = torch.eye(*wanted["text_projection.weight"].shape)
    weights.pop("text_model.embeddings.position_ids", None)  # a buffer that was once stored
    for alias, stored in TIED.items():
        if alias in wanted and stored in weights:
            weights.setdefault(alias, weights[stored])
    model = assign(model, weights, dtype, folder)
    model.tie_weights()
    return model


def assign(model: nn.Module, weights: Weights, dtype: torch.dtype, part: Path) -> nn.Module:
    """Give a module its weights in `dtype`; each finds its parameter, and the other way round."""
    wanted = set(model.state_dict())
    refuse_missing(part, wanted - set(weights))
    _refuse_leftover(part.name, set(weights) - wanted)
    cast = {name: value.to(dtype_of(model, name, dtype)) for name, value in weights.items()}
    model.load_state_dict(cast, assign=True)
    restore_buffers(model, dtype, torch.device("cpu"))
    return model.eval()


def _refuse_leftover(part: str, names: Iterable[str]) -> None:
    """Refuse weights that no parameter takes: a scaled fp8 file would pass for a plain one."""
    leftover = sorted(names)
    if leftover:
        raise ValueError(
            f"{part} has {len(leftover)} weights that no parameter takes, first {leftover[0]}"
        )
