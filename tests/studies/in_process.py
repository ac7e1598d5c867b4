"""A worker that computes in the test's own process: no start of Python and torch for each load."""

from typing import Any

import pytest

from sd35bench.backends.base import Backend, load_backend
from sd35bench.limits import Limits
from sd35bench.types import Load
from sd35bench.workers import process
from sd35bench.workers.worker import Answer, Failed, Job, Ready, Settled, answer, settle


class HereWorker:
    """What `WorkerProcess` is to a lane, without deadlines, leases and the canary."""

    def __init__(self, load: Load, limits: Limits, *seat: Any) -> None:
        self._load = load
        self._backend: Backend | None = None

    def load(self) -> Ready | Failed:
        self._backend = load_backend(self._load)
        return Ready(
            load_s=0.1,
            in_force=self._backend.in_force,
            environment={"device": "cpu"},
            environment_id="e" * 64,
        )

    def settle(self) -> Settled | Failed:
        assert self._backend is not None
        return settle(self._backend)

    def run(self, job: Job, deadline_s: float) -> Answer:
        assert self._backend is not None
        return answer(self._backend, job)

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    stop = kill = close


def compute_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs use such workers, and leave the machine's limits unmeasured (20 s of CPU)."""
    monkeypatch.setattr(process, "WorkerProcess", HereWorker)
    monkeypatch.setattr(process, "measure_once", lambda *_: None)
