"""Building ONNX artifacts: the exported denoiser with its proof, and its int8 form.

Beside ``model.onnx`` an artifact holds a probe: seeded inputs of three shapes and what PyTorch's
denoiser made of them. Every load runs the probe again, so that parity is shown on the machine and
the session that are timed, without the PyTorch weights.

The protobuf of a model may not exceed 2 GB, so weights always lie in ``model.onnx.data``. Leaving
blocks out for skip-layer guidance is surgery on the graph alone (some 100 kB to 1 MB): every
variant reads the same file of weights.
"""

import ast
import contextlib
import fnmatch
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from sd35bench.errors import BackendError, OptimizationNotApplied, UnsupportedRequest
from sd35bench.export.artifact import Artifact, Recipe, locked, make_artifact
from sd35bench.export.denoiser import INPUTS, OUTPUT, ExportableDenoiser, boundaries
from sd35bench.words import size_in

MODEL, DATA, PROBE = "model.onnx", "model.onnx.data", "probe.safetensors"
PROBE_SHAPES = ((1, 15, 7), (2, 24, 5), (3, 8, 11))
"""Batch, image tokens and text tokens: all different from the export's example."""
INT8_OPERATORS = ("MatMulInteger", "DynamicQuantizeMatMul")
SPACE_FACTOR = 1.2

OPSET = 23
"""The first with Attention, RMSNormalization and Gelu as operators; 18 takes them apart."""
DTYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SCOPES = "pkg.torch.onnx.name_scopes"
MAX_BATCH, MAX_TOKENS = 4096, 1 << 20
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")

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


def example_inputs(
    transformer: Any, *, batch: int, tokens: int, text: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Seeded inputs of the graph, in the transformer's dtype and on its device."""
    config = transformer.config
    source = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=source)
        return values.to(dtype=transformer.dtype, device=transformer.device)

    timestep = torch.rand(batch, generator=source) * 1000
    return {
        "patches": noise(batch, tokens, config.in_channels * config.patch_size**2),
        "positions": noise(1, tokens, config.num_attention_heads * config.attention_head_dim),
        "timestep": timestep.to(transformer.device),
        "text": noise(batch, text, config.joint_attention_dim),
        "pooled": noise(batch, config.pooled_projection_dim),
    }


def export_graph(transformer: Any, path: Path) -> None:
    """Write ``path`` and ``path.data``; batch, image tokens and text tokens stay free.

    Raises: BackendError where torch cannot export this transformer.
    """
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    tokens = torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    text = torch.export.Dim("text_tokens", min=2, max=MAX_TOKENS)
    example = example_inputs(transformer, batch=2, tokens=6, text=5)
    with quiet(*NOISY), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                ExportableDenoiser(transformer).eval(),
                tuple(example[name] for name in INPUTS),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=[OUTPUT, *boundaries(len(transformer.transformer_blocks))],
                dynamic_shapes=(
                    {0: batch, 1: tokens},
                    {1: tokens},
                    {0: batch},
                    {0: batch, 1: text},
                    {0: batch},
                ),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as exc:
            raise BackendError(f"torch cannot export this denoiser to ONNX: {exc}") from exc
        program.save(path, external_data=True)
    model = read_graph(path)
    _keep_only_output(model)
    _name_nodes(model)
    onnx.save(model, path)


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a model's graph, its weights left on disk."""
    return onnx.load(path, load_external_data=False)


def leave_out(model: onnx.ModelProto, layers: Sequence[int], of: int) -> onnx.ModelProto:
    """Return the graph without the blocks `layers` of a denoiser that has `of` blocks.

    Whoever read what such a block returned reads what went into it; the nodes that nobody reads
    any more are dropped.

    Raises: UnsupportedRequest for a layer that is not there, BackendError where the graph has
    lost the names of its blocks' inputs.
    """
    outside = [layer for layer in layers if not 0 <= layer < of]
    if outside:
        raise UnsupportedRequest(f"skip_layers {outside}: this model has 0 to {of - 1}")
    produced = {name for node in model.graph.node for name in node.output}
    renamed: dict[str, str] = {}
    for layer in sorted(set(layers)):
        for stream in ("image", "text"):
            before = f"{stream}.{layer}"
            source = renamed.get(before, before)
            if source not in produced:
                raise BackendError(f"the exported graph has no value {source}; export it again")
            renamed[f"{stream}.{layer + 1}"] = source
    shortened = onnx.ModelProto()
    shortened.CopyFrom(model)
    for node in shortened.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    _keep_only_output(shortened)
    return shortened


def weight_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Count the weights' elements by type, as the graph declares them, commonest first."""
    counts: Counter[str] = Counter()
    for weight in model.graph.initializer:
        elements = 1
        for size in weight.dims:
            elements *= size
        name = TensorProto.DataType.Name(weight.data_type).lower()
        counts[DTYPES.get(name, name)] += elements
    return dict(counts.most_common())


def module_of(node_name: str) -> str:
    """The module that a node came from, by the node's name: "transformer_blocks.0.attn.to_q"."""
    return node_name.partition("/")[0]


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name every node after its module, and drop the exporter's stack traces."""
    for index, node in enumerate(model.graph.node):
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = ast.literal_eval(notes.get(SCOPES, "[]"))
        module = scopes[-2].removeprefix("transformer.") if len(scopes) > 1 else ""
        stem = "patches" in node.input  # a convolution in PyTorch, so its module is not entered
        node.name = f"{'pos_embed.proj' if stem else module}/{node.op_type}_{index}"
        del node.metadata_props[:]


def _keep_only_output(model: onnx.ModelProto) -> None:
    """Drop every output but `OUTPUT`, and the nodes and weights that it does not need."""
    graph = model.graph
    makers: Mapping[str, Any] = {name: node for node in graph.node for name in node.output}
    needed, waiting = set(), [OUTPUT]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        if name in makers:
            waiting += makers[name].input
    kept = [node for node in graph.node if needed.intersection(node.output)]
    weights = [weight for weight in graph.initializer if weight.name in needed]
    outputs = [output for output in graph.output if output.name == OUTPUT]
    del graph.value_info[:]  # shapes of values that folding has changed mislead shape inference
    fields: tuple[tuple[Any, Sequence[Any]], ...] = (
        (graph.node, kept),
        (graph.initializer, weights),
        (graph.output, outputs),
    )
    for field, values in fields:
        copies: list[Any] = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep what these loggers say below an error off the terminal."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
