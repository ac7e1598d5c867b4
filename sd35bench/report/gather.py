"""What a report reads of its studies: rows, records, headline; one study, or several side by side.

Of several studies the name is one more field of a setting, so that every chart, table and filter
tells them apart as it tells backends apart; row ids are prefixed with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sd35bench import words
from sd35bench.analysis.table import by_host
from sd35bench.disk import is_locked
from sd35bench.report.headline import Headline, dominated_shares, objective_estimates, read_headline
from sd35bench.report.rows import Row, match_records, read_rows, varying_fields
from sd35bench.study.columns import Some, is_text, moments, prompts, unlike
from sd35bench.study.store import Study
from sd35bench.types import Session, Status

STUDY = "study"
"""The field of a setting that tells several studies apart."""

Shares = dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A study with its `show` document, its recommendation (or why there is none), its claims."""

    study: Study
    show: Mapping[str, Any]
    recommendation: Mapping[str, Any] | str | None
    claims: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """One study as the report has it; `shares` is metric → row id → how often it is dominated."""

    source: Source
    records: Some
    sessions: Mapping[str, Session]
    rows: tuple[Row, ...]
    matched: dict[str, Some]
    headline: Headline
    shares: Shares

    @property
    def name(self) -> str:
        """The study's name."""
        return self.source.study.name


def gather(sources: Sequence[Source]) -> tuple[list[Gathered], tuple[str, ...]]:
    """Read the studies; beside them the fields beyond steps, cfg and strength that vary."""
    rows = [_rows(source) for source in sources]
    extra = varying_fields([row for members in rows for row in members])
    found = [_gather(s, members, extra) for s, members in zip(sources, rows, strict=True)]
    if len(found) < 2:
        return found, extra
    return [_named(each) for each in found], (STUDY, *extra)


def _rows(source: Source) -> tuple[Row, ...]:
    objective = objective_estimates(source.recommendation)
    rows = read_rows(source.show)
    return tuple(replace(r, metrics={**objective.get(r.id, {}), **r.metrics}) for r in rows)


def _gather(source: Source, rows: tuple[Row, ...], extra: Sequence[str]) -> Gathered:
    records, sessions = source.study.records(), by_host(source.study.sessions())
    return Gathered(
        source=source,
        records=records,
        sessions=sessions,
        rows=rows,
        matched=match_records(rows, records, sessions),
        headline=read_headline(rows, source.recommendation, extra),
        shares=dominated_shares(source.recommendation),
    )


def _named(one: Gathered) -> Gathered:
    """The same with the study's name in its settings, and before its row ids and sentences."""

    def named(row_id: str) -> str:
        return f"{one.name}.{row_id}"

    head = one.headline
    answers = tuple(
        (
            task,
            tuple(
                replace(a, study=one.name, row_id=None if a.row_id is None else named(a.row_id))
                for a in group
            ),
        )
        for task, group in head.answers
    )
    headline = replace(
        head,
        lead=tuple((f"{one.name}: {before}", name, after) for before, name, after in head.lead),
        answers=answers,
        notes=tuple(f"{one.name}: {note}" for note in head.notes),
        badges={named(row_id): names for row_id, names in head.badges.items()},
        defaults={task: (named(row_id), what) for task, (row_id, what) in head.defaults.items()},
    )
    return replace(
        one,
        rows=tuple(
            replace(r, id=named(r.id), setting={STUDY: one.name, **r.setting}) for r in one.rows
        ),
        matched={named(row_id): records for row_id, records in one.matched.items()},
        headline=headline,
        shares={m: {named(i): v for i, v in found.items()} for m, found in one.shares.items()},
    )


def join_headlines(parts: Sequence[Gathered]) -> Headline:
    """One headline of several studies: the first one's choice is shown beside the second one's."""
    if len(parts) == 1:
        return parts[0].headline
    answers: dict[str, list[Any]] = {}
    badges: dict[str, tuple[str, ...]] = {}
    for part in parts:
        badges |= part.headline.badges
        for task, group in part.headline.answers:
            answers.setdefault(task, []).extend(group)
    other = parts[1]
    chosen = {task: other.headline.pinned(task, other.rows) for task in answers}
    return Headline(
        lead=tuple(line for part in parts for line in part.headline.lead),
        answers=tuple((task, tuple(group)) for task, group in answers.items()),
        notes=tuple(note for part in parts for note in part.headline.notes),
        badges=badges,
        defaults={task: (row.id, f"chosen in {other.name}") for task, row in chosen.items() if row},
    )


def join_shares(parts: Sequence[Gathered]) -> Shares:
    """Metric → row id → how often the row is dominated, within its own study."""
    found: Shares = {}
    for part in parts:
        for metric, shares in part.shares.items():
            found.setdefault(metric, {}).update(shares)
    return found


def read_facts(one: Gathered) -> list[tuple[str, str]]:
    """Models, backends, counts: (name, value) of what there is to say."""
    rows, records, sessions = one.rows, one.records, one.sessions
    ok = int(is_text(records, "status", Status.OK).sum())
    kinds = unlike(records)
    requests, loads = [r.trial.request for r in kinds], [r.trial.load for r in kinds]
    started = records[int(moments(records).argmin())].started_at if records else None
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
    facts.append(("clock", (one.source.show.get("clock") or "").removeprefix("clock: ")))
    return [(name, value) for name, value in facts if value]


def _device(session: Session) -> str:
    load = session.load
    if load.is_hosted:
        return f"hosted by {load.backend.kind}"
    return str(session.in_force.get("device", "?"))


def _listed(values: Any) -> str:
    found = sorted(set(values))
    return ", ".join(found) if len(found) <= 4 else f"{len(found)} different"


def read_state(one: Gathered, pairs: Mapping[str, int]) -> list[tuple[str, str]]:
    """What a reader must know before any figure: (mark, sentence); nothing of a whole study.

    `pairs` is row id → of how many prompts and seeds there is a trial.
    """
    study, rows, records = one.source.study, one.rows, one.records
    said = []
    failed = int((~is_text(records, "status", Status.OK)).sum())
    if failed == len(records):
        return [("bad", "Every trial failed.")] if failed else [("open", "No trial yet.")]
    if is_locked(study.path / ".lock"):
        said.append(("open", "Being written: a run adds images while this page is read."))
    if failed:
        trials = f"{words.count(failed)} of {words.count(len(records))} trials failed"
        share = words.share(failed / len(records))
        said.append(("bad", f"{trials} ({share}); reasons are under Warnings and failures."))
    tuned = (study.path / "tune.json").exists()  # a race drops settings by design
    for task in () if tuned else dict.fromkeys(r.task for r in rows):
        counts = sorted(pairs[r.id] for r in rows if r.task == task and r.id in pairs)
        fewer = [n for n in counts if n < counts[-1]]
        if fewer:
            text = (
                f"Incomplete: {len(fewer)} of {len(counts)} settings of {task} have fewer images"
                f" than the others ({fewer[0]} at the least, of {counts[-1]})."
            )
            said.append(("open", text))
    return said
