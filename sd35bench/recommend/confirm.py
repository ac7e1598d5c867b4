"""Confirming a choice on prompts that it never saw.

A winner looks better on the prompts that it won on than it is. So the records of a study are
parted before anything is compared: the choice gets those of the other splits, and the held-out
split is looked at only afterwards, for the chosen setting and what it was held against. A held-out
image whose prompt also stands among the choice's, under whatever name or split, does not count;
nor does one made under a negative prompt that the choice's prompts did not have.

*Confirmed* means that the 95 % interval of the paired difference on held-out prompts lies above
minus the profile's margin, *contradicted* that it lies below, *undecided* that it holds it. Each
choice is one claim, so nothing is corrected. How many prompts it takes is planned from the choice's
own spread, and nothing is said until they have all been run: an earlier look would be optional
stopping.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.grouping import HELD_OUT, pair_prompt, shared_negatives
from sd35bench.analysis.pairs import Candidate, candidates, paired_difference
from sd35bench.analysis.table import Row, Table, keep_records
from sd35bench.errors import ConfigError
from sd35bench.prompts import FEWEST_TO_SPLIT, PromptSpec, load_prompts, same_prompt
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import images_between, prompts_needed, spread
from sd35bench.study.columns import (
    Some,
    among,
    distinct,
    distinct_refs,
    is_ref,
    is_text,
    join,
    pick,
    prompts,
    texts,
)
from sd35bench.types import PromptRef, Status, Task

MOST_TIMES = 2
"""A confirmation asks for at most so many times the prompts of the choice."""
_SET_SIZES = {"nano": 400, "starter.txt": 15}
"""Held-out prompts that a set has (`nano.prompts.MAX_ITEMS`; those in configs/prompts)."""


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
    """One task's candidates on held-out prompts under the choice's metric, by their setting.

    `run` says on how many held-out prompts each setting was run, whatever came of it.
    """

    metric: str
    by_setting: dict[str, list[Candidate]]
    run: Mapping[str, int]

    def prompts_of(self, one: str, other: str) -> int:
        """On how many held-out prompts both settings were run at least; both by setting hash."""
        return min(self.run.get(one, 0), self.run.get(other, 0))

    def confirm(self, chosen: str, against: str, margin: float, wanted: int) -> dict[str, Any]:
        """Hold the chosen setting against another on `wanted` held-out prompts; both by hash."""
        found = self.difference(chosen, against)
        nothing = {"difference": None, "n_pairs": 0, "n_prompts": 0, "wanted": wanted, "more": None}
        if found is None:
            return {"status": "not run", **nothing}
        run = self.prompts_of(chosen, against)
        if run < wanted:
            return {"status": "not run enough", **nothing, "n_prompts": run}
        more = None
        status = _status(found, margin)
        if status == "undecided":
            more = images_between(found, margin)
        return {
            "status": status,
            "difference": {"value": found.value, "ci95": found.ci95},
            "n_pairs": found.n,
            "n_prompts": found.clusters,
            "wanted": wanted,
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
        sides = self.by_setting.get(setting, ())
        return max((len({pair_prompt(key) for key in c.quality}) for c in sides), default=0)


def part_rows(rows: Iterable[Row]) -> Parted:
    """Part rows into what a choice may look at and what only its confirmation may."""
    rows = list(rows)
    splits = {split for row in rows for (split,) in distinct_refs(row.usable, "split")}
    if splits <= {HELD_OUT}:
        return Parted(rows, None, [], "the choice was made on the held-out split itself")
    shown = [_split_off(row.records) for row in rows]
    seen = {same_prompt(text) for text in distinct(join(shown), "prompt")}
    are_there = any(is_ref(row.records, "split", HELD_OUT).any() for row in rows)
    negatives = _negatives(rows) if are_there else {}
    leaked: set[str] = set()
    strange: set[str] = set()

    def are_held(records: Some) -> NDArray[np.bool_]:
        """Those of one row that count."""
        found = is_ref(records, "split", HELD_OUT)
        held = pick(records, found)
        if not held:
            return found
        known = {text for text in distinct(held, "prompt") if same_prompt(text) in seen}
        shared = among(held, "prompt", known)
        leaked.update(texts(pick(held, shared), "key"))
        request = held[0].trial.request
        asked = negatives[request.task]
        if asked and request.cfg > 1:
            others = ~shared & ~among(held, "negative_prompt", asked)
            strange.update(texts(pick(held, others), "key"))
            shared |= others
        found[found] = ~shared
        return found

    for_choice = keep_records(rows, lambda x: ~is_ref(x, "split", HELD_OUT))
    held_out = keep_records(rows, are_held)
    notes = []
    if leaked:
        notes.append(
            f"left out of the confirmation: {len(leaked)} held-out images whose prompts the choice"
            " saw too"
        )
    if strange:
        notes.append(
            f"left out of the confirmation: {len(strange)} held-out images under another negative"
            " prompt than the choice's"
        )
    if "tune" not in splits:
        why = f"the choice was made on all prompts of its set; {_remedy(rows)}"
        if not held_out:
            return Parted(for_choice, None, notes, why)
    return Parted(for_choice, held_out, notes)


def _remedy(rows: Iterable[Row]) -> str:
    """What makes a choice that can be confirmed."""
    usable = join([row.usable for row in rows])
    sets = {name for (name,) in distinct_refs(usable, "set")}
    few = len({same_prompt(text) for text in distinct(usable, "prompt")}) < FEWEST_TO_SPLIT
    if (few and not sets & _SET_SIZES.keys()) or "given" in sets:
        return f"half of {FEWEST_TO_SPLIT} or more in a file (prompts.path=FILE) is held out"
    return "choose on prompts.split=tune"


def _split_off(records: Some) -> Some:
    return pick(records, ~is_ref(records, "split", HELD_OUT))


def read_held_out(table: Table, rows: Sequence[Row], task: Task, metric: str) -> HeldOut:
    """Score the held-out rows of one task under the metric that the choice was made by."""
    mine = [
        r for r in rows if r.setting["task"] == task.value and r.usable and not r.random_weights
    ]
    by_setting: dict[str, list[Candidate]] = {}
    run = prompts_run(rows, task)
    if mine:
        try:
            judged, found = candidates(table, mine, task)
        except ConfigError:
            judged, found = metric, []  # nothing of it was scored
        for candidate in found if judged == metric else []:
            by_setting.setdefault(candidate.row.setting["setting"], []).append(candidate)
    return HeldOut(metric, by_setting, run)


def prompts_run(held: Iterable[Row], task: Task) -> dict[str, int]:
    """On how many held-out prompts each setting was run, whatever came of it, by its hash.

    What a stopped run skipped was not run.
    """
    found: dict[str, int] = {}
    for row in held:
        if row.setting["task"] == task.value:
            ran = ~is_text(row.records, "status", Status.SKIPPED)
            count = len(prompts(pick(row.records, ran)))
            key = row.setting["setting"]
            found[key] = max(count, found.get(key, 0))
    return found


def prompts_wanted(
    difference: Interval | None, margin: float, chosen_on: int, ref: PromptRef
) -> int:
    """Held-out prompts to ask for, from the choice's spread, as many as the set may have."""
    wanted = prompts_to_confirm(difference, margin, chosen_on)
    return min(wanted, most_prompts(chosen_on, ref))


