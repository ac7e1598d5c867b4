"""What a search found, as one JSON document."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from sd35bench import words
from sd35bench.analysis.grouping import setting_key
from sd35bench.disk import write_atomic
from sd35bench.recommend.profiles import BEST, Profile
from sd35bench.stats.clustered import mean_t, quantile_t
from sd35bench.study.store import Study
from sd35bench.tune.confirm import Confirmation
from sd35bench.tune.final import Final
from sd35bench.tune.race import OVER_LIMITS, Evidence
from sd35bench.tune.session import Budget, Outcome
from sd35bench.tune.space import Point, Space
from sd35bench.tune.study_adapter import StudyLab

_ORDER = ("winner", "racing", "set aside", "dominated", "out of reach", *OVER_LIMITS, "failed")


def tune_document(
    study: str, lab: StudyLab, budget: Budget, profile: Profile, found: Outcome, held: Confirmation
) -> dict[str, Any]:
    """Put a search's outcome into words and figures, ready for JSON; unknown is ``None``.

    `confirmed`, `confirmation` and `confirm` are as in `recommend`'s document, and so is the
    recommended setting's own `confirmation`.
    """
    space = lab.space
    exhaustive = space.size * lab.prompts * lab.images_per_prompt
    margin = lab.margin(profile)
    winner = None if found.winner is None else found.found.points[found.winner]
    rows = [_row(lab, found, point, winner) for point in found.found.points]
    rows.sort(key=lambda row: (_ORDER.index(row["status"]), -_number(row["quality"]["value"])))
    return {
        "study": study,
        "profile": profile.name,
        "objective": lab.metric,
        "margin": margin,
        "recommended": None if winner is None else _recommended(lab, found, winner, profile, held),
        "confirmed": held.confirmed,
        "confirmation": held.said,
        "confirm": held.confirm,
        "stopped": found.stopped,
        "images": {
            "used": found.images,
            "budget": budget.images,
            "exhaustive": exhaustive,
            "share": found.images / exhaustive,
        },
        "settings": {"tried": len(rows), "grid": space.size, "trials": budget.trials},
        "prompts": {"split": "tune", "count": lab.prompts, "first": budget.first},
        "axes": {axis.name: list(axis.values) for axis in space.axes},
        "rounds": found.history,
        "tried": rows,
    }


def write_tuning(study: Study, document: dict[str, Any]) -> None:
    """Write the study's tune.json, whole or not at all."""
    data = json.dumps(document, indent=2, allow_nan=False) + "\n"
    write_atomic(study.path / "tune.json", data.encode())


def _recommended(
    lab: StudyLab, found: Outcome, winner: Point, profile: Profile, held: Confirmation
) -> dict[str, Any]:
    space = lab.space
    assert found.final is not None
    evidence = found.seen[winner]
    quality, latency = _quality(lab, evidence), _latency(evidence)
    setting = space.named(winner)
    metric = lab.metric.replace("_", " ")
    figures = f"{metric} {words.estimate(words.read_estimate(quality), 2)}"
    if latency["value"] is not None:
        figures += f", {words.estimate(words.read_estimate(latency), 3)} s an image"
    return {
        "setting": setting,
        "setting_key": setting_key(lab.trial(winner)),
        "headline": f"{setting_text(setting)} ({figures}, n={quality['n']})",
        "reason": _reason(found, found.final, profile),
        "quality": quality,
        "latency_s": latency,
        "usd_per_image": evidence.usd,
        "wanted": profile.objective,
        "reference": profile.reference,
        "difference_from_best": _difference(space, found.final),
        "non_inferiority": _test(space, found, found.final),
        "confirmation": held.entry,
    }


def _difference(space: Space, final: Final) -> dict[str, Any] | None:
    """From the best of those left, or the named default that the profile holds it against."""
    choice = final.choice
    if choice.chosen == choice.reference:
        return None
    found = choice.differences[choice.chosen]
    best = space.named(final.points[choice.reference])
    return {"best": best, "value": found.value, "ci95": found.ci95}


def _test(space: Space, found: Outcome, final: Final) -> dict[str, Any] | None:
    """Whether the choice is shown to be as good, as in `recommend`'s document.

    `unshown` counts the settings that left the race early and may still be better than the choice;
    `p` and `p_adjusted` are about those left.
    """
    test = final.choice.tests.get(final.choice.chosen)
    if test is None:
        return None
    rival = space.named(final.points[test.rival])
    said = {"shown": found.shown, "p": test.p, "p_adjusted": test.p_adjusted}
    left_early = {"settings": len(final.choice.tests), "unshown": len(found.unshown)}
    ends = {"value": test.difference.value, "ci95": test.difference.ci95}
    return {**said, **left_early, "rival": rival, "difference": ends}


def _reason(found: Outcome, final: Final, profile: Profile) -> str:
    """`recommend`'s reason, and what it cannot know here: who never got as far."""
    choice, left = final.choice, len(final.choice.differences)
    reason = "the only setting left in the race" if left == 1 else choice.reason
    if not final.shown and choice.chosen in choice.tests:
        whom = "every other" if profile.reference == BEST else profile.reference
        reason += f"; that it is within {choice.margin:g} of {whom} is not shown"
    elif found.unshown:
        reason += f"; of {len(found.unshown)} that left the race early that is not shown"
    if left > 1:
        reason += f"; {left} settings were left in the race"
    if found.aside:
        reason += f"; {len(found.aside)} were set aside undecided, as the images did not reach"
    return reason


def _row(lab: StudyLab, found: Outcome, point: Point, winner: Point | None) -> dict[str, Any]:
    space = lab.space
    status, why, by = "racing", None, None
    if point == winner:
        status = "winner"
    elif point in found.out:
        out = found.out[point]
        status, why = out.kind, out.why
        by = None if out.by is None else space.named(out.by)
    elif point in found.aside:
        status, why = "set aside", found.aside[point]
    evidence = found.seen[point]
    return {
        "setting": space.named(point),
        "status": status,
        "why": why,
        "by": by,
        "prompts": found.depth[point],
        "quality": _quality(lab, evidence),
        "latency_s": _latency(evidence),
        "usd_per_image": evidence.usd,
    }


def _quality(lab: StudyLab, evidence: Evidence) -> dict[str, Any]:
    known = evidence.quality[~np.isnan(evidence.quality)]
    if not len(known):
        return {"value": None, "ci95": None, "n": 0}
    found = mean_t(known, np.arange(len(known)), bounds=lab.bounds)
    return {**found.document(), "n": found.n * lab.images_per_prompt}  # images, not prompts


def _latency(evidence: Evidence) -> dict[str, Any]:
    known = evidence.latency_s[~np.isnan(evidence.latency_s)]
    if not len(known):
        return {"value": None, "ci95": None, "n": 0}
    return quantile_t(known, np.arange(len(known)), 0.5).document()


def setting_text(setting: Mapping[str, Any]) -> str:
    """A point of the space in a few words."""
    return ", ".join(f"{name} {words.plain(value)}" for name, value in setting.items())


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value
