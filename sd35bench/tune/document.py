"""What a search found, as one JSON document and as text for a terminal."""

import json
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35bench.analysis.clustered import mean_t, quantile_t
from sd35bench.analysis.intervals import Interval
from sd35bench.analysis.profiles import Profile
from sd35bench.analysis.settings import setting_key
from sd35bench.disk import write_atomic
from sd35bench.store import Study
from sd35bench.tune.lab import StudyLab
from sd35bench.tune.race import Evidence, as_good
from sd35bench.tune.session import Budget, Outcome
from sd35bench.tune.space import Point, Space

__all__ = ["print_tuning", "tune_document", "write_tuning"]

NOT_CONFIRMED = (
    "chosen on prompts of the tune split; not confirmed on held-out prompts, none of which was used"
)
_SHOWN = 8
_ORDER = ("winner", "racing", "set aside", "dominated", "out of reach", "too slow", "failed")


def tune_document(
    study: str, space: Space, lab: StudyLab, budget: Budget, profile: Profile, found: Outcome
) -> dict[str, Any]:
    """Put a search's outcome into words and figures, ready for JSON; unknown is ``None``."""
    exhaustive = space.size * lab.prompts * lab.images_per_prompt
    margin = lab.margin(profile)
    winner = None if found.winner is None else found.found.points[found.winner]
    rows = [_row(space, lab, found, point, winner) for point in found.found.points]
    rows.sort(key=lambda row: (_ORDER.index(row["status"]), -_number(row["quality"]["value"])))
    return {
        "study": study,
        "profile": profile.name,
        "objective": lab.metric,
        "margin": margin,
        "recommended": None if winner is None else _recommended(space, lab, found, winner, margin),
        "confirmed": False,
        "confirmation": NOT_CONFIRMED,
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


def print_tuning(document: dict[str, Any], out: Console) -> None:
    """Print the answer first, then what it cost and who else was in the race."""
    best, images = document["recommended"], document["images"]
    if best is None:
        out.print(f"no setting: {document['stopped']}", markup=False, soft_wrap=True)
    else:
        out.print(f"[bold]{escape(document['profile'])}[/bold]: {escape(best['headline'])}")
        out.print(escape(best["reason"]), soft_wrap=True)
    out.print(
        f"{images['used']} images of {document['settings']['tried']} settings; the full grid of"
        f" {document['settings']['grid']} would take {images['exhaustive']}"
        f" ({100 * images['share']:.3g} %)",
        soft_wrap=True,
    )
    out.print(f"stopped: {escape(document['stopped'])}", soft_wrap=True)
    out.print(escape(document["confirmation"]), soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("setting", document["objective"].replace("_", " "), "n", "p50 s", "in the race"):
        table.add_column(column)
    for row in document["tried"][:_SHOWN]:
        why = row["status"] if row["why"] is None else f"{row['status']}: {row['why']}"
        quality, latency = _with_interval(row["quality"], 2), _with_interval(row["latency_s"], 3)
        table.add_row(
            escape(_text(row["setting"])), quality, str(row["quality"]["n"]), latency, escape(why)
        )
    out.print(table)
    more = len(document["tried"]) - _SHOWN
    if more > 0:
        out.print(f"… and {more} more in tune.json")


def _recommended(
    space: Space, lab: StudyLab, found: Outcome, winner: Point, margin: float
) -> dict[str, Any]:
    assert found.winner is not None
    best, good = as_good(found.found, found.racing, margin)
    evidence = found.seen[winner]
    quality, latency = _quality(lab, evidence), _latency(evidence)
    setting = space.named(winner)
    difference = None
    if best != found.winner:
        low = float(found.found.low[found.winner, best])
        high = float(found.found.high[found.winner, best])
        difference = {
            "best": space.named(found.found.points[best]),
            "value": evidence.mean - found.seen[found.found.points[best]].mean,
            "ci95": [low, high],
        }
    metric = lab.metric.replace("_", " ")
    figures = f"{metric} {_with_interval(quality, 2)}, {_with_interval(latency, 3)} s an image"
    return {
        "setting": setting,
        "setting_key": setting_key(lab.trial(winner)),
        "headline": f"{_text(setting)} ({figures}, n={quality['n']})",
        "reason": _reason(found, best, good, margin),
        "quality": quality,
        "latency_s": latency,
        "usd_per_image": evidence.usd,
        "difference_from_best": difference,
    }


def _reason(found: Outcome, best: int, good: list[int], margin: float) -> str:
    finalists = len(found.racing)
    if finalists == 1:
        return "the only setting left in the race"
    if found.winner == best and len(good) == 1:
        return (
            f"the best mean of {finalists} settings left; no faster one is shown to be within"
            f" {margin:g} of it, which more images might"
        )
    if found.winner == best:
        return f"the best mean of {finalists} settings left, and the fastest shown to be as good"
    left = f"the fastest of {finalists} settings left"
    return f"{left} that is shown to be within {margin:g} of the best"


def _row(
    space: Space, lab: StudyLab, found: Outcome, point: Point, winner: Point | None
) -> dict[str, Any]:
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
    return _entry(mean_t(known, np.arange(len(known)), bounds=lab.bounds), lab.images_per_prompt)


def _latency(evidence: Evidence) -> dict[str, Any]:
    known = evidence.latency_s[~np.isnan(evidence.latency_s)]
    if not len(known):
        return {"value": None, "ci95": None, "n": 0}
    return _entry(quantile_t(known, np.arange(len(known)), 0.5), 1)


def _entry(interval: Interval, images: int) -> dict[str, Any]:
    """`n` counts images; the interval is over prompts."""
    return {
        "value": interval.value,
        "ci95": interval.ci95,
        "n": interval.n * images,
        "n_prompts": interval.clusters,
    }


def _text(setting: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in setting.items()
    )


def _with_interval(entry: dict[str, Any], digits: int) -> str:
    if entry["value"] is None:
        return "unknown"
    text = f"{entry['value']:.{digits}f}"
    if entry["ci95"] is None:
        return text
    low, high = entry["ci95"]
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _number(value: float | None) -> float:
    return float("-inf") if value is None else value
