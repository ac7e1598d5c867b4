"""Run a plan: one worker process, every trial's record on disk before the next one starts.

The parent alone writes. Order for one batch: images (content-addressed, atomic), then one
journal line per trial with fsync. A kill between the two leaves an image without a record, which
the next writer sweeps; so what is lost is at most the batch in flight. A worker that dies leaves
a `CRASHED` record for the batch it held, and a new worker goes on with the rest, until
`CRASH_LIMIT` deaths of this load.

Cost of a trial beyond generation: one message each way over a socket pair, two fsyncs.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

from sd35bench.errors import WorkerDied
from sd35bench.plan import Batch, Plan
from sd35bench.store import Shard, Study, new_shard_id
from sd35bench.types import Load, Record, Request, Session, Status, Trial
from sd35bench.worker import Answer, Job, LoadFailed, Made, Ready

__all__ = ["CRASH_LIMIT", "Progress", "RunSummary", "run_plan"]

CRASH_LIMIT = 3
Progress = Callable[[int, int, Record], None]


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """What one plan's run did.

    `wall_s` counts from the end of loading and warm-up to the last record. `measured_s` is the
    part of it spent in generation and image encoding; the rest is the harness's overhead.
    """

    planned: int
    skipped: int = 0
    done: int = 0
    failed: int = 0
    loads: int = 0
    load_s: float | None = None
    warmup_s: float | None = None
    wall_s: float = 0.0
    measured_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    @property
    def overhead_frac(self) -> float | None:
        """Share of the wall time that is neither generation nor encoding; None without trials."""
        if self.wall_s <= 0.0 or self.done == 0:
            return None
        return max(0.0, 1.0 - self.measured_s / self.wall_s)


class Worker:
    """The parent's end of a worker process."""

    def __init__(self, load: Load) -> None:
        """Start the process and wait until the backend is loaded.

        Raises: WorkerDied if it ends before that.
        """
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
                [sys.executable, "-m", "sd35bench.worker", str(handle)],
                pass_fds=[handle],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
                env=environment,
            )
        self._connection = Connection(ours.detach())
        self.first: Ready | LoadFailed = self._ask(load)

    def run(self, job: Job) -> Answer:
        """Run one batch. Raises: WorkerDied."""
        return self._ask(job)

    def close(self) -> None:
        """Ask the worker to end, and see to it."""
        try:
            self._connection.send(None)
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
        self._connection.close()

    def kill(self) -> None:
        """End the worker now."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _ask(self, message: Any) -> Any:
        try:
            self._connection.send(message)
            return self._connection.recv()
        except (EOFError, OSError) as exc:
            try:
                code = self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise WorkerDied(f"the worker process ended with {how}") from exc


def run_plan(plan: Plan, study: Study, progress: Progress | None = None) -> RunSummary:
    """Run what is missing of `plan` in `study`; safe to interrupt and to repeat.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    with study.lock(plan.load.key):
        run = _Run(plan, study, progress)
        run.everything()
    return run.summary


