"""Confirming a choice on prompts that it never saw.

A winner looks better on the prompts that it won on than it is. So the records of a study are
parted before anything is compared: the choice gets those of the other splits, and the held-out
split is looked at only afterwards, for the chosen setting and what it was held against. A held-out
image whose prompt also stands among the choice's, under whatever name or split, does not count.

*Confirmed* means that the 95 % interval of the paired difference on held-out prompts lies above
minus the profile's margin, *contradicted* that it lies below, *undecided* that it holds it. Each
choice is one claim, so nothing is corrected.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sd35bench.analysis.intervals import Interval
from sd35bench.analysis.noninferiority import images_between, prompts_needed, spread
from sd35bench.analysis.pairs import Candidate, candidates, paired_difference
from sd35bench.analysis.table import Row, Table
from sd35bench.errors import ConfigError
from sd35bench.types import Record, Task

__all__ = ["HELD_OUT", "HeldOut", "Parted", "part_rows", "prompts_to_confirm", "read_held_out"]

HELD_OUT = "heldout"
_MOST_TIMES = 2
"""A confirmation asks for at most so many times the prompts of the choice."""


@dataclass(frozen=True, slots=True)
class Parted:
    """What a choice may look at, and what only its confirmation may; `notes` say what was dropped.

    `held_out` is ``None`` where the choice has to be made on the held-out split itself, or on all
    prompts of a set, so that nothing of it is left to confirm on; `why` then says which.
    """

    choice: list[Row]
    held_out: list[Row] | None
    notes: list[str]
    why: str | None = None


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One task's candidates on held-out prompts under the choice's metric, by their setting."""

    metric: str
    by_setting: dict[str, list[Candidate]]

    def confirm(self, chosen: str, against: str, margin: float) -> dict[str, Any]:
        """Hold the chosen setting against another on held-out prompts; both by setting hash."""
        found = self.difference(chosen, against)
        if found is None:
            return {"status": "not run", "difference": None, "n_pairs": 0, "n_prompts": 0}
        more = None
        status = _status(found, margin)
        if status == "undecided":
            more = images_between(found, margin)
        return {
            "status": status,
            "difference": {"value": found.value, "ci95": found.ci95},
            "n_pairs": found.n,
            "n_prompts": found.clusters,
            "more": more,
        }

    def difference(self, one: str, other: str) -> Interval | None:
        """Paired difference, `one` minus `other`, in the environment where both have most pairs."""
        sides = [
            (a, b)
            for a in self.by_setting.get(one, ())
            for b in self.by_setting.get(other, ())
            if a.row.environment_id == b.row.environment_id
        ]
        found = [d for a, b in sides if (d := paired_difference(self.metric, a, b)) is not None]
        return max(found, key=lambda d: d.n, default=None)

    def prompts(self, setting: str) -> int:
        """On how many held-out prompts a setting was scored."""
        counts = (len({(k[0], k[5]) for k in c.quality}) for c in self.by_setting.get(setting, ()))
        return max(counts, default=0)


def part_rows(rows: Iterable[Row]) -> Parted:
    """Part rows into what a choice may look at and what only its confirmation may."""
    rows = list(rows)
    splits = {r.trial.prompt.split for row in rows for r in row.usable}
    if splits <= {HELD_OUT}:
        return Parted(rows, None, [], "the choice was made on the held-out split itself")
    seen = {_text(r) for row in rows for r in row.records if r.trial.prompt.split != HELD_OUT}
    leaked: Counter[str] = Counter()

    def held(record: Record) -> bool:
        if record.trial.prompt.split != HELD_OUT:
            return False
        if _text(record) in seen:
            leaked[record.trial.key] += 1
            return False
        return True

    for_choice = _only(rows, lambda r: r.trial.prompt.split != HELD_OUT)
    held_out = _only(rows, held)
    notes = []
    if leaked:
        notes.append(
            f"left out of the confirmation: {len(leaked)} held-out images whose prompts the choice"
            " saw too"
        )
    if "tune" not in splits:
        why = "the choice was made on all prompts of its set; choose on prompts.split=tune"
        if not held_out:
            return Parted(for_choice, None, notes, why)
    return Parted(for_choice, held_out, notes)


def read_held_out(table: Table, rows: Sequence[Row], task: Task, metric: str) -> HeldOut:
    """Score the held-out rows of one task under the metric that the choice was made by."""
    mine = [
        r for r in rows if r.setting["task"] == task.value and r.usable and not r.random_weights
    ]
    by_setting: dict[str, list[Candidate]] = {}
    if mine:
        try:
            judged, found = candidates(table, mine, task)
        except ConfigError:
            judged, found = metric, []  # nothing of it was scored
        for candidate in found if judged == metric else []:
            by_setting.setdefault(candidate.row.setting["setting"], []).append(candidate)
    return HeldOut(metric, by_setting)


def prompts_to_confirm(difference: Interval | None, margin: float, chosen_on: int) -> int:
    """Held-out prompts to ask for: enough to show two equal settings within the margin.

    At least as many as the choice had and at most twice that; from the choice's own spread,
    never from what the held-out images say, so that asking again asks for the same.
    """
    sd = None if difference is None else spread(difference)
    needed = None if sd is None else prompts_needed(sd, margin)
    if needed is None:
        return chosen_on
    return min(max(needed, chosen_on), _MOST_TIMES * chosen_on)


def _status(difference: Interval, margin: float) -> str:
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > -margin:
        return "confirmed"
    return "contradicted" if difference.high < -margin else "undecided"


def _text(record: Record) -> str:
    """A prompt as it is compared: case and spaces do not make it another."""
    return " ".join(record.trial.request.prompt.split()).casefold()


def _only(rows: Iterable[Row], keep: Callable[[Record], bool]) -> list[Row]:
    """Rows with the records that are kept; rows without any are gone."""
    found = []
    for row in rows:
        records = [r for r in row.records if keep(r)]
        if records:
            part = Row(row.setting, row.environment_id, records)
            part.timed = [r for r in row.timed if keep(r)]
            part.usable = [r for r in row.usable if keep(r)]
            found.append(part)
    return found
