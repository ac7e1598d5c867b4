"""The commands that make what a recommendation lacks: held-out images of a few settings.

For each choice these are the chosen setting, the one that it has to stand against, and the named
defaults that the study has. How many prompts is decided from the choice's own spread, never from
what held-out images say, so that nobody stops when the answer pleases.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sd35bench.analysis.pairs import Candidate
from sd35bench.analysis.settings import is_hosted
from sd35bench.recommend.confirm import HELD_OUT
from sd35bench.recommend.entry import Entry, setting_of
from sd35bench.recommend.reproduce import Elsewhere, results_dir_of, run_command
from sd35bench.types import Record, Task

__all__ = ["Run", "add_run", "confirming_runs", "runs_document"]


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
    def records(self) -> list[Record]:
        """The records of the choice that the held-out ones are to be like."""
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
        "images": (run.prompts - run.there) * len({r.trial.request.seed for r in records}),
        "hosted": is_hosted(records[0].trial.load),
        "command": run_command(records, run.study, asked),
    }
