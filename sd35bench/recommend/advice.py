"""`recommend`: a setting per profile and task, chosen by paired data, with its evidence.

The choice is made on the prompts of every split but the held-out one. Whether it holds on that one
is found out afterwards, from the chosen setting and what it was held against alone: each entry has
a `confirmation`, and ``confirmed`` is true only where all of them say so.

The commands for the missing held-out images make the chosen setting, the one that it has to stand
against, and the named defaults that the study has. How many prompts is decided from the choice's
own spread, never from what held-out images say, so that nobody stops when the answer pleases.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd35bench import plugins
from sd35bench.analysis.commands import Elsewhere, results_dir_of
from sd35bench.analysis.grouping import HELD_OUT
from sd35bench.analysis.pairs import Candidate, Comparison, all_candidates, compare, pick_family
from sd35bench.analysis.table import Row, Table, read_table
from sd35bench.errors import ConfigError
from sd35bench.fields import describe
from sd35bench.recommend.choice import choose
from sd35bench.recommend.confirm import Parted, part_rows, read_held_out
from sd35bench.recommend.entry import Claim, Entry, setting_of, shown_worse
from sd35bench.recommend.look_plan import Look, read_look
from sd35bench.recommend.named_defaults import check_name, find_default
from sd35bench.recommend.pareto import Front, Speeds, front_of, speeds
from sd35bench.recommend.profiles import BEST, Profile, as_profiles
from sd35bench.recommend.reproduce import run_command
from sd35bench.stats.verdicts import holm
from sd35bench.study.columns import Some, distinct_refs, seeds
from sd35bench.types import Task

_NAMED = 3
"""Settings that lack pairs that a warning names; it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Held-out images of one setting: on how many prompts they are wanted, and are there."""

    candidate: Candidate
    task: Task
    study: str
    results_dir: str | None
    prompts: int
    there: int

    @property
    def records(self) -> Some:
        """The choice's records that the held-out ones are to be like."""
        return self.candidate.row.quality_records()


def confirming_runs(found: Entry, task: Task, planned: Mapping[str, int]) -> list[Run]:
    """What the confirmation of one choice needs; `planned` counts prompts run, by setting."""
    if found.against is None:
        return []
    indices = dict.fromkeys([found.choice.chosen, found.against, *found.default_indices(task)])
    candidates = [found.comparison.candidates[i] for i in indices]
    return [
        Run(
            candidate=c,
            task=task,
            study=found.study.name,
            results_dir=results_dir_of(found.study.path),
            prompts=found.wanted,
            there=planned.get(c.row.setting["setting"], 0),
        )
        for c in candidates
    ]


def add_run(runs: dict[str, Run], run: Run) -> None:
    """Add a run to those by setting; the larger of two numbers of prompts counts."""
    key = run.candidate.row.setting["setting"]
    known = runs.get(key)
    runs[key] = run if known is None else replace(run, prompts=max(run.prompts, known.prompts))


def runs_document(runs: Iterable[Run]) -> dict[str, Any]:
    """Return ``{"commands", "images"}``: what is missing still, each with its command."""
    missing = [run for run in runs if run.there < run.prompts]
    commands = [_document(run) for run in missing]
    return {"commands": commands, "images": sum(c["images"] for c in commands)}


def _document(run: Run) -> dict[str, Any]:
    records = run.records
    asked = Elsewhere(split=HELD_OUT, limit=run.prompts, results_dir=run.results_dir)
    return {
        "task": run.task.value,
        "setting": setting_of(run.candidate.row),
        "prompts": run.prompts,
        "there": run.there,
        "images": (run.prompts - run.there) * len(set(seeds(records).tolist())),
        "hosted": records[0].trial.load.is_hosted,
        "command": run_command(records, run.study, asked),
    }


_NOTHING: dict[str, Any] = {
    "setting": None,
    "setting_id": None,
    "alternatives": [],
    "named_defaults": [],
    "confirmation": None,
    "command": None,
    "snippet": None,
    "api": None,
}


