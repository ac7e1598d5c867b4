"""Clocks, memory and environment, on machines with and without a GPU (NVML is doubled here)."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sd35bench.machine import measure
from sd35bench.machine.measure import (
    COMPARABLE,
    DeviceClock,
    Stopwatch,
    environment,
    environment_id,
    gpu_state,
    memory,
    peak_rss_bytes,
)
from sd35bench.types import GpuState

MIB = 2**20


def test_measure_loads_no_torch() -> None:
    code = (
        "import sys; from sd35bench.machine import measure; "
        "measure.environment(); measure.memory(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_stopwatch_counts_between_synchronisations() -> None:
    calls = []

    def synchronize() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.02)

    with Stopwatch(synchronize) as watch:
        calls.append(time.perf_counter())
    # The first synchronisation is over before the clock starts, the last one counts.
    assert len(calls) == 3
    assert 0.02 <= watch.elapsed_s <= time.perf_counter() - calls[1] + 0.001


def test_stopwatch_does_not_synchronise_after_an_error() -> None:
    calls = []
    with pytest.raises(ZeroDivisionError), Stopwatch(lambda: calls.append(1)) as watch:
        _ = 1 / 0
    assert len(calls) == 1
    assert watch.elapsed_s > 0


def test_device_clock_on_the_cpu_is_monotonic_seconds() -> None:
    clock = DeviceClock("cpu")
    start = clock.stamp()
    time.sleep(0.02)
    assert 0.02 <= clock.seconds(start, clock.stamp()) < 60


def test_device_clock_on_cuda_reads_events_after_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            log.append("read")
            return 250.0

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(Event=Event)))
    clock = DeviceClock("cuda:0")
    assert clock.seconds(clock.stamp(), clock.stamp()) == 0.25
    assert log == ["record", "record", "wait", "read"]


def test_peak_rss_sees_an_allocation_that_is_gone() -> None:
    before = peak_rss_bytes()
    block = bytearray(os.urandom(1)) * (before + 64 * MIB)
    del block
    assert peak_rss_bytes() >= before + 64 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_rss_of_a_child_is_not_its_parents() -> None:
    child = "from sd35bench.machine.measure import peak_rss_bytes; print(peak_rss_bytes())"
    parent = (
        "import subprocess, sys; block = bytearray(b'x') * (400 * 2**20); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, check=True, timeout=60
    )
    assert 4 * MIB < int(done.stdout) < 300 * MIB


def test_memory_knows_no_vram_without_cuda() -> None:
    seen = memory("cpu")
    assert seen.peak_rss_bytes > MIB
    assert (seen.peak_vram_bytes, seen.peak_allocator_bytes) == (None, None)


REASONS = {
    "nvmlClocksEventReasonGpuIdle": 0x1,
    "nvmlClocksEventReasonApplicationsClocksSetting": 0x2,
    "nvmlClocksEventReasonSwPowerCap": 0x4,
    "nvmlClocksEventReasonHwSlowdown": 0x8,
    "nvmlClocksEventReasonSyncBoost": 0x10,
    "nvmlClocksEventReasonSwThermalSlowdown": 0x20,
    "nvmlClocksEventReasonHwThermalSlowdown": 0x40,
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": 0x80,
    "nvmlClocksEventReasonDisplayClockSetting": 0x100,
}
"""Bits of NVML's header."""


