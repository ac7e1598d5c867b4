"""`show` as Markdown: the form in which small tables are published under results/."""

from collections.abc import Mapping
from typing import Any

from sd35bench.report.blocks import Block, comparison_blocks
from sd35bench.report.hosted import hosted_blocks, network_note
from sd35bench.report.provenance import list_warnings
from sd35bench.report.rows import Row, read_rows, varying_fields
from sd35bench.report.tables import setting_columns

__all__ = ["environment_lines", "escape_cell", "settings_markdown"]

_FACTS = (
    *("sd35bench", "commit", "dirty", "torch", "diffusers", "cpu_model", "gpu_name", "threads"),
    "service",
)


def settings_markdown(document: Mapping[str, Any]) -> str:
    """Render a `show` document: one table per task, then environment and warnings."""
    rows = read_rows(document)
    extra = varying_fields(rows)
    lines = [f"# Study {escape_cell(str(document['study']))}", "", _about(rows), ""]
    for task in dict.fromkeys(row.task for row in rows):
        lines += [f"## {task}", "", *_table([r for r in rows if r.task == task], extra), ""]
    lines += [
        "Latency: median of images made one at a time, from request to encoded file. Brackets:"
        " 95 % intervals, resampled by prompt. n: images." + _rates_note(rows),
        "",
    ]
    if note := network_note(rows):
        lines += [note, ""]
    for block in (*hosted_blocks(rows), *comparison_blocks(document, rows)):
        lines += _block(block)
    lines += environment_lines(document.get("environments", {}))
    lines += [f"Warning: {escape_cell(text)}" for text in list_warnings(document, rows, extra)]
    return "\n".join(lines).rstrip() + "\n"


def environment_lines(environments: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ran a document's images: a line for each unlike environment."""
    facts = [
        ", ".join(f"{name} {environment[name]}" for name in _FACTS if environment.get(name))
        for environment in environments.values()
    ]
    return [f"Environment: {text}." for text in dict.fromkeys(facts)]


def _about(rows: tuple[Row, ...]) -> str:
    names = ("model", "backend")
    shared = [", ".join(sorted({str(r.setting.get(n)) for r in rows})) for n in names]
    sizes = sorted({f"{r.setting.get('width')}×{r.setting.get('height')} px" for r in rows})
    return " · ".join(escape_cell(text) for text in (*shared, ", ".join(sizes)))


def _table(rows: list[Row], extra: tuple[str, ...]) -> list[str]:
    columns = setting_columns(rows, extra, stacked=False)
    head = [escape_cell(column.title) for column in columns]
    rule = ["---:" if column.numeric else "---" for column in columns]
    body = [[escape_cell(column.cells[i].plain) for column in columns] for i in range(len(rows))]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


def _rates_note(rows: tuple[Row, ...]) -> str:
    if all(row.achieved_tflops is None for row in rows):
        return ""
    return (
        " TFLOP/s: operations that the image needs over its time, in brackets the share of the rate"
        " at which this machine multiplies matrices of that precision."
    )


def _block(block: Block) -> list[str]:
    head = [escape_cell(title) for title, _ in block.columns]
    rule = ["---:" if numeric else "---" for _, numeric in block.columns]
    body = [[escape_cell(text) for text in row] for row in block.rows]
    lines = [f"| {' | '.join(line)} |" for line in (head, rule, *body)]
    return [
        f"## {escape_cell(block.title)}",
        "",
        *lines,
        "",
        *([escape_cell(block.note), ""] if block.note else []),
    ]


def escape_cell(text: str) -> str:
    """Keep a cell on one line, and its text from being read as markup."""
    text = " ".join(text.split())
    for mark in ("\\", "|", "<", "`", "*", "_"):
        text = text.replace(mark, f"\\{mark}")
    return text
