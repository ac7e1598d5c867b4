"""How plans are run on a crew of workers: a lane drives one after the other over a load's chunks.

A `Crew` says how many workers there are and starts one; each is driven by a lane, a thread of this
process, which alone writes (docs/adr/0018). A lane takes chunks of whole blocks of one load
(`sharing.py`), keeps its worker while chunks of that load are left, then goes to the next.
What a worker dies over gets a record with the phase it died in, and a new worker goes on with the
rest. One that dies in warm-up takes everything of the same kind with it, which would die alike;
after `max_failures` deaths the rest is skipped. Skipped trials have records that say why, and are
tried by the next run like all failures. Trials that other work disturbed (`machine.contention`)
are timed again at the end of each worker, up to half as many as were timed.

Cost: a trial costs one message each way, and two fsyncs; the canary's readings cost 3 to 6 ms every
0.3 s.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from sd35bench.errors import WorkerDied, WorkerHung, WorkerLost, WorkerTooLarge
from sd35bench.fields import work_identity
from sd35bench.machine.contention import (
    BUDGET,
    is_timed,
    judge,
    judge_session,
    read_contention,
    relative,
    sustained,
)
from sd35bench.machine.rates import canary_facts, keep_best
from sd35bench.plan import Batch, Plan
from sd35bench.study.store import Study
from sd35bench.trials import Observer, RunSummary, open_run
from sd35bench.types import CanaryFacts, Load, Record, Session, Status, Trial
from sd35bench.workers.limits import Limits, work_of
from sd35bench.workers.sharing import Failure, Kind, Work
from sd35bench.workers.worker import Answer, BatchJob, Failed, Made, Ready, Settled


class Worker(Protocol):
    """What a lane asks of a worker; see `WorkerProcess`."""

    def load(self) -> Ready | Failed:
        """Load the backend and wait until it is there."""
        ...

    def settle(self) -> Settled | Failed:
        """Say that the warm-up is over."""
        ...

    def run(self, job: BatchJob, deadline_s: float) -> Answer:
        """Run one batch."""
        ...

    def close(self) -> None:
        """Ask the worker to end, and see to it."""
        ...

    def stop(self) -> None:
        """End it from another thread; the one that waits for it finds it dead."""
        ...

    def kill(self) -> None:
        """End it now; safe to call twice."""
        ...


class Crew(Protocol):
    """The workers that plans are shared out to; equal crews can take plans together."""

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def measure(self, study: Study, load: Load) -> None:
        """Measure the limits of the machine that they are on, unless the study has them."""
        ...

    def hire(self, lane: int, load: Load, limits: Limits) -> Worker:
        """Start a worker for a lane. Raises: WorkerDied where none can be had."""
        ...

    def opened(self) -> contextlib.AbstractContextManager[None]:
        """Be connected for a run. Raises: ConfigError."""
        ...


LOSSES = 3
"""Workers that a lane may lose in a row before what it tried counts as having killed them."""
JOIN_S = 0.2
"""How often the main thread looks up while lanes work, so that Ctrl-C is heard."""


class Stopped(Exception):
    """Another lane, or the user, ended the run."""


class Lane:
    """One thread's part of a run: which worker it holds, and where that stands."""

    def __init__(self, number: int, crew: Crew, next_work: Callable[[int], Work | None]) -> None:
        """`next_work` says which load a lane goes to, by the lane's number."""
        self.number, self.crew, self.next_work = number, crew, next_work
        self.stopping = threading.Event()
        self.worker: Worker | None = None
        self.warm: dict[Kind, tuple[float, float]] = {}  # seconds and work of this worker's
        self.phase, self.tried = "load", Batch(())
        self.canary: CanaryFacts | None = None
        self.timings: list[Record] = []  # of this worker, in order of time
        self.losses = 0

    def make(self) -> None:
        """Go from load to load while there is something to take."""
        while (work := self.next_work(self.number)) is not None:
            self.work, self.limits = work, work.limits
            self.run = work.run.beside()
            with contextlib.closing(self.run):
                self.run.new_session()
                while (taken := work.take(self.number)) is not None:
                    self._share(*taken)
                if work.failure is not None:
                    for batch in work.drop():
                        self._fail(batch, work.failure)
            self._say(None)

    def stop(self) -> None:
        """End from another thread: the worker dies, and nothing is written any more."""
        self.stopping.set()
        worker = self.worker
        if worker is not None:
            worker.stop()

    def _share(self, start: int, chunk: list[Batch]) -> None:
        """One start's chunks, on as many workers as die over them."""
        left = self._safe(chunk)
        while left and self.work.failure is None:
            left = self._safe(self._one_worker(start, left))
        if self.work.failure is not None:
            for batch in left:
                self._fail(batch, self.work.failure)

    def _safe(self, batches: list[Batch]) -> list[Batch]:
        """Leave out what has killed a worker in warm-up, and say so."""
        unsafe = self.work.unsafe
        for batch in batches:
            died_of = unsafe.get(_kind(batch))
            if died_of is not None:
                error = f"not tried: warming up for this size and setting failed ({died_of})"
                self._fail(batch, Failure(status=Status.SKIPPED, error=error, phase="warm-up"))
        return [b for b in batches if _kind(b) not in unsafe]

    def _one_worker(self, start: int, chunk: list[Batch]) -> list[Batch]:
        """Run a chunk and those after it on one worker; what is left of the one it died over."""
        self.run.new_session()
        self.warm, self.timings, self.canary = {}, [], None
        self._enter("load", chunk[0])
        made: list[Batch] = []
        try:
            self.worker = self.crew.hire(self.number, self.run.plan.load, self.limits)
            if not self._begin(self.worker, start, chunk):
                return chunk
            while chunk:
                self._chunk(self.worker, chunk)
                made += chunk
                taken = self.work.take(self.number, start)
                chunk = [] if taken is None else self._safe(taken[1])
            self._retime(self.worker, made)
            self.worker.close()
            return []
        except WorkerDied as exc:
            self._require_going()
            return self._record_death(exc, chunk)
        finally:
            if self.worker is not None:
                self.worker.kill()
                self.worker = None
            self._conclude()

    def _chunk(self, worker: Worker, chunk: Sequence[Batch]) -> None:
        last = max((i for i, b in enumerate(chunk) if self._is_timed(b)), default=-1)
        for number, batch in enumerate(chunk):
            self._enter("generate", batch)
            self._one_batch(worker, batch, closes=number == last)

    def _enter(self, phase: str, batch: Batch) -> None:
        """Note what is tried, for the record of a death; nothing is once the run has ended."""
        self._require_going()
        if phase != self.phase or self.number not in self.run.doing:
            self._say(phase)
        self.phase, self.tried = phase, batch

    def _say(self, phase: str | None) -> None:
        """Tell the progress what this lane does, where there are several."""
        if self.crew.size > 1:
            what = "idle" if phase is None else f"{phase} {self.run.plan.load.backend.name}"
            self.run.doing[self.number] = what

    def _require_going(self) -> None:
        if self.stopping.is_set():
            raise Stopped

    def _retime(self, worker: Worker, batches: Sequence[Batch]) -> None:
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
                        self._add(retimed=len(batch.trials))

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
        found = judge_session(self.timings)
        latest = {record.trial.key: record for record in self.timings}.values()
        self._add(timed=len(latest), disturbed=sum(map(found.is_disturbed, latest)))
        speed, summary = found.speed.get(self.run.session_id), self.run.summary
        with self.run.lock:
            if speed is not None:
                summary.speed = speed if summary.speed is None else min(speed, summary.speed)
            if self.limits.contention == "error":
                summary.refuse(sum(map(found.is_refused, latest)))

    def _add(self, **amounts: float) -> None:
        with self.run.lock:
            self.run.summary.add(**amounts)

    def _record_death(self, exc: WorkerDied, chunk: list[Batch]) -> list[Batch]:
        """Record what the worker died over; returns what is still to do of the chunk."""
        victim, work = self.tried, self.work
        at = next((i for i, batch in enumerate(chunk) if batch is victim), None)
        if isinstance(exc, WorkerLost) and self.losses < LOSSES:
            self.losses += 1
            return chunk if at is None or self.phase != "generate" else chunk[at:]
        failure = Failure(
            status=_status_of(exc), error=f"{type(exc).__name__}: {exc}", phase=self.phase
        )
        if at is not None or work.drop(victim):  # else another lane has it, and will find out
            self._fail(victim, failure)
        with work.run.lock:
            work.deaths += 1
            if self.phase == "warm-up":
                work.unsafe[_kind(victim)] = failure.error
            if work.deaths >= self.limits.max_failures:
                times = "once" if work.deaths == 1 else f"{work.deaths} times"
                work.failure = Failure(
                    status=Status.SKIPPED,
                    error=f"not tried: the worker died {times} (last, in {self.phase}:"
                    f" {failure.error}); fix that or raise max_failures={self.limits.max_failures},"
                    " and run the same command again",
                )
        if self.phase == "warm-up":
            return [batch for batch in chunk if batch is not victim]
        return chunk if at is None else chunk[at + 1 :]

    def _begin(self, worker: Worker, start: int, chunk: list[Batch]) -> bool:
        """Load, warm up, settle, and write the session down; False if the backend refused."""
        started_at = _now()
        ready = worker.load()
        self._add(loads=1)
        if isinstance(ready, Failed):
            self.work.failure = Failure(status=ready.status, error=ready.error, phase="load")
            return False
        answers = self._warm_up(worker, chunk)
        self._enter("settle", chunk[0])
        settled = worker.settle()
        if isinstance(settled, Failed):
            self.work.failure = Failure(status=settled.status, error=settled.error, phase="warm-up")
            return False
        if settled.canary is not None:
            kind, best = settled.canary
            self.canary = canary_facts(kind, best, ready.environment)
        warmup_s = sum(answer.wall_s for answer in answers)
        good = [answer.wall_s for answer in answers if answer.phase is None]
        self._add(load_s=ready.load_s, warmup_s=warmup_s)
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

    def _warm_up(self, worker: Worker, chunk: list[Batch]) -> list[Answer]:
        """Run one batch of every kind that is timed, now or later; the first where nothing is."""
        kinds: dict[Kind, Batch] = {}
        for batch in (*chunk, *self.work.waiting()):
            if self._is_timed(batch) and _kind(batch) not in self.work.unsafe:
                kinds.setdefault(_kind(batch), batch)
        answers = []
        for batch in list(kinds.values()) or chunk[:1]:
            self._enter("warm-up", batch)
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

    def _job(self, batch: Batch, expected_s: float = 0.0, closes: bool = False) -> BatchJob:
        requests = tuple(t.request for t in batch.trials)
        inits = tuple(
            None if r.init_image is None else str(self.run.study.init_path(r.init_image))
            for r in requests
        )
        return BatchJob(
            requests=requests,
            inits=inits,
            keep_latents=self.limits.keep_latents,
            timed=self._is_timed(batch),
            watched=self._is_timed(batch),
            closes=closes,
            expected_s=expected_s,
        )

    def _one_batch(
        self, worker: Worker, batch: Batch, *, closes: bool, again: bool = False
    ) -> None:
        self._require_going()
        started, started_at = time.perf_counter(), _now()
        expected_s = self._expected_s(batch)
        job = self._job(batch, expected_s, closes)
        answer = worker.run(job, self.limits.batch_deadline_s(expected_s))
        if answer.timings is not None:
            self._add(measured_s=answer.timings.latency_s)
        seen = None if self.canary is None else relative(answer.surroundings, self.canary)
        answer = replace(answer, surroundings=seen)
        self.losses = 0
        for trial, made in zip(batch.trials, answer.made, strict=True):
            if trial.key not in self.run.done:
                # When the work began, not when it began to wait for its device.
                began = answer.started_at or started_at
                record = self._record(trial, made, answer, began, len(batch.trials))
                self._append(record, again)
                if is_timed(record):
                    self.timings.append(record)
        self._add(wall_s=time.perf_counter() - started)

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

    def _fail(self, batch: Batch, failure: Failure) -> None:
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


