"""A recommendation as Markdown: the answers as a table, then the evidence of each."""

import json
from collections.abc import Sequence
from typing import Any

from sd35bench.fields import describe
from sd35bench.report.recommend import (
    confirmation_text,
    default_cells,
    estimate_text,
    failures_text,
    first_upper,
    front_cell,
    front_note,
    front_sentence,
)

__all__ = ["recommendation_markdown"]

_ANSWERS = ("profile", "task", "setting", "quality", "latency p50", "margin", "held-out prompts")
_OTHERS = ("setting", "quality", "minus the reference", "p (Holm)", "dominated", "why not")
_DEFAULTS = ("default", "setting", "quality", "choice minus it", "takes", "the choice is")
_SHOWN = 8


def recommendation_markdown(document: dict[str, Any]) -> str:
    """Write a `recommend` document as Markdown, commands and API bodies included."""
    entries = [
        (profile, task, entry)
        for profile, tasks in document["profiles"].items()
        for task, entry in tasks.items()
        if entry is not None
    ]
    where = sorted({f"{p['set']} ({p['split']})" for p in document["prompts"]})
    lines = [
        f"## Recommended settings from study {_cell(document['study'])}",
        "",
        *_table(_ANSWERS, [_answer(*e) for e in entries]),
        "",
        f"Chosen on prompts: {_cell(', '.join(where))}. {first_upper(document['confirmation'])}."
        " Brackets are 95 % intervals, clustered by prompt.",
    ]
    for note in (*document["notes"], *document["warnings"]):
        lines += ["", f"Note: {_cell(note)}."]
    for profile, task, entry in entries:
        if entry["setting"] is not None:
            lines += _section(profile, task, entry)
    return "\n".join(lines) + "\n"


def _answer(profile: str, task: str, entry: dict[str, Any]) -> list[str]:
    evidence = entry["evidence"]
    if entry["setting"] is None:
        return [profile, task, f"none: {evidence['reason']}", "", "", "", ""]
    quality = evidence["quality"]
    p50 = evidence["latency_s"]["p50"]
    margin = f"{evidence['margin']:g} against {_reference(evidence)}"
    return [
        profile,
        task,
        describe(entry["setting"]),
        f"{quality['metric']} {estimate_text(quality)} (n={quality['n']})",
        "" if p50 is None else f"{p50:.3g} s (n={evidence['latency_s']['n']})",
        margin,
        confirmation_text(entry["confirmation"]),
    ]


def _reference(evidence: dict[str, Any]) -> str:
    named = evidence["reference"]
    return f"{named}: {describe(evidence['best'])}" if named == "best" else named


def _section(profile: str, task: str, entry: dict[str, Any]) -> list[str]:
    evidence = entry["evidence"]
    lines = [
        "",
        f"### {first_upper(profile)}, {task}",
        "",
        f"{first_upper(evidence['reason'])}. {evidence['settings_compared']} settings compared on"
        f" the same {evidence['n_pairs']} images of {evidence['n_prompts']} prompts."
        f"{failures_text(evidence)} {front_sentence(evidence)}",
    ]
    if evidence["more_images"] is not None:
        lines += ["", f"{first_upper(evidence['more_images']['text'])}."]
    if entry["named_defaults"]:
        lines += ["", *_table(_DEFAULTS, [default_cells(d) for d in entry["named_defaults"]])]
    others = entry["alternatives"]
    if others:
        rows = [_other(o, entry["setting"]) for o in others[:_SHOWN]]
        lines += ["", *_table(_OTHERS, rows), "", f"{first_upper(front_note(evidence))}."]
    if len(others) > _SHOWN:
        lines += ["", f"{len(others) - _SHOWN} more are in recommended.yaml."]
    lines += ["", *_fenced("sh", _commands(entry))]
    if entry["snippet"] is not None:
        lines += ["", *_fenced("python", entry["snippet"])]
    api = entry["api"]
    if api["body"] is None:
        return [*lines, "", f"No API body: {api['why_not']}."]
    return [*lines, "", *_fenced("json", json.dumps(api["body"], indent=2, ensure_ascii=False))]


def _commands(entry: dict[str, Any]) -> str:
    adding = [
        f"# adds the default of {d['name']} to the study\n{d['command']}"
        for d in entry["named_defaults"]
        if d["command"] is not None
    ]
    return "\n".join([entry["command"], *adding])


def _other(other: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    test = other["non_inferiority"]
    return [
        describe(other["setting"], [chosen]),
        estimate_text(other["quality"]),
        estimate_text(other["difference_from_best"], "+"),
        "" if test is None else f"{test['p_holm']:.2g}",
        front_cell(other),
        other["why_not"],
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return head + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(text: str) -> str:
    """Text that stays one cell, whatever a prompt or a name holds."""
    flat = " ".join(text.split())
    for mark in ("\\", "|", "`", "<", ">", "*", "_"):
        flat = flat.replace(mark, f"\\{mark}" if mark in "\\|`*_" else f"&{_NAMED[mark]};")
    return flat


_NAMED = {"<": "lt", ">": "gt"}


def _fenced(language: str, text: str) -> list[str]:
    """A code block whose fence is longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{language}", text.rstrip("\n"), fence]
