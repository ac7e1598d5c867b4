"""One file in the original layout: the same pipeline as the folder's, or a refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import BackendError
from sd35bench.loading.single_file import transformer_config
from sd35bench.loading.sources import load_model, prove_dtypes
from sd35bench.types import BackendSpec, Load, ModelSpec
from tests.backends.bare import IDENTICAL, bare_images, differs, make_inits
from tests.original_layout import ENCODERS, write_original
from tests.studies.tiny import TOKENS, build_tiny_sd3


def file_spec(path: Path, components: Path) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        path=str(path),
        components=str(components),
        weights_digest="tests",
        max_sequence_length=TOKENS,
    )


def strip_weights(folder: Path, to: Path, parts: list[str]) -> Path:
    """Copy a folder without its transformer and without the weights of `parts`."""
    stripped = shutil.copytree(folder, to)
    shutil.rmtree(stripped / "transformer")
    for part in parts:
        for file in (stripped / part).glob("*.safetensors"):
            file.unlink()
    return stripped


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return write_original(build_tiny_sd3(), folder / "tiny.safetensors")


@pytest.mark.parametrize("encoders", [[], [*ENCODERS]], ids=["no-encoders", "all-encoders"])
def test_single_file_makes_the_folders_images(
    tiny_path: Path, tmp_path: Path, encoders: list[str]
) -> None:
    path = write_original(build_tiny_sd3(), tmp_path / "tiny.safetensors", encoders)
    components = strip_weights(tiny_path, tmp_path / "components", ["vae", *encoders])
    load = Load(
        model=file_spec(path, components),
        backend=BackendSpec(name="eager", kind="eager"),
        threads=1,
    )
    backend = EagerBackend(load)
    requests = IDENTICAL["text-batch-3"]
    images = backend.generate(requests, make_inits(requests)).images
    backend.close()
    assert not differs(images, bare_images(tiny_path, requests))


def test_transformer_config_is_read_off_the_weights(original: Path) -> None:
    prefix = "model.diffusion_model."
    weights = {k.removeprefix(prefix): v for k, v in load_file(original).items()}
    found = transformer_config(weights)
    true = dict(build_tiny_sd3().transformer.config)
    assert {k: v for k, v in found.items() if k != "sample_size"} == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in true.items()
        if k in found and k != "sample_size"
    }


def test_single_file_keeps_in_fp32_what_the_folder_does(tiny_path: Path, tmp_path: Path) -> None:
    path = write_original(build_tiny_sd3(), tmp_path / "tiny.safetensors", [*ENCODERS])
    pipe = load_model(file_spec(path, tiny_path), torch.float16)
    assert prove_dtypes(pipe, "fp16")["text_encoder_3"] == "fp16+fp32"
    assert pipe.facts["format"] == "single file"


def test_single_file_takes_the_identity_where_clip_l_has_no_projection(
    tiny_path: Path, tmp_path: Path
) -> None:
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    path = write_original(build_tiny_sd3(), tmp_path / "t.safetensors", [*ENCODERS], leave_out=key)
    pipe = load_model(file_spec(path, tiny_path), torch.float32)
    projection = pipe.text_encoder.text_projection.weight
    assert torch.equal(projection, torch.eye(len(projection)))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.diffusion_model.final_layer.linear.bias", "cannot be loaded"),
        ("first_stage_model.decoder.conv_in.bias", "vae lacks 1 weights, first decoder.conv_in"),
        ("first_stage_model.decoder.up.2.block.0.conv1.weight", "vae lacks 1 weights"),
        ("text_encoders.clip_l.transformer.text_model.final_layer_norm.bias", "lacks 1 weights"),
    ],
    ids=["transformer", "vae", "vae-block", "clip"],
)
def test_single_file_refuses_missing_weights(
    tiny_path: Path, tmp_path: Path, key: str, message: str
) -> None:
    pipe = build_tiny_sd3()
    path = write_original(pipe, tmp_path / "t.safetensors", [*ENCODERS], leave_out=key)
    with pytest.raises(BackendError, match=message):
        load_model(file_spec(path, tiny_path), torch.float32)


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.scale_weight",
        "first_stage_model.decoder.scale_weight",
        "text_encoders.t5xxl.transformer.shared.scale_weight",
    ],
)
def test_single_file_refuses_weights_that_nothing_takes(
    tiny_path: Path, tmp_path: Path, key: str
) -> None:
    path = write_original(build_tiny_sd3(), tmp_path / "tiny.safetensors", [*ENCODERS])
    save_file({**load_file(path), key: torch.ones(1)}, path)
    with pytest.raises(BackendError, match=r"that no parameter takes|weights of the VAE"):
        load_model(file_spec(path, tiny_path), torch.float32)


def test_single_file_refuses_components_without_a_tokenizer(
    tiny_path: Path, tmp_path: Path, original: Path
) -> None:
    components = shutil.copytree(tiny_path, tmp_path / "components")
    shutil.rmtree(components / "tokenizer_2")
    with pytest.raises(BackendError, match=r"tokenizer_2/ is missing"):
        load_model(file_spec(original, components), torch.float32)


def test_single_file_refuses_components_of_another_pipeline(
    tiny_path: Path, tmp_path: Path, original: Path
) -> None:
    components = shutil.copytree(tiny_path, tmp_path / "components")
    index = json.loads((components / "model_index.json").read_text())
    (components / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "FluxPipeline"})
    )
    with pytest.raises(BackendError, match="holds a FluxPipeline"):
        load_model(file_spec(original, components), torch.float32)