def run_plans(
    plans: Sequence[tuple[Plan, Limits, Observer | None]], study: Study, crew: Crew
) -> list[RunSummary]:
    """Make what is missing of several loads' plans on one crew; summaries in the same order.

    Raises: StudyLocked, DiskFull, StoreError. Failures of trials become records.
    """
    with contextlib.ExitStack() as stack:
        works = []
        for plan, limits, observer in plans:
            refused = _refused(study) if limits.contention == "error" else frozenset[str]()
            run = stack.enter_context(open_run(plan, study, observer, refused))
            works.append(Work(run, limits, crew.size))
        if any(work.left for work in works):
            stack.enter_context(crew.opened())
            _Lanes(works, crew).make()
    return [work.run.summary for work in works]


def _refused(study: Study) -> Set[str]:
    """Keys of the trials whose last timing was disturbed, or made on a slow machine."""
    found = read_contention(study.all_records(), study.sessions())
    return {r.trial.key for r in study.records() if found.is_refused(r)}


class _Lanes:
    """The threads of a run: each drives one worker at a time."""

    def __init__(self, works: Sequence[Work], crew: Crew) -> None:
        self.works = works
        self.lanes = [Lane(number, crew, self.next_work) for number in range(crew.size)]
        self._lock = threading.Lock()
        self._errors: list[BaseException] = []

    def make(self) -> None:
        """Run every missing batch; raises the first of what ended a lane."""
        if len(self.lanes) == 1:
            self.lanes[0].make()
            return
        threads = [
            threading.Thread(target=self._guarded, args=(lane,), name=f"lane-{i}", daemon=True)
            for i, lane in enumerate(self.lanes)
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self._errors:
                for thread in threads:
                    thread.join(JOIN_S / len(threads))
        finally:
            self._stop(threads)
        if self._errors:
            raise self._errors[0]

    def next_work(self, lane: int) -> Work | None:
        """The load that a lane goes to: one with a single lane first, then one with none."""
        with self._lock:
            open_works = [w for w in self.works if w.failure is None and w.room(lane)]
            order = {1: 0, 0: 1}
            rank = [(order.get(len(w.takers - {lane}), 2 + len(w.takers))) for w in open_works]
            if not open_works:
                return None
            work = open_works[rank.index(min(rank))]
            work.takers.add(lane)
            return work

    def _guarded(self, lane: Lane) -> None:
        try:
            lane.make()
        except Stopped:
            return
        except BaseException as exc:
            self._errors.append(exc)

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        for lane in self.lanes:
            lane.stop()
        for thread in threads:
            thread.join()


def _kind(batch: Batch) -> Kind:
    """What decides the work of a call: two batches alike in this need one warm-up."""
    return (len(batch.trials), *work_identity(batch.trials[0].request))


def _work(batch: Batch) -> float:
    return work_of(batch.trials[0].request, len(batch.trials))


def _status_of(exc: WorkerDied) -> Status:
    kinds = {WorkerHung: Status.TIMED_OUT, WorkerTooLarge: Status.OUT_OF_MEMORY}
    return kinds.get(type(exc), Status.CRASHED)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