def recommend_document(
    study: Any, profiles: Mapping[str, Profile | Mapping[str, Any]], table: Table | None = None
) -> dict[str, Any]:
    """Recommend a setting of the study (`sd35bench.study.store.Study`) for each profile and task.

    `table` is the study's, where it was read already.

    Returns: ``{"study", "confirmed", "confirmation", "prompts", "profiles": {name:
    {"text-to-image": entry or None, "image-to-image": entry or None}}, "confirm", "notes",
    "warnings"}``. An entry has `setting`, `setting_id`, `evidence`, `alternatives`,
    `named_defaults`, `confirmation`, `command`, `snippet` and `api`, or, where no setting meets
    the profile, `setting` ``None`` and the evidence's `reason`. Evidence and alternatives say
    whether a setting is on the Pareto front (`on_front`) and its probability of being dominated
    (`p_dominated`, ``None`` with one prompt; see `sd35bench.recommend.pareto`). `confirm` lists the
    commands that make the held-out images that are not there.

    Raises: ConfigError where neither task has two settings to compare, or for a bad profile.
    """
    checked = as_profiles(profiles)
    table = read_table(study) if table is None else table
    parted = part_rows(table.rows)
    tasks: dict[str, _Task] = {}
    notes = list(parted.notes)
    warnings = list(table.warnings)
    problems: list[str] = []
    for task in Task:
        rows, left = pick_family(parted.choice, task)
        notes += left
        warnings += without_images(parted.choice, task)
        if rows:
            try:
                tasks[task.value] = _Task(study, table, parted, rows, task)
            except ConfigError as exc:
                problems.append(str(exc))
    if not tasks:
        raise ConfigError(_nothing(study, table.rows, problems))
    entries = {task: each.entries(checked) for task, each in tasks.items()}
    found = {
        p.name: {t.value: entries[t.value][p.name] if t.value in tasks else None for t in Task}
        for p in checked
    }
    for kind, each in tasks.items():
        warnings += comparison_warnings(each.comparison, kind)
        warnings += [
            f"{name} ({kind}): {caveat}"
            for name, entry in entries[kind].items()
            for caveat in entry["evidence"].get("caveats", ())
        ]
    confirmed, said = _confirmation(found, parted)
    return {
        "study": study.name,
        "confirmed": confirmed,
        "confirmation": said,
        "prompts": _prompts(tasks),
        "profiles": found,
        "confirm": runs_document([run for t in tasks.values() for run in t.runs.values()]),
        "notes": [*table.busy, *notes, *problems],
        "warnings": warnings,
    }


def without_images(rows: Iterable[Row], task: Task) -> list[str]:
    """Name the settings of a task that made no image that counts."""
    return [
        f"{task.value}: {describe(row.setting)} is in no comparison: none of its"
        f" {len(row.records)} trials made an image that counts"
        for row in rows
        if row.setting["task"] == task.value and not row.usable and not row.random_weights
    ]


def comparison_warnings(comparison: Comparison, task: str) -> list[str]:
    """Name the settings that are in no comparison, and those that shrink it for all others."""
    found = [
        f"{task}: {describe(c.row.setting)} is in no comparison: {why}"
        for c, why in comparison.left_out
    ]
    lacking = sorted(comparison.lacking.items(), key=lambda entry: -entry[1])
    if not lacking:
        return found
    n = comparison.quality.shape[1]
    most = max(len(c.outcomes()) for c in comparison.candidates)
    named = [
        f"{describe(comparison.candidates[i].row.setting)} lacks {count}"
        for i, count in lacking[:_NAMED]
    ]
    more = len(lacking) - len(named)
    named += [f"{more} more settings lack some"] if more else []
    return [
        *found,
        f"{task}: compared on {n} pairs, of which a setting has up to {most}: {', '.join(named)};"
        " run and score them on the others, or leave them out",
    ]


