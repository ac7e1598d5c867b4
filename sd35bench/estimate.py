"""What a plan would cost, from what earlier trials on the same load cost; reads only.

Cost model: an image takes time in proportion to denoiser evaluations (two per step with guidance)
times pixels, plus a fixed part worth about two evaluations for text and decoding. The rate is the
median over earlier records of the same model and backend in the results folder, each batch size
on its own where it has been seen. Trials that other work disturbed teach nothing.
"""

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35bench.analysis.grouping import setting_key
from sd35bench.engine import Engine
from sd35bench.errors import StoreError
from sd35bench.evaluations import work
from sd35bench.machine.contention import read_contention
from sd35bench.plan import Plan
from sd35bench.remote.ledger import Ledger
from sd35bench.study.store import Study, study_names
from sd35bench.trials import shares
from sd35bench.types import Record, Request, Session, Status, Trial

FIXED_EVALUATIONS = 2
RECORD_BYTES = 2_000
RGB_BYTES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """Counts and costs of what is planned; `seconds` is None where nothing is known.

    Time, disk and money are of the trials that are still to do. Money is not asked for again where
    a hosted service was already asked, `created`: those are only fetched. `spent_usd` is what the
    study has cost so far.
    """

    trials: int
    done: int
    settings: int
    loads: int
    seconds: float | None
    disk_bytes: int
    usd: float
    notes: tuple[str, ...]
    created: int = 0
    spent_usd: float = 0.0

    @property
    def to_do(self) -> int:
        """Trials that would run."""
        return self.trials - self.done

    def document(self, study: str) -> dict[str, Any]:
        """What `run --dry-run --json` prints."""
        return {
            "study": study,
            "dry_run": True,
            "trials": self.trials,
            "done": self.done,
            "to_do": self.to_do,
            "settings": self.settings,
            "loads": self.loads,
            "estimated_s": self.seconds,
            "disk_bytes": self.disk_bytes,
            "usd": self.usd,
            "spent_usd": self.spent_usd,
            "created": self.created,
            "notes": list(self.notes),
        }


def estimate(plans: Sequence[tuple[Plan, Engine]], results_dir: Path, study_name: str) -> RunCost:
    """RunCost `plans`, each on its engine."""
    studies = list(_studies(results_dir))
    done_keys = {k for s in studies if s.name == study_name for k in s.done_keys()}
    ledger = Ledger(results_dir / study_name, None)
    # What a service may or may not have made is bought again where the user agreed to that.
    again = any(engine.price.resubmits for _, engine in plans)
    created = {i.trial for i in ledger.open_intents() if i.prediction is not None or not again}
    created -= done_keys
    trials = [t for plan, _ in plans for t in plan.trials]
    disk = usd = 0.0
    seconds: float | None = 0.0
    loads = 0
    for plan, engine in plans:
        missing = [t for t in plan.trials if t.key not in done_keys]
        if not missing:
            continue
        keys = {t.key for t in missing}
        started = sum(
            any(t.key in keys for batch in share for t in batch.trials)
            for share in shares(plan.batches, engine.starts)
        )
        loads += started
        seen = _Seen(plan, studies)
        spent_s = seen.seconds(missing, started)
        seconds = None if seconds is None or spent_s is None else seconds + spent_s
        disk += sum(seen.image_bytes(t.request) + RECORD_BYTES for t in missing)
        usd += engine.price.usd_per_image * len(keys - created)
    return RunCost(
        trials=len(trials),
        done=sum(t.key in done_keys for t in trials),
        settings=len({setting_key(t) for t in trials}),
        loads=loads,
        seconds=seconds,
        disk_bytes=round(disk),
        usd=usd,
        notes=tuple(dict.fromkeys(n for plan, _ in plans for n in plan.notes)),
        created=len(created & {t.key for t in trials}),
        spent_usd=ledger.spent_usd,
    )


class _Seen:
    """Earlier records of the same model and backend."""

    def __init__(self, plan: Plan, studies: Sequence[Study]) -> None:
        self._rates: dict[int, list[float]] = {}
        self._bytes: list[float] = []
        self._loads: list[float] = []
        for study in studies:
            found = read_contention(study.all_records(), study.sessions())
            for record in study.records():
                if _alike(record.trial, plan) and not found.is_disturbed(record):
                    self._learn(record)
            for session in study.sessions().values():
                if _alike(session, plan):
                    self._loads.append(session.load_s + session.warmup_s)

    def _learn(self, record: Record) -> None:
        if record.status is not Status.OK or record.timings is None:
            return
        request = record.trial.request
        per_image_s = record.timings.latency_s / record.batch_actual
        self._rates.setdefault(record.trial.batch_size, []).append(per_image_s / _work(request))
        if record.image_bytes is not None:
            self._bytes.append(record.image_bytes / (request.width * request.height))

    def seconds(self, trials: Iterable[Trial], loads: int) -> float | None:
        """Seconds for so many loads and these trials, or None if nothing alike has run."""
        if not self._rates:
            return None
        rates = {size: statistics.median(values) for size, values in self._rates.items()}
        total = loads * statistics.median(self._loads) if self._loads else 0.0
        for trial in trials:
            nearest = min(rates, key=lambda size: abs(size - trial.batch_size))
            total += rates[nearest] * _work(trial.request)
        return total

    def image_bytes(self, request: Request) -> float:
        """Bytes of an image file."""
        return self.bytes_per_pixel * request.width * request.height

    @functools.cached_property
    def bytes_per_pixel(self) -> float:
        """Median of the files seen; the raw pixels' three bytes where there are none."""
        return statistics.median(self._bytes) if self._bytes else RGB_BYTES


def _work(request: Request) -> float:
    """Denoiser evaluations, and what else an image takes, times pixels."""
    return (work(request).sequences + FIXED_EVALUATIONS) * request.width * request.height


def _alike(thing: Trial | Session, plan: Plan) -> bool:
    load = plan.load
    return (thing.load.model.name, thing.load.backend) == (load.model.name, load.backend)


def _studies(results_dir: Path) -> Iterable[Study]:
    for name in study_names(results_dir):
        try:
            yield Study.open(results_dir, name)
        except StoreError:
            continue
