"""Building OpenVINO artifacts from an exported ONNX graph: read as it is, or quantised by NNCF.

`openvino` and `nncf` are an optional extra and imported where they are used.
"""

import contextlib
import fnmatch
import importlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd35bench.errors import BackendError, OptimizationNotApplied, UnsupportedRequest
from sd35bench.export.artifact import Artifact, Recipe, make_artifact
from sd35bench.export.denoiser import INPUTS
from sd35bench.export.onnx_model import MODEL, PROBE, module_of, quiet, write_probe

IR = "model.xml"
REMEDY = "pip install 'nncf>=3.0' 'openvino>=2025.4'"
DTYPES = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "uint8"}
PROBES = 3
PASSED = ("Convert", "Multiply", "Subtract", "Reshape", "Transpose", "Squeeze", "Unsqueeze")


def import_extra(name: str) -> Any:
    """Import `openvino` or `nncf`; by name, since the extra is absent where types are checked.

    Raises: BackendError with the remedy where it is not installed.
    """
    try:
        with _quiet():
            return importlib.import_module(name)
    except ImportError as exc:
        raise BackendError(f"{name} cannot be imported ({exc}); {REMEDY}") from exc


def quantise_openvino(
    recipe: Recipe, source: Artifact, feeds: Sequence[Mapping[str, torch.Tensor]]
) -> Artifact:
    """Return the recipe's artifact: weights and activations in int8, calibrated on `feeds`.

    `feeds`: inputs of the graph, each with PyTorch's answer.

    Raises: OptimizationNotApplied where no layer was quantised.
    """

    def build(folder: Path) -> dict[str, Any]:
        ov, nncf = import_extra("openvino"), import_extra("nncf")
        model = ov.Core().read_model(source.folder / MODEL)
        ignored = _ignored(model, recipe.excluded.split())
        with _quiet():
            quantised = nncf.quantize(
                model,
                nncf.Dataset([{n: feed[n].numpy() for n in INPUTS} for feed in feeds]),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
            )
        names = quantised_layers(quantised)
        if not names:
            raise OptimizationNotApplied(
                "quantisation=int8 asked, but NNCF quantised no layer; see backend.exclude="
                f"{recipe.excluded!r}"
            )
        ov.save_model(quantised, folder / IR, compress_to_fp16=False)
        # Static ranges fit real inputs only: the probe is of the steps that were recorded.
        write_probe(folder / PROBE, feeds[:: max(1, len(feeds) // PROBES)])
        return {
            **source.facts,
            "weights": _weight_counts(quantised),
            "quantised": names,
            "calibration": {"feeds": len(feeds)},
        }

    return make_artifact(recipe, build)


def leave_out(model: Any, layers: Sequence[int], of: int) -> None:
    """Take the blocks `layers` out of a graph of `of` blocks, in place, as `onnx_model` does.

    Raises: UnsupportedRequest for a layer that is not there, BackendError where the graph has lost
    the names of its blocks' inputs.
    """
    outside = [layer for layer in layers if not 0 <= layer < of]
    if outside:
        raise UnsupportedRequest(f"skip_layers {outside}: this model has 0 to {of - 1}")
    values = {
        name: output
        for operation in model.get_ordered_ops()
        if operation.get_type_name() != "Result"  # it bears the name of what it reads
        for output in operation.outputs()
        for name in output.get_names()
    }
    for layer in sorted(set(layers)):
        for stream in ("image", "text"):
            before, after = f"{stream}.{layer}", f"{stream}.{layer + 1}"
            if before not in values:
                raise BackendError(f"the exported graph has no value {before}; export it again")
            if after in values:  # the last block returns no text
                for reader in values[after].get_target_inputs():
                    reader.replace_source_output(values[before])
            values[after] = values[before]
    model.validate_nodes_and_infer_types()


def quantised_layers(model: Any) -> list[str]:
    """Modules whose product of matrices has int8 weights and quantised activations."""
    return sorted(
        module_of(operation.get_friendly_name())
        for operation in model.get_ordered_ops()
        if operation.get_type_name() == "MatMul"
        and _origin(operation, 1).get_element_type().get_type_name() in ("i8", "u8")
        and _origin(operation, 0).get_type_name() == "FakeQuantize"
    )


def _origin(operation: Any, port: int) -> Any:
    """Walk up from an input through what only rescales or rearranges."""
    node = operation.input_value(port).get_node()
    while node.get_type_name() in PASSED and node.get_input_size():
        node = node.input_value(0).get_node()
    return node


def _ignored(model: Any, patterns: Sequence[str]) -> list[str]:
    return [
        operation.get_friendly_name()
        for operation in model.get_ordered_ops()
        if any(fnmatch.fnmatch(module_of(operation.get_friendly_name()), p) for p in patterns)
    ]


def _weight_counts(model: Any) -> dict[str, int]:
    """Elements of constants by type, commonest first."""
    counts: Counter[str] = Counter()
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "Constant":
            elements = int(np.prod(operation.get_output_shape(0)))
            name = operation.get_element_type().get_type_name()
            counts[str(DTYPES.get(name, name))] += elements
    return dict(counts.most_common())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars and advice off the terminal."""
    out, err = io.StringIO(), io.StringIO()
    with quiet("nncf"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield
