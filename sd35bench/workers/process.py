"""Worker processes of this machine: the engine that runs plans on them, and their parent's end.

Three ways in which a worker can fail to answer, told apart by type: it ended by itself
(`WorkerDied`, with the exit code or signal), it let a deadline pass (`WorkerHung`), its resident
set passed the limit (`WorkerTooLarge`). In the last two it is killed here.

Cost: waiting is two poll(2) a second (`waiting.py`); the memory watch, only there with a limit,
reads the process's size every `WATCH_S`, 10 µs each time in the parent, so it takes 0.02 % of one
core and none of the worker's.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from sd35bench import plugins
from sd35bench.errors import WorkerDied, WorkerHung, WorkerTooLarge
from sd35bench.machine.measure import BESIDE
from sd35bench.machine.rates import measure_once
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.trials import Observer, Price, RunSummary
from sd35bench.types import Load, Scalar
from sd35bench.words import digits, size_in
from sd35bench.workers.lane import Crew, Worker, run_plans
from sd35bench.workers.leases import Lease
from sd35bench.workers.limits import Limits
from sd35bench.workers.seats import Seat, occupies, resources, seats_of
from sd35bench.workers.waiting import has_answer
from sd35bench.workers.worker import Answer, BatchJob, Failed, Ready, Settle, Settled

WATCH_S = 0.05
EXIT_WAIT_S = 10.0
ANYWHERE = Seat()


@dataclass(frozen=True, slots=True)
class LocalCrew:
    """Worker processes of this machine, one a seat."""

    seats: tuple[Seat, ...] = (Seat(),)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.seats)

    def measure(self, study: Study, load: Load) -> None:
        """Measure the limits of what one worker sees."""
        measure_once(study, load, self.seats[0].cores)

    def hire(self, lane: int, load: Load, limits: Limits) -> Worker:
        """Start a process on the lane's seat."""
        return WorkerProcess(load, limits, self.seats[lane])

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Nothing to connect to."""
        return contextlib.nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalProcesses:
    """The engine of backends that run here: `workers` processes at once, or "auto"."""

    limits: Limits = field(default_factory=Limits)
    price: Price = field(default_factory=Price)
    workers: int | str = 1

    @property
    def starts(self) -> int:
        """Worker processes that share a plan."""
        return self.limits.starts

    def prepare(self, plan: Plan, *, dry: bool) -> None:
        """Refuse more workers than fit. Raises: ConfigError."""
        self.crew(plan)

    def crew(self, plan: Plan) -> LocalCrew:
        """The workers for a plan. Raises: ConfigError."""
        return LocalCrew() if self.workers == 1 else LocalCrew(seats_of(plan.load, self.workers))

    def run(self, plan: Plan, study: Study, observer: Observer | None = None) -> RunSummary:
        """Measure the machine once, then make what is missing. Raises: as `run_plan`."""
        crew = self.crew(plan)
        crew.measure(study, plan.load)
        return run_plan(plan, study, observer, self.limits, crew)


def run_plan(
    plan: Plan,
    study: Study,
    observer: Observer | None = None,
    limits: Limits | None = None,
    crew: Crew | None = None,
) -> RunSummary:
    """Make what is missing of `plan` on a crew, one worker of this machine unless one is given.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    bounds = Limits() if limits is None else limits
    workers = LocalCrew() if crew is None else crew
    return run_plans([(plan, bounds, observer)], study, workers)[0]


