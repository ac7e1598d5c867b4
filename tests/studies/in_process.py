"""A worker that computes in a thread of the test's own process: no start of Python and torch."""

import contextlib
import os
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35bench.types import Load
from sd35bench.workers import process, worker
from sd35bench.workers.leases import Lease
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import ANYWHERE, WorkerProcess
from sd35bench.workers.seats import Seat, resources

if TYPE_CHECKING:
    import pytest


class _Thread:
    """What a worker's process is to its parent: it serves the same protocol over a socket."""

    def __init__(self, wire: socket.socket) -> None:
        self.pid = os.getpid()
        self._wire = wire
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with (
            contextlib.suppress(EOFError, ConnectionError, BrokenPipeError),
            Connection(self._wire.detach()) as connection,
        ):
            worker._serve(connection)

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        """What is being made when the wire is closed is not waited for; it has nowhere to go."""
        self._thread.join(1.0 if timeout is None else timeout)
        return 0

    def kill(self) -> None:
        """It ends when its parent's end of the wire is closed."""


class HereWorker(WorkerProcess):
    """A `WorkerProcess` whose process is a thread; nothing can kill it."""

    def __init__(self, load: Load, limits: Limits, seat: Seat = ANYWHERE) -> None:
        self._load, self._limits = load, limits
        self._lease = Lease(resources(load, seat))
        ours, theirs = socket.socketpair()
        self._dump = Path("no dump of a thread")
        self._process: Any = _Thread(theirs)
        self._connection = Connection(ours.detach())
        self._watch = None

    def kill(self) -> None:
        """Close the wire first: that ends the thread."""
        self._connection.close()
        super().kill()


def hire(load: Load, limits: Limits, seat: Seat = ANYWHERE) -> WorkerProcess:
    """A thread for a backend without a model and without a fatal fault, else a process."""
    fault = load.backend.options.get("fault", "none")
    is_plain = load.backend.kind == "fake" and fault in ("none", "memory-error")
    kind = HereWorker if is_plain and limits.memory_limit_bytes is None else WorkerProcess
    return kind(load, limits, seat)


def fakes_here(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Have runs of the fake backend use such workers: 0.1 s of CPU a load instead of 0.7 s."""
    monkeypatch.setattr(process, "WorkerProcess", hire)


def compute_here(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Have all runs use such workers, and leave the machine's limits unmeasured (20 s of CPU)."""
    from tests.kept_models import keep_models  # it imports torch

    keep_models(monkeypatch)
    monkeypatch.setattr(process, "WorkerProcess", HereWorker)
    monkeypatch.setattr(process, "measure_once", lambda *_: None)
