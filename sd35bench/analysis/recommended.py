"""A recommendation for people: `recommended.yaml`, and the same on a terminal."""

import os
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_recommendation", "write_recommended"]

_SHOWN_ALTERNATIVES = 5


def write_recommended(study: Any, document: dict[str, Any]) -> Path:
    """Write the study's recommended.yaml, whole or not at all, and return its path."""
    path = study.path / "recommended.yaml"
    part = path.with_name(f".recommended.{os.getpid()}.tmp")
    header = "# Written by `sd35bench recommend`. Settings per profile, with their evidence.\n"
    text = yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    with open(part, "w", encoding="utf-8") as file:
        file.write(header + text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    return path


def print_recommendation(document: dict[str, Any], console: Console) -> None:
    """Print the answers first, then per setting the evidence and how to reproduce it."""
    console.print(f"[bold]Recommended settings[/bold] from study {escape(document['study'])}\n")
    entries = [
        (profile, task, entry)
        for profile, tasks in document["profiles"].items()
        for task, entry in tasks.items()
        if entry is not None
    ]
    answers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for profile, task, entry in entries:
        headline = escape(entry["evidence"]["headline"])
        answers.add_row(f"[bold]{escape(profile)}[/bold]", task, headline)
    console.print(answers)
    where = sorted({f"{p['set']} ({p['split']})" for p in document["prompts"]})
    held_out = "" if document["confirmed"] else "; not confirmed on prompts it never saw"
    console.print(f"\nChosen on prompts: {escape(', '.join(where))}{held_out}.")
    for note in (*document["notes"], *document["warnings"]):
        console.print(f"[yellow]note[/yellow] {escape(note)}")
    for group in _by_setting(entries):
        _print_setting(group, console)


def _by_setting(entries: list[tuple[str, str, Any]]) -> list[list[tuple[str, str, Any]]]:
    """Put entries that chose the same setting together."""
    groups: dict[Any, list[tuple[str, str, Any]]] = {}
    for entry in entries:
        if entry[2]["setting"] is not None:
            groups.setdefault((entry[1], entry[2]["setting_id"]), []).append(entry)
    return list(groups.values())


def _print_setting(group: list[tuple[str, str, Any]], console: Console) -> None:
    """Print one setting: which profiles chose it and why, the others, command and snippet."""
    _, task, entry = group[-1]
    names = " and ".join(profile for profile, _, _ in group)
    console.print()
    console.rule(f"[bold]{escape(names)}, {task}[/bold]", align="left")
    for profile, _, each in group:
        console.print(f"{escape(profile)}: {escape(each['evidence']['reason'])}.")
    evidence = entry["evidence"]
    console.print(
        f"{evidence['settings_compared']} settings compared on the same {evidence['n_pairs']}"
        f" images of {evidence['n_prompts']} prompts."
    )
    _print_alternatives(entry, console)
    console.print(f"\n[dim]$[/dim] {escape(entry['command'])}", soft_wrap=True, highlight=False)
    if entry["snippet"] is not None:
        console.print(f"\n{escape(entry['snippet'])}", soft_wrap=True, highlight=False)


def _print_alternatives(entry: dict[str, Any], console: Console) -> None:
    if not entry["alternatives"]:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    speed = _unit(entry["evidence"])
    for column in ("not chosen", "quality", "minus the best", speed, "why not"):
        table.add_column(column)
    for other in entry["alternatives"][:_SHOWN_ALTERNATIVES]:
        table.add_row(*map(escape, _cells(other)))
    console.print(table)
    more = len(entry["alternatives"]) - _SHOWN_ALTERNATIVES
    if more > 0:
        console.print(f"… and {more} more in recommended.yaml")


def _unit(evidence: dict[str, Any]) -> str:
    return "p50 s" if evidence["speed_basis"] == "latency_s" else "evaluations"


def _cells(other: dict[str, Any]) -> list[str]:
    s = other["setting"]
    name = f"{s['steps']} steps, cfg {s['cfg']:g}"
    if s["prompt_strength"] is not None:
        name += f", strength {s['prompt_strength']:g}"
    speed = "" if other["speed"] is None else f"{other['speed']:.3g}"
    quality, difference = _estimate(other["quality"]), _estimate(other["difference_from_best"], "+")
    return [name, quality, difference, speed, other["why_not"]]


def _estimate(entry: dict[str, Any] | None, sign: str = "") -> str:
    if entry is None:
        return ""
    value = format(entry["value"], f"{sign}.2f")
    if entry["ci95"] is None:
        return value
    low, high = (format(end, f"{sign}.2f") for end in entry["ci95"])
    return f"{value} [{low}, {high}]"


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors, long texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)