class _Task:
    """The settings of one task, compared once and asked for every profile."""

    def __init__(
        self, study: Any, table: Table, parted: Parted, rows: list[Row], task: Task
    ) -> None:
        self.study, self.table, self.task, self.parted = study, table, task, parted
        metric, found = all_candidates(table, rows, task)
        self.comparison: Comparison = compare(metric, found)
        self.speed: Speeds = speeds(self.comparison)
        self.front: Front = front_of(self.comparison, self.speed)
        held = [] if parted.held_out is None else parted.held_out
        self.held_out = read_held_out(table, held, task, metric)
        self.runs: dict[str, Any] = {}
        self.look: Look = read_look(study, int(self.comparison.clusters.max()) + 1)

    def entries(self, profiles: Sequence[Profile]) -> dict[str, dict[str, Any]]:
        """Choose for each profile and say why.

        What all choices together claim to be better than is corrected for the number of claims.
        """
        found = {profile.name: self._entry(profile) for profile in profiles}
        chosen = [entry for entry in found.values() if isinstance(entry, Entry)]
        claims = {c: p for entry in chosen for c, p in entry.claims(self.task).items()}
        p_holm = dict(zip(claims, holm(list(claims.values())), strict=True))
        return {name: self._document(entry, p_holm) for name, entry in found.items()}

    def _entry(self, profile: Profile) -> Entry | str:
        """One profile's choice; a text says why there is none."""
        named = self._named(profile)
        if isinstance(named, str):
            return named
        choice = choose(self.comparison, self.speed, profile, named, self.look.level)
        if isinstance(choice, str):
            return choice
        return Entry(
            study=self.study,
            table=self.table,
            comparison=self.comparison,
            speed=self.speed,
            front=self.front,
            held_out=self.held_out,
            profile=profile,
            choice=choice,
        )

    def _document(self, found: Entry | str, p_holm: Mapping[Claim, float]) -> dict[str, Any]:
        if isinstance(found, str):
            evidence = {"headline": f"no setting: {found}", "reason": found}
            return {**_NOTHING, "evidence": evidence}
        if self.parted.held_out is not None:
            for run in confirming_runs(found, self.task, self.held_out.run):
                add_run(self.runs, run)
        return {
            "setting": setting_of(found.row),
            "setting_id": found.row.id,
            "evidence": found.document() | self.look.document(),
            "alternatives": found.alternatives(),
            "named_defaults": found.named_defaults(self.task, p_holm),
            "confirmation": found.confirmation(self.parted.why),
            "command": found.command(),
            "snippet": found.snippet(),
            "api": found.api(),
        }

    def _named(self, profile: Profile) -> int | str | None:
        """The candidate that the profile holds others against; a text where it is not there."""
        if profile.reference == BEST:
            return None
        default = check_name(profile.reference, self.task)
        if default is None:
            return f"{profile.reference} has no default for {self.task.value}"
        rows = [c.row for c in self.comparison.candidates]
        places = dict.fromkeys((r.setting["backend"], r.environment_id) for r in rows)
        for place in places:
            like = next(r for r in rows if (r.setting["backend"], r.environment_id) == place)
            row = find_default(default, rows, like)
            if row is not None:
                return next(i for i, r in enumerate(rows) if r is row)
        return (
            f"the study has no setting like {profile.reference}'s ({default.steps} steps, cfg"
            f" {default.cfg:g}) to hold others against"
        )


def _confirmation(found: Mapping[str, Mapping[str, Any]], parted: Parted) -> tuple[bool, str]:
    """Whether every choice is confirmed, and a sentence about it."""
    status: dict[str, list[str]] = {}
    for profile, tasks in found.items():
        for task, entry in tasks.items():
            if entry is not None and entry["setting"] is not None:
                said = entry["confirmation"]["status"]
                status.setdefault(said, []).append(f"{profile} ({task})")
    count = sum(map(len, status.values()))
    if parted.why is not None:
        return False, f"not confirmed: {parted.why}"
    if set(status) <= {"not run", "nothing to hold it against"}:
        return False, "chosen on these prompts; not confirmed on held-out prompts"
    confirmed = len(status.get("confirmed", ()))
    worse = [
        f"{profile} ({task})"
        for profile, tasks in found.items()
        for task, entry in tasks.items()
        if entry is not None and entry["setting"] is not None and shown_worse(entry["confirmation"])
    ]
    parts = [f"confirmed on held-out prompts: {confirmed} of {count} choices"]
    parts += [f"of these worse, by less than the margin: {', '.join(worse)}"] if worse else []
    parts += [f"{k}: {', '.join(v)}" for k, v in status.items() if k != "confirmed"]
    return confirmed == count, "; ".join(parts)


def _prompts(tasks: Mapping[str, _Task]) -> list[dict[str, Any]]:
    """The prompt sets and splits that the choices were made on."""
    refs = {
        (task, *names)
        for task, each in tasks.items()
        for c in each.comparison.candidates
        for names in distinct_refs(c.row.quality_records(), "set", "split")
    }
    return [{"task": t, "set": name, "split": split} for t, name, split in sorted(refs)]


def _nothing(study: Any, rows: list[Row], problems: list[str]) -> str:
    if problems:
        return "; ".join(problems)
    if any(row.usable for row in rows if row.random_weights):
        return (
            f"nothing to recommend: the images of study {study.name!r} were made with random"
            " weights, which say nothing about quality; run it with model.weights=checkpoint"
        )
    return (
        f"nothing to compare: study {study.name!r} has no usable image; run a sweep first, for"
        f" example `{plugins.command('run -m steps=4,16 cfg=1,4')}`"
    )