def most_prompts(chosen_on: int, ref: PromptRef) -> int:
    """Held-out prompts that a confirmation asks for at most; `ref`: one of the choice's."""
    most = MOST_TIMES * chosen_on
    size = ref.held_out if ref.held_out is not None else _set_size(ref.set)
    return most if size is None else min(most, size)


def prompts_to_confirm(difference: Interval | None, margin: float, chosen_on: int) -> int:
    """Held-out prompts to ask for: enough to show two equal settings within the margin.

    At least as many as the choice had and at most twice that; from the choice's own spread,
    never from what the held-out images say, so that asking again asks for the same.
    """
    sd = None if difference is None else spread(difference)
    needed = None if sd is None else prompts_needed(sd, margin)
    if needed is None:
        return chosen_on
    return min(max(needed, chosen_on), MOST_TIMES * chosen_on)


def _set_size(prompt_set: str) -> int | None:
    """Held-out prompts that a set has; ``None`` where it is a file that is not here."""
    if prompt_set in _SET_SIZES:
        return _SET_SIZES[prompt_set]
    if not Path(prompt_set).is_file():
        return None
    try:
        return len(load_prompts(PromptSpec(kind="file", path=prompt_set, split=HELD_OUT)))
    except ConfigError:
        return None  # its columns have names of their own, or it has no held-out half


def _negatives(rows: Iterable[Row]) -> dict[Task, tuple[str, ...] | None]:
    """Each task's negative prompts in the choice; ``None`` where prompts bring their own."""
    by_task: dict[Task, list[Some]] = {task: [] for task in Task}
    for row in rows:
        by_task[Task(row.setting["task"])].append(_split_off(row.records))
    return {task: shared_negatives(join(found)) for task, found in by_task.items()}


def _status(difference: Interval, margin: float) -> str:
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > -margin:
        return "confirmed"
    return "contradicted" if difference.high < -margin else "undecided"
