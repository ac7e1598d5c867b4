"""From SD3 files to fused weights: diffusers' folder, Stability's single file, or a loaded module.

Both layouts are mapped to the names of `model`. Stability's file has fused projections already and
is only renamed; of diffusers' the three projections of an attention are put one under the other,
and the shifts and scales of the last modulations, which it stores the other way round, are swapped.
Every weight must find its place and every place its weight. Tensors are taken out of the source as
they are placed, so that fusing needs the memory of one layer beyond the model's own.

Source of the layouts: Stability-AI/sd3.5, `mmditx.py`; diffusers 0.42, `transformer_sd3.py`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sd35bench.core.model import Config, Weights

HEAD_WIDTH = 64
"""Width of an attention head where no query norm shows it: all of SD3 has it."""
MLP = {"up": ("ff.net.0.proj", "mlp.fc1"), "down": ("ff.net.2", "mlp.fc2")}
LINEAR = ("weight", "bias")


def read_file(path: Path, prefix: str = "") -> Weights:
    """Read a safetensors file's tensors whose names begin with `prefix`, which is cut off."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - no mapping
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def config_of_diffusers(values: Mapping[str, Any]) -> Config:
    """Read a configuration of diffusers' `SD3Transformer2DModel`.

    Raises: ValueError for an MMDiT that this one is not.
    """
    if values.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm={values['qk_norm']!r}: only rms_norm or none is known")
    return Config(
        layers=values["num_layers"],
        heads=values["num_attention_heads"],
        head_dim=values["attention_head_dim"],
        dual=tuple(values.get("dual_attention_layers") or ()),
        patch=values["patch_size"],
        in_channels=values["in_channels"],
        out_channels=values.get("out_channels") or values["in_channels"],
        context_width=values["joint_attention_dim"],
        pooled_width=values["pooled_projection_dim"],
        position_side=values["pos_embed_max_size"],
        qk_norm=values.get("qk_norm") is not None,
    )


def config_of_stability(weights: Mapping[str, torch.Tensor]) -> Config:
    """Read the configuration off the shapes of the single file's weights, keys without prefix."""
    projection = weights["x_embedder.proj.weight"]  # [width, channels, patch, patch]
    width, channels, patch = (int(n) for n in projection.shape[:3])
    norm = weights.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = HEAD_WIDTH if norm is None else len(norm)
    blocks = {int(key.split(".")[1]) for key in weights if key.startswith("joint_blocks.")}
    dual = {int(key.split(".")[1]) for key in weights if ".x_block.attn2." in key}
    return Config(
        layers=len(blocks),
        heads=width // head,
        head_dim=head,
        dual=tuple(sorted(dual)),
        patch=patch,
        in_channels=channels,
        out_channels=weights["final_layer.linear.weight"].shape[0] // patch**2,
        context_width=weights["context_embedder.weight"].shape[1],
        pooled_width=weights["y_embedder.mlp.0.weight"].shape[1],
        position_side=math.isqrt(weights["pos_embed"].shape[1]),
        qk_norm=norm is not None,
    )


def original_layers(config: Config) -> Iterator[tuple[str, list[str], bool]]:
    """Each layer of the original layout, with the layers of diffusers' that are put together in it.

    Gives its name, theirs from top to bottom, and whether the halves of its rows are swapped there.
    """
    places: dict[tuple[str, int], tuple[list[str], bool]] = {}
    seen: Counter[str] = Counter()
    for name, sources, swapped in diffusers_layout(config):
        places[name, seen[name]] = (sources, swapped)
        seen[name] += 1
    seen.clear()
    for name, (source,), _ in stability_layout(config):
        sources, swapped = places[name, seen[name]]
        seen[name] += 1
        if source.endswith(".weight"):
            names = [each.removesuffix(".weight") for each in sources]
            yield source.removesuffix(".weight"), names, swapped


Place = tuple[str, list[str], bool]
"""A fused tensor's name, the source's names from top to bottom, and whether halves are swapped."""


def fuse(
    config: Config,
    weights: Weights,
    dtype: torch.dtype,
    layout: Callable[[Config], Iterator[Place]] | None = None,
) -> Weights:
    """Fuse the weights of a layout (`diffusers_layout` by default), in `dtype`; empties `weights`.

    Raises: ValueError for weights too few or too many.
    """
    fused: Weights = {}
    modulation: dict[str, list[torch.Tensor]] = {kind: [] for kind in LINEAR}
    for name, sources, swapped in (diffusers_layout if layout is None else layout)(config):
        missing = [source for source in sources if source not in weights]
        if missing:
            raise ValueError(f"the transformer lacks weights, first {missing[0]}")
        parts = [weights.pop(source) for source in sources]
        if name == "position":  # 226 million values in SD3.5-Medium: converted where it is cropped
            fused[name] = parts[0].reshape(-1, config.width)
            continue
        value = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
        if swapped:
            value = torch.cat(value.chunk(2)[::-1])
        if name.startswith("modulation."):
            modulation[name.removeprefix("modulation.")].append(value)
        else:
            fused[name] = value.flatten(1).contiguous() if value.ndim > 1 else value.contiguous()
    if weights:
        raise ValueError(
            f"the transformer has {len(weights)} weights without a place, first {min(weights)}"
        )
    for kind in LINEAR:
        fused[f"modulation.{kind}"] = torch.cat(modulation.pop(kind))
    return fused


