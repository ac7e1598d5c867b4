"""Local worker processes: the parent's end, and the engine that runs a plan on them.

Three ways in which a worker can fail to answer, told apart by type: it ended by itself
(`WorkerDied`, with the exit code or signal), it let a deadline pass (`WorkerHung`), its resident
set passed the limit (`WorkerTooLarge`). In the last two it is killed here.

Cost: waiting is one poll(2) per message; the memory watch, only there with a limit, reads the
process's size every `WATCH_S`, 10 µs each time in the parent, so it takes 0.02 % of one core
and none of the worker's. A trial costs one message each way over a socket pair, and two fsyncs; the
canary's readings cost 3 to 6 ms every 0.3 s.

What a worker dies over gets a record with the phase it died in, and a new worker goes on with the
rest. One that dies in warm-up takes everything of the same kind with it, which would die alike;
after `max_failures` deaths the rest is skipped. Skipped trials have records that say why, and are
tried by the next run like all failures. Trials that other work disturbed (`sd35bench.contention`)
are timed again at the end of each worker, up to half as many as were timed.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

import psutil

from sd35bench.contention import (
    BUDGET,
    is_timed,
    judge,
    judge_session,
    read_contention,
    relative,
    sustained,
)
from sd35bench.errors import WorkerDied, WorkerHung, WorkerTooLarge
from sd35bench.fields import work_identity
from sd35bench.limits import Limits, work_of
from sd35bench.machine import canary_facts, keep_best, measure_once
from sd35bench.plan import Batch, Plan
from sd35bench.store import Study
from sd35bench.trials import Observer, Price, Run, RunSummary, open_run, shares
from sd35bench.types import CanaryFacts, Load, Record, Session, Status, Trial
from sd35bench.worker import Answer, Failed, Job, Made, Ready, Settle, Settled

_Kind = tuple[Any, ...]

WATCH_S = 0.05
EXIT_WAIT_S = 10.0


class WorkerProcess:
    """One worker process; every method that waits for it raises `WorkerDied` or a kind of it."""

    def __init__(self, load: Load, limits: Limits) -> None:
        """Start the process; `load` waits for it."""
        self._load, self._limits = load, limits
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(load.threads),
            "MKL_NUM_THREADS": str(load.threads),
            "SD35BENCH_PARENT": str(os.getpid()),
            "HF_HUB_OFFLINE": "1",
        }
        with theirs:
            handle = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sd35bench.worker", str(handle)],
                pass_fds=[handle],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                env=environment,
            )
        self._connection = Connection(ours.detach())
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
        """Load the backend and wait until it is there."""
        return self._ask(self._load, self._limits.start_deadline_s())

    def settle(self) -> Settled | Failed:
        """Say that the warm-up is over."""
        return self._ask(Settle(), self._limits.start_deadline_s())

    def run(self, job: Job, deadline_s: float) -> Answer:
        """Run one batch."""
        return self._ask(job, deadline_s)

    def close(self) -> None:
        """Ask the worker to end, and see to it."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._connection.send(None)
            self._process.wait(timeout=EXIT_WAIT_S)
        self.kill()

    def kill(self) -> None:
        """End the worker now; safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        if self._watch is not None:
            self._watch.stop()

    def _ask(self, message: Any, deadline_s: float) -> Any:
        try:
            self._connection.send(message)
            if self._connection.poll(deadline_s):
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
            f"no answer in {deadline_s:.4g} s, so the worker was ended; if it is slow and not hung,"
            f" {remedy} (seconds for a batch; loading and warming up get ten times that)"
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
                f"the worker held {self._watch.seen_bytes / 1e9:.2f} GB, over"
                f" memory_limit_gb={self._watch.limit_bytes / 1e9:g}, so it was ended; raise the"
                " limit, or use a smaller batch, size or dtype"
            )
        if code >= 0:
            return WorkerDied(f"the worker process ended with exit code {code}; stderr says more")
        hint = " (the kernel's out-of-memory killer, perhaps)" if code == -signal.SIGKILL else ""
        return WorkerDied(f"the worker process ended with signal {-code}{_name(-code)}{hint}")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalProcesses:
    """The engine of backends that run here: worker processes, one after the other."""

    limits: Limits = field(default_factory=Limits)
    price: Price = field(default_factory=Price)

    @property
    def starts(self) -> int:
        """Worker processes that share a plan."""
        return self.limits.starts

    def prepare(self, plan: Plan, *, dry: bool) -> None:
        """Nothing to refuse: a backend refuses when it is loaded."""

    def run(self, plan: Plan, study: Study, observer: Observer | None = None) -> RunSummary:
        """Measure the machine once, then make what is missing.

        Raises: as `run_plan`.
        """
        measure_once(study, plan.load)
        return run_plan(plan, study, observer, self.limits)


def run_plan(
    plan: Plan, study: Study, observer: Observer | None = None, limits: Limits | None = None
) -> RunSummary:
    """Make what is missing of `plan` in worker processes of this machine.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    bounds = Limits() if limits is None else limits
    refused = _refused(study) if bounds.contention == "error" else frozenset[str]()
    with open_run(plan, study, observer, refused) as run:
        _Workers(run, bounds).make()
    return run.summary


