"""What a worker sees of its machine around timed trials: canary, CPU time, the system's counters.

The canary (`sd35_kernels.canary`) is a fixed loop of 3 ms on the units that the backend uses. It
runs right before and right after every trial. Trials shorter than `BLOCK_S` share a block of that
length, so that the loop takes at most 2 % of the time; a reading that is younger than `FRESH_S`
serves the next trial too, which makes it 1 %. What the readings mean is judged later, in
`sd35bench.machine.contention`.

A backend that loads no torch computes nothing worth timing here and gets no canary.
SD35BENCH_CANARY=off leaves it out everywhere, for tests that must not depend on the machine.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sd35bench.machine.measure import Counters, Usage, counters, device_of, usage
from sd35bench.types import Surroundings

BLOCK_S = 0.3
FRESH_S = 0.05
FIRST_READINGS = 8
"""Readings at the start, from which a machine that was never seen has its first best."""


class Canary(Protocol):
    """A fixed loop; see `sd35_kernels.canary`."""

    kind: str

    def read(self) -> float:
        """Run the loop once; returns 1e9 operations a second."""
        ...


def start_lookout(in_force: Mapping[str, Any], threads: int) -> "Lookout | None":
    """Watch a loaded backend's machine; ``None`` where there is no canary."""
    if "torch" not in sys.modules or os.environ.get("SD35BENCH_CANARY") == "off":
        return None
    # By name, as backends are: planning and storing must not load torch.
    kernels = importlib.import_module("sd35_kernels.canary")
    lookout = Lookout(kernels.load(threads, device_of(in_force)), threads)
    for _ in range(FIRST_READINGS):
        lookout.read()
    return lookout


@dataclass(slots=True)
class Lookout:
    """Reads the canary around trials; speeds in what it returns are in 1e9 operations a second.

    `best` is the highest reading so far.
    """

    canary: Canary
    threads: int
    clock: Callable[[], float] = time.perf_counter
    best: float = 0.0
    _opened_s: float | None = None
    _speed: float = 0.0
    _read_s: float = float("-inf")
    _before: float | None = None
    _usage: Usage = field(default_factory=usage)
    _counters: Counters = field(default_factory=counters)
    _started_s: float = 0.0

    def settle(self) -> tuple[str, float]:
        """End the warm-up's block; returns the canary's kind and the best reading so far."""
        self._opened_s = None
        return self.canary.kind, self.best

    def before(self, expected_s: float) -> None:
        """Right before a trial: a reading, unless a block of short ones is open."""
        self._before = None
        if self._opened_s is None or expected_s >= BLOCK_S:
            if self.clock() - self._read_s > FRESH_S:
                self.read()
            self._before = self._speed
            self._opened_s = self.clock()
        self._usage, self._started_s = usage(), self.clock()

    def worked(self) -> tuple[float, int]:
        """At the end of the work: the share of its cores' time, and how often it was taken off."""
        now, wall_s = usage(), self.clock() - self._started_s
        share = (now.cpu_s - self._usage.cpu_s) / (wall_s * self.threads) if wall_s > 0 else 0.0
        return share, now.switches - self._usage.switches

    def after(self, worked: tuple[float, int], closes: bool) -> Surroundings:
        """Right after a trial: close the block with a reading where it is long enough."""
        share, switches = worked
        if not closes and self._opened_s is not None and self.clock() - self._opened_s < BLOCK_S:
            return Surroundings(canary_before=self._before, cpu_share=share, switches=switches)
        self._opened_s = None
        now = counters()
        pressure, steal = now.since(self._counters)
        self._counters = now
        return Surroundings(
            canary_before=self._before,
            canary_after=self.read(),
            cpu_share=share,
            switches=switches,
            pressure=pressure,
            steal=steal,
            load_1m=now.load_1m,
        )

    def read(self) -> float:
        """Take a reading now."""
        self._speed = self.canary.read()
        self.best = max(self.best, self._speed)
        self._read_s = self.clock()
        return self._speed
