"""What a search found: for the terminal, and as Markdown for a document."""

from collections.abc import Iterator, Mapping
from typing import Any

from sd35bench import words
from sd35bench.report.render import (
    MARKDOWN,
    TERMINAL,
    WRAPPED,
    Heading,
    Part,
    Table,
    estimate_cell,
    paragraph,
    say,
    text_table,
)
from sd35bench.tune.document import setting_text

_SHOWN = 8
"""Settings that a terminal lists; Markdown has all."""


def tuning_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A `tune` document: the answer, what it cost, who else was in the race."""
    best, images = document["recommended"], document["images"]
    yield Heading(f"Tuned setting from study {document['study']}", forms=(MARKDOWN,))
    if best is None:
        yield say(f"no setting: {document['stopped']}")
        yield paragraph((f"No setting: {document['stopped']}.", "raw"))
    else:
        yield say((document["profile"], "bold"), f": {best['headline']}", wraps=True)
        yield say(best["reason"])
        reason = (f" {words.first_upper(best['reason'])}.", "raw")
        yield paragraph((f"{document['profile']}:", "strong"), f" {best['headline']}.", reason)
    confirmation = f"{words.first_upper(document['confirmation'])}."
    yield paragraph(confirmation)
    share = words.digits(100 * images["share"])
    cost = (
        f"{words.plural(images['used'], 'image')} of"
        f" {words.plural(document['settings']['tried'], 'setting')}; the full grid of"
        f" {document['settings']['grid']} would take {images['exhaustive']} ({share} %)"
    )
    yield say(cost)
    yield say(f"stopped: {document['stopped']}")
    yield say(confirmation)
    yield paragraph(
        f"{cost}. Stopped: {document['stopped']}. Brackets are 95 % intervals, clustered by prompt."
    )
    missing = document["confirm"]["images"]
    if missing:
        yield say(f"{missing} held-out images would confirm it: the same command with --confirm")
    yield _tried(document, TERMINAL, "p50 s", _SHOWN)
    more = len(document["tried"]) - _SHOWN
    if more > 0:
        yield say(f"… and {more} more in tune.json", wraps=True)
    yield _tried(document, MARKDOWN, "latency p50 s", len(document["tried"]))


def _tried(document: Mapping[str, Any], form: str, latency: str, most: int) -> Table:
    """The settings that were tried, and what became of each."""
    metric = document["objective"].replace("_", " ")
    rows = (
        (
            setting_text(row["setting"]),
            estimate_cell(words.read_estimate(row["quality"]), 2),
            str(row["quality"]["n"]),
            estimate_cell(words.read_estimate(row["latency_s"]), 3),
            row["status"] if row["why"] is None else f"{row['status']}: {row['why']}",
        )
        for row in document["tried"][:most]
    )
    columns = text_table(("setting", metric, "n", latency, "in the race"), rows)
    return Table(columns=columns, layouts=WRAPPED, frame="padded", forms=(form,))
