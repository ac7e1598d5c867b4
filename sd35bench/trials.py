"""Run a plan: one worker process, every trial's record on disk before the next one starts.

The parent alone writes. Order for one batch: images (content-addressed, atomic), then one
journal line per trial with fsync. A kill between the two leaves an image without a record, which
the next writer sweeps; so what is lost is at most the batch in flight.

A worker that dies, hangs or grows too large leaves a record for the batch that it held, with the
phase it died in, and a new worker goes on with the rest. One that dies in warm-up takes everything
of the same kind with it, which would die alike; after `max_failures` deaths the rest is skipped.
Skipped trials have records that say why, and are tried by the next run like all failures.

Cost of a trial beyond generation: one message each way over a socket pair, two fsyncs.
"""

import itertools
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
from sd35bench.store import Shard, Study, new_shard_id
from sd35bench.types import Record, Session, Status, Trial
from sd35bench.worker import Answer, Failed, Job, Made

__all__ = ["Progress", "RunSummary", "run_plan", "shares"]

Progress = Callable[[int, int, Record], None]
_Kind = tuple[Any, ...]


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

    @property
    def overhead_frac(self) -> float | None:
        """Share of the wall time that is neither generation nor encoding; None without trials."""
        if self.wall_s <= 0.0 or self.done == 0:
            return None
        return max(0.0, 1.0 - self.measured_s / self.wall_s)


def run_plan(
    plan: Plan, study: Study, progress: Progress | None = None, limits: Limits | None = None
) -> RunSummary:
    """Run what is missing of `plan` in `study`; safe to interrupt and to repeat.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    with study.lock(plan.load.key):
        run = _Run(plan, study, progress, Limits() if limits is None else limits)
        run.everything()
    return run.summary


def shares(batches: Sequence[Batch], starts: int) -> list[list[Batch]]:
    """Cut a plan into at most `starts` contiguous runs of whole blocks, one per worker process.

    A block is one prompt and seed under every setting, so that every start sees every setting.
    """
    blocks = [list(group) for _, group in itertools.groupby(batches, key=_cell)]
    count = min(starts, len(blocks))
    edges = [len(blocks) * i // count for i in range(count + 1)]
    return [
        [batch for block in blocks[low:high] for batch in block]
        for low, high in itertools.pairwise(edges)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What becomes of every trial that is left."""

    status: Status
    error: str
    phase: str | None = None


