"""LoRA files in the layouts that trainers write: merged as diffusers computes them, or refused."""

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd35bench.errors import BackendError
from sd35bench.loading.checkpoint import path_digest
from sd35bench.loading.lora import merge_lora
from sd35bench.types import Change
from tests.studies.tiny import build_tiny_sd3

RANK, ALPHA = 2, 6.0
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "norm1.linear", "ff.net.2")
ORIGINAL = {
    "joint_blocks.0.x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "joint_blocks.0.x_block.adaLN_modulation.1": ("norm1.linear",),
    "joint_blocks.0.x_block.mlp.fc2": ("ff.net.2",),
}
ROUNDING = 2e-6
"""Sums of weights of the order of 1 in float32, whose epsilon is 1.2e-7."""


@cache
def shared() -> Any:
    """The tiny model, whose weights nobody changes."""
    return build_tiny_sd3()


def fresh() -> Any:
    """The parts that LoRA files change, to be changed."""
    names = ("transformer", "text_encoder")
    parts = {name: deepcopy(getattr(shared(), name)) for name in names}
    return SimpleNamespace(components=parts, **parts)


def factors(layer: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) of a layer."""
    g = torch.Generator().manual_seed(seed)
    out, into = layer.weight.flatten(1).shape
    return torch.randn(RANK, into, generator=g) * 0.1, torch.randn(out, RANK, generator=g) * 0.1


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One pair for each of `LAYERS` of the first block."""
    block = shared().transformer.transformer_blocks[0]
    return {name: factors(block.get_submodule(name), i) for i, name in enumerate(LAYERS)}


def diffusers_layout() -> dict[str, torch.Tensor]:
    found = {}
    for name, (down, up) in pairs().items():
        found[f"transformer.transformer_blocks.0.{name}.lora_A.weight"] = down
        found[f"transformer.transformer_blocks.0.{name}.lora_B.weight"] = up
    return found


def kohya_layout() -> dict[str, torch.Tensor]:
    """The same product: q, k and v are one layer there, whose rank is three times theirs."""
    own, found = pairs(), {}
    for original, names in ORIGINAL.items():
        key = "lora_unet_" + original.replace(".", "_")
        found[f"{key}.lora_down.weight"] = torch.cat([own[n][0] for n in names])
        found[f"{key}.lora_up.weight"] = torch.block_diag(*(own[n][1] for n in names))
        found[f"{key}.alpha"] = torch.tensor(ALPHA * len(names))
    return found


def peft_layout() -> dict[str, torch.Tensor]:
    return {
        name.replace("transformer.", "base_model.model.", 1): value
        for name, value in diffusers_layout().items()
    }


def comfy_layout() -> dict[str, torch.Tensor]:
    return {
        name.replace("lora_unet_joint_blocks_0_x_block_", "diffusion_model.joint_blocks.0.x_block.")
        .replace("attn_qkv", "attn.qkv")
        .replace("adaLN_modulation_1", "adaLN_modulation.1")
        .replace("mlp_fc2", "mlp.fc2")
        .replace("lora_down", "lora_A")
        .replace("lora_up", "lora_B"): value
        for name, value in kohya_layout().items()
    }


def with_settings(path: Path, weights: dict[str, torch.Tensor], **more: Any) -> Path:
    """Write a file with PEFT's settings in its header, as diffusers' `save_lora_weights` does."""
    settings = {"r": RANK, "lora_alpha": ALPHA, **more}
    text = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    save_file(weights, path, metadata={"lora_adapter_metadata": text})
    return path


