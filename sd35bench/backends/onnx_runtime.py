"""The denoiser as an ONNX graph in ONNX Runtime; text encoders, VAE and samplers stay diffusers'.

The graph is exported once and kept (`sd35bench.export`); every load proves that the session runs
where it was asked to, and that it computes what PyTorch's denoiser computed at export. Inputs and
outputs are PyTorch's own memory, bound by address, on the CPU as on a GPU: nothing is copied.

ONNX Runtime's allocator is its own: PyTorch's figures do not contain it.
"""

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from sd35bench.backends.base import Probe
from sd35bench.backends.exported import QUANTISATIONS, ExportedBackend
from sd35bench.backends.pipeline import choice
from sd35bench.errors import BackendError, OptimizationNotApplied, OutOfMemory
from sd35bench.export.artifact import Artifact
from sd35bench.export.denoiser import OUTPUT
from sd35bench.export.onnx_model import MODEL, leave_out, quantise_onnx, read_graph
from sd35bench.types import Scalar

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
OPTIMISATIONS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
NEEDS_GPU = "give backend.provider=cpu and backend.dtype=fp32, or use a machine with a CUDA device"
HEAVY = {"MatMul", "Gemm", "MatMulInteger", "DynamicQuantizeMatMul", "Attention", "Softmax"}
"""Operators that carry the work: on a GPU none of them may have stayed on the CPU."""
_STATE = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(_STATE, name)
    for name in ("EPFail", "Fail", "InvalidArgument", "InvalidGraph", "NotImplemented",
                 "NoSuchFile", "InvalidProtobuf", "RuntimeException")
)  # fmt: skip


class OnnxEngine:
    """ONNX Runtime sessions of one artifact: the full graph, and one per set of skipped layers."""

    def __init__(
        self, artifact: Artifact, *, provider: str, threads: int, optimisation: str, width: int
    ) -> None:
        """Open the full graph's session; `width` is the size of an output token.

        Raises: OptimizationNotApplied where the session's providers or threads are not those
        asked for.
        """
        self._artifact = artifact
        self._settings = {"provider": provider, "threads": threads, "optimisation": optimisation}
        self._width = width
        self._device_type = "cpu" if provider == "cpu" else "cuda"
        self._sessions: dict[tuple[int, ...], ort.InferenceSession] = {}
        self._open(())

    @property
    def facts(self) -> dict[str, Any]:
        """What the sessions say about themselves."""
        session = self._sessions[()]
        return {
            "providers": list(session.get_providers()),
            "nodes": _node_counts(session),
            "session_threads": session.get_session_options().intra_op_num_threads,
            "graph_optimization": self._settings["optimisation"],
            "skip_layer_graphs": [list(layers) for layers in self._sessions if layers],
        }

    def run(self, inputs: Mapping[str, torch.Tensor], skip_layers: tuple[int, ...]) -> torch.Tensor:
        """Run the graph on tensors of the session's device; the answer is [B, T, p·p·C].

        Raises: OutOfMemory, BackendError for ONNX Runtime's own errors.
        """
        if skip_layers not in self._sessions:
            self._open(skip_layers)
        patches = inputs["patches"]
        output = patches.new_empty((*patches.shape[:2], self._width))
        with ort_errors():
            binding = self._sessions[skip_layers].io_binding()
            for name, value in inputs.items():
                binding.bind_input(name, *self._place(value))
            binding.bind_output(OUTPUT, *self._place(output))
            if self._device_type == "cuda":
                # ONNX Runtime's stream is another one, and waits for nothing of PyTorch's.
                torch.cuda.current_stream(patches.device).synchronize()
            self._sessions[skip_layers].run_with_iobinding(binding)
        return output

    def _place(self, value: torch.Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
        assert value.is_contiguous(), "an address says nothing of strides"
        index = value.device.index
        return (
            self._device_type,
            index if index is not None else 0,
            ELEMENTS[value.dtype],
            tuple(value.shape),
            value.data_ptr(),
        )

    def _open(self, skip_layers: tuple[int, ...]) -> None:
        path = self._artifact.folder / MODEL
        model: Path | bytes = path
        if skip_layers:
            graph = read_graph(path)
            model = leave_out(
                graph, skip_layers, self._artifact.facts["blocks"]
            ).SerializeToString()
        self._sessions[skip_layers] = open_session(model, folder=path.parent, **self._settings)


class OnnxBackend(ExportedBackend):
    """diffusers around an ONNX Runtime session."""

    options = MappingProxyType(
        {**ExportedBackend.options, "provider": "auto", "graph_optimization": "all"}
    )

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Open a session on a graph of one node, with the providers asked for."""
        found = super().probe(options)
        if not found.ok:
            return found
        asked = {**cls.options, **options}
        device = "cuda" if asked["device"] != "cpu" and torch.cuda.is_available() else "cpu"
        try:
            provider = provider_of(asked, device)
            prove_provider(provider)
        except BackendError as exc:
            return Probe(ok=None, detail=str(exc), remedy=NEEDS_GPU)
        return Probe(ok=True, detail=f"ONNX Runtime {ort.__version__}, {PROVIDERS[provider]}")

    def check(self) -> None:
        """Look at the options, and open a session on a graph of one node.

        Raises: BackendError, OptimizationNotApplied.
        """
        choice("quantisation", self.asked["quantisation"], QUANTISATIONS)
        choice("graph_optimization", self.asked["graph_optimization"], OPTIMISATIONS)
        self._provider = provider_of(self.asked, self.device.type)
        prove_provider(self._provider)

    def convert(self, exported: Artifact, feeds: list[dict[str, torch.Tensor]]) -> Artifact:
        """Return the graph itself, or its int8 form."""
        if self.asked["quantisation"] == "none":
            return exported
        return quantise_onnx(self.recipe("onnx", "int8"), exported)

    def open(self, artifact: Artifact, width: int) -> OnnxEngine:
        """Open a session."""
        return OnnxEngine(
            artifact,
            provider=self._provider,
            threads=self._load.threads,
            optimisation=str(self.asked["graph_optimization"]),
            width=width,
        )


def open_session(
    model: Path | bytes, *, provider: str, threads: int, optimisation: str, folder: Path | None
) -> ort.InferenceSession:
    """Open a session and prove its providers and threads; `folder` has the weights of `bytes`.

    Raises: OptimizationNotApplied, OutOfMemory, BackendError.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is proven below, not logged
    options.graph_optimization_level = OPTIMISATIONS[optimisation]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Threads that spin after a run would take the cores from the VAE.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    wanted = _provider_list(provider)
    with ort_errors():
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[(name, _provider_options(name, folder)) for name in wanted],
        )
    prove_session(session, wanted, threads)
    return session