class FakeNvml:
    """NVML with one device and the processes it is told."""

    class NVMLError(Exception):
        """NVML's own."""

    def __init__(self, *processes: tuple[int, int | None], devices: int = 1) -> None:
        self.processes = [SimpleNamespace(pid=p, usedGpuMemory=used) for p, used in processes]
        self.devices = devices
        for name, mask in REASONS.items():
            setattr(self, name, mask)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.devices

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index >= self.devices:
            raise self.NVMLError("no such device")
        return f"index {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        return self.processes

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"GPU at {handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 * 2**30)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    reasons = 0
    silent: tuple[str, ...] = ()

    def _tell(self, name: str, value: int) -> int:
        if name in self.silent:
            raise self.NVMLError(f"{name}: not supported")
        return value

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self._tell("clock", {self.NVML_CLOCK_SM: 1755, self.NVML_CLOCK_MEM: 2619}[kind])

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._tell("power", 612_345)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._tell("temperature", 61)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return self._tell("reasons", self.reasons)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A doubled driver; no environment variable hides its device."""
    fake = FakeNvml()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(measure, "_nvml", lambda: fake)
    peak = measure._VramPeak()
    monkeypatch.setattr(measure, "_vram_peak", lambda: peak)
    return fake


OWN = os.getpid()


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([(OWN, 500)], 500),
        ([(OWN, 500), (1, 900)], 500),
        ([(1, 900)], 900),
        ([(1, 900), (2, 800)], None),
        ([(OWN, None)], None),
        ([], None),
    ],
    ids=["own", "own-and-other", "container", "container-crowded", "hidden", "none"],
)
def test_memory_reads_this_process_from_nvml(
    nvml: FakeNvml, processes: list[tuple[int, int | None]], expected: int | None
) -> None:
    nvml.processes = FakeNvml(*processes).processes
    assert memory("cuda:0").peak_vram_bytes == expected


def test_memory_keeps_the_peak(nvml: FakeNvml) -> None:
    for used in (300, 700, 200):
        nvml.processes = FakeNvml((OWN, used)).processes
        last = memory("cuda:0").peak_vram_bytes
    assert last == 700


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, "index 0"),
        ("1,0", "index 1"),
        ("GPU-abc,GPU-def", "GPU-abc"),
        ("", None),
        ("-1", None),
    ],
    ids=["unset", "index", "uuid", "empty", "minus-one"],
)
def test_environment_names_the_gpu_that_torch_sees(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str | None
) -> None:
    nvml.devices = 2
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    seen = environment()
    assert seen["gpu_name"] == (None if expected is None else f"GPU at {expected}")
    assert seen["gpu_driver"] == (None if expected is None else "580.1")


def test_environment_survives_a_driver_that_fails(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert environment()["gpu_name"] is None
    assert memory("cuda:0").peak_vram_bytes is None


def test_gpu_state_reads_clocks_power_and_temperature(nvml: FakeNvml) -> None:
    assert gpu_state() == GpuState(
        sm_clock_mhz=1755,
        memory_clock_mhz=2619,
        power_w=612.345,
        temperature_c=61,
        throttled=(),
        foreign_processes=0,
    )


def test_gpu_state_counts_the_processes_of_others(nvml: FakeNvml) -> None:
    nvml.processes = [SimpleNamespace(pid=pid, usedGpuMemory=1) for pid in (1, 2, 3)]
    found = gpu_state()
    assert found is not None
    assert found.foreign_processes == 2


@pytest.mark.parametrize(
    ("reasons", "names"),
    [
        (0x0, ()),
        (0x1, ()),
        (0x4, ("power-cap",)),
        (0x1 | 0x20 | 0x8, ("hardware-slowdown", "thermal-slowdown")),
        (0x1000, ()),
    ],
    ids=["none", "idle", "power", "two-and-idle", "of-the-future"],
)
def test_gpu_state_names_why_clocks_are_held_down(
    nvml: FakeNvml, reasons: int, names: tuple[str, ...]
) -> None:
    nvml.reasons = reasons
    seen = gpu_state()
    assert seen is not None
    assert seen.throttled == names


def test_every_reason_is_one_that_the_driver_knows() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert {name: getattr(pynvml, name) for name in REASONS} == REASONS
    assert set(measure.THROTTLING) == set(REASONS) - {"nvmlClocksEventReasonGpuIdle"}


def test_gpu_state_leaves_out_what_a_driver_does_not_tell(nvml: FakeNvml) -> None:
    nvml.silent = ("power", "reasons")
    seen = gpu_state()
    assert seen is not None
    assert (seen.power_w, seen.throttled, seen.sm_clock_mhz) == (None, None, 1755)


@pytest.mark.parametrize("visible", ["", "7"], ids=["hidden", "absent"])
def test_gpu_state_is_none_without_a_gpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_state() is None


def test_gpu_state_is_none_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_nvml", lambda: None)
    assert gpu_state() is None


def test_environment_describes_this_machine() -> None:
    seen = environment(threads=3)
    assert set(COMPARABLE) <= set(seen)
    assert seen["threads"] == 3
    assert seen["python"] == sys.version.split()[0]
    assert isinstance(seen["cpu_count"], int)
    assert seen["cpu_count"] >= 1
    assert isinstance(seen["ram_bytes"], int)
    assert seen["ram_bytes"] > 100 * MIB
    assert isinstance(seen["torch"], str)


def test_environment_takes_the_threads_of_a_loaded_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 5))
    assert environment()["threads"] == 5


def test_environment_id_changes_with_what_makes_figures_comparable() -> None:
    env = environment(threads=1)
    own = environment_id(env)
    assert [k for k in COMPARABLE if environment_id({**env, k: "another"}) == own] == []


def test_environment_id_ignores_the_rest_and_the_order() -> None:
    env = environment(threads=1)
    other = {**dict(reversed(env.items())), "os": "another", "ram_bytes": 1, "started_at": "now"}
    assert environment_id(env) == environment_id(other)


def git(root: Path, *arguments: str) -> None:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(root), *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "sd35bench").mkdir()
    (tmp_path / "sd35bench" / "code.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text("hello\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_commit_of_a_clean_checkout(checkout: Path) -> None:
    seen = measure._commit(checkout)
    assert isinstance(seen["commit"], str)
    assert len(seen["commit"]) == 40
    assert seen["dirty"] is False


@pytest.mark.parametrize(
    ("path", "dirty"),
    [("sd35bench/code.py", True), ("sd35bench/new.py", True), ("README.md", False)],
    ids=["edited", "new-module", "readme"],
)
def test_only_code_makes_a_checkout_dirty(checkout: Path, path: str, dirty: bool) -> None:
    (checkout / path).write_text("x = 2\n")
    assert measure._commit(checkout)["dirty"] is dirty


def test_commit_is_unknown_outside_a_checkout(tmp_path: Path) -> None:
    assert measure._commit(tmp_path) == {"commit": None, "dirty": None}


def test_commit_is_unknown_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert measure._commit(checkout) == {"commit": None, "dirty": None}
