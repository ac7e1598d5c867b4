"""`show`: its rows marked, ordered and picked, written as CSV, and as a document.

A column is named as in ``show --json``; a figure with an interval is three columns of a CSV,
``NAME``, ``NAME_low`` and ``NAME_high``.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd35bench import words
from sd35bench.disk import read_yaml
from sd35bench.errors import ConfigError, nearest
from sd35bench.fields import label, value_text
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.hosted import hosted_blocks, network_note
from sd35bench.report.leaderboard import LAST_TO_GO, front_ids, primary_metric, setting_table
from sd35bench.report.provenance import closing_parts, list_warnings
from sd35bench.report.render import (
    MARKDOWN,
    Cell,
    Column,
    Heading,
    Layout,
    Part,
    Table,
    Text,
    estimate_cell,
    paragraph,
    say,
)
from sd35bench.report.rows import Row, by_task, latency_scope, read_rows, size_rank, varying_fields
from sd35bench.stats.latency import LEAST_IMAGES
from sd35bench.words import MISSING, Estimate

RECOMMENDED = "recommended.yaml"
_LEFT_OUT = frozenset(
    ("id", "environment", "in_force", "excluded", "contention", "remote", "gpu", "warnings")
)
_QUANTILES = {"p90": "p90_s", "p99": "p99_s", "mean": "mean_s"}
_ENDS = ("low", "high")
_LEAST_PICKED = 13
"""Characters of a column and its margin below which cells break into slivers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions:
    """How the rows are shown: `sort` is a column, ``-`` before it for the highest first."""

    sort: str | None = None
    columns: tuple[str, ...] = ()


_AS_USUAL = ShowOptions()


def mark_rows(document: dict[str, Any], folder: Path, written_at: float) -> None:
    """Say of each row whether it is on its task's front, and for which profiles it was chosen.

    Args:
        document: of `show_document`; its rows get `front` and `chosen_for`, and the document gets
            `recommended`, ``None`` or ``{"path", "is_older"}``.
        folder: the study's, whose recommended.yaml names what was chosen.
        written_at: when the study's journal was last written, seconds since 1970.
    """
    rows = read_rows(document)
    front: set[str] = set()
    for members in by_task(rows).values():
        front |= front_ids(members, primary_metric(members))
    path = folder / RECOMMENDED
    chosen = _chosen(path)
    is_older = chosen is not None and path.stat().st_mtime < written_at
    document["recommended"] = None if chosen is None else {"path": str(path), "is_older": is_older}
    for row in document["settings"]:
        row["front"] = row["id"] in front
        row["chosen_for"] = [] if chosen is None else chosen.get(row["setting"], [])


def _chosen(path: Path) -> dict[str, list[str]] | None:
    """Setting → profiles; ``None`` where there is no file, or one of somebody else's."""
    try:
        found = read_yaml(path)["profiles"]
        chosen: dict[str, list[str]] = {}
        for profile, tasks in found.items():
            for answer in tasks.values():
                if answer["setting"] is not None:
                    chosen.setdefault(answer["setting"]["setting"], []).append(profile)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return {setting: list(dict.fromkeys(names)) for setting, names in chosen.items()}


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a `show` document as named values: text, numbers, booleans or ``None``."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name == "latency_s":
            found |= _estimate(name, {**value, "value": value.get("p50")})
            found |= {column: value.get(q) for q, column in _QUANTILES.items()}
        elif name in ("metrics", "stage_s"):
            for key, inner in (value or {}).items():
                found |= _estimate(key, inner)
        elif name == "throughput":
            for entry in value or ():
                figure = {**entry, "value": entry.get("images_per_s")}
                found |= _estimate(f"images_per_s_{entry['batch_size']}", figure)
        elif name in ("speedup", "usd_per_image"):
            found |= _estimate(name, value)
        elif name not in _LEFT_OUT:
            found[name] = _scalar(value)
    return found


def _estimate(name: str, raw: Mapping[str, Any] | float | None) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        return {name: raw}
    ends = raw.get("ci95") or (None, None)
    return {name: raw.get("value"), **{f"{name}_{e}": v for e, v in zip(_ENDS, ends, strict=True)}}


def _scalar(value: Any) -> Any:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value_text(value) if isinstance(value, Mapping) else value


