"""ONNX Runtime: parity with eager, and proofs that can fail."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sd35bench.backends.exported as exported
from sd35bench.backends.base import Generation, load_backend
from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.onnx_runtime import (
    PROVIDERS,
    OnnxBackend,
    open_session,
    ort_errors,
    prove_session,
)
from sd35bench.errors import (
    BackendError,
    OptimizationNotApplied,
    OutOfMemory,
    UnsupportedRequest,
)
from sd35bench.export.denoiser import GraphDenoiser
from sd35bench.types import Task
from tests.backends.conftest import Loads, make_load
from tests.backends.exported import CASES, PARITY, latents_error, make, nano_load, small_request

pytestmark = pytest.mark.usefixtures("tiny_graph")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(scope="module")
def wanted(load: Loads) -> dict[str, Generation]:
    """What eager makes of every case."""
    backend = EagerBackend(load("eager", device="cpu"))
    made = {name: make(backend, requests) for name, requests in CASES.items()}
    backend.close()
    return made


@pytest.fixture(scope="module")
def onnx(load: Loads) -> Iterator[OnnxBackend]:
    backend = OnnxBackend(load("onnx", device="cpu"))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def int8(load: Loads) -> Iterator[OnnxBackend]:
    backend = OnnxBackend(load("onnx", device="cpu", quantisation="int8"))
    yield backend
    backend.close()


@pytest.mark.parametrize("case", CASES)
def test_onnx_equals_eager(onnx: OnnxBackend, wanted: dict[str, Generation], case: str) -> None:
    found = make(onnx, CASES[case])
    assert latents_error(found, wanted[case]) <= PARITY
    assert found.evaluations == wanted[case].evaluations
    for image, other in zip(found.images, wanted[case].images, strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1


def test_onnx_parity_can_fail(onnx: OnnxBackend, wanted: dict[str, Generation]) -> None:
    other = make(onnx, [small_request(cfg=4.01)])
    assert latents_error(other, wanted["1:1"]) > PARITY


def test_onnx_says_what_is_in_force(onnx: OnnxBackend) -> None:
    proven = onnx.in_force
    assert proven["providers"] == ["CPUExecutionProvider"]
    assert list(proven["nodes"]) == ["CPUExecutionProvider"]
    assert proven["nodes"]["CPUExecutionProvider"] > 100
    assert proven["session_threads"] == proven["threads"] == 1
    assert proven["component_dtypes"]["transformer"] == "fp32"
    assert 0 < proven["parity"]["relative_max"] <= PARITY
    assert proven["artifact"]["opset"] == 23
    assert proven["artifact"]["bytes"] > 4 * 127_000  # the tiny denoiser's weights in fp32
    assert "quantised" not in proven


def test_onnx_holds_no_torch_denoiser(
    onnx: OnnxBackend, monkeypatch: pytest.MonkeyPatch, load: Loads
) -> None:
    """Its weights would be in memory twice."""
    replaced: list[weakref.ref[torch.nn.Module]] = []

    def seen(transformer: Any, run: Any) -> GraphDenoiser:
        replaced.append(weakref.ref(transformer))
        return GraphDenoiser(transformer, run)

    monkeypatch.setattr(exported, "GraphDenoiser", seen)
    backend = OnnxBackend(load("onnx", device="cpu"))
    gc.collect()
    assert replaced[0]() is None
    pipes = backend._pipes
    assert pipes[Task.TEXT_TO_IMAGE].transformer is pipes[Task.IMAGE_TO_IMAGE].transformer
    backend.close()


def test_settle_names_the_shorter_graphs(load: Loads) -> None:
    backend = OnnxBackend(load("onnx", device="cpu"))
    assert backend.in_force["skip_layer_graphs"] == []
    make(backend, CASES["skip-layers"])
    backend.settle()
    assert backend.in_force["skip_layer_graphs"] == [[1, 2]]
    assert backend.in_force["artifact"]["cached"]
    backend.close()


def test_int8_is_int8(int8: OnnxBackend, onnx: OnnxBackend, wanted: dict[str, Generation]) -> None:
    proven = int8.in_force
    weights = proven["quantised"]["weight_elements"]
    assert proven["quantised"]["layers"] > 40
    assert len(proven["quantised"]["names"]) == 8
    assert weights["int8"] > 15 * weights["fp32"]
    assert "uint8" not in weights
    sizes = [(b._artifact.folder / "model.onnx.data").stat().st_size for b in (int8, onnx)]
    assert sizes[0] < sizes[1] / 3
    assert proven["component_dtypes"]["transformer"].startswith("int8")
    assert proven["parity"]["relative_max"] > PARITY
    error = latents_error(make(int8, CASES["1:1"]), wanted["1:1"])
    assert PARITY < error < 0.2


def test_int8_leaves_out_what_is_excluded(int8: OnnxBackend, load: Loads) -> None:
    backend = OnnxBackend(
        load("onnx", device="cpu", quantisation="int8", exclude="proj_out norm_out.*")
    )
    whole, fewer = (b.in_force["quantised"] for b in (int8, backend))
    assert fewer["layers"] == whole["layers"] - 2
    assert "proj_out" in whole["names"]
    assert "proj_out" not in fewer["names"]
    backend.close()


def test_int8_that_quantised_nothing_is_refused(load: Loads) -> None:
    with pytest.raises(OptimizationNotApplied, match=r"no layer was quantised.*exclude"):
        OnnxBackend(load("onnx", device="cpu", quantisation="int8", exclude="*"))


def test_int8_that_computes_in_fp32_is_refused(
    onnx: OnnxBackend, monkeypatch: pytest.MonkeyPatch, load: Loads
) -> None:
    monkeypatch.setattr(OnnxBackend, "convert", lambda self, artifact, feeds: artifact)
    with pytest.raises(OptimizationNotApplied, match="nothing was computed in int8"):
        OnnxBackend(load("onnx", device="cpu", quantisation="int8"))


def test_graph_that_computes_something_else_is_refused(
    onnx: OnnxBackend, monkeypatch: pytest.MonkeyPatch, load: Loads
) -> None:
    run = exported.ExportedBackend._run
    monkeypatch.setattr(
        exported.ExportedBackend, "_run", lambda self, inputs, skip: run(self, inputs, skip) * 1.001
    )
    with pytest.raises(OptimizationNotApplied, match="computes something else"):
        OnnxBackend(load("onnx", device="cpu"))


@NO_CUDA
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_silent_provider_fallback_is_refused(onnx: OnnxBackend, provider: str) -> None:
    """ONNX Runtime opens a CPU session here and only logs; the proof must not."""
    model = onnx._artifact.folder / "model.onnx"
    with pytest.raises(OptimizationNotApplied, match=rf"\['{PROVIDERS[provider]}.*fell back"):
        open_session(model, provider=provider, threads=1, optimisation="all", folder=None)


@NO_CUDA
def test_backend_refuses_cuda_where_there_is_none(load: Loads) -> None:
    with pytest.raises(OptimizationNotApplied, match=r"provider=cuda.*is on cpu"):
        OnnxBackend(load("onnx", provider="cuda"))


class Session:
    """A session on CUDA whose products of matrices stayed on the CPU."""

    def __init__(self, *strays: str) -> None:
        self._strays = strays

    def get_providers(self) -> list[str]:
        return [PROVIDERS["cuda"], PROVIDERS["cpu"]]

    def get_session_options(self) -> Any:
        return replace_options(threads=1)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        part = type("Part", (), {"ep_name": PROVIDERS["cpu"]})()
        nodes = [type("Node", (), {"op_type": name})() for name in self._strays]
        part.get_nodes = lambda: nodes
        return [part]


def replace_options(threads: int) -> Any:
    return type("Options", (), {"intra_op_num_threads": threads})()


def test_work_that_stayed_on_the_cpu_is_refused() -> None:
    wanted = [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    prove_session(Session("Shape", "Gather"), wanted, threads=1)
    with pytest.raises(OptimizationNotApplied, match="'MatMulInteger': 2"):
        prove_session(Session("Shape", "MatMulInteger", "MatMulInteger"), wanted, threads=1)
    with pytest.raises(OptimizationNotApplied, match="threads=2 asked"):
        prove_session(Session(), wanted, threads=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bf16"}, OptimizationNotApplied, "CPU kernels compute in fp32"),
        ({"provider": "directml"}, BackendError, "backend.provider='directml' is unknown"),
        ({"quantisation": "int4"}, BackendError, "backend.quantisation='int4' is unknown"),
        ({"graph_optimization": "some"}, BackendError, "graph_optimization='some' is unknown"),
        ({"excluded": "x"}, BackendError, "has no option 'excluded'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_onnx_refuses_options(
    options: dict[str, Any], error: type[BackendError], message: str, load: Loads
) -> None:
    with pytest.raises(error, match=message):
        OnnxBackend(load("onnx", **{"device": "cpu", **options}))


def test_onnx_refuses_another_family(tiny_path: Path) -> None:
    load = make_load(tiny_path, "onnx", device="cpu")
    backend = object.__new__(OnnxBackend)  # no Sana checkpoint is needed to be refused
    backend._load = replace(load, model=replace(load.model, family="sana"))
    with pytest.raises(UnsupportedRequest, match="family 'sana' runs on the eager"):
        backend.prepare(object())


@pytest.mark.parametrize(
    ("text", "error"),
    [("Failed to allocate memory for requested buffer", OutOfMemory), ("no kernel", BackendError)],
)
def test_onnx_errors_become_ours(text: str, error: type[BackendError]) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    with pytest.raises(error) as caught, ort_errors():
        raise RuntimeException(text)
    assert type(caught.value) is error


def test_closed_onnx_backend_refuses(load: Loads) -> None:
    backend = load_backend(load("onnx", device="cpu"))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.generate([small_request()], [None])


def test_onnx_probe_tells() -> None:
    found = OnnxBackend.probe({"device": "cpu"})
    assert found.ok is True
    assert "CPUExecutionProvider" in found.detail


@NO_CUDA
@pytest.mark.parametrize(
    "options", [{"provider": "cuda"}, {"device": "cuda", "provider": "cuda", "dtype": "fp16"}]
)
def test_onnx_probe_wants_a_gpu(options: dict[str, Any]) -> None:
    found = OnnxBackend.probe(options)
    assert found.ok is None
    assert found.remedy


@pytest.mark.slow
def test_nano_graph_equals_eager() -> None:
    """The shipped weights: every case, and in int8."""
    made = []
    for kind, options in (("eager", {}), ("onnx", {}), ("onnx", {"quantisation": "int8"})):
        backend = load_backend(nano_load(kind, device="cpu", **options))
        made.append({name: make(backend, requests) for name, requests in CASES.items()})
        facts = backend.in_force
        backend.close()
    eager, onnx, int8 = made
    for case in CASES:
        assert latents_error(onnx[case], eager[case]) <= PARITY
    assert facts["quantised"]["layers"] > 80
    weights = facts["quantised"]["weight_elements"]
    assert weights["int8"] > 20 * weights["fp32"]
    assert PARITY < latents_error(int8["1:1"], eager["1:1"]) < 0.2
