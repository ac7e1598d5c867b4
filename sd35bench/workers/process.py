"""Worker processes and the engine that runs plans on them: one worker, or many beside each other.

A `Crew` says how many workers there are and starts one; each is driven by a lane (`lane.py`), a
thread of this process, which alone writes (docs/adr/0018). A lane takes chunks of whole blocks of
one load (`sharing.py`), keeps its worker while chunks of that load are left, then goes to the next.
"""

import contextlib
import threading
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from sd35bench.machine.contention import read_contention
from sd35bench.machine.rates import measure_once
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.trials import Observer, Price, RunSummary, open_run
from sd35bench.types import Load
from sd35bench.workers.lane import Crew, Lane, Stopped, Worker
from sd35bench.workers.limits import Limits
from sd35bench.workers.seats import Seat, seats_of
from sd35bench.workers.sharing import Work
from sd35bench.workers.worker_process import WorkerProcess

JOIN_S = 0.2
"""How often the main thread looks up while lanes work, so that Ctrl-C is heard."""


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
        """Measure the machine once, then make what is missing.

        Raises: as `run_plan`.
        """
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


def run_plans(
    plans: Sequence[tuple[Plan, Limits, Observer | None]], study: Study, crew: Crew
) -> list[RunSummary]:
    """Make what is missing of several loads' plans on one crew.

    Raises: as `run_plan`.
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
