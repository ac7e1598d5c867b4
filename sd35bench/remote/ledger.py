"""What was asked of a hosted service and what it may cost: on disk before it happens.

    <study>/remote/<shard>.jsonl    one JSON object a line, fsync per line, never rewritten

One `Intent` is one create that is about to be sent, once. Its lines:

    intent     trial, input, price     before the create leaves
    created    prediction id           before the first poll; or when the listing showed it
    lost       why                     sent, and no answer that names a prediction
    refused    why                     it created nothing: never left, or the service said so
    finished   phase, cost, outputs    what the service said in the end
    kept       sha256                  an image that was refused, in <study>/refused

A crash leaves an intent at one of these places, and the next run goes on from there. Every intent
that is not proven uncharged counts at its price; a cost that the service reports replaces it.
Each run writes a file of its own; spending is summed over all files of the study, under a lock
where a budget depends on it.

A `CircuitBreaker` says when to stop buying. A service that moves its outputs to another host, makes
another size, or fails and bills all the same would take a whole budget for no image. So:

- Until the service has made one usable image in this study, and after a run that ended here, it is
  on probation: one purchase at a time, and the first that cannot be used ends the run.
- Else `MOST_UNUSABLE` in a row end it, or more than `SHARE` of the budget (three images at least)
  for nothing.
- A charge above `CHARGE_FACTOR` times the listed price ends it at once; the ledger refuses what
  would pass the agreed total.

What may have been made counts as paid for: a prediction that never ends, or that nobody lists.
What is in flight is collected; nothing that was paid for is thrown away.
"""

import contextlib
import fcntl
import json
import math
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd35bench.disk import LineFile, disk_errors, open_lock, parse_json, read_regular
from sd35bench.errors import Paused, StoreError
from sd35bench.study.journal import shard_order
from sd35bench.words import digits, in_usd

ROUNDING_USD = 1e-9
"""Sums of prices are off by rounding; a budget is not passed by that."""
MOST_UNUSABLE = 3
SHARE = 0.05
CHARGE_FACTOR = 1.5
"""Before there were these, a test bought 100 of 100 unusable images, and six at 1,000 USD each."""


def ledger_folder(study: Path) -> Path:
    """Where a study keeps its ledgers."""
    return study / "remote"


@dataclass(slots=True, kw_only=True)
class Intent:
    """One create, from before it was sent to its end.

    `at` is when it was about to be sent (aware, UTC). `phase` is the service's last word, and
    `outputs` the URLs that came with it. `why` says why it was lost or refused. `kept` is the
    SHA-256 of an image that came and was not what was asked for.
    """

    id: str
    trial: str
    input: dict[str, Any]
    price_usd: float
    at: datetime
    prediction: str | None = None
    lost: bool = False
    refused: bool = False
    phase: str | None = None
    outputs: tuple[str, ...] = ()
    cost_usd: float | None = None
    why: str | None = None
    kept: str | None = None

    @property
    def charge_usd(self) -> float:
        """What it has to be counted with."""
        if self.refused:
            return 0.0
        return self.price_usd if self.cost_usd is None else self.cost_usd

    @property
    def is_over(self) -> bool:
        """Whether nothing more is expected of it."""
        return self.phase is not None

    @property
    def may_exist(self) -> bool:
        """Whether the service may know it: creating again could pay twice."""
        return not self.refused and self.phase not in ("failed", "cancelled")