def with_config(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Write a folder as PEFT's `save_pretrained` does."""
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder / "adapter_model.safetensors"


def lora(path: Path, weight: float = 1.0) -> Change:
    return Change(kind="lora", path=str(path), digest=path_digest(path), weight=weight)


def merged(change: Change) -> dict[str, torch.Tensor]:
    pipe = fresh()
    merge_lora(pipe, change)
    return pipe.transformer.state_dict()


def wanted(weight: float, scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    """The definition, layer by layer."""
    state = dict(shared().transformer.state_dict())
    for name, (down, up) in pairs().items():
        key = f"transformer_blocks.0.{name}.weight"
        state[key] = state[key] + weight * scale * (up @ down)
    return state


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(params=["diffusers", "peft", "kohya", "comfy", "pickled"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    if request.param == "diffusers":
        return with_settings(path, diffusers_layout())
    if request.param == "peft":
        return with_config(tmp_path / "peft", peft_layout())
    if request.param == "pickled":
        torch.save(kohya_layout(), path.with_suffix(".pt"))
        return path.with_suffix(".pt")
    save_file(kohya_layout() if request.param == "kohya" else comfy_layout(), path)
    return path


def test_every_layout_is_the_product_of_its_factors(written: Path) -> None:
    found = merged(lora(written, weight=0.5))
    assert largest_difference(found, wanted(0.5)) < ROUNDING
    # Mutants: the weight left out, and alpha.
    assert largest_difference(found, wanted(1.0)) > 0.01
    assert largest_difference(found, wanted(0.5, scale=1.0)) > 0.01


def test_the_last_modulation_is_swapped_as_the_original_has_it(tmp_path: Path) -> None:
    layer = shared().transformer.norm_out.linear
    down, up = factors(layer)
    shift, scale = up.chunk(2)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    names = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": torch.cat([scale, shift])}
    save_file(names, tmp_path / "lora.safetensors")
    found = merged(lora(tmp_path / "lora.safetensors"))["norm_out.linear.weight"]
    assert float((found - layer.weight - up @ down).detach().abs().max()) < ROUNDING


def test_merging_is_what_diffusers_computes_with_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="diffusers applies LoRA files through peft")
    path = with_settings(
        tmp_path / "lora.safetensors",
        diffusers_layout(),
        target_modules=[f"transformer_blocks.0.{name}" for name in LAYERS],
    )
    pipe: Any = build_tiny_sd3()
    pipe.load_lora_weights(str(path), adapter_name="own")
    pipe.set_adapters("own", 0.5)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    theirs = pipe.transformer.state_dict()
    assert largest_difference(merged(lora(path, weight=0.5)), theirs) < ROUNDING


def test_text_encoders_are_merged_too_and_the_facts_say_so(tmp_path: Path) -> None:
    pipe = fresh()
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    down, up = factors(pipe.text_encoder.get_submodule(name))
    key = "lora_te1_" + name.replace(".", "_")
    path = tmp_path / "lora.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, path)
    before = pipe.text_encoder.get_submodule(name).weight.clone()
    facts = merge_lora(pipe, lora(path, weight=-1.0))
    after = pipe.text_encoder.get_submodule(name).weight
    assert float((after - before + up @ down).detach().abs().max()) < ROUNDING
    assert (facts["parts"], facts["layers"], facts["weight"]) == (["text_encoder"], 1, -1.0)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_down_blocks_0_attentions_0.lora_down.weight", "only one of its two factors"),
        ("transformer.transformer_blocks.0.attn.to_q.dora_scale", "is of DoRA"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a", "is of LoHa"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "is of LoKr"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_bias", "is no factor of a LoRA"),
    ],
)
def test_what_would_be_dropped_is_refused(tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({**diffusers_layout(), key: torch.ones(RANK, 4)}, path)
    with pytest.raises(BackendError, match=message):
        merge_lora(fresh(), lora(path))


def test_a_lora_of_another_model_is_refused_by_its_first_layer(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    sdxl = "lora_unet_input_blocks_1_1_proj_in"
    other = {
        f"{sdxl}.lora_down.weight": torch.ones(2, 4),
        f"{sdxl}.lora_up.weight": torch.ones(4, 2),
    }
    save_file({**diffusers_layout(), **other}, path)
    with pytest.raises(BackendError, match=f"1 of its 6 layers are not in the model.*{sdxl}"):
        merge_lora(fresh(), lora(path))
    wide = {
        n: torch.ones(2, 99) if n.endswith("A.weight") else v for n, v in diffusers_layout().items()
    }
    save_file(wide, path)
    with pytest.raises(BackendError, match=r"is \[32, 99\], the model's layer is not"):
        merge_lora(fresh(), lora(path))
