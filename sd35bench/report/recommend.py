"""A recommendation for people: `recommended.yaml`, and the same on a terminal."""

import json
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35bench.disk import write_atomic
from sd35bench.fields import describe
from sd35bench.recommend.pareto import SAME_COST

__all__ = [
    "confirmation_text",
    "default_cells",
    "estimate_text",
    "failures_text",
    "first_upper",
    "front_cell",
    "front_note",
    "front_sentence",
    "print_confirming",
    "print_recommendation",
    "share_text",
    "write_recommended",
]

_SHOWN_ALTERNATIVES = 5


def write_recommended(study: Any, document: dict[str, Any]) -> Path:
    """Write the study's recommended.yaml, whole or not at all, and return its path.

    Raises: DiskFull, StoreError.
    """
    path = study.path / "recommended.yaml"
    header = "# Written by `sd35bench recommend`. Settings per profile, with their evidence.\n"
    text = yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    write_atomic(path, (header + text).encode())
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
    console.print(f"\nChosen on prompts: {escape(', '.join(where))}.", soft_wrap=True)
    console.print(f"{escape(first_upper(document['confirmation']))}.", soft_wrap=True)
    images = document["confirm"]["images"]
    if images:
        console.print(
            f"{images} held-out images would confirm it: sd35bench recommend"
            f" {escape(document['study'])} --confirm",
            soft_wrap=True,
        )
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
        f" images of {evidence['n_prompts']} prompts.{failures_text(evidence)}"
    )
    console.print(front_sentence(evidence), soft_wrap=True)
    for line in _confirmed_lines(group):
        console.print(escape(line), soft_wrap=True)
    for line in _open_lines(group):
        console.print(escape(line), soft_wrap=True)
    _print_alternatives(entry, console)
    _print_defaults(entry, console)
    console.print(f"\n[dim]$[/dim] {escape(entry['command'])}", soft_wrap=True, highlight=False)
    if entry["snippet"] is not None:
        console.print(f"\n{escape(entry['snippet'])}", soft_wrap=True, highlight=False)
    _print_api(entry["api"], console)


def print_confirming(document: dict[str, Any], console: Console) -> None:
    """Print the commands that make the held-out images that are not there, one a line."""
    confirm = document["confirm"]
    if not confirm["commands"]:
        console.print(f"{escape(first_upper(document['confirmation']))}.", soft_wrap=True)
        console.print("no held-out image is missing")
        return
    console.print(f"{confirm['images']} held-out images are missing; these commands make them:")
    for run in confirm["commands"]:
        console.print(escape(run["command"]), soft_wrap=True, highlight=False)


def confirmation_text(confirmation: dict[str, Any]) -> str:
    """One choice's confirmation in a sentence, without a full stop."""
    status = confirmation["status"]
    if status == "impossible":
        return f"not confirmed: {confirmation['why']}"
    if status == "nothing to hold it against":
        return "not confirmed: there is nothing within the limits to hold it against"
    if status == "not run":
        return "not confirmed on held-out prompts: they have not been run"
    if status == "not run enough":
        run, wanted = confirmation["n_prompts"], confirmation["wanted"]
        return f"not confirmed: held-out prompts not run enough, {run} of the planned {wanted}"
    found = estimate_text(confirmation["difference"], "+")
    text = (
        f"{status} on {confirmation['n_prompts']} held-out prompts"
        f" ({confirmation['n_pairs']} images): {found} against"
        f" {describe(confirmation['against'])}, margin {confirmation['margin']:g}"
    )
    more = confirmation["more"]
    if more is None:
        return text
    return (
        f"{text}; about {more['images']} more images would decide, in a new plan on other prompts:"
        " adding to these would be looking twice"
    )


def default_cells(default: dict[str, Any]) -> list[str]:
    """A named default as cells: name, setting, quality, the choice minus it, speed, verdict."""
    strength = default["prompt_strength"]
    name = f"{default['steps']} steps, cfg {default['cfg']:g}"
    name += "" if strength is None else f", prompt_strength {strength:g}"
    name += "" if default["sampler"] == "euler" else f", {default['sampler']}"
    name += ", skip-layer guidance" if default["skip_layer_guidance"] else ""
    verdict = default["verdict"]
    if default["status"] == "not in the study":
        verdict = "not in the study"
    elif default["on"] is not None:
        verdict = f"{verdict} (on {default['on']})"
    ratio = default["speed_ratio"]
    speed = "" if ratio is None else f"{ratio['value']:.2f}x as long"
    quality = estimate_text(default["quality"])
    return [
        default["name"],
        name,
        quality,
        estimate_text(default["difference"], "+"),
        speed,
        verdict,
    ]


