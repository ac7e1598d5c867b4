"""The report as data: what the template shows, gathered from a study and its two documents.

Nothing here renders a page and nothing in the template computes. A partial study (no metrics, no
image-to-image, failures only) gives a document with fewer parts, each still true.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd35bench.analysis.settings import is_hosted
from sd35bench.report.blocks import Block, comparison_blocks
from sd35bench.report.charts import (
    front_figures,
    line_figures,
    speed_figures,
    throughput_figures,
    tradeoff_figures,
)
from sd35bench.report.claims import ClaimsSection, claims_section
from sd35bench.report.figures import format_estimate
from sd35bench.report.headline import (
    Headline,
    dominated_shares,
    objective_estimates,
    read_headline,
)
from sd35bench.report.hosted import hosted_blocks, hosted_figures, hosted_sentences
from sd35bench.report.leaderboard import Leaderboard, build_leaderboard
from sd35bench.report.plots import Figure
from sd35bench.report.provenance import (
    list_environments,
    list_failures,
    list_loads,
    list_warnings,
    rerun_commands,
)
from sd35bench.report.rows import (
    Row,
    match_records,
    metric_label,
    read_rows,
    varying_fields,
)
from sd35bench.report.wall import build_wall
from sd35bench.store import Study
from sd35bench.types import Record, Session, Status

__all__ = ["Document", "TaskSection", "build_document"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection:
    """Everything about one task: leaderboard and charts of quality.

    `levels` is (metric label, level names, [(setting, figure per level)]).
    """

    task: str
    anchor: str
    leaderboard: Leaderboard
    fronts: tuple[Figure, ...]
    tradeoffs: tuple[Figure, ...]
    lines: tuple[Figure, ...]
    lines_note: str
    levels: tuple[str, tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the template shows."""

    study: str
    facts: tuple[tuple[str, str], ...]
    headline: Headline
    claims: ClaimsSection | None
    tasks: tuple[TaskSection, ...]
    speed: tuple[Figure, ...]
    speed_note: str
    loads: tuple[dict[str, Any], ...]
    hosted: tuple[Block, ...]
    hosted_lead: tuple[tuple[str, str], ...]
    hosted_figures: tuple[Figure, ...]
    backends: tuple[Block, ...]
    throughput: tuple[Figure, ...]
    wall: dict[str, Any]
    environments: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]
    commands: tuple[dict[str, str], ...]


def build_document(
    study: Study,
    show: Mapping[str, Any],
    recommendation: Mapping[str, Any] | str | None,
    claims: Mapping[str, Any] | None = None,
) -> Document:
    """Gather the report on `study` from its `show` document and, where there are, the two others.

    A text instead of a recommendation says why there is none.
    """
    records, sessions = study.records(), study.sessions()
    objective = objective_estimates(recommendation)
    rows = tuple(
        replace(r, metrics={**objective.get(r.id, {}), **r.metrics}) for r in read_rows(show)
    )
    matched = match_records(rows, records, sessions)
    extra = varying_fields(rows)
    headline = read_headline(rows, recommendation, extra)
    shares = dominated_shares(recommendation)
    speed, speed_note = speed_figures(rows, matched, headline.badges, extra)
    return Document(
        study=study.name,
        facts=tuple(_facts(rows, records, sessions)),
        headline=headline,
        claims=None if claims is None else claims_section(claims),
        tasks=tuple(_tasks(rows, headline, extra, _target(records), shares)),
        speed=tuple(speed),
        speed_note=speed_note,
        loads=tuple(list_loads(sessions, records)),
        hosted=tuple(hosted_blocks(rows)),
        hosted_lead=tuple(hosted_sentences(show, rows)),
        hosted_figures=tuple(hosted_figures(rows)),
        backends=tuple(comparison_blocks(show, rows)),
        throughput=tuple(throughput_figures(rows)),
        wall=_wall(study, rows, matched, headline, extra),
        environments=tuple(list_environments(sessions)),
        failures=tuple(list_failures(records)),
        warnings=tuple(list_warnings(show, rows, extra)),
        commands=tuple(rerun_commands(study.name, records)),
    )


def _facts(
    rows: Sequence[Row], records: Sequence[Record], sessions: Mapping[str, Session]
) -> list[tuple[str, str]]:
    """The line under the title."""
    ok = [r for r in records if r.status is Status.OK]
    requests = [r.trial.request for r in records]
    loads = [r.trial.load for r in records]
    started = sorted(r.started_at for r in records)
    facts = [
        ("model", _listed(load.model.name for load in loads)),
        ("backend", _listed(load.backend.name for load in loads)),
        ("size", _listed(f"{r.width}×{r.height}" for r in requests)),
        ("device", _listed(_device(s) for s in sessions.values())),
        ("settings", str(len(rows))),
        ("images", f"{len(ok):,}"),
        ("prompts", f"{len({(r.prompt, r.init_image) for r in requests}):,}"),
        ("seeds", str(len({r.seed for r in requests}))),
    ]
    failed = len(records) - len(ok)
    facts += [("failed", f"{failed:,}")] if failed else []
    facts += [("run", started[0][:16].replace("T", " "))] if started else []
    return [(name, value) for name, value in facts if value]


def _device(session: Session) -> str:
    load = session.load
    if is_hosted(load):
        return f"hosted by {load.backend.kind}"
    return str(session.in_force.get("device", "?"))


def _listed(values: Any) -> str:
    found = sorted(set(values))
    return ", ".join(found) if len(found) <= 4 else f"{len(found)} different"


def _target(records: Sequence[Record]) -> float | None:
    found = {r.trial.load.model.target_latency_s for r in records}
    return found.pop() if len(found) == 1 else None


def _tasks(
    rows: Sequence[Row],
    headline: Headline,
    extra: Sequence[str],
    target_s: float | None,
    shares: Mapping[str, Mapping[str, float]],
) -> list[TaskSection]:
    sections = []
    for task in dict.fromkeys(r.task for r in rows):
        members = [r for r in rows if r.task == task]
        pinned = headline.pinned(task, members)
        lines, note = line_figures(members, pinned)
        sections.append(
            TaskSection(
                task=task,
                anchor=task,
                leaderboard=build_leaderboard(members, headline.badges, extra, shares),
                fronts=tuple(front_figures(members, headline.badges, extra, target_s, shares)),
                tradeoffs=tuple(tradeoff_figures(members, pinned)),
                lines=tuple(lines),
                lines_note=note,
                levels=_levels(members, headline, extra),
            )
        )
    return sections


def _levels(
    rows: Sequence[Row], headline: Headline, extra: Sequence[str]
) -> tuple[str, tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]] | None:
    """By difficulty, for the recommended settings: where the average hides what fails."""
    shown = [r for r in rows if r.id in headline.badges and r.levels]
    if not shown:
        return None
    metric = next(iter(sorted(shown[0].levels, reverse=True)))
    names = tuple(dict.fromkeys(level for r in shown for level in r.levels.get(metric, {})))
    if len(names) < 2:
        return None
    table = tuple(
        (
            r.name(extra),
            tuple(format_estimate(r.levels.get(metric, {}).get(level)) for level in names),
        )
        for r in shown
    )
    return metric_label(metric), names, table


def _wall(
    study: Study,
    rows: Sequence[Row],
    matched: Mapping[str, Sequence[Record]],
    headline: Headline,
    extra: Sequence[str],
) -> dict[str, Any]:
    wall = build_wall(study, rows, matched, list(headline.badges), extra)
    first = headline.compare(rows)
    return {**wall, "first": first, "badges": {k: list(v) for k, v in headline.badges.items()}}