def prove_session(session: Any, wanted: list[str], threads: int) -> None:
    """Compare what a session says with what was asked for.

    Raises: OptimizationNotApplied for other providers, work that stayed on the CPU beside a GPU,
    or another number of threads.
    """
    found = list(session.get_providers())
    if found != wanted:
        raise OptimizationNotApplied(
            f"providers {wanted} asked, the session has {found}: ONNX Runtime could not load"
            f" {wanted[0]} and fell back; give backend.provider=cpu, or install the CUDA and"
            " cuDNN libraries that onnxruntime-gpu names"
        )
    if wanted[0] != PROVIDERS["cpu"]:
        strays = Counter(
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == PROVIDERS["cpu"]
            for node in part.get_nodes()
            if node.op_type in HEAVY
        )
        if strays:
            raise OptimizationNotApplied(
                f"{wanted[0]} asked, but {dict(strays)} stayed on the CPU: it has no such kernels"
            )
    used = session.get_session_options().intra_op_num_threads
    if used != threads:
        raise OptimizationNotApplied(f"threads={threads} asked, the session uses {used}")


def provider_of(asked: Mapping[str, Scalar], device: str) -> str:
    """Return the provider asked for; "auto" is that of the device ("cpu" or "cuda").

    Raises: BackendError for an unknown one; OptimizationNotApplied where PyTorch's parts would lie
    on another device, where half precision is asked of the CPU, or int8 of a GPU.
    """
    name = choice("provider", asked["provider"], ("auto", *PROVIDERS))
    if name == "auto":
        name = "cpu" if device == "cpu" else "cuda"
    if (name == "cpu") != (device == "cpu"):
        raise OptimizationNotApplied(
            f"backend.provider={name} asked, but the rest of the pipeline is on {device}; "
            + ("give backend.device=cpu too" if name == "cpu" else "this needs a CUDA device")
        )
    if name == "cpu" and asked["dtype"] != "fp32":
        raise OptimizationNotApplied(
            f"backend.dtype={asked['dtype']} asked, but ONNX Runtime's CPU kernels compute in fp32;"
            " give backend.dtype=fp32"
        )
    if name != "cpu" and asked["quantisation"] == "int8":
        raise OptimizationNotApplied(
            f"backend.quantisation=int8 asked, but its kernels exist on the CPU only, not on {name}"
        )
    return name


def prove_provider(provider: str) -> None:
    """Open a session on a graph of one node: a missing provider shows before a long export.

    Raises: OptimizationNotApplied.
    """
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "one", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    open_session(
        model.SerializeToString(), provider=provider, threads=1, optimisation="all", folder=None
    )


@contextlib.contextmanager
def ort_errors() -> Iterator[None]:
    """Turn ONNX Runtime's errors into ours. Raises: OutOfMemory, BackendError."""
    try:
        yield
    except ORT_ERRORS as exc:
        text = str(exc)
        if "allocate memory" in text or "out of memory" in text.lower() or "bad_alloc" in text:
            raise OutOfMemory(f"{exc}; use a smaller batch, size or dtype") from exc
        raise BackendError(f"ONNX Runtime failed: {exc}") from exc


def _provider_list(provider: str) -> list[str]:
    """The providers that a session must show; ONNX Runtime always adds the CPU's, for shapes."""
    order = {"cpu": (), "cuda": ("cuda",), "tensorrt": ("tensorrt", "cuda")}[provider]
    return [PROVIDERS[name] for name in (*order, "cpu")]


def _provider_options(name: str, folder: Path | None) -> dict[str, Any]:
    """The GPU that PyTorch uses; TensorRT keeps its engines, minutes of work, beside the graph."""
    if name == PROVIDERS["cpu"] or not torch.cuda.is_available():
        return {}
    chosen: dict[str, Any] = {"device_id": torch.cuda.current_device()}
    if name == PROVIDERS["tensorrt"] and folder is not None:
        chosen |= {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder / "engines"),
        }
    return chosen


def _node_counts(session: Any) -> dict[str, int]:
    """How many nodes each provider took."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)