class _Run:
    """The state of one run: what is left, the worker that holds the load, the open shard."""

    def __init__(self, plan: Plan, study: Study, progress: Progress | None) -> None:
        self.plan, self.study, self.progress = plan, study, progress
        done = study.done_keys()
        self.todo = [b for b in plan.batches if any(t.key not in done for t in b.trials)]
        self.done = done
        planned = sum(len(b.trials) for b in plan.batches)
        missing = sum(t.key not in done for b in plan.batches for t in b.trials)
        self.summary = RunSummary(planned=planned, skipped=planned - missing)
        self.total = missing
        self.shard: Shard | None = None
        self.session_id = ""

    def everything(self) -> None:
        for digest, data in self.plan.inits.items():
            if not self.study.init_path(digest).exists():
                self.study.put_init(data)
        todo, crashes = list(self.todo), 0
        while todo and crashes < CRASH_LIMIT:
            finished = self._one_worker(todo)
            crashes += finished < len(todo)
            todo = todo[finished + 1 :] if finished < len(todo) else []
        for batch in todo:
            self._fail(batch, f"not tried: the worker died {CRASH_LIMIT} times", Status.CRASHED)

    def _one_worker(self, batches: Sequence[Batch]) -> int:
        """Run batches on one worker; returns how many were finished before it died."""
        self.session_id = new_shard_id()
        self.shard = self.study.shard(self.session_id)
        started_at = _now()
        worker: Worker | None = None
        index, phase = 0, "load"
        try:
            worker = Worker(self.plan.load)
            self.summary.loads += 1
            if isinstance(worker.first, LoadFailed):
                for batch in batches:
                    self._fail(batch, worker.first.error, worker.first.status, phase)
                return len(batches)
            phase = "warm-up"
            self._begin(worker, worker.first, batches, started_at)
            phase = "generate"
            started = time.perf_counter()
            for index, batch in enumerate(batches):  # noqa: B007 - says where a death happened
                self._one_batch(worker, batch)
                self.summary.wall_s += time.perf_counter() - started
                started = time.perf_counter()
            worker.close()
        except WorkerDied as exc:
            self._fail(batches[index], f"WorkerDied: {exc}", Status.CRASHED, phase)
            return index
        except BaseException:
            if worker is not None:
                worker.kill()
            raise
        finally:
            self.shard.close()
        return len(batches)

    def _begin(
        self, worker: Worker, ready: Ready, batches: Sequence[Batch], started_at: str
    ) -> None:
        """Warm up at the timed shapes, then write the session down."""
        assert self.shard is not None
        times = [worker.run(job).wall_s for job in self._warmups(batches)]
        self.summary.load_s = (self.summary.load_s or 0.0) + ready.load_s
        self.summary.warmup_s = (self.summary.warmup_s or 0.0) + sum(times)
        self.shard.append_session(
            Session(
                id=self.session_id,
                load=self.plan.load,
                started_at=started_at,
                environment_id=ready.environment_id,
                environment=ready.environment,
                load_s=ready.load_s,
                first_call_s=times[0],
                warmup_s=sum(times),
                in_force=ready.in_force,
            )
        )

    def _warmups(self, batches: Sequence[Batch]) -> Iterable[Job]:
        """One job per timed shape; the first batch stands in where nothing is timed."""
        timed = [b for b in batches if b.trials[0].batch_size == 1]
        shapes = {_shape(b.trials[0].request): b for b in reversed(timed)}
        for batch in list(shapes.values()) or [batches[0]]:
            yield self._job(batch)

    def _job(self, batch: Batch) -> Job:
        requests = tuple(t.request for t in batch.trials)
        inits = tuple(
            None if r.init_image is None else str(self.study.init_path(r.init_image))
            for r in requests
        )
        return Job(requests=requests, inits=inits)

    def _one_batch(self, worker: Worker, batch: Batch) -> None:
        started_at = _now()
        answer = worker.run(self._job(batch))
        if answer.timings is not None:
            self.summary.measured_s += answer.timings.latency_s
        for trial, made in zip(batch.trials, answer.made, strict=True):
            if trial.key not in self.done:
                self._keep(trial, made, answer, started_at, len(batch.trials))

    def _keep(
        self, trial: Trial, made: Made, answer: Answer, started_at: str, batch_actual: int
    ) -> None:
        ok = made.status is Status.OK
        image = self.study.put_image(made.data, made.suffix) if ok else None
        self._append(
            Record(
                trial=trial,
                status=made.status,
                session_id=self.session_id,
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
            )
        )

    def _fail(self, batch: Batch, error: str, status: Status, phase: str | None = None) -> None:
        for trial in batch.trials:
            if trial.key not in self.done:
                self._append(
                    Record(
                        trial=trial,
                        status=status,
                        session_id=self.session_id,
                        started_at=_now(),
                        phase=phase,
                        error=error,
                        batch_actual=len(batch.trials),
                    )
                )

    def _append(self, record: Record) -> None:
        assert self.shard is not None
        self.shard.append_record(record)
        if record.status is Status.OK:
            self.summary.done += 1
        else:
            self.summary.failed += 1
            text = record.error if record.error is not None else record.status.value
            self.summary.errors[text] = self.summary.errors.get(text, 0) + 1
        if self.progress is not None:
            self.progress(self.summary.done + self.summary.failed, self.total, record)


def _shape(request: Request) -> tuple[Any, ...]:
    """What decides the work of a call: two requests alike in this need one warm-up."""
    return (
        request.task,
        request.width,
        request.height,
        request.effective_steps,
        request.cfg > 1,
        request.sampler,
        request.skip_layer_guidance,
        request.max_sequence_length,
        request.output_format,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
