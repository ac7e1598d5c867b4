"""OpenVINO on the same exported graph: parity, int8 through NNCF, and what is said without it."""

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sd35bench.backends.base import Generation, Probe
from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.openvino_runtime import OpenVinoBackend, openvino_errors, prove_compiled
from sd35bench.errors import BackendError, OptimizationNotApplied, OutOfMemory
from tests.backends.conftest import Loads
from tests.backends.exported import CASES, PARITY, latents_error, make, nano_load, small_request

pytestmark = pytest.mark.usefixtures("tiny_graph")
REMEDY = r"pip install 'nncf>=3\.0' 'openvino>=2025\.4'"
HERE = importlib.util.find_spec("openvino") is not None
NNCF = importlib.util.find_spec("nncf") is not None
with_openvino = pytest.mark.skipif(not HERE, reason="openvino is not installed: an optional extra")
with_nncf = pytest.mark.skipif(not (HERE and NNCF), reason="nncf is not installed: an extra")
FEW = ("1:1", "16:9", "9:16", "batch", "image-to-image", "skip-layers")


@pytest.fixture(scope="module")
def wanted(load: Loads) -> dict[str, Generation]:
    backend = EagerBackend(load("eager", device="cpu"))
    made = {name: make(backend, CASES[name]) for name in FEW}
    backend.close()
    return made


@pytest.fixture(scope="module")
def openvino(load: Loads) -> Iterator[OpenVinoBackend]:
    backend = OpenVinoBackend(load("openvino", device="cpu"))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def int8() -> Iterator[OpenVinoBackend]:
    backend = OpenVinoBackend(nano_load("openvino", device="cpu", quantisation="int8"))
    yield backend
    backend.close()


@with_openvino
@pytest.mark.parametrize("case", FEW)
def test_openvino_equals_eager(
    openvino: OpenVinoBackend, wanted: dict[str, Generation], case: str
) -> None:
    found = make(openvino, CASES[case])
    assert latents_error(found, wanted[case]) <= PARITY
    for image, other in zip(found.images, wanted[case].images, strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1


@with_openvino
def test_openvino_says_what_is_in_force(openvino: OpenVinoBackend) -> None:
    proven = openvino.in_force
    assert proven["providers"] == ["CPU"]
    assert proven["inference_precision"] == "f32"
    assert proven["session_threads"] == proven["threads"] == 1
    assert proven["parity"]["relative_max"] <= PARITY
    assert proven["artifact"]["opset"] == 23


@pytest.mark.slow
@with_nncf
def test_openvino_int8_is_int8(int8: OpenVinoBackend) -> None:
    eager = EagerBackend(nano_load("eager", device="cpu"))
    proven = int8.in_force
    assert proven["quantised"]["layers"] > 50
    assert proven["quantised"]["weight_elements"]["int8"] > 5e6
    assert proven["parity"]["relative_max"] > PARITY
    for case in ("1:1", "skip-layers"):
        assert PARITY < latents_error(make(int8, CASES[case]), make(eager, CASES[case])) < 0.3
    eager.close()


@pytest.mark.slow
@with_nncf
def test_openvino_int8_is_calibrated_once(int8: OpenVinoBackend) -> None:
    assert not int8.needs_calibration(int8._artifact)


@pytest.mark.slow
@with_nncf
def test_openvino_int8_that_quantised_nothing_is_refused() -> None:
    with pytest.raises(OptimizationNotApplied, match="NNCF quantised no layer"):
        OpenVinoBackend(nano_load("openvino", device="cpu", quantisation="int8", exclude="*"))


class Compiled:
    """A compiled graph that is not what was asked for."""

    def __init__(self, **changes: Any) -> None:
        self._properties = {
            "EXECUTION_DEVICES": ["CPU"],
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 2,
            **changes,
        }

    def get_property(self, name: str) -> Any:
        return self._properties[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INFERENCE_PRECISION_HINT": "bf16"}, "inference_precision=f32 asked, OpenVINO has bf16"),
        ({"EXECUTION_DEVICES": ["GPU"]}, "providers"),
        ({"INFERENCE_NUM_THREADS": 1}, "session_threads=2 asked"),
    ],
    ids=["precision", "device", "threads"],
)
def test_openvino_that_runs_otherwise_is_refused(changes: dict[str, Any], message: str) -> None:
    prove_compiled(Compiled(), precision="fp32", threads=2)
    with pytest.raises(OptimizationNotApplied, match=message):
        prove_compiled(Compiled(**changes), precision="fp32", threads=2)


@with_openvino
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "bf16"}, OptimizationNotApplied, r"backend\.precision=bf16"),
        ({"precision": "fp16"}, BackendError, "backend.precision='fp16' is unknown"),
        ({"quantisation": "int4"}, BackendError, "backend.quantisation='int4' is unknown"),
    ],
    ids=["dtype", "precision", "quantisation"],
)
def test_openvino_refuses_options(
    options: dict[str, Any], error: type[BackendError], message: str, load: Loads
) -> None:
    with pytest.raises(error, match=message):
        OpenVinoBackend(load("openvino", **{"device": "cpu", **options}))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Make one package look as if it were not installed."""
    absent: str = request.param
    for name in [n for n in sys.modules if n.partition(".")[0] == absent]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, absent, None)
    return absent


@pytest.mark.parametrize("without", ["openvino"], indirect=True)
def test_without_openvino_loading_says_how_to_get_it(without: str, load: Loads) -> None:
    with pytest.raises(BackendError, match=f"{without} cannot be imported.*{REMEDY}"):
        OpenVinoBackend(load("openvino", device="cpu"))


@pytest.mark.parametrize("without", ["openvino"], indirect=True)
def test_without_openvino_probe_says_how_to_get_it(without: str) -> None:
    found = OpenVinoBackend.probe({"device": "cpu"})
    assert found.ok is None
    assert found.remedy == "pip install 'nncf>=3.0' 'openvino>=2025.4'"


@with_openvino
@pytest.mark.parametrize("without", ["nncf"], indirect=True)
def test_without_nncf_only_int8_is_refused(without: str, load: Loads) -> None:
    assert OpenVinoBackend.probe({"device": "cpu"}).ok
    found = OpenVinoBackend.probe({"device": "cpu", "quantisation": "int8"})
    assert (found.ok, found.remedy) == (None, "pip install 'nncf>=3.0' 'openvino>=2025.4'")
    with pytest.raises(BackendError, match=f"{without} cannot be imported.*{REMEDY}"):
        OpenVinoBackend(load("openvino", device="cpu", quantisation="int8"))


@with_openvino
def test_openvino_probe_tells() -> None:
    found = OpenVinoBackend.probe({"device": "cpu", "precision": "fp32"})
    assert isinstance(found, Probe)
    assert found.ok is True
    assert "OpenVINO 20" in found.detail


@with_openvino
def test_closed_openvino_backend_refuses(load: Loads) -> None:
    backend = OpenVinoBackend(load("openvino", device="cpu"))
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="closed"):
        backend.generate([small_request()], [None])


@pytest.mark.parametrize(
    ("text", "error"), [("std::bad_alloc", OutOfMemory), ("shape mismatch", BackendError)]
)
def test_openvino_errors_become_ours(text: str, error: type[BackendError]) -> None:
    with pytest.raises(error) as caught, openvino_errors():
        raise RuntimeError(text)
    assert type(caught.value) is error
