"""The exported denoiser in OpenVINO on the CPU: the same ONNX artifact, or NNCF's int8 form of it.

OpenVINO and NNCF are an extra; nothing here is imported before it is used. OpenVINO picks bf16 by
itself on CPUs that have it, so the precision is always said and proven.
"""

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from sd35bench.backends.base import Probe
from sd35bench.backends.exported import QUANTISATIONS, ExportedBackend
from sd35bench.backends.pipeline import choice
from sd35bench.errors import BackendError, OptimizationNotApplied, OutOfMemory
from sd35bench.export.artifact import Artifact, find_artifact
from sd35bench.export.denoiser import INPUTS, OUTPUT
from sd35bench.export.onnx_model import MODEL
from sd35bench.export.openvino_model import IR, REMEDY, import_extra, leave_out, quantise_openvino
from sd35bench.types import Scalar

DEVICE = "CPU"
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEngine:
    """OpenVINO's compiled graphs of one artifact: the full one, one per set of skipped layers."""

    def __init__(self, artifact: Artifact, *, threads: int, precision: str) -> None:
        """Compile the full graph for the CPU.

        Raises: OptimizationNotApplied where precision, device or threads are not those asked for.
        """
        self._artifact = artifact
        self._threads, self._precision = threads, precision
        self._requests: dict[tuple[int, ...], Any] = {}
        self._proven: dict[str, Any] = {}
        self._open(())

    @property
    def facts(self) -> dict[str, Any]:
        """What the compiled graph says about itself."""
        shorter = [list(layers) for layers in self._requests if layers]
        return {**self._proven, "skip_layer_graphs": shorter}

    def run(self, inputs: Mapping[str, torch.Tensor], skip_layers: tuple[int, ...]) -> torch.Tensor:
        """Run the graph; the answer is a copy [B, T, p·p·C].

        Raises: OutOfMemory, BackendError for OpenVINO's own errors.
        """
        if skip_layers not in self._requests:
            self._open(skip_layers)
        request = self._requests[skip_layers]
        with openvino_errors():
            request.infer({name: inputs[name].numpy() for name in INPUTS}, share_inputs=True)
            return torch.from_numpy(request.get_tensor(OUTPUT).data.copy())

    def _open(self, skip_layers: tuple[int, ...]) -> None:
        core = import_extra("openvino").Core()
        folder = self._artifact.folder
        path = folder / IR if (folder / IR).is_file() else folder / MODEL
        with openvino_errors():
            model = core.read_model(path)
            if skip_layers:
                leave_out(model, skip_layers, self._artifact.facts["blocks"])
            compiled = core.compile_model(
                model,
                DEVICE,
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": PRECISIONS[self._precision],
                    "INFERENCE_NUM_THREADS": self._threads,
                },
            )
        proven = prove_compiled(compiled, precision=self._precision, threads=self._threads)
        self._proven = self._proven if skip_layers else proven
        self._requests[skip_layers] = compiled.create_infer_request()


class OpenVinoBackend(ExportedBackend):
    """diffusers around OpenVINO; option `precision` (fp32, bf16) is what the CPU computes in."""

    options = MappingProxyType({**ExportedBackend.options, "precision": "fp32"})

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Import OpenVINO and ask it for the CPU."""
        found = super().probe(options)
        if not found.ok:
            return found
        asked = {**cls.options, **options}
        try:
            ov = _import(str(asked["quantisation"]))
            _refuse_precision(ov, str(asked["precision"]))
        except OptimizationNotApplied as exc:
            return Probe(ok=None, detail=str(exc), remedy="give backend.precision=fp32")
        except BackendError as exc:
            return Probe(ok=None, detail=str(exc), remedy=REMEDY)
        return Probe(ok=True, detail=f"OpenVINO {ov.__version__} on the {DEVICE}")

    @property
    def precision(self) -> str:
        """What OpenVINO computes in, whatever the graph's dtype."""
        return str(self.asked["precision"])

    def check(self) -> None:
        """Look at the options, for OpenVINO, and at the CPU's precisions.

        Raises: BackendError, OptimizationNotApplied.
        """
        quantisation = choice("quantisation", self.asked["quantisation"], QUANTISATIONS)
        precision = choice("precision", self.asked["precision"], PRECISIONS)
        if self._dtype != "fp32" or self.device.type != "cpu":
            raise OptimizationNotApplied(
                f"backend.dtype={self._dtype} on {self.device.type} asked, but this backend runs an"
                " fp32 graph on the CPU; give backend.dtype=fp32 backend.device=cpu (and"
                " backend.precision=bf16 to compute in bf16)"
            )
        ov = _import(quantisation)
        _refuse_precision(ov, precision)

    def needs_calibration(self, exported: Artifact) -> bool:
        """Only the int8 artifact, and only when it has to be made."""
        if self.asked["quantisation"] == "none":
            return False
        return find_artifact(self.recipe("openvino", "int8")) is None

    def convert(self, exported: Artifact, feeds: list[dict[str, torch.Tensor]]) -> Artifact:
        """Return the exported graph itself, or NNCF's int8 form."""
        if self.asked["quantisation"] == "none":
            return exported
        return quantise_openvino(self.recipe("openvino", "int8"), exported, feeds)

    def open(self, artifact: Artifact, width: int) -> OpenVinoEngine:
        """Compile the graph."""
        return OpenVinoEngine(artifact, threads=self._load.threads, precision=self.precision)


def _import(quantisation: str) -> Any:
    """Import what a quantisation needs, and return OpenVINO.

    Raises: BackendError with the remedy.
    """
    if quantisation == "int8":
        import_extra("nncf")
    return import_extra("openvino")


def prove_compiled(compiled: Any, *, precision: str, threads: int) -> dict[str, Any]:
    """Ask a compiled graph where and how it runs. Raises: OptimizationNotApplied."""
    found = {
        "providers": list(compiled.get_property("EXECUTION_DEVICES")),
        "inference_precision": _text(compiled.get_property("INFERENCE_PRECISION_HINT")),
        "session_threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
    }
    wanted = {
        "providers": [DEVICE],
        "inference_precision": PRECISIONS[precision],
        "session_threads": threads,
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise OptimizationNotApplied(f"{name}={value} asked, OpenVINO has {found[name]}")
    return found


@contextlib.contextmanager
def openvino_errors() -> Iterator[None]:
    """Turn OpenVINO's errors, which are RuntimeErrors, into ours.

    Raises: OutOfMemory, BackendError.
    """
    try:
        yield
    except RuntimeError as exc:
        if "bad_alloc" in str(exc) or "allocate" in str(exc):
            raise OutOfMemory(f"{exc}; use a smaller batch or size") from exc
        raise BackendError(f"OpenVINO failed: {exc}") from exc


def _refuse_precision(ov: Any, precision: str) -> None:
    """Refuse a precision that this CPU lacks. Raises: OptimizationNotApplied."""
    known = ov.Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and "BF16" not in known:
        raise OptimizationNotApplied("backend.precision=bf16 asked, but this CPU has no bf16")


def _text(precision: Any) -> str:
    """OpenVINO's name of an element type: "f32"."""
    return precision.get_type_name() if hasattr(precision, "get_type_name") else str(precision)
