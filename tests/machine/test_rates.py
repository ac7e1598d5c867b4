"""The machine's limits: measured once per study, plausible, and never at the cost of a run."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from sd35bench.machine import rates
from sd35bench.machine.measure import RATE_FIELDS
from sd35bench.machine.rates import measure_once, measure_rates
from sd35bench.study.store import Study
from sd35bench.types import BackendSpec, Load, ModelSpec

LOAD = Load(
    model=ModelSpec(name="m", path="p", weights_digest="d" * 64, max_sequence_length=16),
    backend=BackendSpec(name="eager", kind="eager"),
    threads=2,
)
RATES = {"fp32": {"best": 0.2, "median": 0.19, "n": 4, "unit": "TFLOP/s"}}


@pytest.fixture
def study(tmp_path) -> Study:
    return Study.open(tmp_path, "s", create=True)


@pytest.fixture
def children(monkeypatch) -> list[tuple[int, str]]:
    """Children that would have been started, as (threads, device); each answers at once."""
    asked: list[tuple[int, str]] = []

    def answer(threads: int, device: str, cores: Any = None) -> dict[str, Any]:
        asked.append((threads, device))
        return {"device": device, "threads": threads, "rates": RATES}

    monkeypatch.setattr(rates, "_ask_child", answer)
    return asked


def on_gpu(monkeypatch, name: str | None) -> None:
    real = rates.environment
    monkeypatch.setattr(rates, "environment", lambda threads: real(threads) | {"gpu_name": name})


def test_a_study_is_measured_once_for_each_thread_count(study, children):
    for load in (LOAD, LOAD, replace(LOAD, threads=1), LOAD):
        measure_once(study, load)
    assert children == [(2, "cpu"), (1, "cpu")]
    assert [m["threads"] for m in study.machine()] == [2, 1]
    first = study.machine()[0]
    assert first["rates"] == RATES
    assert set(first["environment"]) == set(RATE_FIELDS)


def test_another_backend_on_the_same_device_is_not_measured_again(study, children):
    measure_once(study, LOAD)
    measure_once(study, replace(LOAD, backend=BackendSpec(name="compile", kind="compile")))
    assert len(children) == 1


def test_another_study_is_measured_again(study, tmp_path, children):
    measure_once(study, LOAD)
    measure_once(Study.open(tmp_path, "t", create=True), LOAD)
    assert len(children) == 2


@pytest.mark.parametrize(
    ("gpu", "options", "device"),
    [
        (None, {}, "cpu"),
        (None, {"device": "cuda"}, "cpu"),
        ("H200", {}, "cuda"),
        ("H200", {"device": "auto"}, "cuda"),
        ("H200", {"device": "cpu"}, "cpu"),
        ("H200", {"provider": "CPUExecutionProvider"}, "cpu"),
    ],
)
def test_the_device_is_the_one_that_the_backend_would_use(
    study, children, monkeypatch, gpu, options, device
):
    on_gpu(monkeypatch, gpu)
    measure_once(study, replace(LOAD, backend=replace(LOAD.backend, options=options)))
    assert children == [(2, device)]


def test_a_load_without_weights_has_no_limit(study, children):
    measure_once(study, replace(LOAD, model=replace(LOAD.model, weights_digest="none")))
    assert children == []
    assert study.machine() == []


def test_a_failed_measurement_is_kept_and_tried_again(study, monkeypatch):
    monkeypatch.setattr(rates.sys, "executable", "/nonexistent/python")
    measure_once(study, LOAD)
    (failed,) = study.machine()
    assert failed["rates"] == {}
    assert "FileNotFoundError" in failed["error"]
    monkeypatch.setattr(
        rates, "_ask_child", lambda *_: {"device": "cpu", "threads": 1, "rates": RATES}
    )
    measure_once(study, LOAD)
    assert len(study.machine()) == 2


def test_a_child_that_breaks_says_why(study, monkeypatch):
    def broken(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nImportError: no torch\n")

    double = SimpleNamespace(run=broken, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(rates, "subprocess", double)
    measure_once(study, LOAD)
    assert study.machine()[0]["error"] == "ImportError: no torch"


def test_the_parent_stays_free_of_torch():
    code = "import sys; from sd35bench.machine import rates; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(rates, "CPU_SHAPE", (128, 192, 768))
    monkeypatch.setattr(rates, "CPU_COPY_BYTES", 2**22)
    monkeypatch.setattr(rates, "RATE_SECONDS", 0.02)


@pytest.fixture
def threads():
    """Torch's thread count, put back afterwards."""
    import torch

    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_rates_are_best_over_median_with_their_count(small, threads):
    found = measure_rates(1, "cpu")
    assert (found["device"], found["threads"]) == ("cpu", 1)
    assert set(found["rates"]) >= {"fp32", "bf16", "copy"}
    for rate in found["rates"].values():
        assert rate["best"] >= rate["median"] > 0
        assert rate["n"] >= rates.LEAST_REPETITIONS
    # 37.7 MFLOP take between 1 us (37 TFLOP/s) and 0.4 s (0.1 GFLOP/s) on any CPU there is.
    assert 1e-4 < found["rates"]["fp32"]["best"] < 37
    assert 0.05 < found["rates"]["copy"]["best"] < 5000
    json.dumps(found, allow_nan=False)


def test_rates_count_a_multiply_add_twice_and_bytes_both_ways(small, threads, monkeypatch):
    monkeypatch.setattr(rates._Clock, "seconds", lambda self, call: 0.5)
    found = measure_rates(1, "cpu")["rates"]
    assert found["fp32"]["best"] == pytest.approx(2 * 128 * 192 * 768 / 0.5 / 1e12)
    assert found["copy"]["best"] == pytest.approx(2 * 2**22 / 0.5 / 1e9)


@pytest.mark.parametrize(("one_s", "n"), [(0.1, 6), (0.2, 5), (0.5, 3), (9.0, 1)])
def test_slow_products_are_repeated_less_often(monkeypatch, one_s, n):
    clock = rates._Clock(None, "cpu")
    monkeypatch.setattr(rates._Clock, "seconds", lambda self, call: one_s)
    assert len(clock.repeat(lambda: None)) == n


def test_a_dtype_that_the_device_does_not_multiply_is_left_out(small, threads, monkeypatch):
    import torch

    def refuses(*_: Any) -> None:
        raise RuntimeError("not implemented for 'Char'")

    monkeypatch.setattr(torch, "_int_mm", refuses)
    assert "int8" not in measure_rates(1, "cpu")["rates"]


def test_without_cuda_the_cpu_is_measured_and_said(small, threads, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measure_rates(1, "cuda")["device"] == "cpu"


@pytest.mark.slow
def test_the_real_child_measures_within_seconds(study):
    measure_once(study, LOAD)
    (found,) = study.machine()
    assert "error" not in found
    assert found["rates"]["fp32"]["best"] > 0.005
    assert found["rates"]["copy"]["best"] > 0.5
    assert found["wall_s"] < 20


def test_onednn_multiplies_the_same_matrices():
    torch = pytest.importorskip("torch")
    a, b = torch.randn(7, 33), torch.randn(33, 5)
    torch.testing.assert_close(rates._onednn_product(torch, a, b)(), a @ b)
