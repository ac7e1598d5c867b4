"""What a search found, as Markdown for a document."""

from collections.abc import Mapping
from typing import Any

from sd35bench.report.markdown import escape_cell
from sd35bench.report.recommend import first_upper
from sd35bench.tune.document import setting_text, with_interval

__all__ = ["tuning_markdown"]

_COLUMNS = ("setting", "n", "latency p50 s", "in the race")


def tuning_markdown(document: Mapping[str, Any]) -> str:
    """Write a `tune` document as Markdown: the answer, what it cost, who else was in the race."""
    best, images = document["recommended"], document["images"]
    answer = f"No setting: {document['stopped']}"
    if best is not None:
        reason = first_upper(best["reason"])
        answer = (
            f"**{escape_cell(document['profile'])}:** {escape_cell(best['headline'])}. {reason}"
        )
    metric = document["objective"].replace("_", " ")
    head = [_COLUMNS[0], metric, *_COLUMNS[1:]]
    lines = [
        f"## Tuned setting from study {escape_cell(document['study'])}",
        "",
        f"{answer}.",
        "",
        f"{first_upper(escape_cell(document['confirmation']))}.",
        "",
        f"{images['used']} images of {document['settings']['tried']} settings; the full grid of"
        f" {document['settings']['grid']} would take {images['exhaustive']}"
        f" ({100 * images['share']:.3g} %). Stopped: {escape_cell(document['stopped'])}."
        " Parentheses are 95 % intervals, clustered by prompt.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(map(escape_cell, _cells(row)))} |" for row in document["tried"]),
    ]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    why = row["status"] if row["why"] is None else f"{row['status']}: {row['why']}"
    return [
        setting_text(row["setting"]),
        with_interval(row["quality"], 2),
        str(row["quality"]["n"]),
        with_interval(row["latency_s"], 3),
        why,
    ]
