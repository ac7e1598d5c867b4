"""Faults on request: ways in which a process really fails, so that what guards runs can be tried.

Nothing here pretends. `allocate` touches the memory that it takes, in small steps, and gives up at
`ALLOCATE_BYTES` with a MemoryError, so that without a limit it cannot take the machine down.
"""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable

import numpy as np

ALLOCATE_BYTES = 2 * 2**30
STEP_BYTES = 16 * 2**20
STEP_S = 0.005
EXIT_CODE = 7

PHASES = ("load", "warm-up", "generate")


def _allocate() -> None:
    held = []
    while len(held) * STEP_BYTES < ALLOCATE_BYTES:
        held.append(np.ones(STEP_BYTES, np.uint8))
        time.sleep(STEP_S)
    raise MemoryError(f"fault=allocate holds {ALLOCATE_BYTES / 1e9:.2f} GB and met no limit")


def _memory_error() -> None:
    raise MemoryError("fault=memory-error, by design")


def _segfault() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file in the user's folder
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(EXIT_CODE)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        time.sleep(3600)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "allocate": _allocate,
    "exit": _exit,
    "hang": _hang,
    "kill": _kill,
    "memory-error": _memory_error,
    "segfault": _segfault,
}
"""What each word of the option `fault` does to the process that calls it."""
