"""A plan of how many images would decide, for people: a terminal and Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

from sd35bench import words
from sd35bench.fields import describe
from sd35bench.report.recommend import entries_of
from sd35bench.report.render import MARKDOWN, TERMINAL, WRAPPED, Code, Part, Table, Text, text_table

_TITLES = (
    "profile",
    "task",
    "margin",
    "contenders",
    "prompts x images of each",
    "more images",
    "timed",
    "time",
    "USD",
)


def plan_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A `recommend --plan` document, commands included."""
    entries = entries_of(document)
    rows = [_row(*e) for e in entries]
    hosted = any(row[-1] for row in rows)
    width = len(_TITLES) if hosted else len(_TITLES) - 1
    columns = text_table(_TITLES[:width], (row[:width] for row in rows))
    yield Text(
        ((f"How many images would decide, with study {document['study']} as pilot", "strong"),)
    )
    yield Table(columns=columns, layouts=WRAPPED, frame="padded")
    said = (
        "With them a cheaper setting that is truly equal is shown to be within the margin with a"
        f" probability of {words.percent(document['power'])} (one-sided"
        f" {words.percent(document['level'])}), and latencies that differ by"
        f" {words.percent(document['speed_margin'])} are told apart. One that is truly"
        " worse by half of the margin takes four times as many."
    )
    yield Text((said,), wraps=True)
    for profile, task, entry in entries:
        notes = (f"{profile} ({task}): {note}." for note in _notes(entry))
        yield from (Text((note,), wraps=True, gap=True) for note in notes)
    commands = [c["command"] for _, _, e in entries for c in e["contenders"] if c["more_images"]]
    unique = list(dict.fromkeys(c for c in commands if c is not None))
    if unique:
        yield Code("\n".join(unique), "sh", forms=(TERMINAL, MARKDOWN))


def _row(profile: str, task: str, entry: Mapping[str, Any]) -> list[str]:
    prompts, timed = entry["prompts"], entry["timed"]
    usd = entry["usd"]
    price = entry["usd_per_image"]
    return [
        profile,
        task,
        words.plain(entry["margin"]),
        f"{len(entry['contenders'])} of {entry['pilot']['settings']}",
        "" if prompts is None else f"{prompts} x {entry['images_per_prompt']}",
        "" if entry["more_images"] is None else str(entry["more_images"]),
        _timed(timed),
        "" if entry["seconds"] is None else words.seconds(entry["seconds"]),
        "" if usd is None else f"{words.usd(usd)} ({words.usd(price)} an image)",
    ]


def _timed(timed: Mapping[str, Any] | None) -> str:
    if timed is None:
        return ""
    if timed["images"] is None:
        return "no practicable number"
    starts = "1 start" if timed["starts"] == 1 else f"{timed['starts']} starts"
    return f"{timed['images']} x {starts}"


def _notes(entry: Mapping[str, Any]) -> Iterator[str]:
    """The part of an entry that its row does not say."""
    if entry["why"] is not None:
        yield entry["why"]
    if entry["settled"]:
        named = [describe(s) for s in entry["settled"]]
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        yield f"shown to be beyond the margin already, and given no more images: {shown}"
    timed = entry["timed"]
    if timed is not None and timed["one_start"] and entry["usd"] is None:
        yield (
            "timed within one start only; how far starts differ is not in this pilot, a pilot with"
            " starts=2 would say"
        )