def _refused(study: Study) -> Set[str]:
    """Keys of the trials whose last timing was disturbed, or made on a slow machine."""
    found = read_contention(study.all_records(), study.sessions())
    return {r.trial.key for r in study.records() if found.is_refused(r)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """What becomes of every trial that is left."""

    status: Status
    error: str
    phase: str | None = None


class _Workers:
    """Makes a run's images on worker processes: which one holds the load, and where it stands."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.run, self.limits = run, limits
        self.deaths = 0
        self.failure: _Failure | None = None
        self.unsafe: dict[_Kind, str] = {}  # what a warm-up died of
        self.warm: dict[_Kind, tuple[float, float]] = {}  # seconds and work of this worker's
        self.phase, self.current = "load", 0
        self.canary: CanaryFacts | None = None
        self.timings: list[Record] = []  # of this worker, in order of time

    def make(self) -> None:
        """Run every missing batch, share by share."""
        plan_shares = shares(self.run.plan.batches, self.limits.starts)
        for start, share in enumerate(plan_shares):
            self._share(start, [batch for batch in share if self._missing(batch)])

    def _missing(self, batch: Batch) -> bool:
        return any(trial.key not in self.run.done for trial in batch.trials)

    def _share(self, start: int, batches: list[Batch]) -> None:
        """One start's batches, on as many workers as die over them."""
        left = self._safe(batches)
        while left and self.failure is None:
            left = self._safe(self._one_worker(start, left))
        if self.failure is not None:
            for batch in left:
                self._fail(batch, self.failure)

    def _safe(self, batches: list[Batch]) -> list[Batch]:
        """Leave out what has killed a worker in warm-up, and say so."""
        for batch in batches:
            died_of = self.unsafe.get(_kind(batch))
            if died_of is not None:
                error = f"not tried: warming up for this size and setting failed ({died_of})"
                self._fail(batch, _Failure(status=Status.SKIPPED, error=error, phase="warm-up"))
        return [b for b in batches if _kind(b) not in self.unsafe]

    def _one_worker(self, start: int, batches: list[Batch]) -> list[Batch]:
        """Run batches on one worker; returns what is left after its end."""
        self.run.new_session()
        self.warm, self.timings, self.canary = {}, [], None
        self.phase, self.current = "load", 0
        worker = WorkerProcess(self.run.plan.load, self.limits)
        try:
            if not self._begin(worker, start, batches):
                return batches
            self.phase = "generate"
            last = max((i for i, b in enumerate(batches) if self._is_timed(b)), default=-1)
            for self.current, batch in enumerate(batches):
                self._one_batch(worker, batch, closes=self.current == last)
            self._retime(worker, batches)
            worker.close()
            return []
        except WorkerDied as exc:
            return self._record_death(exc, batches)
        finally:
            worker.kill()
            self._conclude()

    def _retime(self, worker: WorkerProcess, batches: Sequence[Batch]) -> None:
        """Time again what other work disturbed, up to `BUDGET` of what was timed.

        A worker that dies over it has lost nothing: every trial has its record.
        """
        left = int(BUDGET * len(self.timings)) if self.limits.contention == "retime" else 0
        with contextlib.suppress(WorkerDied):
            while again := [b for b in self._disturbed(batches) if len(b.trials) <= left]:
                for number, batch in enumerate(again, 1):
                    if len(batch.trials) <= left:
                        left -= len(batch.trials)
                        closes = number == len(again) or left == 0
                        self._one_batch(worker, batch, closes=closes, again=True)
                        self.run.summary.retimed += len(batch.trials)

    def _disturbed(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches whose latest timing was disturbed."""
        judged = zip(self.timings, judge(self.timings), strict=True)
        latest = {record.trial.key: bad for record, bad in judged}
        return [b for b in batches if any(latest.get(trial.key) for trial in b.trials)]

    def _conclude(self) -> None:
        """Count how quiet the machine was, and keep the best speed that it has shown."""
        if self.canary is None or not self.timings:
            return
        keep_best(self.canary.machine, self.canary.best * max(1.0, sustained(self.timings)))
        found = judge_session(self.timings, self.canary)
        latest = {record.trial.key: record for record in self.timings}.values()
        summary = self.run.summary
        summary.timed += len(latest)
        summary.disturbed += sum(map(found.is_disturbed, latest))
        speed = found.speed.get(self.run.session_id)
        if speed is not None:
            summary.speed = speed if summary.speed is None else min(speed, summary.speed)
        if self.limits.contention == "error":
            self.run.summary.refuse(sum(map(found.is_refused, latest)))

    def _record_death(self, exc: WorkerDied, batches: list[Batch]) -> list[Batch]:
        """Record what the worker died over; returns what is still to do."""
        victim = batches[self.current]
        failure = _Failure(
            status=_status_of(exc), error=f"{type(exc).__name__}: {exc}", phase=self.phase
        )
        self._fail(victim, failure)
        self.deaths += 1
        if self.phase == "warm-up":
            self.unsafe[_kind(victim)] = failure.error
            del batches[self.current]
        else:
            batches = batches[self.current + 1 :]
        if self.deaths >= self.limits.max_failures:
            times = "once" if self.deaths == 1 else f"{self.deaths} times"
            self.failure = _Failure(
                status=Status.SKIPPED,
                error=f"not tried: the worker died {times} (last, in {self.phase}:"
                f" {failure.error}); fix that or raise max_failures={self.limits.max_failures},"
                " and run the same command again",
            )
        return batches

    def _begin(self, worker: WorkerProcess, start: int, batches: Sequence[Batch]) -> bool:
        """Load, warm up, settle, and write the session down; False if the backend refused."""
        started_at = _now()
        ready = worker.load()
        self.run.summary.loads += 1
        if isinstance(ready, Failed):
            self.failure = _Failure(status=ready.status, error=ready.error, phase="load")
            return False
        answers = self._warm_up(worker, batches)
        self.phase, self.current = "settle", 0
        settled = worker.settle()
        if isinstance(settled, Failed):
            self.failure = _Failure(status=settled.status, error=settled.error, phase="warm-up")
            return False
        if settled.canary is not None:
            kind, best = settled.canary
            self.canary = canary_facts(kind, best, ready.environment)
        warmup_s = sum(answer.wall_s for answer in answers)
        good = [answer.wall_s for answer in answers if answer.phase is None]
        self.run.summary.load_s = (self.run.summary.load_s or 0.0) + ready.load_s
        self.run.summary.warmup_s = (self.run.summary.warmup_s or 0.0) + warmup_s
        self.run.append_session(
            Session(
                id=self.run.session_id,
                load=self.run.plan.load,
                started_at=started_at,
                environment_id=ready.environment_id,
                environment=ready.environment,
                load_s=ready.load_s,
                first_call_s=good[0] if good else answers[0].wall_s,
                warmup_s=warmup_s,
                in_force=settled.in_force,
                start=start,
                canary=self.canary,
            )
        )
        return True

    def _warm_up(self, worker: WorkerProcess, batches: Sequence[Batch]) -> list[Answer]:
        """Run one batch of every kind that is timed; the first one where nothing is."""
        self.phase = "warm-up"
        kinds: dict[_Kind, int] = {}
        for index, batch in enumerate(batches):
            if self._is_timed(batch):
                kinds.setdefault(_kind(batch), index)
        answers = []
        for self.current in list(kinds.values()) or [0]:
            batch = batches[self.current]
            deadline_s = self.limits.start_deadline_s(_work(batch))
            answers.append(worker.run(self._job(batch), deadline_s))
            self.warm[_kind(batch)] = answers[-1].wall_s, _work(batch)
        return answers

    def _expected_s(self, batch: Batch) -> float:
        """Its warm-up's seconds; for what had none, those of the slowest, in proportion."""
        if _kind(batch) in self.warm:
            return self.warm[_kind(batch)][0]
        return max(seconds / work for seconds, work in self.warm.values()) * _work(batch)

    def _is_timed(self, batch: Batch) -> bool:
        return batch.trials[0].batch_size in self.run.plan.timed_batch_sizes

    def _job(self, batch: Batch, expected_s: float = 0.0, closes: bool = False) -> Job:
        requests = tuple(t.request for t in batch.trials)
        inits = tuple(
            None if r.init_image is None else str(self.run.study.init_path(r.init_image))
            for r in requests
        )
        return Job(
            requests=requests,
            inits=inits,
            keep_latents=self.limits.keep_latents,
            timed=self._is_timed(batch),
            watched=self._is_timed(batch),
            closes=closes,
            expected_s=expected_s,
        )

    def _one_batch(
        self, worker: WorkerProcess, batch: Batch, *, closes: bool, again: bool = False
    ) -> None:
        started, started_at = time.perf_counter(), _now()
        expected_s = self._expected_s(batch)
        job = self._job(batch, expected_s, closes)
        answer = worker.run(job, self.limits.batch_deadline_s(expected_s))
        if answer.timings is not None:
            self.run.summary.measured_s += answer.timings.latency_s
        seen = None if self.canary is None else relative(answer.surroundings, self.canary)
        answer = replace(answer, surroundings=seen)
        for trial, made in zip(batch.trials, answer.made, strict=True):
            if trial.key not in self.run.done:
                record = self._record(trial, made, answer, started_at, len(batch.trials))
                self._append(record, again)
                if is_timed(record):
                    self.timings.append(record)
        self.run.summary.wall_s += time.perf_counter() - started

    def _record(
        self, trial: Trial, made: Made, answer: Answer, started_at: str, batch_actual: int
    ) -> Record:
        """What one image left behind; its files are on disk when this returns."""
        ok = made.status is Status.OK
        image = self.run.study.put_image(made.data, made.suffix) if ok else None
        latents = None if made.latents is None else self.run.study.put_latents(*made.latents)
        return Record(
            trial=trial,
            status=made.status,
            session_id=self.run.session_id,
            started_at=started_at,
            phase=None if ok else answer.phase,
            error=made.error,
            timings=answer.timings if ok else None,
            memory=answer.memory,
            image=image,
            image_bytes=len(made.data) if ok else None,
            effective_steps=answer.effective_steps,
            evaluations=answer.evaluations,
            truncated_tokens=made.truncated_tokens,
            batch_actual=batch_actual,
            latents=latents,
            flops=answer.flops,
            gpu=answer.gpu,
            surroundings=answer.surroundings,
        )

    def _fail(self, batch: Batch, failure: _Failure) -> None:
        for trial in batch.trials:
            if trial.key not in self.run.done:
                self._append(
                    Record(
                        trial=trial,
                        status=failure.status,
                        session_id=self.run.session_id,
                        started_at=_now(),
                        phase=failure.phase,
                        error=failure.error,
                        batch_actual=len(batch.trials),
                    )
                )

    def _append(self, record: Record, again: bool = False) -> None:
        self.run.append(record, again)
        self.run.show()


def _kind(batch: Batch) -> _Kind:
    """What decides the work of a call: two batches alike in this need one warm-up."""
    return (len(batch.trials), *work_identity(batch.trials[0].request))


def _work(batch: Batch) -> float:
    return work_of(batch.trials[0].request, len(batch.trials))


def _status_of(exc: WorkerDied) -> Status:
    kinds = {WorkerHung: Status.TIMED_OUT, WorkerTooLarge: Status.OUT_OF_MEMORY}
    return kinds.get(type(exc), Status.CRASHED)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