def first_upper(text: str) -> str:
    """A sentence's beginning; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def _confirmed_lines(group: list[tuple[str, str, Any]]) -> list[str]:
    """What held-out prompts say, once per claim."""
    found: dict[str, list[str]] = {}
    for profile, _, entry in group:
        found.setdefault(confirmation_text(entry["confirmation"]), []).append(profile)
    return [f"{' and '.join(names)}: {text}." for text, names in found.items()]


def _open_lines(group: list[tuple[str, str, Any]]) -> list[str]:
    """What more images would decide, once per question."""
    found = [e["evidence"]["more_images"] for _, _, e in group]
    return list(dict.fromkeys(f"{first_upper(m['text'])}." for m in found if m is not None))


def _print_defaults(entry: dict[str, Any], console: Console) -> None:
    if not entry["named_defaults"]:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = (
        "named default",
        "setting",
        "its quality",
        "choice minus it",
        "takes",
        "the choice is",
    )
    for column in columns:
        table.add_column(column)
    for default in entry["named_defaults"]:
        table.add_row(*map(escape, default_cells(default)))
    console.print(table)
    for default in entry["named_defaults"]:
        if default["command"] is not None:
            console.print(
                f"[dim]add {escape(default['name'])}:[/dim] {escape(default['command'])}",
                soft_wrap=True,
                highlight=False,
            )


def _print_api(api: dict[str, Any], console: Console) -> None:
    if api["body"] is None:
        console.print(f"\nNo API body: {escape(api['why_not'])}.", soft_wrap=True)
        return
    text = json.dumps(api["body"], ensure_ascii=False)
    console.print(f"\nPOST /v1/prediction {escape(text)}", soft_wrap=True, highlight=False)


def _print_alternatives(entry: dict[str, Any], console: Console) -> None:
    if not entry["alternatives"]:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    speed = _unit(entry["evidence"])
    for column in ("not chosen", "quality", "minus the best", speed, "dominated", "why not"):
        table.add_column(column)
    for other in entry["alternatives"][:_SHOWN_ALTERNATIVES]:
        table.add_row(*map(escape, _cells(other, entry["setting"])))
    console.print(table)
    more = len(entry["alternatives"]) - _SHOWN_ALTERNATIVES
    if more > 0:
        console.print(f"… and {more} more in recommended.yaml")
    console.print(f"[dim]{front_note(entry['evidence'])}[/dim]", soft_wrap=True)


def _unit(evidence: dict[str, Any]) -> str:
    return "p50 s" if evidence["speed_basis"] == "latency_s" else "evaluations"


def _cells(other: dict[str, Any], chosen: dict[str, Any]) -> list[str]:
    speed = "" if other["speed"] is None else f"{other['speed']:.3g}"
    quality = estimate_text(other["quality"])
    difference = estimate_text(other["difference_from_best"], "+")
    name = describe(other["setting"], [chosen])
    return [name, quality, difference, speed, front_cell(other), other["why_not"]]


def estimate_text(entry: dict[str, Any] | None, sign: str = "") -> str:
    """A value with its 95 % interval; empty where there is none."""
    if entry is None:
        return ""
    value = format(entry["value"], f"{sign}.2f")
    if entry["ci95"] is None:
        return value
    low, high = (format(end, f"{sign}.2f") for end in entry["ci95"])
    return f"{value} [{low}, {high}]"


def failures_text(evidence: dict[str, Any]) -> str:
    """What of the choice's trials failed, as one more sentence; empty where none did."""
    failed = evidence["failed"]
    if not failed:
        return ""
    return f" {failed} of its {evidence['n_trials']} trials failed, which count as 0."


def front_cell(entry: dict[str, Any]) -> str:
    """Its probability of being dominated, and whether it is on the front; empty if not compared."""
    if entry["on_front"] is None:
        return ""
    share = entry["p_dominated"]
    said = "" if share is None else share_text(share)
    return f"{said} (front)".strip() if entry["on_front"] else said


def front_sentence(evidence: dict[str, Any]) -> str:
    """Where the choice lies beside the front."""
    where = "on" if evidence["on_front"] else "not on"
    share = evidence["p_dominated"]
    sure = "" if share is None else f"; dominated in {share_text(share)} of resamples"
    return f"The choice is {where} the Pareto front of quality and {_cost_word(evidence)}{sure}."


def front_note(evidence: dict[str, Any]) -> str:
    """What the column about the front means."""
    return (
        "dominated: in how many of"
        f" {evidence['resamples']} resamples of the prompts another setting is no worse and no"
        " slower, and better in one of the two; front: in what was measured, none is."
        f" {100 * SAME_COST:.0f} % of {_cost_word(evidence)} is no difference"
    )


def share_text(share: float) -> str:
    """A share of resamples in percent; never 0 or 100, which no number of them shows."""
    if share < 0.001:
        return "< 0.1 %"
    if share > 0.999:
        return "> 99.9 %"
    return f"{100 * share:.{0 if 0.01 <= share <= 0.99 else 1}f} %"


def _cost_word(evidence: dict[str, Any]) -> str:
    return "latency" if evidence["speed_basis"] == "latency_s" else "evaluations"


class _Dumper(yaml.SafeDumper):
    """Plain YAML without anchors, long texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)