class WorkerProcess:
    """One worker process; every method that waits for it raises `WorkerDied` or a kind of it."""

    def __init__(self, load: Load, limits: Limits, seat: Seat = ANYWHERE) -> None:
        """Start the process, which sees its seat alone; `load` waits for it."""
        self._load, self._limits = load, limits
        self._lease = Lease(resources(load, seat))
        own = {} if seat.gpu is None else {"CUDA_VISIBLE_DEVICES": seat.gpu}
        own |= {BESIDE: str(seat.beside)} if seat.beside else {}
        dump, path = tempfile.mkstemp(prefix="sd35bench-crash-", suffix=".txt")
        self._dump = Path(path)
        with open(dump, "wb"):
            self._process, self._connection = start_child(
                "sd35bench.workers.worker", load.threads, seat.cores, own, dump
            )
        limit_bytes = limits.memory_limit_bytes
        self._watch = None if limit_bytes is None else _MemoryWatch(self._process, limit_bytes)

    @property
    def pid(self) -> int:
        """The operating system's number of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def load(self) -> Ready | Failed:
        """Load the backend and wait until it is there; nothing is timed beside it."""
        with self._lease.hold(alone=False):
            ready = self._ask(self._load, self._limits.start_deadline_s())
        if isinstance(ready, Ready) and occupies(self._load):
            names = tuple(str(ready.environment.get("occupies") or "").split(","))
            if names not in (self._lease.names, ("",)):
                self._lease.close()
                self._lease = Lease(names)
            ready = replace(ready, environment=ready.environment | self._kept())
        return ready

    def _kept(self) -> dict[str, Scalar]:
        """Whether the device is locked against timing by our other runs."""
        return {"leased": self._lease.is_honoured}

    def settle(self) -> Settled | Failed:
        """Say that the warm-up is over."""
        return self._ask(Settle(), self._limits.start_deadline_s())

    def run(self, job: BatchJob, deadline_s: float) -> Answer:
        """Run one batch, alone on its device if it is timed; the deadline begins after the wait."""
        with self._lease.hold(alone=job.timed):
            return self._ask(job, deadline_s)

    def close(self) -> None:
        """Ask the worker to end, and see to it."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._connection.send(None)
            self._process.wait(timeout=EXIT_WAIT_S)
        self.kill()

    def stop(self) -> None:
        """End the process; the thread that waits for it finds it dead."""
        self._process.kill()

    def kill(self) -> None:
        """End the worker now; safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._lease.close()
        if not self._has_dump():
            self._dump.unlink(missing_ok=True)
        if self._watch is not None:
            self._watch.stop()

    def _ask(self, message: Any, deadline_s: float) -> Any:
        try:
            self._connection.send(message)
            if has_answer(self._connection, deadline_s):
                return self._connection.recv()
        except (EOFError, OSError) as exc:
            died = self._died()
            self.kill()
            raise died from exc
        self.kill()
        raise WorkerHung(self._hung(deadline_s))

    def _hung(self, deadline_s: float) -> str:
        given = self._limits.deadline_s
        remedy = "set deadline_s" if given is None else f"raise deadline_s={given:g}"
        return (
            f"no answer in {digits(deadline_s, 4)} s, so the worker was ended; if it is slow and"
            f" not hung, {remedy} (seconds for a batch; loading and warming up get ten times that)"
        )

    def _died(self) -> WorkerDied:
        """Say how the process ended; it has closed its side or is about to."""
        try:
            code = self._process.wait(timeout=EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._watch is not None and self._watch.seen_bytes is not None:
            return WorkerTooLarge(
                f"the worker held {size_in(self._watch.seen_bytes, 'GB', 2)}, over"
                f" memory_limit_gb={self._watch.limit_bytes / 1e9:g}, so it was ended; raise the"
                " limit, or use a smaller batch, size or dtype"
            )
        if code >= 0:
            return WorkerDied(f"the worker process ended with exit code {code}; stderr says more")
        hint = " (the kernel's out-of-memory killer, perhaps)" if code == -signal.SIGKILL else ""
        where = f"; its stack is in {self._dump}" if self._has_dump() else ""
        return WorkerDied(
            f"the worker process ended with signal {-code}{_name(-code)}{hint}{where}"
        )

    def _has_dump(self) -> bool:
        """Whether a fatal signal left the worker's stack behind: that file is the user's."""
        with contextlib.suppress(OSError):
            return self._dump.stat().st_size > 0
        return False


def start_child(
    module: str,
    threads: int,
    cores: Collection[int] | None,
    own: Mapping[str, str] | None = None,
    dump: int | None = None,
) -> tuple["subprocess.Popen[bytes]", Connection]:
    """Start a module of ours as a process that dies with this one; our end of its connection.

    `own` are variables of its environment. It is told the handles of its end and of `dump`, a file
    for its stack, and the folder of plug-ins. With a dump it may print, to our stderr.
    """
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "SD35BENCH_PARENT": str(os.getpid()),
        "HF_HUB_OFFLINE": "1",
        **(own or {}),
    }
    with theirs:
        handles = [theirs.fileno()] if dump is None else [theirs.fileno(), dump]
        says = dump is not None and _has_fileno(sys.stderr)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *map(str, handles), *plugins.given()],
            pass_fds=handles,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if says else subprocess.DEVNULL,
            env=environment,
        )
    if cores is not None:
        # At once: threads that it starts later inherit it, and Python takes longer to begin.
        os.sched_setaffinity(process.pid, cores)
    return process, Connection(ours.detach())


class _MemoryWatch:
    """A thread that kills a process whose resident set passes a limit.

    It sees the worker alone, neither its children nor the GPU's memory; between two readings a
    process can grow by what it touches in `WATCH_S`.
    """

    def __init__(self, process: subprocess.Popen, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.seen_bytes: int | None = None
        self._process = process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            watched = psutil.Process(self._process.pid)
            while not self._stop.wait(WATCH_S):
                size_bytes = watched.memory_info().rss
                if size_bytes > self.limit_bytes:
                    self.seen_bytes = size_bytes
                    self._process.kill()
                    return
        except psutil.Error:  # it has ended
            return


def _name(number: int) -> str:
    try:
        return f", {signal.Signals(number).name}"
    except ValueError:
        return ""


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
