"""Building ONNX artifacts: the exported denoiser with its proof, and its int8 form.

Beside ``model.onnx`` an artifact holds a probe: seeded inputs of three shapes and what PyTorch's
denoiser made of them. Every load runs the probe again, so that parity is shown on the machine and
the session that are timed, without the PyTorch weights.
"""

import fnmatch
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file, save_file

from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.export.artifact import Artifact, Recipe, locked, make_artifact
from sd35bench.export.denoiser import INPUTS, OUTPUT, ExportableDenoiser
from sd35bench.export.graph import (
    OPSET,
    example_inputs,
    export_graph,
    module_of,
    quiet,
    read_graph,
    weight_counts,
)
from sd35bench.words import size_in

MODEL, DATA, PROBE = "model.onnx", "model.onnx.data", "probe.safetensors"
PROBE_SHAPES = ((1, 15, 7), (2, 24, 5), (3, 8, 11))
"""Batch, image tokens and text tokens: all different from the export's example."""
INT8_OPERATORS = ("MatMulInteger", "DynamicQuantizeMatMul")
SPACE_FACTOR = 1.2

Forward = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def export_onnx(recipe: Recipe, transformer: Any) -> Artifact:
    """Return the recipe's artifact, exported from `transformer` where there is none yet.

    Raises: BackendError where the denoiser cannot be exported or written.
    """

    def build(folder: Path) -> dict[str, Any]:
        _refuse_full_disk(folder, sum(p.nbytes for p in transformer.parameters()))
        export_graph(transformer, folder / MODEL)
        write_probe(folder / PROBE, _probe_pairs(transformer))
        return {
            "opset": OPSET,
            "blocks": len(transformer.transformer_blocks),
            "weights": weight_counts(read_graph(folder / MODEL)),
        }

    return make_artifact(recipe, build)


def quantise_onnx(recipe: Recipe, source: Artifact) -> Artifact:
    """Return the recipe's artifact: `source` with int8 weights, activations quantised as it runs.

    Weights are signed, with a scale per output channel; unsigned ones run 2.5 times slower on CPUs
    with VNNI.

    Raises: OptimizationNotApplied where no layer was quantised.
    """

    def build(folder: Path) -> dict[str, Any]:
        _refuse_full_disk(folder, source.bytes / 2)
        _quantise(source.folder / MODEL, folder / MODEL, recipe.excluded.split())
        shutil.copyfile(source.folder / PROBE, folder / PROBE)
        graph = read_graph(folder / MODEL)
        names = _quantised_layers(graph)
        if not names:
            raise OptimizationNotApplied(
                f"quantisation=int8 asked, but no layer was quantised: backend.exclude="
                f"{recipe.excluded!r} leaves none, or the graph has no MatMul with constant weights"
            )
        return {**source.facts, "weights": weight_counts(graph), "quantised": names}

    return make_artifact(recipe, build)


def probe_error(folder: Path, forward: Forward) -> float:
    """Largest relative error of `forward` on the artifact's probe, against PyTorch's answers."""
    tensors = load_file(folder / PROBE)
    errors = []
    for index in range(len(tensors) // (len(INPUTS) + 1)):
        inputs = {name: tensors[f"{index}.{name}"] for name in INPUTS}
        errors.append(relative_error(forward(inputs), tensors[f"{index}.{OUTPUT}"]))
    return max(errors)


def write_probe(path: Path, pairs: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Write inputs of the graph, each with PyTorch's answer under `OUTPUT`."""
    tensors = {
        f"{index}.{name}": value.cpu().contiguous().clone()
        for index, pair in enumerate(pairs)
        for name, value in pair.items()
    }
    save_file(tensors, path)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `wanted`."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _probe_pairs(transformer: Any) -> Iterator[dict[str, torch.Tensor]]:
    module = ExportableDenoiser(transformer).eval()
    for index, (batch, tokens, text) in enumerate(PROBE_SHAPES):
        inputs = example_inputs(transformer, batch=batch, tokens=tokens, text=text, seed=index + 1)
        with torch.no_grad():
            output = module(*(inputs[name] for name in INPUTS))[0]
        yield {**inputs, OUTPUT: output}


def _quantise(source: Path, target: Path, excluded: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [node for node in read_graph(source).graph.node if node.op_type in ("MatMul", "Gemm")]
    left = [
        name
        for node in nodes
        if any(fnmatch.fnmatch(module_of(node.name), pattern) for pattern in excluded)
        for name in (node.name, f"{node.name}_MatMul")  # what a Gemm is renamed to first
    ]
    # Advice to pre-process comes on the root logger; a graph with shapes lies beside the source.
    with quiet(""), locked(source.parent):
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=left,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )


def _quantised_layers(model: onnx.ModelProto) -> list[str]:
    """Modules whose product of matrices is an integer one, with weights that are constant."""
    weights = {weight.name for weight in model.graph.initializer}
    return sorted(
        module_of(node.name)
        for node in model.graph.node
        if node.op_type in INT8_OPERATORS and weights.intersection(node.input)
    )


def _refuse_full_disk(folder: Path, wanted_bytes: float) -> None:
    wanted_bytes *= SPACE_FACTOR
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < wanted_bytes:
        raise BackendError(
            f"the exported model needs {size_in(wanted_bytes, 'GB')} in {folder.parent},"
            f" where {size_in(free_bytes, 'GB')} are free; free some, or set XDG_CACHE_HOME"
            " elsewhere"
        )
