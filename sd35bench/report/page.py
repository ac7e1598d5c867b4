"""The report: gathered from a study and its documents, and written as one HTML file.

Nothing in the template computes. A partial study (no metrics, no image-to-image, failures only)
gives a page with fewer parts, each still true. The file needs nothing else: no network, no other
file, no server. Jinja2 escapes every value; images are data URIs; the wall's data is JSON whose
markup characters are escaped. A content security policy lets run only the script and the styles
that are in the file, by their hashes, and forbids every connection.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sd35bench import words
from sd35bench.analysis.settings import is_hosted
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import Table as StudyTable
from sd35bench.analysis.table import by_host, read_table
from sd35bench.claims.verdicts import claims_document, is_claims_study
from sd35bench.columns import prompts, texts, unlike
from sd35bench.disk import write_atomic
from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.charts import (
    front_figures,
    line_figures,
    speed_figures,
    throughput_figures,
    tradeoff_figures,
)
from sd35bench.report.claims import ClaimsSection, claims_section
from sd35bench.report.headline import (
    Headline,
    dominated_shares,
    objective_estimates,
    read_headline,
)
from sd35bench.report.hosted import hosted_blocks, hosted_figures, hosted_sentences
from sd35bench.report.leaderboard import Leaderboard, build_leaderboard
from sd35bench.report.provenance import (
    list_environments,
    list_failures,
    list_loads,
    list_warnings,
    rerun_commands,
)
from sd35bench.report.render import Figure, Table, html_templates, text_table
from sd35bench.report.rows import Row, match_records, metric_label, read_rows, varying_fields
from sd35bench.report.svg import read_asset
from sd35bench.report.wall import build_wall
from sd35bench.store import Study
from sd35bench.types import Record, Session, Status

# ASCII output already writes U+2028 and lone surrogates as escapes.
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSection:
    """Everything about one task: leaderboard, charts of quality, figures by level of difficulty."""

    task: str
    anchor: str
    leaderboard: Leaderboard
    fronts: tuple[Figure, ...]
    tradeoffs: tuple[Figure, ...]
    lines: tuple[Figure, ...]
    lines_note: str
    levels: Table | None


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
    hosted: tuple[Table, ...]
    hosted_lead: tuple[tuple[str, str], ...]
    hosted_figures: tuple[Figure, ...]
    backends: tuple[Table, ...]
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
    records, sessions = study.records(), by_host(study.sessions())
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
        facts=(*_facts(rows, records, sessions), *_clock(show)),
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
    ok = int((texts(records, "status") == Status.OK).sum())
    kinds = unlike(records)
    requests, loads = [r.trial.request for r in kinds], [r.trial.load for r in kinds]
    started = min(texts(records, "started_at"), default=None)
    facts = [
        ("model", _listed(load.model.name for load in loads)),
        ("backend", _listed(load.backend.name for load in loads)),
        ("size", _listed(f"{r.width}×{r.height}" for r in requests)),
        ("device", _listed(_device(s) for s in sessions.values())),
        ("settings", str(len(rows))),
        ("images", words.count(ok)),
        ("prompts", words.count(len(prompts(records)))),
        ("seeds", str(len({r.seed for r in requests}))),
    ]
    failed = len(records) - ok
    facts += [("failed", words.count(failed))] if failed else []
    facts += [("run", started[:16].replace("T", " "))] if started else []
    return [(name, value) for name, value in facts if value]


def _clock(show: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How quiet the machine was, where that is known."""
    said = show.get("clock")
    return [] if said is None else [("clock", said.removeprefix("clock: "))]


def _device(session: Session) -> str:
    load = session.load
    if is_hosted(load):
        return f"hosted by {load.backend.kind}"
    return str(session.in_force.get("device", "?"))


def _listed(values: Any) -> str:
    found = sorted(set(values))
    return ", ".join(found) if len(found) <= 4 else f"{len(found)} different"


def _target(records: Sequence[Record]) -> float | None:
    found = {r.trial.load.model.target_latency_s for r in unlike(records)}
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


def _levels(rows: Sequence[Row], headline: Headline, extra: Sequence[str]) -> Table | None:
    """By difficulty, for the recommended settings: where the average hides what fails."""
    shown = [r for r in rows if r.id in headline.badges and r.levels]
    if not shown:
        return None
    metric = next(iter(sorted(shown[0].levels, reverse=True)))
    names = tuple(dict.fromkeys(level for r in shown for level in r.levels.get(metric, {})))
    if len(names) < 2:
        return None
    known = [r.levels.get(metric, {}) for r in shown]
    cells = ([words.estimate(levels.get(name)) for name in names] for levels in known)
    named = ([r.name(extra), *row] for r, row in zip(shown, cells, strict=True))
    return Table(title=metric_label(metric), columns=text_table(("setting", *names), named, names))


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


# The file -------------------------------------------------------------------------------------


def write_report(
    study: Study, profiles: Mapping[str, Any] | None = None, name: str = "report.html"
) -> Path:
    """Write `results/<study>/report.html` and return its path; replaced whole or not at all.

    `profiles` are those of `recommend`; without them the report names no recommended setting.

    Raises: DiskFull, StoreError.
    """
    table = read_table(study)
    show = show_document(study, table)
    claims = claims_document(study, table=table) if is_claims_study(study, table) else None
    document = build_document(study, show, _recommend(study, profiles, table), claims)
    path = study.path / name
    write_atomic(path, render_report(document).encode("utf-8", "replace"))
    return path


def _recommend(
    study: Study, profiles: Mapping[str, Any] | None, table: StudyTable
) -> dict[str, Any] | str | None:
    """The recommendation, or why there is none."""
    if profiles is None:
        return None
    try:
        return recommend_document(study, profiles, table)
    except ConfigError as exc:
        return f"No recommendation: {exc}"


def render_report(document: Document) -> str:
    """HTML of a document; pure."""
    script, style = (
        Markup(read_asset("report.js")),
        Markup(read_asset("charts.css") + read_asset("report.css")),
    )
    policy = content_policy(script, style)
    template = html_templates().get_template("report.html.j2")
    return template.render(
        d=document, policy=policy, script=script, style=style, data=embed_json(document.wall)
    )


def content_policy(script: str, style: str) -> str:
    """Policy under which only this script and this style run, and nothing is fetched."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def embed_json(value: Mapping[str, Any]) -> Markup:
    """JSON that is safe inside a `<script>` element, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup("".join(_ESCAPES.get(c, c) for c in text))


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
