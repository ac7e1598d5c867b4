"""Files that users bring: each makes the very weights that were saved, or is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35bench.errors import BackendError
from sd35bench.loading.checkpoint import path_digest
from sd35bench.loading.formats import widen
from sd35bench.loading.sources import load_model
from sd35bench.types import Change, ModelSpec
from tests.original_layout import ENCODERS, write_original
from tests.studies.tiny import TOKENS, build_tiny_sd3

T5 = "text_encoders.t5xxl.transformer."
DENOISER = "model.diffusion_model."


@pytest.fixture(scope="module")
def other() -> Any:
    """Another model of the same shapes: what a fine-tune is to its base."""
    return build_tiny_sd3(seed=1)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, other: Any) -> Path:
    """The other model as an all-in-one file."""
    return write_original(other, tmp_path_factory.mktemp("file") / "all.safetensors", [*ENCODERS])


def spec(base: Path, *changes: Change, **more: Any) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        path=str(base),
        weights_digest="tests",
        max_sequence_length=TOKENS,
        changes=changes,
        **more,
    )


def change(kind: str, path: Path) -> Change:
    return Change(kind=kind, path=str(path), digest=path_digest(path))


def assert_same(part: torch.nn.Module, wanted: torch.nn.Module) -> None:
    found = part.state_dict()
    for name, value in wanted.state_dict().items():
        assert torch.equal(found[name], value), name


def cut(path: Path, prefix: str, to: Path, more: str = "") -> Path:
    """Write a file's tensors under a prefix alone, with another in its place."""
    weights = {n: v for n, v in load_file(path).items() if n.startswith(prefix)}
    save_file({more + n.removeprefix(prefix): v for n, v in weights.items()}, to)
    return to


# The denoiser and the autoencoder alone ---------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["folder", "whole-folder", "sharded", "diffusers-file", "pickled", "all-in-one", "bare"]
)
def test_another_denoiser_is_loaded_and_nothing_else_changes(
    tiny_path: Path, tmp_path: Path, other: Any, original: Path, kind: str
) -> None:
    path = tmp_path / "own"
    if kind == "whole-folder":
        (tmp_path / "whole").mkdir()
        path = tmp_path / "whole" / "transformer"
        other.transformer.save_pretrained(path)
    elif kind in ("folder", "sharded"):
        other.transformer.save_pretrained(
            path, max_shard_size="40KB" if kind == "sharded" else "1GB"
        )
        assert (kind == "sharded") == any("index" in file.name for file in path.iterdir())
    elif kind == "diffusers-file":
        path = tmp_path / "own.safetensors"
        save_file(other.transformer.state_dict(), path)
    elif kind == "pickled":
        path = tmp_path / "own.pt"
        torch.save({"state_dict": other.transformer.state_dict()}, path)
    else:
        path = original
        if kind == "bare":
            path = cut(original, DENOISER, tmp_path / "bare.safetensors")
    base = shutil.copytree(tiny_path, tmp_path / "base")
    shutil.rmtree(base / "transformer" if kind == "folder" else tmp_path / "nothing", True)
    pipe = load_model(spec(base, change("transformer", path)), torch.float32)
    assert_same(pipe.transformer, other.transformer)
    assert_same(pipe.text_encoder, build_tiny_sd3().text_encoder)
    assert pipe.facts["transformer"].startswith(f"{path.name} ")


@pytest.mark.parametrize("kind", ["folder", "file", "original", "bare-original"])
def test_another_autoencoder_is_loaded(
    tiny_path: Path, tmp_path: Path, other: Any, original: Path, kind: str
) -> None:
    path = tmp_path / "vae"
    if kind == "folder":
        other.vae.save_pretrained(path)
    elif kind == "file":
        path = tmp_path / "vae.safetensors"
        save_file(other.vae.state_dict(), path)
    else:
        path = original
        if kind == "bare-original":
            path = cut(original, "first_stage_model.", tmp_path / "vae.safetensors")
    pipe = load_model(spec(tiny_path, change("vae", path)), torch.float32)
    assert_same(pipe.vae, other.vae)


def test_parts_replace_those_of_a_single_file_too(
    tiny_path: Path, tmp_path: Path, other: Any
) -> None:
    base = write_original(build_tiny_sd3(), tmp_path / "base.safetensors", [*ENCODERS])
    other.transformer.save_pretrained(tmp_path / "own")
    mine = spec(base, change("transformer", tmp_path / "own"), components=str(tiny_path))
    pipe = load_model(mine, torch.float32)
    assert_same(pipe.transformer, other.transformer)
    assert_same(pipe.vae, build_tiny_sd3().vae)


