"""From the denoiser to an ONNX file with one file of weights beside it, and blocks taken out of it.

The protobuf of a model may not exceed 2 GB, so weights always lie in ``model.onnx.data``. Leaving
blocks out for skip-layer guidance is surgery on the graph alone (some 100 kB to 1 MB): every
variant reads the same file of weights.
"""

import ast
import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from sd35bench.errors import BackendError, UnsupportedRequest
from sd35bench.export.denoiser import INPUTS, OUTPUT, ExportableDenoiser, boundaries

OPSET = 23
"""The first with Attention, RMSNormalization and Gelu as operators; 18 takes them apart."""
DTYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16"}
SCOPES = "pkg.torch.onnx.name_scopes"
MAX_BATCH, MAX_TOKENS = 4096, 1 << 20
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")


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