class _Run:
    """The state of one run: the worker that holds the load, where it stands, the open shard."""

    def __init__(self, plan: Plan, study: Study, progress: Progress | None, limits: Limits) -> None:
        self.plan, self.study, self.progress, self.limits = plan, study, progress, limits
        self.done = study.done_keys()
        planned = len(plan.trials)
        self.total = sum(trial.key not in self.done for trial in plan.trials)
        self.summary = RunSummary(planned=planned, skipped=planned - self.total)
        self.shard: Shard | None = None
        self.session_id = ""
        self.deaths = 0
        self.verdict: _Verdict | None = None
        self.unsafe: dict[_Kind, str] = {}  # what a warm-up died of
        self.warm: dict[_Kind, tuple[float, float]] = {}  # seconds and work of this worker's
        self.phase, self.current = "load", 0

    def everything(self) -> None:
        for digest, data in self.plan.inits.items():
            if not self.study.init_path(digest).exists():
                self.study.put_init(data)
        try:
            for start, share in enumerate(shares(self.plan.batches, self.limits.starts)):
                self._share(start, [b for b in share if self._missing(b)])
        finally:
            if self.shard is not None:
                self.shard.close()

    def _missing(self, batch: Batch) -> bool:
        return any(trial.key not in self.done for trial in batch.trials)

    def _share(self, start: int, batches: list[Batch]) -> None:
        """One start's batches, on as many workers as die over them."""
        left = self._safe(batches)
        while left and self.verdict is None:
            left = self._safe(self._one_worker(start, left))
        if self.verdict is not None:
            for batch in left:
                self._fail(batch, self.verdict)

    def _safe(self, batches: list[Batch]) -> list[Batch]:
        """Leave out what has killed a worker in warm-up, and say so."""
        for batch in batches:
            died_of = self.unsafe.get(_kind(batch))
            if died_of is not None:
                error = f"not tried: warming up for this size and setting failed ({died_of})"
                self._fail(batch, _Verdict(status=Status.SKIPPED, error=error, phase="warm-up"))
        return [b for b in batches if _kind(b) not in self.unsafe]

    def _one_worker(self, start: int, batches: list[Batch]) -> list[Batch]:
        """Run batches on one worker; returns what is left after its end."""
        if self.shard is not None:
            self.shard.close()
        self.session_id = new_shard_id()
        self.shard = self.study.shard(self.session_id)
        self.warm = {}
        self.phase, self.current = "load", 0
        worker = WorkerProcess(self.plan.load, self.limits)
        try:
            if not self._begin(worker, start, batches):
                return batches
            self.phase = "generate"
            for self.current, batch in enumerate(batches):
                started = time.perf_counter()
                self._one_batch(worker, batch)
                self.summary.wall_s += time.perf_counter() - started
            worker.close()
            return []
        except WorkerDied as exc:
            return self._bury(exc, batches)
        finally:
            worker.kill()

    def _bury(self, exc: WorkerDied, batches: list[Batch]) -> list[Batch]:
        """Record what the worker died over; returns what is still to do."""
        victim = batches[self.current]
        verdict = _Verdict(
            status=_status_of(exc), error=f"{type(exc).__name__}: {exc}", phase=self.phase
        )
        self._fail(victim, verdict)
        self.deaths += 1
        if self.phase == "warm-up":
            self.unsafe[_kind(victim)] = verdict.error
            del batches[self.current]
        else:
            batches = batches[self.current + 1 :]
        if self.deaths >= self.limits.max_failures:
            times = "once" if self.deaths == 1 else f"{self.deaths} times"
            self.verdict = _Verdict(
                status=Status.SKIPPED,
                error=f"not tried: the worker died {times} (last, in {self.phase}:"
                f" {verdict.error}); fix that or raise max_failures={self.limits.max_failures},"
                " and run the same command again",
            )
        return batches

    def _begin(self, worker: WorkerProcess, start: int, batches: Sequence[Batch]) -> bool:
        """Load, warm up, settle, and write the session down; False if the backend refused."""
        assert self.shard is not None
        started_at = _now()
        ready = worker.load()
        self.summary.loads += 1
        if isinstance(ready, Failed):
            self.verdict = _Verdict(status=ready.status, error=ready.error, phase="load")
            return False
        answers = self._warm_up(worker, batches)
        self.phase, self.current = "settle", 0
        settled = worker.settle()
        if isinstance(settled, Failed):
            self.verdict = _Verdict(status=settled.status, error=settled.error, phase="warm-up")
            return False
        warmup_s = sum(answer.wall_s for answer in answers)
        good = [answer.wall_s for answer in answers if answer.phase is None]
        self.summary.load_s = (self.summary.load_s or 0.0) + ready.load_s
        self.summary.warmup_s = (self.summary.warmup_s or 0.0) + warmup_s
        self.shard.append_session(
            Session(
                id=self.session_id,
                load=self.plan.load,
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
            if batch.trials[0].batch_size in self.plan.timed_batch_sizes:
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
            None if r.init_image is None else str(self.study.init_path(r.init_image))
            for r in requests
        )
        return Job(
            requests=requests,
            inits=inits,
            keep_latents=self.limits.keep_latents,
            timed=batch.trials[0].batch_size in self.plan.timed_batch_sizes,
        )

    def _one_batch(self, worker: WorkerProcess, batch: Batch) -> None:
        started_at = _now()
        answer = worker.run(self._job(batch), self.limits.batch_deadline_s(self._expected_s(batch)))
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
        latents = None if made.latents is None else self.study.put_latents(*made.latents)
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
                latents=latents,
                flops=answer.flops,
                gpu=answer.gpu,
            )
        )

    def _fail(self, batch: Batch, verdict: _Verdict) -> None:
        for trial in batch.trials:
            if trial.key not in self.done:
                self._append(
                    Record(
                        trial=trial,
                        status=verdict.status,
                        session_id=self.session_id,
                        started_at=_now(),
                        phase=verdict.phase,
                        error=verdict.error,
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
            for counts, name in (
                (self.summary.errors, text),
                (self.summary.statuses, record.status.value),
            ):
                counts[name] = counts.get(name, 0) + 1
        if self.progress is not None:
            self.progress(self.summary.done + self.summary.failed, self.total, record)


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