def test_a_denoiser_of_another_kind_is_refused(tiny_path: Path, tmp_path: Path) -> None:
    save_file({"single_transformer_blocks.0.x": torch.ones(1)}, tmp_path / "flux.safetensors")
    with pytest.raises(BackendError, match=r"none of its 1 tensors begins with joint_blocks"):
        load_model(
            spec(tiny_path, change("transformer", tmp_path / "flux.safetensors")), torch.float32
        )
    folder = shutil.copytree(tiny_path / "transformer", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2D"}))
    with pytest.raises(BackendError, match="holds a FluxTransformer2D, the model has a SD3"):
        load_model(spec(tiny_path, change("transformer", folder)), torch.float32)


class Trap:
    """A pickle of it would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["transformer", "vae", "lora"])
def test_a_pickle_that_would_run_code_is_refused(
    tiny_path: Path, tmp_path: Path, kind: str
) -> None:
    path, marker = tmp_path / "own.pt", tmp_path / "marker"
    torch.save({"x": torch.ones(1), "trap": Trap(marker)}, path)
    with pytest.raises(BackendError, match="its pickle holds more than tensors and is not read"):
        load_model(spec(tiny_path, change(kind, path)), torch.float32)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the mutant
    assert marker.exists()


# Variants ---------------------------------------------------------------------------------------


def test_a_variant_is_loaded_from_plain_and_sharded_parts(tmp_path: Path, other: Any) -> None:
    build_tiny_sd3().save_pretrained(tmp_path)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        size = "40KB" if name in ("transformer", "text_encoder_3") else "1GB"
        part = getattr(other, name)
        part.save_pretrained(tmp_path / name, variant="fp16", max_shard_size=size)
    assert any("-of-" in f.name and "fp16" in f.name for f in (tmp_path / "transformer").iterdir())
    pipe = load_model(spec(tmp_path, variant="fp16"), torch.float32)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        assert_same(getattr(pipe, name), getattr(other, name))
    assert_same(pipe.text_encoder_2, build_tiny_sd3().text_encoder_2)  # it has no such files
    assert pipe.facts["variant"] == "fp16"
    assert_same(load_model(spec(tmp_path), torch.float32).vae, build_tiny_sd3().vae)


# fp8 --------------------------------------------------------------------------------------------


def scaled_fp8(weights: dict[str, torch.Tensor], names: list[str], style: str) -> dict[str, Any]:
    """Store weights in fp8 as ComfyUI does: value divided by (largest / 448), the factor beside."""
    found = dict(weights)
    for name in names:
        stem = name.removesuffix(".weight")
        scale = weights[name].abs().max() / 448
        found[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        found[f"{stem}.{'scale_weight' if style == 'old' else 'weight_scale'}"] = scale
        if style == "old":
            found[f"{stem}.scale_input"] = torch.tensor(1.0)
        else:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            found[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


@pytest.mark.parametrize("style", ["old", "new"])
def test_an_all_in_one_file_with_scaled_fp8_is_dequantised(
    tiny_path: Path, tmp_path: Path, original: Path, style: str
) -> None:
    weights = load_file(original)
    names = [n for n in weights if n.startswith(T5) and n.endswith((".q.weight", ".wo.weight"))]
    names += [n for n in weights if n.startswith(DENOISER) and n.endswith("mlp.fc1.weight")]
    stored = scaled_fp8(weights, names, style)
    if style == "old":
        stored[f"{T5}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    path = tmp_path / "fp8.safetensors"
    save_file({name: value.contiguous() for name, value in stored.items()}, path)
    pipe = load_model(spec(path, components=str(tiny_path)), torch.float32)
    t5 = pipe.text_encoder_3.state_dict()
    key = "encoder.block.0.layer.0.SelfAttention.q"
    suffix = "scale_weight" if style == "old" else "weight_scale"
    wanted = stored[f"{T5}{key}.weight"].float() * stored[f"{T5}{key}.{suffix}"]
    assert torch.equal(t5[f"{key}.weight"], wanted)
    own = weights[f"{T5}{key}.weight"]
    assert float((wanted - own).abs().max()) <= float(own.abs().max()) / 16  # 3 bits of mantissa
    assert float((stored[f"{T5}{key}.weight"].float() - own).abs().max()) > 100  # unscaled
    assert pipe.facts["dequantised"]["text_encoder_3"].endswith("weights from fp8 times its scale")
    assert "transformer" in pipe.facts["dequantised"]


def test_plain_fp8_is_widened_and_other_formats_are_refused() -> None:
    value = torch.tensor([1.5, -0.25])
    weights = {"a.weight": value.to(torch.float8_e5m2), "b.weight": value}
    assert widen(weights, lambda _: torch.float32) == "1 weights from plain fp8"
    assert torch.equal(weights["a.weight"], value)
    text = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    with pytest.raises(ValueError, match="a is stored as nvfp4, not as fp8"):
        widen({"a.weight": value, "a.comfy_quant": text}, lambda _: torch.float32)


# GGUF -------------------------------------------------------------------------------------------


def test_a_gguf_denoiser_is_widened_as_gguf_itself_does(
    tiny_path: Path, tmp_path: Path, original: Path, other: Any
) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "own.gguf", "sd3")
    q8, kept = gguf.GGMLQuantizationType.Q8_0, {}
    for name, value in load_file(original).items():
        if not name.startswith(DENOISER):
            continue
        short, array = name.removeprefix(DENOISER), value.numpy()
        if array.ndim == 4:  # city96's converter keeps the shapes that GGUF has no room for
            writer.add_array(f"comfy.gguf.orig_shape.{short}", list(array.shape))
            array = array.reshape(array.shape[0], -1)
        if short.endswith("attn.qkv.weight"):
            data = gguf.quants.quantize(array, q8)
            kept[short] = gguf.quants.dequantize(data, q8)
            writer.add_tensor(short, data, raw_dtype=q8)
        else:
            writer.add_tensor(short, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pipe = load_model(spec(tiny_path, change("transformer", tmp_path / "own.gguf")), torch.float32)
    found, wanted = pipe.transformer.state_dict(), other.transformer.state_dict()
    qkv = torch.from_numpy(kept["joint_blocks.0.x_block.attn.qkv.weight"])
    assert torch.equal(found["transformer_blocks.0.attn.to_q.weight"], qkv.chunk(3)[0])
    for name in ("pos_embed.proj.weight", "norm_out.linear.weight", "proj_out.bias"):
        assert torch.equal(found[name], wanted[name])
    assert "Q8_0" in pipe.facts["dequantised"]["transformer"]
