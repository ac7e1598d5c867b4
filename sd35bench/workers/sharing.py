"""One load's blocks, shared out to lanes in chunks, and what its workers died of.

A load's chunks go to two lanes at least where there are two, so that worker and load are not
confounded: one lane alone may take half. Chunks get smaller towards the end, so that lanes end
together.
"""

from dataclasses import dataclass
from typing import Any

from sd35bench.plan import Batch
from sd35bench.trials import Run, blocks_of, shares
from sd35bench.types import Status
from sd35bench.workers.limits import Limits

Kind = tuple[Any, ...]
"""What decides the work of a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What becomes of every trial that is left."""

    status: Status
    error: str
    phase: str | None = None


class Work:
    """One load's blocks that are still to do, and what its workers died of; lanes share it."""

    def __init__(self, run: Run, limits: Limits, lanes: int) -> None:
        self.run, self.limits, self.lanes = run, limits, lanes
        self.deaths = 0
        self.failure: Failure | None = None
        self.unsafe: dict[Kind, str] = {}  # what a warm-up died of
        self.takers: set[int] = set()
        self._budgets: dict[int, int] = {}  # blocks that a process start may still take
        self._queue: list[tuple[int, list[Batch]]] = []
        batches = run.plan.batches
        # One lane takes its starts' shares one after the other, as they were cut.
        parts = shares(batches, limits.starts) if lanes == 1 else blocks_of(batches)
        for start, part in enumerate(parts):
            missing = [b for b in part if any(t.key not in run.done for t in b.trials)]
            if missing:
                self._queue.append((start, missing))
        self._all = len(self._queue)

    @property
    def left(self) -> bool:
        """Whether anything is left to take."""
        return bool(self._queue)

    def room(self, lane: int) -> int:
        """How many blocks a lane may take: half of them stay for a second lane."""
        alone = self.lanes > 1 and self.takers <= {lane}
        return max(0, len(self._queue) - (self._all // 2 if alone else 0))

    def take(self, lane: int, start: int | None = None) -> tuple[int, list[Batch]] | None:
        """The next chunk for a lane, on the process start that it has or on a new one."""
        with self.run.lock:
            count = self.room(lane)
            if self.failure is not None or count == 0:
                return None
            self.takers.add(lane)
            if self.lanes == 1:
                return None if start is not None else self._queue.pop(0)
            if start is None:
                start = len(self._budgets)
                self._budgets[start] = -(-self._all // self.limits.starts)
            count = min(max(1, count // (2 * self.lanes)), self._budgets[start])
            self._budgets[start] -= count
            taken, self._queue = self._queue[:count], self._queue[count:]
            return (start, [b for _, part in taken for b in part]) if taken else None

    def waiting(self) -> list[Batch]:
        """What a worker that has begun may still be given."""
        with self.run.lock:
            parts = [] if self.lanes == 1 else self._queue
            return [batch for _, part in parts for batch in part]

    def drop(self, batch: Batch | None = None) -> list[Batch]:
        """Take a batch out of what waits, or all; returns what was there of it."""
        with self.run.lock:
            parts = [part for _, part in self._queue]
            found = [b for part in parts for b in part if batch is None or b is batch]
            for part in parts:
                part[:] = [b for b in part if batch is not None and b is not batch]
            self._queue = [(start, part) for start, part in self._queue if part]
            return found