def _linear(name: str, *sources: str, swapped: bool = False) -> Iterator[Place]:
    for kind in LINEAR:
        yield f"{name}.{kind}", [f"{source}.{kind}" for source in sources], swapped


def diffusers_layout(config: Config) -> Iterator[Place]:
    """Where each tensor of diffusers' transformer goes."""
    yield from _linear("patch", "pos_embed.proj")
    yield "position", ["pos_embed.pos_embed"], False
    for name, inner in {"time": "timestep_embedder", "pooled": "text_embedder"}.items():
        for number, layer in (("0", "linear_1"), ("2", "linear_2")):
            yield from _linear(f"{name}.{number}", f"time_text_embed.{inner}.{layer}")
    yield from _linear("context", "context_embedder")
    for i in range(config.layers):
        source, last = f"transformer_blocks.{i}", i == config.layers - 1
        yield from _linear("modulation", f"{source}.norm1.linear")
        yield from _linear("modulation", f"{source}.norm1_context.linear", swapped=last)
        streams = {
            "image": ("attn", "to_q to_k to_v", "norm_q", "norm_k", "to_out.0"),
            "text": (
                "attn",
                "add_q_proj add_k_proj add_v_proj",
                "norm_added_q",
                "norm_added_k",
                "to_add_out",
            ),
            "dual": ("attn2", "to_q to_k to_v", "norm_q", "norm_k", "to_out.0"),
        }
        for stream, (attention, projections, *norms, out) in streams.items():
            if stream == "dual" and i not in config.dual:
                continue
            name, inside = f"blocks.{i}.{stream}", f"{source}.{attention}"
            yield from _linear(f"{name}.qkv", *(f"{inside}.{p}" for p in projections.split()))
            if config.qk_norm:
                for fused, norm in zip(("q_norm", "k_norm"), norms, strict=True):
                    yield f"{name}.{fused}", [f"{inside}.{norm}.weight"], False
            if not (stream == "text" and last):
                yield from _linear(f"{name}.out", f"{inside}.{out}")
        for fused, (mlp, _) in MLP.items():
            yield from _linear(f"blocks.{i}.image.{fused}", f"{source}.{mlp}")
            if not last:
                context = mlp.replace("ff.", "ff_context.")
                yield from _linear(f"blocks.{i}.text.{fused}", f"{source}.{context}")
    yield from _linear("modulation", "norm_out.linear", swapped=True)
    yield from _linear("final", "proj_out")


def stability_layout(config: Config) -> Iterator[Place]:
    """Where each tensor of Stability's single file goes."""
    yield from _linear("patch", "x_embedder.proj")
    yield "position", ["pos_embed"], False
    for name, inner in {"time": "t_embedder", "pooled": "y_embedder"}.items():
        for number in ("0", "2"):
            yield from _linear(f"{name}.{number}", f"{inner}.mlp.{number}")
    yield from _linear("context", "context_embedder")
    for i in range(config.layers):
        last = i == config.layers - 1
        for stream, block in (("image", "x_block"), ("text", "context_block"), ("dual", "x_block")):
            if stream == "dual" and i not in config.dual:
                continue
            name, source = f"blocks.{i}.{stream}", f"joint_blocks.{i}.{block}"
            attention = f"{source}.{'attn2' if stream == 'dual' else 'attn'}"
            yield from _linear(f"{name}.qkv", f"{attention}.qkv")
            if config.qk_norm:
                for side in ("q", "k"):
                    yield f"{name}.{side}_norm", [f"{attention}.ln_{side}.weight"], False
            if not (stream == "text" and last):
                yield from _linear(f"{name}.out", f"{attention}.proj")
            if stream == "dual":
                continue
            yield from _linear("modulation", f"{source}.adaLN_modulation.1")
            if not (stream == "text" and last):
                for fused, (_, mlp) in MLP.items():
                    yield from _linear(f"{name}.{fused}", f"{source}.{mlp}")
    yield from _linear("modulation", "final_layer.adaLN_modulation.1")
    yield from _linear("final", "final_layer.linear")
