"""Tables for a terminal: `show` as a person wants to read it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sd35bench.report.blocks import Block, comparison_blocks, split_interval
from sd35bench.report.figures import (
    MISSING,
    Estimate,
    column_decimals,
    decimals_for,
    format_bytes,
    format_interval,
    format_number,
    format_plain,
)
from sd35bench.report.hosted import hosted_blocks, network_note
from sd35bench.report.provenance import list_warnings
from sd35bench.report.rows import (
    Row,
    failed_text,
    metric_label,
    metric_names,
    read_rows,
    usd_text,
    varying_fields,
)

__all__ = ["Column", "print_settings", "setting_columns"]

# Columns of this rank and above are left out before intervals move below their values.
_EXTRA = 3


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, one text per row, and how dear it is (0 is never left out)."""

    title: str
    cells: list[Text]
    rank: int = 0
    numeric: bool = True


def print_settings(document: Mapping[str, Any], console: Console) -> None:
    """Print a `show` document: one row per setting, then what to be careful about.

    On a narrow terminal intervals move below their values, and columns that matter least are left
    out and named.
    """
    rows = read_rows(document)
    console.print(_title(document, rows))
    if not rows:
        console.print("no trials yet")
    extra = varying_fields(rows)
    for task in dict.fromkeys(r.task for r in rows):
        _print_task([r for r in rows if r.task == task], extra, console)
    if any(r.latency is not None for r in rows):
        console.print(
            "latency: median of images made one at a time; brackets: 95 % intervals", style="dim"
        )
    if note := network_note(rows):
        console.print(Text(note, style="dim"))
    for block in (*hosted_blocks(rows), *comparison_blocks(document, rows)):
        _print_block(block, console)
    for warning in list_warnings(document, rows, extra):
        console.print(Text.assemble(("warning ", "yellow"), warning))


def _title(document: Mapping[str, Any], rows: Sequence[Row]) -> Text:
    """Study, and what all rows share."""
    models = sorted({str(r.setting.get("model")) for r in rows})
    backends = sorted({str(r.setting.get("backend")) for r in rows})
    about = [", ".join(models), ", ".join(backends), f"{len(rows)} settings"] if rows else []
    return Text.assemble((str(document["study"]), "bold"), "  ", " · ".join(about))


