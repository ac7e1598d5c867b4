"""Run a plan: every trial's record is on disk before the next one starts.

`run_trials` is the one loop that writes. It holds the load's lock, the open journal shard and the
counts (`Run`); a *maker* makes the images of what is missing and hands back each record. The maker
of this module has local worker processes; that of `sd35bench.remote` calls a hosted service.

The parent alone writes. Order for one batch: images (content-addressed, atomic), then one
journal line per trial with fsync. A kill between the two leaves an image without a record; so what
is lost is at most the batch in flight.

A worker that dies, hangs or grows too large leaves a record for the batch that it held, with the
phase it died in, and a new worker goes on with the rest. One that dies in warm-up takes everything
of the same kind with it, which would die alike; after `max_failures` deaths the rest is skipped.
Skipped trials have records that say why, and are tried by the next run like all failures.

Cost of a trial beyond generation: one message each way over a socket pair, two fsyncs.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sd35bench.errors import WorkerDied, WorkerHung, WorkerTooLarge
from sd35bench.fields import work_identity
from sd35bench.limits import Limits, work_of
from sd35bench.plan import Batch, Plan
from sd35bench.process import WorkerProcess
from sd35bench.store import Shard, Study
from sd35bench.types import Record, Session, Status, Trial
from sd35bench.worker import Answer, Failed, Job, Made

_Kind = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, `minutes` after its start; `cost_usd` is ``None`` where nobody bills."""

    done: int
    failed: int
    total: int
    minutes: float
    in_flight: int = 1
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What an engine's images cost, and what it may spend unasked.

    `is_billed`: somebody sends a bill. `confirm_above_usd` is the bill that has to be agreed to.
    `resubmits`: what may have been made before is bought again.
    """

    usd_per_image: float = 0.0
    is_billed: bool = False
    confirm_above_usd: float = math.inf
    resubmits: bool = False


Observer = Callable[[Progress], None]
"""Called whenever a run's progress changed."""


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """What one plan's run did.

    `wall_s` counts from the end of loading and warm-up to the last record. `measured_s` is the
    part of it spent in generation and image encoding; the rest is the harness's overhead.
    `errors` counts failed trials by message, `statuses` by status. Of hosted services: `cost_usd`
    was spent by this run, `ambiguous` trials may have been, and `paused` says why it ended early.
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
    statuses: dict[str, int] = field(default_factory=dict)
    cost_usd: float | None = None
    ambiguous: int = 0
    paused: str | None = None

    def count(self, record: Record) -> None:
        """Count what became of one trial."""
        if record.status is Status.OK:
            self.done += 1
            return
        self.failed += 1
        self.ambiguous += record.status is Status.AMBIGUOUS
        text = record.status.value if record.error is None else record.error
        for counts, name in ((self.errors, text), (self.statuses, record.status.value)):
            counts[name] = counts.get(name, 0) + 1

    @property
    def overhead_frac(self) -> float | None:
        """Share of the wall time that is neither generation nor encoding; None without trials."""
        if self.wall_s <= 0.0 or self.done == 0:
            return None
        return max(0.0, 1.0 - self.measured_s / self.wall_s)


def shares(batches: Sequence[Batch], starts: int) -> list[list[Batch]]:
    """Cut a plan into at most `starts` contiguous runs of whole blocks, one per worker process.

    A block is one prompt and seed under every setting, so that every start sees every setting.
    Without a start (a hosted service has none) there is no share.
    """
    blocks = [list(group) for _, group in itertools.groupby(batches, key=_cell)]
    count = min(starts, len(blocks))
    edges = [len(blocks) * i // max(count, 1) for i in range(count + 1)]
    return [
        [batch for block in blocks[low:high] for batch in block]
        for low, high in itertools.pairwise(edges)
    ]


class Run:
    """One run's missing trials, and all that it writes: the open shard and the counts."""

    def __init__(self, plan: Plan, study: Study, observer: Observer | None) -> None:
        self.plan, self.study, self._observer = plan, study, observer
        self.done = study.done_keys()
        trials = {trial.key: trial for trial in plan.trials}.values()
        self.missing = [trial for trial in trials if trial.key not in self.done]
        planned = len(plan.trials)
        self.summary = RunSummary(planned=planned, skipped=planned - len(self.missing))
        self.session_id = ""
        self._shard: Shard | None = None
        self._started = time.perf_counter()

    def new_session(self) -> None:
        """Go on in a new shard, which is named like its session."""
        self.close()
        self.session_id = self.study.new_shard_id()
        self._shard = self.study.shard(self.session_id)

    def close(self) -> None:
        """Close the shard; safe to call twice."""
        if self._shard is not None:
            self._shard.close()

    def append_session(self, session: Session) -> None:
        """Write down what made the records that follow."""
        assert self._shard is not None
        self._shard.append_session(session)

    def append(self, record: Record) -> None:
        """Write a record down and count it."""
        assert self._shard is not None
        self._shard.append_record(record)
        self.summary.count(record)

    def show(self, in_flight: int = 1, cost_usd: float | None = None) -> None:
        """Say how far the run is."""
        if self._observer is not None:
            self._observer(
                Progress(
                    done=self.summary.done,
                    failed=self.summary.failed,
                    total=len(self.missing),
                    minutes=(time.perf_counter() - self._started) / 60,
                    in_flight=in_flight,
                    cost_usd=cost_usd,
                )
            )


