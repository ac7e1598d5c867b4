"""Writes a diffusers pipeline as one file in the original SD3 layout: the loader's inverse.

Written from the layout's own names, not from diffusers' conversion, which the loader uses.
Source: Stability-AI/sd3.5, `mmditx.py` and `other_impls.py`; CompVis/latent-diffusion for the VAE.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Weights = dict[str, torch.Tensor]

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
IN_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
VAE_NAMES = (
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_(q|k|v)\b", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def write_original(
    pipe: Any, path: Path, encoders: Iterable[str] = (), leave_out: str | None = None
) -> Path:
    """Write transformer, VAE and some of the text encoders; a weight may be left out by key."""
    weights = {f"model.diffusion_model.{k}": v for k, v in _transformer(pipe.transformer).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in _vae(pipe.vae).items()}
    for part in encoders:
        prefix = f"text_encoders.{ENCODERS[part]}.transformer."
        weights |= {f"{prefix}{k}": v for k, v in getattr(pipe, part).state_dict().items()}
    if leave_out is not None:
        del weights[leave_out]
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path)
    return path


def _transformer(model: Any) -> Weights:
    state = dict(model.state_dict())
    last = model.config.num_layers - 1
    result: Weights = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if name in OUTSIDE:
            result[OUTSIDE[name]] = value
        elif stem in OUTSIDE:
            result[f"{OUTSIDE[stem]}.{kind}"] = value
        elif stem == "norm_out.linear":
            result[f"final_layer.adaLN_modulation.1.{kind}"] = _shift_first(value)
        else:
            _, number, inside = stem.split(".", 2)
            if inside in IN_BLOCK:
                swap = inside == "norm1_context.linear" and int(number) == last
                key = f"joint_blocks.{number}.{IN_BLOCK[inside]}.{kind}"
                result[key] = _shift_first(value) if swap else value
    for number in range(last + 1):
        for fused, names in FUSED.items():
            for kind in ("weight", "bias"):
                parts = [f"transformer_blocks.{number}.{name}.{kind}" for name in names]
                if parts[0] in state:
                    joined = torch.cat([state[part] for part in parts])
                    result[f"joint_blocks.{number}.{fused}.{kind}"] = joined
    return result


def _shift_first(value: torch.Tensor) -> torch.Tensor:
    """Turn (scale, shift) of diffusers' continuous adaLN into the original's (shift, scale)."""
    scale, shift = value.chunk(2, dim=0)
    return torch.cat([shift, scale])


def _vae(model: Any) -> Weights:
    blocks = len(model.config.up_block_types)
    result: Weights = {}
    for name, value in model.state_dict().items():
        key = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)",
            lambda match: _up(match, blocks),
            name,
        )
        for old, new in VAE_NAMES:
            key = re.sub(old, new, key)
        is_projection = ".attn_1." in key and key.endswith("weight") and "norm" not in key
        result[key] = value[:, :, None, None] if is_projection else value
    return result


def _up(match: re.Match[str], blocks: int) -> str:
    """The original counts the decoder's blocks from the small side, diffusers from the other."""
    number = blocks - 1 - int(match[1])
    return f"up.{number}.upsample" if match[2] == "upsamplers" else f"up.{number}.block.{match[3]}"
