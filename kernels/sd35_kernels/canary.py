"""A canary: a fixed loop of about 3 ms whose speed says how much of the machine is ours right now.

The idea: a benchmark's clock is right only while nobody else uses the cores, and on shared hosts
the system's own counters do not tell: with load 0.9 and 0.3 % steal a loop on registers ran at 2.2
to 5.3 tera-operations from one second to the next, since a neighbour had the other half of the
core. So the loop runs on the units that the work uses: C++ on multiply-adds (and AMX tiles) with
one thread a core; half-precision products on a GPU, timed by its own events. Without a compiler a
fixed product of torch's stands in, and `kind` says so.

Cost: 3 ms a reading at 2.5 GHz; the C++ is compiled once a machine, in half a second.
"""

import ctypes
import time
from pathlib import Path
from typing import Protocol

import torch

from sd35_kernels.cpu.build import library, pick_level
from sd35_kernels.w8a8.errors import KernelUnavailable

SOURCE = Path(__file__).parent / "cpu" / "canary" / "canary.cpp"
PRODUCT, GPU_PRODUCT, GPU_REPEATS = 512, 4096, 16


class Canary(Protocol):
    """Something whose speed is read; readings compare only within one `kind` and thread count."""

    kind: str

    def read(self) -> float:
        """Run the loop once; returns 1e9 operations a second."""
        ...


def load(threads: int, device: str = "cpu") -> Canary:
    """Return the canary for a device ("cpu" or "cuda") and so many threads."""
    if device == "cuda":
        return GpuProducts()
    try:
        return Loop(threads)
    except KernelUnavailable:
        return TorchProducts(threads)


class Loop:
    """Multiply-adds on registers, in C++."""

    def __init__(self, threads: int) -> None:
        """Compile it if need be. Raises: KernelUnavailable."""
        level = pick_level()
        self._library, self._threads = library(level, SOURCE), ctypes.c_int64(threads)
        self._library.sd35_canary.restype = ctypes.c_double
        self.kind = level + ("+tiles" if self._library.sd35_canary_tiles() else "")

    def read(self) -> float:
        """Run the loop once; returns 1e9 operations a second."""
        started = time.perf_counter()
        operations = self._library.sd35_canary(self._threads)
        return operations / (time.perf_counter() - started) / 1e9


class TorchProducts:
    """Products of float32 matrices by torch, as many as threads: 2.7 ms at 100 GFLOP/s a core."""

    kind = "torch"

    def __init__(self, threads: int) -> None:
        """`threads` of torch's share each product."""
        self._repeats = threads
        self._left = torch.ones(PRODUCT, PRODUCT)

    def read(self) -> float:
        """Multiply; returns 1e9 operations a second."""
        started = time.perf_counter()
        for _ in range(self._repeats):
            torch.mm(self._left, self._left)
        return 2.0 * PRODUCT**3 * self._repeats / (time.perf_counter() - started) / 1e9


class GpuProducts:
    """Half-precision products on the GPU, 16 of 137 GFLOP: 3 ms at 700 TFLOP/s."""

    kind = "cuda"

    def __init__(self) -> None:
        """Take 64 MB of the device's memory. Raises: RuntimeError without CUDA."""
        shape = (GPU_PRODUCT, GPU_PRODUCT)
        self._left = torch.full(shape, 0.5, dtype=torch.float16, device="cuda")
        self._out = torch.empty_like(self._left)

    def read(self) -> float:
        """Multiply; returns 1e9 operations a second by the device's clock."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(GPU_REPEATS):
            torch.mm(self._left, self._left, out=self._out)
        stop.record()
        stop.synchronize()
        return 2.0 * GPU_PRODUCT**3 * GPU_REPEATS / start.elapsed_time(stop) / 1e6