def sort_rows(document: dict[str, Any], sort: str | None) -> None:
    """Order a document's rows by a column; what has no value stands last.

    Raises: ConfigError for a column that no row has.
    """
    if sort is None:
        return
    name = sort.removeprefix("-")
    flat = [flatten(row) for row in document["settings"]]
    _check("--sort", [name], flat)
    known = [i for i, row in enumerate(flat) if row.get(name) is not None]
    unknown = [i for i, row in enumerate(flat) if row.get(name) is None]
    known.sort(key=lambda i: size_rank(flat[i][name]), reverse=sort.startswith("-"))
    document["settings"] = [document["settings"][i] for i in (*known, *unknown)]


def _check(flag: str, names: Iterable[str], flat: Sequence[Mapping[str, Any]]) -> None:
    columns = dict.fromkeys(name for row in flat for name in row)
    for name in names:
        if flat and name not in columns:
            some = ", ".join(c for c in columns if not c.endswith(("_low", "_high")))
            hint = nearest(name, columns)
            raise ConfigError(f"{flag}={name}: no such column{hint}; there are {some}")


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Write rows of `show` documents as CSV with a line of names.

    Unknown is empty. A picked figure brings its interval.

    Raises: ConfigError for a column that no row has.
    """
    flat = [flatten(row) for row in rows]
    _check("--columns", columns, flat)
    known = dict.fromkeys(name for row in flat for name in row)
    with_ends = (n for c in columns for n in (c, *(f"{c}_{end}" for end in _ENDS)) if n in known)
    names = list(dict.fromkeys(with_ends)) if columns else list(known)
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def picked_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], title: str) -> Table:
    """A table of the columns that were asked for, in that order.

    Raises: ConfigError for a column that no row has.
    """
    flat = [flatten(row) for row in rows]
    _check("--columns", columns, flat)
    found = tuple(_picked(name, flat) for name in columns)
    wrapped = Layout(between="\n", wraps=True, from_width=_LEAST_PICKED * len(found))
    folded = Layout(between="\n", wraps=True, folds=True)
    return Table(title=title, columns=found, layouts=(Layout(), wrapped, folded), folded="values")


def _picked(name: str, flat: Sequence[Mapping[str, Any]]) -> Column:
    values = [row.get(name) for row in flat]
    if any(f"{name}_low" in row for row in flat):
        ends = [[row.get(f"{name}_{end}") for end in _ENDS] for row in flat]
        estimates = (
            Estimate(value=value, low=low, high=high)
            for value, (low, high) in zip(values, ends, strict=True)
        )
        return Column(title=name, cells=tuple(map(estimate_cell, estimates)))
    numeric = all(isinstance(value, int | float) or value is None for value in values)
    cells = tuple(Cell(text=_text(value)) for value in values)
    said = tuple(f"{label(name)} {cell.text}" for cell in cells)
    return Column(title=name, cells=cells, numeric=numeric, said=said)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return MISSING if value == "" else words.plain(value)


def marks_column(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Which rows are on the front (•), and for which profiles a row was chosen; nothing unmarked.

    Where there is little room the profiles stand below each other.
    """
    told = [("•" if row.get("front") else "", row.get("chosen_for") or []) for row in rows]
    if not any(on or chosen for on, chosen in told):
        return []
    wide, narrow = (
        Column(
            title="front",
            cells=tuple(Cell(text=f"{on} {sep.join(chosen)}".strip()) for on, chosen in told),
            numeric=False,
            rank=LAST_TO_GO,
            key="front",
        )
        for sep in (", ", "\n")
    )
    return [replace(wide, narrow=narrow)]


def marks_note(document: Mapping[str, Any]) -> str:
    """What the marks mean; empty where no row has one."""
    rows = document["settings"]
    parts = []
    if any(row.get("front") for row in rows):
        parts.append("front: no other setting is both faster and better")
    if any(row.get("chosen_for") for row in rows):
        is_older = document["recommended"]["is_older"]
        older = ", written before the newest images" if is_older else ""
        parts.append(f"names: the profiles that chose a setting ({RECOMMENDED}{older})")
    return "; ".join(parts)


# The document ---------------------------------------------------------------------------------


def settings_parts(document: Mapping[str, Any], shown: ShowOptions = _AS_USUAL) -> Iterator[Part]:
    """A `show` document: one row per setting, then what to be careful about.

    Where `shown` sorts, its rows are in that order already.
    """
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
    for task, members in by_task(rows).items():
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
        yield Text(((note, "dim"),), wraps=True)
    yield from hosted_blocks(rows)
    yield from comparison_blocks(document, rows)
    warnings = list_warnings(document, rows, extra)
    for warning in warnings:
        yield say(("warning ", "yellow"), warning, wraps=True)
    yield from closing_parts(document.get("environments", {}), warnings)


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