def _print_task(rows: list[Row], extra: Sequence[str], console: Console) -> None:
    stacked, shown, left_out = _layout(rows, extra, console.width)
    table = Table(title=rows[0].task, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for column in shown:
        justify = "right" if column.numeric else "left"
        table.add_column(escape(column.title), justify=justify, no_wrap=not stacked)
    for i in range(len(rows)):
        table.add_row(*(column.cells[i] for column in shown))
    console.print()
    console.print(table)
    if left_out:
        names = ", ".join(c.title.replace("\n", " ") for c in left_out)
        console.print(f"too narrow for: {names} (--json has them)", style="dim")


def _print_block(block: Block, console: Console) -> None:
    """Print a block; where it is too wide without its intervals, or last columns, and says so."""
    shown, left_out = _fit_block(block, console.width)
    table = Table(title=escape(block.title), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for column in shown:
        table.add_column(
            escape(column.title), justify="right" if column.numeric else "left", no_wrap=True
        )
    for i in range(len(block.rows)):
        table.add_row(*(column.cells[i] for column in shown))
    console.print()
    console.print(table)
    if block.note:
        console.print(Text(block.note, style="dim"))
    if left_out:
        console.print(f"too narrow for: {', '.join(left_out)} (--json has them)", style="dim")


def _fit_block(block: Block, width: int) -> tuple[list[Column], list[str]]:
    """Columns that fit: intervals beside the values, below them, or left out; then fewer columns.

    The columns that name a row (those before the first figure) are never left out.
    """
    for between in (" ", "\n", None):
        columns = _block_columns(block, between)
        if _width(columns) <= width:
            return columns, []
    shown, _ = _fit(_block_columns(block, None), width)
    titles = [c.title for c in shown]
    intervals = any(split_interval(cell)[1] for row in block.rows for cell in row)
    left_out = [title for title, _ in block.columns if title not in titles]
    return shown, ["intervals", *left_out] if intervals else left_out


def _block_columns(block: Block, between: str | None) -> list[Column]:
    named = next((i for i, (_, numeric) in enumerate(block.columns) if numeric), 0)
    return [
        Column(
            title,
            [_block_cell(row[i], between) for row in block.rows],
            rank=max(0, i - named),
            numeric=numeric,
        )
        for i, (title, numeric) in enumerate(block.columns)
    ]


def _block_cell(text: str, between: str | None) -> Text:
    value, interval = split_interval(text)
    if between is None or not interval:
        return Text(value)
    return Text.assemble(value, (between + interval, "dim"))


def _layout(
    rows: list[Row], extra: Sequence[str], width: int
) -> tuple[bool, list[Column], list[Column]]:
    """Intervals beside their values if only extras must go for it, else below them."""
    shown, left_out = _fit(setting_columns(rows, extra, stacked=False), width)
    if _width(shown) <= width and all(c.rank >= _EXTRA for c in left_out):
        return False, shown, left_out
    return True, *_fit(setting_columns(rows, extra, stacked=True), width)


def setting_columns(rows: list[Row], extra: Sequence[str], stacked: bool) -> list[Column]:
    """Columns of a table of settings; `stacked` puts intervals below their values."""
    columns = [_field(name, rows) for name in extra if name == "backend"]
    columns.append(_plain("steps", rows, lambda r: format_plain(r.steps)))
    columns.append(_plain("cfg", rows, lambda r: format_plain(r.cfg)))
    if any(r.prompt_strength is not None for r in rows):
        columns.append(_plain("strength", rows, lambda r: format_plain(r.prompt_strength)))
    columns += [_field(name, rows) for name in extra if name != "backend"]
    columns.append(_plain("n", rows, lambda r: str(r.n)))
    measured = [m for m in metric_names(rows) if any(_has_value(r, m) for r in rows)]
    refused = [m for m in metric_names(rows) if m not in measured and _needs(rows, m)]
    for rank, name in enumerate((*measured, *refused)):
        cells = _estimates([r.metrics.get(name) for r in rows], stacked, most=4)
        label = metric_label(name)
        title = label.replace(" ", "\n", 1) if stacked else label
        columns.append(Column(title, cells, rank if name in measured else _EXTRA))
    latency = _estimates([r.latency for r in rows], stacked, most=3)
    columns.append(Column("latency s", latency))
    columns += _against_reference(rows, stacked)
    if any(r.target_ratio is not None for r in rows):
        ratio = _plain("× target", rows, lambda r: format_number(r.target_ratio, 2))
        columns.append(Column(ratio.title, ratio.cells, 4))
    if any(r.usd_per_image is not None for r in rows):
        columns.append(Column("USD/image", [Text(usd_text(r)) for r in rows], 1))
    columns += _memory(rows)
    if any(r.failed for r in rows):
        columns.append(_plain("failed", rows, failed_text))
    return columns


def _has_value(row: Row, metric: str) -> bool:
    found = row.metrics.get(metric)
    return found is not None and found.value is not None


def _needs(rows: Sequence[Row], metric: str) -> bool:
    return any(r.metrics[metric].needs is not None for r in rows if metric in r.metrics)


def _plain(title: str, rows: Sequence[Row], text: Callable[[Row], str]) -> Column:
    return Column(title, [Text(text(r)) for r in rows])


def _field(name: str, rows: Sequence[Row]) -> Column:
    texts = [r.text(name) for r in rows]
    cells = [Text(t if len(t) <= 20 else t[:8] + "…") for t in texts]
    return Column(name.replace("_", " "), cells, numeric=False)


def _against_reference(rows: Sequence[Row], stacked: bool) -> list[Column]:
    """Speed and drift against the reference backend, and the rate against the machine's limit."""
    columns = []
    if any(r.speedup is not None for r in rows):
        speedups = [_value_only(r.speedup) if stacked else r.speedup for r in rows]
        most = 3 if network_note(rows) else 2  # what is far away is a small share
        columns.append(Column("× eager", _estimates(speedups, stacked, most=most), 1))
    if any(r.psnr_db is not None for r in rows):
        cells = _estimates([_value_only(r.psnr_db) for r in rows], stacked, most=1)
        same = [
            Text("identical") if r.identical_pairs else c for r, c in zip(rows, cells, strict=True)
        ]
        columns.append(Column("PSNR dB", same, 2))
    if any(r.achieved_tflops is not None for r in rows):
        columns.append(Column("TFLOP/s", [Text(_rate(r)) for r in rows], 3))
    return columns


def _value_only(estimate: Estimate | None) -> Estimate | None:
    """Without its interval, which --json has."""
    return None if estimate is None else Estimate(value=estimate.value, n=estimate.n)


def _rate(row: Row) -> str:
    if row.achieved_tflops is None:
        return MISSING
    digits = decimals_for(Estimate(value=row.achieved_tflops))
    share = "" if row.limit_fraction is None else f" ({100 * row.limit_fraction:.0f} %)"
    return format_number(row.achieved_tflops, digits) + share


def _memory(rows: Sequence[Row]) -> list[Column]:
    columns = []
    if any(r.peak_vram_bytes is not None for r in rows):
        vram = _plain("VRAM", rows, lambda r: format_bytes(r.peak_vram_bytes))
        columns.append(Column(vram.title, vram.cells, 5))
    rss = _plain("peak RSS", rows, lambda r: format_bytes(r.peak_rss_bytes))
    compared = len({r.setting.get("backend") for r in rows}) > 1
    return [*columns, Column(rss.title, rss.cells, 2 if compared else 6)]


def _estimates(estimates: Sequence[Estimate | None], stacked: bool, *, most: int) -> list[Text]:
    decimals = min(most, column_decimals(estimates))
    return [_estimate(e, decimals, stacked) for e in estimates]


def _estimate(estimate: Estimate | None, decimals: int, stacked: bool) -> Text:
    if estimate is None:
        return Text(MISSING)
    if estimate.value is None:
        needs = MISSING if estimate.needs is None else f"needs n ≥ {estimate.needs:,}"
        return Text(needs, style="dim")
    interval = format_interval(estimate, decimals)
    between = "\n" if stacked else " "
    value = format_number(estimate.value, decimals)
    return Text.assemble(value, (between + interval if interval else "", "dim"))


def _fit(columns: list[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Leave out the least important columns until the rest fits into `width` characters."""
    shown = list(columns)
    while _width(shown) > width and any(c.rank for c in shown):
        least = max(c.rank for c in shown)
        shown.remove([c for c in shown if c.rank == least][-1])
    # What had to go for a wide column may fit after that has gone.
    for column in sorted((c for c in columns if c not in shown), key=lambda c: c.rank):
        more = [c for c in columns if c in shown or c is column]
        if _width(more) <= width:
            shown = more
    return shown, [c for c in columns if c not in shown]


def _width(columns: Sequence[Column]) -> int:
    """Characters that a table of these columns takes: contents, padding and borders."""
    inner = (max(_longest(Text(c.title)), *map(_longest, c.cells)) for c in columns)
    return sum(inner) + 3 * (len(columns) - 1)


def _longest(text: Text) -> int:
    return max(len(line) for line in text.plain.split("\n"))
