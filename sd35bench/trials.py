"""A run of a plan: what is missing, and the one place that adds to the journal.

`open_run` holds the load's lock and hands out a `Run`: the missing trials, the open journal shard
and the counts. An engine makes the images and gives each record to it: local worker processes
(`sd35bench.workers.process`) or a hosted service (`sd35bench.remote.drive`).

The process that called the engine alone writes. Order for one batch: images (content-addressed,
atomic), then one journal line per trial with fsync. A kill between the two leaves an image without
a record; so what is lost is at most the batch in flight. A trial that is timed again gets a second
record, which takes the first one's place.
"""

import contextlib
import copy
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from sd35bench.errors import count_error
from sd35bench.plan import Batch, Plan
from sd35bench.study.journal import Shard
from sd35bench.study.store import Study
from sd35bench.types import Record, Session, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is, `minutes` after its start; `cost_usd` is ``None`` where nobody bills.

    `doing` says what each of several workers does.
    """

    done: int
    failed: int
    total: int
    minutes: float
    in_flight: int = 1
    cost_usd: float | None = None
    doing: tuple[str, ...] = ()


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


REFUSED = "timed beside other work or on a slow machine; contention=retime or warn would keep it"

Observer = Callable[[Progress], None]
"""Called whenever a run's progress changed."""


@dataclass(slots=True, kw_only=True)
class RunSummary:
    """What one plan's run did.

    `wall_s` is the time from the end of warm-up to the last record, summed over workers;
    `measured_s` is its part in generation and image encoding, the rest is the harness's overhead.
    `errors` counts failed trials by message, `statuses` by status; `truncated` counts images whose
    prompt the encoders saw in part. `timed` counts timed trials, `disturbed` those that other work
    disturbed, `retimed` the timings that were repeated; `speed` is the slowest worker's median
    canary, relative to the machine's best. Of hosted services: `cost_usd` is what this run spent,
    `ambiguous` counts trials that may have been billed, `paused` says why it ended early.
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
    timed: int = 0
    disturbed: int = 0
    retimed: int = 0
    speed: float | None = None
    truncated: int = 0

    def add(self, **amounts: float) -> None:
        """Add to sums; one that is ``None`` so far begins at 0."""
        for name, amount in amounts.items():
            setattr(self, name, (getattr(self, name) or 0) + amount)

    def count(self, record: Record) -> None:
        """Count what became of one trial."""
        self.truncated += bool(record.truncated_tokens)
        if record.status is Status.OK:
            self.done += 1
            return
        self.failed += 1
        self.ambiguous += record.status is Status.AMBIGUOUS
        text = record.status.value if record.error is None else record.error
        count_error(self.errors, text)
        status = record.status.value
        self.statuses[status] = self.statuses.get(status, 0) + 1

    def refuse(self, count: int) -> None:
        """Count as failed what was made while the machine was not quiet."""
        if count:
            self.done -= count
            self.failed += count
            self.errors[REFUSED] = self.errors.get(REFUSED, 0) + count
            self.statuses["disturbed"] = self.statuses.get("disturbed", 0) + count


def shares(batches: Sequence[Batch], starts: int) -> list[list[Batch]]:
    """Cut a plan into at most `starts` contiguous runs of whole blocks, one per worker process.

    A block is one prompt and seed under every setting, so that every start sees every setting.
    Without a start (a hosted service has none) there is no share.
    """
    blocks = blocks_of(batches)
    count = min(starts, len(blocks))
    edges = [len(blocks) * i // max(count, 1) for i in range(count + 1)]
    return [
        [batch for block in blocks[low:high] for batch in block]
        for low, high in itertools.pairwise(edges)
    ]


def blocks_of(batches: Sequence[Batch]) -> list[list[Batch]]:
    """Cut a plan into its blocks: one prompt and seed under every setting of its load."""
    return [list(group) for _, group in itertools.groupby(batches, key=_cell)]


class Run:
    """One run's missing trials, and all that it writes: the open shard and the counts.

    Trials in `refused` have a record that does not count, and are made again. Several workers'
    threads have a shard each (`beside`) and take `lock` to count.
    """

    def __init__(
        self, plan: Plan, study: Study, observer: Observer | None, refused: Set[str] = frozenset()
    ) -> None:
        self.plan, self.study, self._observer = plan, study, observer
        self.done = study.done_keys() - refused
        trials = {trial.key: trial for trial in plan.trials}.values()
        self.missing = [trial for trial in trials if trial.key not in self.done]
        planned = len(plan.trials)
        self.summary = RunSummary(planned=planned, skipped=planned - len(self.missing))
        self.session_id = ""
        self.lock = threading.RLock()
        self.doing: dict[int, str] = {}
        self._shard: Shard | None = None
        self._started = time.perf_counter()

    def beside(self) -> "Run":
        """The same run for another thread: the same counts, a shard of its own."""
        other = copy.copy(self)
        other._shard = None
        return other

    def new_session(self) -> None:
        """Go on in a new shard, which is named like its session."""
        self.close()
        with self.lock:
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

    def append(self, record: Record, again: bool = False) -> None:
        """Write a record down and count it, unless its trial was counted before."""
        assert self._shard is not None
        self._shard.append_record(record)
        if not again:
            with self.lock:
                self.summary.count(record)

    def show(self, in_flight: int = 1, cost_usd: float | None = None) -> None:
        """Say how far the run is."""
        if self._observer is None:
            return
        with self.lock:
            self._observer(
                Progress(
                    done=self.summary.done,
                    failed=self.summary.failed,
                    total=len(self.missing),
                    minutes=(time.perf_counter() - self._started) / 60,
                    in_flight=in_flight,
                    cost_usd=cost_usd,
                    doing=tuple(self.doing[lane] for lane in sorted(self.doing)),
                )
            )


@contextlib.contextmanager
def open_run(
    plan: Plan, study: Study, observer: Observer | None = None, refused: Set[str] = frozenset()
) -> Iterator[Run]:
    """Hold a study's lock for one load, and hand out what is missing of `plan`.

    `refused`: keys of trials that are made again, though they are done. A context and not a
    callback, so that the one who makes images is called by nobody here.

    Raises: StudyLocked, DiskFull, StoreError.
    """
    with study.lock(plan.load.key):
        run = Run(plan, study, observer, refused)
        for data in plan.inits.values():
            study.put_init(data)
        with contextlib.closing(run):
            try:
                yield run
            finally:
                study.save_checked()


def _cell(batch: Batch) -> tuple[Any, ...]:
    """What the batches of one block share."""
    first = batch.trials[0]
    return (first.batch_size, first.request.prompt, first.request.seed, first.request.init_image)
