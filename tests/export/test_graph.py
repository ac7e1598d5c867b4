"""The exported graph: every size, every set of skipped layers, against PyTorch's transformer."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch

import sd35bench.export.artifact as artifact
from sd35bench.core.model import crop_positions, patchify, unpatchify
from sd35bench.errors import BackendError, UnsupportedRequest
from sd35bench.export.artifact import Artifact
from sd35bench.export.denoiser import INPUTS, OUTPUT, ExportableDenoiser, GraphDenoiser
from sd35bench.export.onnx_model import (
    OPSET,
    example_inputs,
    leave_out,
    module_of,
    read_graph,
    relative_error,
    weight_counts,
)
from tests.studies.tiny import LAYERS, build_tiny_sd3

PARITY = 1e-4
SIZES = {"1:1": (8, 8), "16:9": (4, 14), "9:16": (14, 4)}


@pytest.fixture(scope="module")
def transformer() -> Any:
    return build_tiny_sd3().transformer


@pytest.fixture(scope="module")
def exported(tiny_graph: Artifact) -> Path:
    """What `export_graph` wrote, for the same weights."""
    return tiny_graph.folder / "model.onnx"


def latents_and_text(
    transformer: Any, batch: int, height: int, width: int, text: int
) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(batch * text)
    config = transformer.config
    return {
        "hidden_states": torch.randn(batch, config.in_channels, height, width, generator=source),
        "encoder_hidden_states": torch.randn(
            batch, text, config.joint_attention_dim, generator=source
        ),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=source),
        "timestep": torch.full((1,), 700.0).expand(batch),  # as diffusers hands it over
    }


def on_session(model: bytes | str, folder: Path) -> Any:
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, torch.Tensor], _: tuple[int, ...]) -> torch.Tensor:
        feeds = {name: value.numpy() for name, value in inputs.items()}
        return torch.from_numpy(session.run([OUTPUT], feeds)[0])

    return run


@pytest.fixture(scope="module")
def denoiser(transformer: Any, exported: Path) -> GraphDenoiser:
    return GraphDenoiser(transformer, on_session(str(exported), exported.parent))


@pytest.mark.parametrize(("height", "width"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("batch", "text"), [(1, 24), (2, 9), (5, 48)])
def test_graph_equals_the_transformer(
    transformer: Any, denoiser: GraphDenoiser, height: int, width: int, batch: int, text: int
) -> None:
    inputs = latents_and_text(transformer, batch, height, width, text)
    with torch.no_grad():
        (wanted,) = transformer(**inputs, return_dict=False)
        (found,) = denoiser(**inputs)
    assert found.shape == wanted.shape
    assert relative_error(found, wanted) <= PARITY


@pytest.mark.parametrize("skipped", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
def test_graph_without_layers_equals_the_transformer_without_them(
    transformer: Any, exported: Path, skipped: tuple[int, ...]
) -> None:
    model = leave_out(read_graph(exported), skipped, LAYERS)
    denoiser = GraphDenoiser(transformer, on_session(model.SerializeToString(), exported.parent))
    inputs = latents_and_text(transformer, 2, 4, 8, 24)
    with torch.no_grad():
        (wanted,) = transformer(**inputs, return_dict=False, skip_layers=list(skipped))
        (whole,) = transformer(**inputs, return_dict=False)
        (found,) = denoiser(**inputs, skip_layers=list(skipped))
    assert relative_error(found, wanted) <= PARITY
    assert relative_error(found, whole) > 10 * PARITY  # or leaving layers out would show nothing
    assert len(model.graph.node) < len(read_graph(exported).graph.node)
    assert model.ByteSize() < 2e6  # the weights are not in it


def test_leave_out_refuses_what_is_not_there(exported: Path) -> None:
    with pytest.raises(UnsupportedRequest, match="0 to 2"):
        leave_out(read_graph(exported), (3,), LAYERS)
    nameless = read_graph(exported)
    for node in nameless.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = name.replace("image.1", "lost")
    with pytest.raises(BackendError, match=r"no value image\.1"):
        leave_out(nameless, (1,), LAYERS)


def test_graph_is_one_file_and_one_of_weights(exported: Path) -> None:
    assert sorted(p.name for p in exported.parent.glob("*.onnx*")) == [
        "model.onnx",
        "model.onnx.data",
    ]
    onnx.checker.check_model(str(exported))
    model = read_graph(exported)
    assert [o.name for o in model.graph.output] == [OUTPUT]
    assert [i.name for i in model.graph.input] == list(INPUTS)
    assert model.opset_import[0].version == OPSET
    assert str(Path(__file__).parents[2]) not in exported.read_bytes().decode(errors="replace")


def test_weights_of_the_graph_are_those_of_the_transformer(
    transformer: Any, exported: Path
) -> None:
    held = sum(p.numel() for p in transformer.parameters())
    counted = weight_counts(read_graph(exported))
    assert counted["fp32"] == pytest.approx(held, rel=0.02)  # and a few constants
    assert next(iter(counted)) == "fp32"


def test_nodes_are_named_after_their_modules(exported: Path) -> None:
    named = {module_of(n.name) for n in read_graph(exported).graph.node if "MatMul" in n.op_type}
    assert {"pos_embed.proj", "proj_out", "transformer_blocks.1.attn.to_q"} <= named


def test_export_is_quiet(exported: Path) -> None:
    assert exported.is_file()
    assert (artifact.artifact_root() / "told.txt").read_text() == ""
    assert logging.getLogger("torch.onnx").level == logging.NOTSET


@pytest.fixture
def stem(transformer: Any) -> Any:
    return transformer.pos_embed


@pytest.mark.parametrize(("height", "width"), SIZES.values(), ids=SIZES)
def test_patches_and_crop_equal_diffusers(stem: Any, height: int, width: int) -> None:
    latents = torch.randn(2, 16, height, width)
    wanted = stem(latents)
    patches = patchify(latents, 2)
    positions = crop_positions(stem.pos_embed[0], 8, height // 2, width // 2)
    weight = stem.proj.weight.flatten(1)
    found = torch.nn.functional.linear(patches, weight, stem.proj.bias) + positions
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    moved = found - positions + positions.roll(1, dims=0)  # a crop that is not in the middle
    assert not torch.allclose(moved, wanted, rtol=1e-3, atol=1e-3)


def test_unpatchify_is_diffusers_order(transformer: Any) -> None:
    tokens = torch.randn(2, 3 * 5, 2 * 2 * 16)
    grid = tokens.reshape(2, 3, 5, 2, 2, 16)
    wanted = torch.einsum("nhwpqc->nchpwq", grid).reshape(2, 16, 6, 10)
    assert torch.equal(unpatchify(tokens, 2, (6, 10)), wanted)


def test_denoiser_refuses_what_a_graph_cannot_take(
    transformer: Any, denoiser: GraphDenoiser
) -> None:
    inputs = latents_and_text(transformer, 1, 4, 4, 5)
    with pytest.raises(ValueError, match="joint_attention_kwargs"):
        denoiser(**inputs, joint_attention_kwargs={"scale": 1.0})


def test_denoiser_casts_whole_timesteps(transformer: Any) -> None:
    seen: list[torch.Tensor] = []

    def run(inputs: Mapping[str, torch.Tensor], _: tuple[int, ...]) -> torch.Tensor:
        seen.append(inputs["timestep"])
        return torch.zeros(*inputs["patches"].shape[:2], 64)

    inputs = latents_and_text(transformer, 2, 4, 4, 5) | {"timestep": torch.tensor(7).expand(2)}
    GraphDenoiser(transformer, run)(**inputs)
    assert seen[0].tolist() == [7.0, 7.0]
    assert seen[0].is_contiguous()


def test_exportable_denoiser_returns_every_boundary(transformer: Any) -> None:
    inputs = example_inputs(transformer, batch=1, tokens=4, text=3)
    with torch.no_grad():
        outputs = ExportableDenoiser(transformer)(*(inputs[name] for name in INPUTS))
    assert len(outputs) == 1 + 2 * LAYERS + 1