def run_trials(
    plan: Plan, study: Study, make: Callable[[Run], None], observer: Observer | None = None
) -> RunSummary:
    """Have `make` make what is missing of `plan` in `study`; safe to interrupt and to repeat.

    Raises: StudyLocked, DiskFull, StoreError; what `make` raises. Failures of trials are records.
    """
    with study.lock(plan.load.key):
        run = Run(plan, study, observer)
        for digest, data in plan.inits.items():
            if not study.init_path(digest).exists():
                study.put_init(data)
        with contextlib.closing(run):
            if run.missing:
                make(run)
    return run.summary


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
        from sd35bench.machine import measure_once

        measure_once(study, plan.load)
        return run_plan(plan, study, observer, self.limits)


def run_plan(
    plan: Plan, study: Study, observer: Observer | None = None, limits: Limits | None = None
) -> RunSummary:
    """Make what is missing of `plan` in worker processes of this machine.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    bounds = Limits() if limits is None else limits
    return run_trials(plan, study, lambda run: _Workers(run, bounds).make(), observer)


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
        self.warm = {}
        self.phase, self.current = "load", 0
        worker = WorkerProcess(self.run.plan.load, self.limits)
        try:
            if not self._begin(worker, start, batches):
                return batches
            self.phase = "generate"
            for self.current, batch in enumerate(batches):
                started = time.perf_counter()
                self._one_batch(worker, batch)
                self.run.summary.wall_s += time.perf_counter() - started
            worker.close()
            return []
        except WorkerDied as exc:
            return self._record_death(exc, batches)
        finally:
            worker.kill()

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
            )
        )
        return True

    def _warm_up(self, worker: WorkerProcess, batches: Sequence[Batch]) -> list[Answer]:
        """Run one batch of every kind that is timed; the first one where nothing is."""
        self.phase = "warm-up"
        kinds: dict[_Kind, int] = {}
        for index, batch in enumerate(batches):
            if batch.trials[0].batch_size in self.run.plan.timed_batch_sizes:
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

    def _job(self, batch: Batch) -> Job:
        requests = tuple(t.request for t in batch.trials)
        inits = tuple(
            None if r.init_image is None else str(self.run.study.init_path(r.init_image))
            for r in requests
        )
        return Job(
            requests=requests,
            inits=inits,
            keep_latents=self.limits.keep_latents,
            timed=batch.trials[0].batch_size in self.run.plan.timed_batch_sizes,
        )

    def _one_batch(self, worker: WorkerProcess, batch: Batch) -> None:
        started_at = _now()
        answer = worker.run(self._job(batch), self.limits.batch_deadline_s(self._expected_s(batch)))
        if answer.timings is not None:
            self.run.summary.measured_s += answer.timings.latency_s
        for trial, made in zip(batch.trials, answer.made, strict=True):
            if trial.key not in self.run.done:
                self._keep(trial, made, answer, started_at, len(batch.trials))

    def _keep(
        self, trial: Trial, made: Made, answer: Answer, started_at: str, batch_actual: int
    ) -> None:
        ok = made.status is Status.OK
        image = self.run.study.put_image(made.data, made.suffix) if ok else None
        latents = None if made.latents is None else self.run.study.put_latents(*made.latents)
        self._append(
            Record(
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
            )
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

    def _append(self, record: Record) -> None:
        self.run.append(record)
        self.run.show()


def _kind(batch: Batch) -> _Kind:
    """What decides the work of a call: two batches alike in this need one warm-up."""
    return (len(batch.trials), *work_identity(batch.trials[0].request))


def _cell(batch: Batch) -> tuple[Any, ...]:
    """What the batches of one block share."""
    first = batch.trials[0]
    return (first.batch_size, first.request.prompt, first.request.seed, first.request.init_image)


def _work(batch: Batch) -> float:
    return work_of(batch.trials[0].request, len(batch.trials))


def _status_of(exc: WorkerDied) -> Status:
    kinds = {WorkerHung: Status.TIMED_OUT, WorkerTooLarge: Status.OUT_OF_MEMORY}
    return kinds.get(type(exc), Status.CRASHED)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
