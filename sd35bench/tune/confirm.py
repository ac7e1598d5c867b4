"""Whether a search's choice holds on prompts that no search may see: `recommend`'s way, once.

A search sees the tune split alone, so all held-out prompts are new to it. There the chosen setting
is held against the best mean of those still racing or, where it is that itself, against the
runner-up. How many prompts is decided from the spread on the search's prompts, never from what
held-out images say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd35bench.analysis.commands import results_dir_of
from sd35bench.analysis.grouping import pair_prompt, setting_key
from sd35bench.analysis.pairs import Candidate, candidates, paired_difference
from sd35bench.analysis.table import Row, read_table
from sd35bench.recommend.advice import Run, runs_document
from sd35bench.recommend.confirm import (
    most_prompts,
    part_rows,
    prompts_run,
    prompts_wanted,
    read_held_out,
)
from sd35bench.recommend.entry import confirmation_text, setting_of
from sd35bench.recommend.profiles import Profile
from sd35bench.study.store import Study
from sd35bench.tune.race import OVER_LIMITS
from sd35bench.tune.session import Outcome
from sd35bench.tune.study_adapter import StudyLab

_NO_CHOICE = "no setting was chosen, so there is nothing to confirm"
_HOPELESS = ("failed", *OVER_LIMITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What held-out prompts say of a choice, as `recommend`'s document has it.

    `entry` is the choice's own, ``None`` without a choice; `said` is it in words; `confirm` is
    ``{"commands", "images"}``, what would have to be run still.
    """

    entry: dict[str, Any] | None
    said: str
    confirm: dict[str, Any]

    @property
    def confirmed(self) -> bool:
        """Whether held-out prompts confirm the choice."""
        return self.entry is not None and self.entry["status"] == "confirmed"


def confirm_choice(study: Study, lab: StudyLab, found: Outcome, profile: Profile) -> Confirmation:
    """Hold a search's choice against held-out prompts; says what is missing where they are.

    Raises: ConfigError where nothing of the choice was scored.
    """
    nothing: dict[str, Any] = {"commands": [], "images": 0}
    if found.winner is None:
        return Confirmation(entry=None, said=_NO_CHOICE, confirm=nothing)
    against = rival(found)
    if against is None:
        alone = {"status": "nothing to hold it against"}
        return Confirmation(entry=alone, said=confirmation_text(alone), confirm=nothing)
    table = read_table(study)
    parted = part_rows(table.rows)
    held_rows = [] if parted.held_out is None else parted.held_out
    rows = [_row(parted.choice, lab, found, i) for i in (found.winner, against)]
    _, sides = candidates(table, rows, lab.task)
    held = read_held_out(table, held_rows, lab.task, lab.metric)
    margin, (mine, theirs) = lab.margin(profile), rows
    wanted = _wanted(lab, sides, margin)
    entry = {
        **held.confirm(mine.setting["setting"], theirs.setting["setting"], margin, wanted),
        "against": setting_of(theirs),
        "against_id": theirs.id,
        "margin": margin,
        "metric": lab.metric,
    }
    there = prompts_run(held_rows, lab.task)
    runs = [
        Run(
            candidate=side,
            task=lab.task,
            study=study.name,
            results_dir=results_dir_of(study.path),
            prompts=wanted,
            there=there.get(side.row.setting["setting"], 0),
        )
        for side in sides
    ]
    return Confirmation(entry=entry, said=confirmation_text(entry), confirm=runs_document(runs))


def rival(found: Outcome) -> int | None:
    """What the choice has to stand against on other prompts (an index), if there is anything.

    The named default that the profile holds it against, or the best mean still racing; where that
    was chosen, the best of the others: of those still racing or, without any, of those that were
    beaten, but of none that is over a limit.
    """
    if found.winner is None:
        return None
    if found.reference is not None and found.found.points[found.winner] != found.reference:
        return found.found.points.index(found.reference)
    others = [i for i in found.racing if i != found.winner]
    if not others:
        out = {p: o.kind for p, o in found.out.items()}
        beaten = [i for i, p in enumerate(found.found.points) if out.get(p) not in _HOPELESS]
        others = [i for i in beaten if i != found.winner]
    return max(others, key=lambda i: found.found.mean[i], default=None)


def held_out_at_most(lab: StudyLab) -> int:
    """Images that a confirmation takes at most: two settings."""
    return 2 * most_prompts(lab.prompts, lab.prompt_ref) * lab.images_per_prompt


def _row(rows: Sequence[Row], lab: StudyLab, found: Outcome, i: int) -> Row:
    name = setting_key(lab.trial(found.found.points[i]))
    return next(row for row in rows if row.setting["setting"] == name and row.usable)


def _wanted(lab: StudyLab, sides: Sequence[Candidate], margin: float) -> int:
    """Held-out prompts for both sides."""
    chosen, against = sides
    difference = paired_difference(lab.metric, chosen, against)
    chosen_on = len({pair_prompt(key) for key in chosen.quality})
    return prompts_wanted(difference, margin, chosen_on, lab.prompt_ref)
