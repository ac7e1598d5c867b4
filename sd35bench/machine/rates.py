"""What this machine can do at most: matmul and copy rates, measured once per study.

A latency means little without the machine's limit beside it. It measures products of the size of
SD3.5-Medium's MLP at 512 px (1024 x 1536 x 6144, 19.3 GFLOP; 8192^3 on a GPU), large enough that a
product's overhead is under 1 %, and a copy between buffers far larger than any cache (read and
written bytes count). The best of the repetitions is the limit, the median says how steady it is.

`measure_once` starts ``python -m sd35bench.machine.rates`` with as many threads as the load has and
keeps its answer in the study, so the parent stays free of torch. It takes less than 10 s.

The best speed of the canary that any run has seen on this machine is kept in the user's cache
(`keep_best`), so that a run on a busy machine can say how far below it was.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd35bench.disk import cache_folder, write_atomic
from sd35bench.errors import SD35BenchError
from sd35bench.machine.measure import RATE_FIELDS, asked_device, environment
from sd35bench.study.store import Study
from sd35bench.types import NO_WEIGHTS, CanaryFacts, Load, content_hash

CHILD_TIMEOUT_S = 180.0
RATE_SECONDS = 0.6
LEAST_REPETITIONS = 5
MOST_SECONDS = 1.5
CPU_SHAPE = (1024, 1536, 6144)
GPU_SHAPE = (8192, 8192, 8192)
CPU_COPY_BYTES = 256 * 2**20
GPU_COPY_BYTES = 2 * 2**30


def measure_once(study: Study, load: Load, cores: Sequence[int] | None = None) -> None:
    """Measure this machine's rates for `load`'s threads and device, unless the study has them.

    `cores`: those that a worker is pinned to.

    A load without weights (the fake backend) has no limit to be held against. A measurement that
    fails is kept with its error and tried again next time: it must not cost anybody a run.

    Raises: StoreError, DiskFull.
    """
    if load.model.weights_digest == NO_WEIGHTS:
        return
    here = environment(load.threads)
    where = {name: here.get(name) for name in RATE_FIELDS}
    if cores is not None:
        where["cpu_count"] = len(cores)
    device = asked_device(load, where["gpu_name"] is not None)
    key = machine_key(where, device)
    if any(line["key"] == key and line["rates"] for line in study.machine()):
        return
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    answer = _ask_child(load.threads, device, cores)
    study.append_machine({"key": key, "measured_at": started_at, "environment": where, **answer})


def machine_key(where: dict[str, Any], device: str) -> str:
    """Hash what a rate depends on: hardware, threads, torch and device, not the commit."""
    return content_hash([where, device])[:16]


def _ask_child(threads: int, device: str, cores: Sequence[int] | None) -> dict[str, Any]:
    """Run the measurement in a process of its own; its JSON, or why there is none."""
    command = [sys.executable, "-P", "-m", "sd35bench.machine.rates"]
    command += ["--threads", str(threads), "--device", device]
    if cores is not None:
        command += ["--cores", *map(str, cores)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHILD_TIMEOUT_S, env=variables
        )
        if done.returncode == 0:
            return json.loads(done.stdout)
        lines = done.stderr.strip().splitlines()
        error = lines[-1] if lines else f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        error = f"{type(exc).__name__}: {exc}"
    return {"device": device, "threads": threads, "rates": {}, "error": error}


# The canary's best --------------------------------------------------------------------------

_CANARY_FIELDS = ("machine", "cpu_model", "cpu_count", "gpu_name", "threads")


def canary_facts(kind: str, best: float, where: Mapping[str, Any]) -> CanaryFacts:
    """A session's canary: its `kind`, and the machine's best speed, at least this session's.

    `best` is in 1e9 operations/s, `where` an `environment`.
    """
    place = content_hash([kind, *(where.get(name) for name in _CANARY_FIELDS)])[:16]
    threads = int(where.get("threads") or 1)
    return CanaryFacts(kind=kind, threads=threads, best=max(best, read_best(place)), machine=place)


def read_best(place: str) -> float:
    """The best speed kept for a machine (`CanaryFacts.machine`); 0 where there is none."""
    try:
        return float(json.loads(_best_path(place).read_text())["best"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def keep_best(place: str, best: float) -> None:
    """Keep a machine's best speed if it is higher than what is kept.

    Where the cache cannot be written the study's own readings have to do.
    """
    if best > read_best(place):
        with contextlib.suppress(SD35BenchError, OSError):
            _best_path(place).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(_best_path(place), json.dumps({"best": best}).encode())


def _best_path(place: str) -> Path:
    return cache_folder("canary") / f"{place}.json"


# In the child ---------------------------------------------------------------------------------


def measure_rates(threads: int, device: str) -> dict[str, Any]:
    """Measure every rate in this process; imports torch.

    `device`: "cpu" or "cuda"; without CUDA in torch the CPU is measured, and the answer says so.
    A rate is ``{"best", "median", "n", "unit"}``; a dtype that the device does not multiply is
    left out.
    """
    import torch

    began = time.perf_counter()
    torch.set_num_threads(threads)
    used = device if device == "cuda" and torch.cuda.is_available() else "cpu"
    clock = _Clock(torch, used)
    shape = GPU_SHAPE if used == "cuda" else CPU_SHAPE
    names = ("fp32", "bf16", "fp16", "int8") if used == "cuda" else ("fp32", "bf16", "int8")
    rates: dict[str, Any] = {}
    for name in names:
        found = _product_rate(torch, clock, name, shape, used)
        if found is not None:
            rates[name] = found
    rates["copy"] = _copy_rate(torch, clock, used)
    return {
        "device": used,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rates": rates,
        "wall_s": round(time.perf_counter() - began, 2),
    }


class _Clock:
    """Seconds of single calls, on the device's own clock."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._cuda = torch, device == "cuda"

    def seconds(self, call: Callable[[], Any]) -> float:
        """One call's seconds."""
        if not self._cuda:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start, stop = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def repeat(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of each repetition, after one that does not count, for `RATE_SECONDS`.

        At least `LEAST_REPETITIONS` of them, unless they would take longer than `MOST_SECONDS`:
        bf16 on a CPU without it ran at 0.02 TFLOP/s, 12 s of 20 s for a limit nobody reaches.
        """
        self.seconds(call)
        found: list[float] = []
        while (spent := sum(found)) < RATE_SECONDS or (
            len(found) < LEAST_REPETITIONS and spent < MOST_SECONDS
        ):
            found.append(self.seconds(call))
        return found


def _product_rate(
    torch: Any, clock: _Clock, name: str, shape: tuple[int, int, int], device: str
) -> dict[str, Any] | None:
    """Rate of A [m, k] times B [k, n], by the fastest way at hand.

    B is stored by rows or by columns; in fp32 on a CPU oneDNN with a packed B is tried as well:
    `torch.mm` goes to MKL, which on AMD reaches about half of it.
    """
    m, k, n = shape
    a, b = (_operand(torch, name, rows, columns, device) for rows, columns in ((m, k), (k, n)))
    multiply = torch._int_mm if name == "int8" else torch.mm
    seconds: list[list[float]] = []
    try:
        for right in (b, b.t().contiguous().t()):
            seconds.append(clock.repeat(lambda right=right: multiply(a, right)))
        if name == "fp32" and device == "cpu" and torch.backends.mkldnn.is_available():
            seconds.append(clock.repeat(_onednn_product(torch, a, b)))
    except (RuntimeError, NotImplementedError):
        if not seconds:
            return None
    unit = "TOP/s" if name == "int8" else "TFLOP/s"
    rate = _rate(min(seconds, key=statistics.median), 2.0 * m * k * n / 1e12, unit)
    return {**rate, "shape": list(shape)}


def _onednn_product(torch: Any, a: Any, b: Any) -> Callable[[], Any]:
    """A call of oneDNN's linear layer on A and a B that it has packed once."""
    linear = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), a.shape[0])
    return lambda: linear(a, packed, None, "none", [], "")


def _operand(torch: Any, name: str, rows: int, columns: int, device: str) -> Any:
    """Random values: zeros would let the hardware save power."""
    if name == "int8":
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return torch.randn(rows, columns, device=device).to(dtype)


def _copy_rate(torch: Any, clock: _Clock, device: str) -> dict[str, Any]:
    count = GPU_COPY_BYTES if device == "cuda" else CPU_COPY_BYTES
    source = torch.ones(count // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    seconds = clock.repeat(lambda: target.copy_(source))
    return {**_rate(seconds, 2 * count / 1e9, "GB/s"), "bytes": count}


def _rate(seconds: list[float], work: float, unit: str) -> dict[str, Any]:
    return {
        "best": work / min(seconds),
        "median": work / statistics.median(seconds),
        "n": len(seconds),
        "unit": unit,
    }


def main() -> None:
    """Print the rates as one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m sd35bench.machine.rates")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cores", type=int, nargs="+")
    found = parser.parse_args()
    if found.cores:
        os.sched_setaffinity(0, found.cores)
    print(json.dumps(measure_rates(found.threads, found.device)))


if __name__ == "__main__":
    main()
