"""`show` as a document: one table per task, the tables beside it, and what to be careful about."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from sd35bench import words
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.hosted import hosted_blocks, network_note
from sd35bench.report.leaderboard import setting_table
from sd35bench.report.provenance import environment_lines, list_warnings
from sd35bench.report.render import (
    MARKDOWN,
    Heading,
    Part,
    markdown_document,
    paragraph,
    print_document,
    say,
)
from sd35bench.report.rows import Row, latency_scope, read_rows, varying_fields
from sd35bench.report.shown import Shown, marks_column, marks_note, picked_table
from sd35bench.stats.latency import LEAST_IMAGES

_AS_USUAL = Shown()


def print_settings(document: Mapping[str, Any], console: Console, shown: Shown = _AS_USUAL) -> None:
    """Print a `show` document: one row per setting, then what to be careful about.

    On a narrow terminal intervals move below their values, and columns that matter least are left
    out and named.
    """
    print_document(settings_parts(document, shown), console)


def settings_markdown(document: Mapping[str, Any], shown: Shown = _AS_USUAL) -> str:
    """Render a `show` document: the form in which small tables are published under results/."""
    return markdown_document(settings_parts(document, shown))


def settings_parts(document: Mapping[str, Any], shown: Shown = _AS_USUAL) -> Iterator[Part]:
    """The document, part by part; where `shown` sorts, its rows are in that order already."""
    rows = read_rows(document)
    raw = {str(row.get("id")): row for row in document["settings"]}
    if shown.sort is not None:
        places = {row_id: place for place, row_id in enumerate(raw)}
        rows = tuple(sorted(rows, key=lambda row: places[row.id]))
    extra = varying_fields(rows)
    yield _title(document, rows)
    yield Heading(f"Study {document['study']}", 1, forms=(MARKDOWN,))
    yield paragraph(_about(rows))
    if not rows:
        yield say("no trials yet", wraps=True)
    for task in dict.fromkeys(row.task for row in rows):
        members = [r for r in rows if r.task == task]
        found = [raw.get(r.id, {}) for r in members]
        if shown.columns:
            yield picked_table(found, shown.columns, task)
            continue
        table = setting_table(members, extra)
        yield replace(table, columns=(*table.columns, *marks_column(found)))
    if note := marks_note(document):
        yield say((note, "dim"), wraps=True)
        yield paragraph(f"{words.first_upper(note)}.")
    scope = f"of latencies {latency_scope(rows)}, none below {LEAST_IMAGES} images"
    legend = f"latency: median of images made one at a time; brackets: 95 % intervals, {scope}"
    if any(r.latency is not None for r in rows):
        yield say((legend, "dim"), wraps=True)
    yield paragraph(
        "Latency: median of images made one at a time, from request to encoded file. Brackets:"
        f" 95 % intervals, {scope}; of other figures over prompts. n: images." + _rates_note(rows)
    )
    if clock := document.get("clock"):
        yield say((clock, "dim"), wraps=True)
        yield paragraph(f"{words.first_upper(clock)}.")
    if note := network_note(rows):
        yield say((note, "dim"), wraps=True)
        yield paragraph(note)
    yield from hosted_blocks(rows)
    yield from comparison_blocks(document, rows)
    warnings = list_warnings(document, rows, extra)
    for warning in warnings:
        yield say(("warning ", "yellow"), warning, wraps=True)
    lines = environment_lines(document.get("environments", {}))
    for i, line in enumerate((*((t, "raw") for t in lines), *(f"Warning: {t}" for t in warnings))):
        yield paragraph(line, joined=i > 0)


def _title(document: Mapping[str, Any], rows: Sequence[Row]) -> Part:
    """Study, and what all rows share."""
    about = [*_shared(rows), words.plural(len(rows), "setting")] if rows else []
    return say((str(document["study"]), "bold"), "  ", " · ".join(about), wraps=True)


def _shared(rows: Sequence[Row]) -> list[str]:
    return [", ".join(sorted({str(r.setting.get(n)) for r in rows})) for n in ("model", "backend")]


def _about(rows: Sequence[Row]) -> str:
    sizes = sorted({f"{r.setting.get('width')}×{r.setting.get('height')} px" for r in rows})
    return " · ".join((*_shared(rows), ", ".join(sizes)))


def _rates_note(rows: Sequence[Row]) -> str:
    if all(row.achieved_tflops is None for row in rows):
        return ""
    return (
        " TFLOP/s: operations that the image needs over its time, in brackets the share of the rate"
        " at which this machine multiplies matrices of that precision."
    )