class Ledger:
    """All ledgers of a study read, one of them written.

    Other processes may append to theirs meanwhile; `catch_up` reads what they added.
    """

    def __init__(self, study: Path, shard: str | None) -> None:
        """Read everything; without `shard` nothing can be written.

        Raises: StoreError for a line that is not JSON and not the last.
        """
        self.folder = ledger_folder(study)
        self._shard = shard
        self._file = LineFile(self.folder / f"{shard}.jsonl")
        self.agreed_usd = math.inf
        self._read: dict[Path, int] = {}
        self._intents: dict[str, Intent] = {}
        self._by_trial: dict[str, Intent] = {}
        self._by_prediction: dict[str, Intent] = {}
        self.catch_up()

    @property
    def spent_usd(self) -> float:
        """Sum over all intents of the study, those in flight included."""
        return math.fsum(intent.charge_usd for intent in self._intents.values())

    @property
    def own_usd(self) -> float:
        """What this writer's intents count with."""
        return math.fsum(i.charge_usd for i in self._intents.values() if self.owns(i))

    def owns(self, intent: Intent) -> bool:
        """Whether this writer made an intent."""
        return intent.id.startswith(f"{self._shard}-")

    def latest(self, trial: str) -> Intent | None:
        """The trial's last intent."""
        return self._by_trial.get(trial)

    def intents(self) -> list[Intent]:
        """Every intent, the oldest first."""
        return list(self._intents.values())

    def open_intents(self) -> list[Intent]:
        """Each trial's last intent where the service may know it: created, or lost on the way."""
        return [intent for intent in self._by_trial.values() if intent.may_exist]

    def owner(self, prediction: str) -> Intent | None:
        """The intent that has this prediction."""
        return self._by_prediction.get(prediction)

    def intend(
        self, trial: str, inputs: Mapping[str, Any], price_usd: float, limit_usd: float | None
    ) -> Intent:
        """Write down that a create is about to be sent.

        Raises: Paused where its price would pass `limit_usd` of the study or the total that was
        agreed to for this writer (`agreed_usd`); nothing is written then.
        """
        with self._locked():
            if limit_usd is not None:
                self.catch_up()
                if self.spent_usd + price_usd > limit_usd + ROUNDING_USD:
                    raise Paused(
                        f"remote.max_cost_usd={limit_usd:g}: {in_usd(self.spent_usd)} are"
                        f" spent and the next image costs {digits(price_usd, 4)}"
                    )
            if self.own_usd + price_usd > self.agreed_usd + ROUNDING_USD:
                raise Paused(
                    f"the agreed total of {in_usd(self.agreed_usd)} is used up: this run"
                    f" spent {digits(self.own_usd, 4)}, as the service charges more than the"
                    f" listed {digits(price_usd, 4)} an image; to agree, give"
                    " remote.usd_per_image=PRICE"
                )
            intent = Intent(
                id=f"{self._shard}-{len(self._intents)}",
                trial=trial,
                input=dict(inputs),
                price_usd=price_usd,
                at=datetime.now(UTC),
            )
            self._append(
                {
                    "kind": "intent",
                    "id": intent.id,
                    "trial": trial,
                    "input": intent.input,
                    "price_usd": price_usd,
                    "at": intent.at.isoformat(),
                }
            )
        return self._intents[intent.id]

    def created(self, intent: Intent, prediction: str, how: str) -> None:
        """Write down the prediction's id; `how`: "answered" or "listed"."""
        line = {"kind": "created", "id": intent.id, "prediction": prediction, "how": how}
        self._append(line)

    def lost(self, intent: Intent, why: str) -> None:
        """Write down that the create was sent and its answer names no prediction."""
        self._append({"kind": "lost", "id": intent.id, "why": why})

    def refused(self, intent: Intent, why: str) -> None:
        """Write down that the create made nothing and is not billed."""
        self._append({"kind": "refused", "id": intent.id, "why": why})

    def finished(
        self, intent: Intent, phase: str, cost_usd: float | None, outputs: tuple[str, ...]
    ) -> None:
        """Write down how it ended and what the service says it cost."""
        line = {"kind": "finished", "id": intent.id, "phase": phase}
        self._append({**line, "cost_usd": _sum(cost_usd), "outputs": list(outputs)})

    def kept(self, intent: Intent, sha256: str) -> None:
        """Write down that its image was kept among the refused ones."""
        self._append({"kind": "kept", "id": intent.id, "sha256": sha256})

    def catch_up(self) -> None:
        """Read what has been added to any ledger since the last time."""
        for path in sorted(self.folder.glob("*.jsonl"), key=shard_order):
            self._read_on(path)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        """Have a line on disk, then in memory."""
        if self._shard is None:
            raise ValueError("this ledger was opened to be read")
        data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        path = self._file.path
        self._file.append(data)
        self._read[path] = self._read.get(path, 0) + len(data)
        self._apply(line)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time looks at the sum and adds to it."""
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)  # without its study there is nothing to pay for
        with open_lock(self.folder / ".lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _read_on(self, path: Path) -> None:
        start = self._read.get(path, 0)
        data = read_regular(path, follow=True)[0][start:]
        whole, _, torn = data.rpartition(b"\n")
        for line in whole.split(b"\n") if whole else ():
            try:
                self._apply(parse_json(line))
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise StoreError(
                    f"{path}: a line cannot be read; restore the file: it says what was paid for"
                ) from exc
        self._read[path] = start + len(data) - len(torn)
        # A last line may be whole but for its end; applying one twice changes nothing.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            self._apply(parse_json(torn))

    def _apply(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "intent":
            intent = Intent(
                id=line["id"],
                trial=line["trial"],
                input=dict(line["input"]),
                price_usd=_charge(line["price_usd"]),
                at=datetime.fromisoformat(line["at"]),
            )
            if intent.id not in self._intents:
                self._intents[intent.id] = self._by_trial[intent.trial] = intent
            return
        intent = self._intents[line["id"]]
        if kind == "created":
            intent.prediction = str(line["prediction"])
            self._by_prediction.setdefault(intent.prediction, intent)
        elif kind == "finished":
            cost_usd = line["cost_usd"]
            intent.cost_usd = None if cost_usd is None else _charge(cost_usd)
            intent.phase, intent.outputs = str(line["phase"]), tuple(map(str, line["outputs"]))
        elif kind == "kept":
            intent.kept = str(line["sha256"])
        elif kind in ("lost", "refused"):
            setattr(intent, kind, True)
            intent.why = line["why"]


def _charge(value: object) -> float:
    """A price that is no number would pass every budget. Raises: ValueError."""
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no price")
    return float(value)


def _sum(cost_usd: float | None) -> float | None:
    """A cost that can be added up, or nothing."""
    return cost_usd if cost_usd is not None and math.isfinite(cost_usd) and cost_usd >= 0 else None


class CircuitBreaker:
    """The purchases of one run that gave nothing, and whether the service is on probation."""

    def __init__(self, ledger: Ledger, done: Container[str], price_usd: float, budget_usd: float):
        """`done`: keys of the study's trials that have an image; `budget_usd`: of this run."""
        self._price_usd, self._budget_usd = price_usd, budget_usd
        usable = [intent.trial in done for intent in ledger.intents() if intent.charge_usd > 0]
        self.probation = not any(usable[-MOST_UNUSABLE:])
        self._row, self._wasted_usd = 0, 0.0

    def count(self, intent: Intent, usable: bool, why: str) -> Paused | None:
        """Count a purchase of this run; says why no more should be bought."""
        if intent.charge_usd > CHARGE_FACTOR * self._price_usd:
            return Paused(
                f"the service charged {in_usd(intent.charge_usd)} for an image that is listed"
                f" at {self._price_usd:g}; to agree, give"
                f" remote.usd_per_image={digits(intent.charge_usd, 4)}"
            )
        if usable:
            self.probation, self._row = False, 0
            return None
        if intent.charge_usd == 0:
            return None
        self._row += 1
        self._wasted_usd += intent.charge_usd
        limit_usd = max(MOST_UNUSABLE * self._price_usd, SHARE * self._budget_usd)
        most = 1 if self.probation else MOST_UNUSABLE
        if self._row < most and self._wasted_usd <= limit_usd:
            return None
        return Paused(
            f"{in_usd(self._wasted_usd)} were paid for what cannot be used, {self._row} in a"
            f" row, so nothing more is bought; the last: {why}"
        )
