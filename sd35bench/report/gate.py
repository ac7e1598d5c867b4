"""A comparison in words: for the terminal, for a Markdown step summary, for JUnit's messages."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35bench.report.markdown import escape_cell

__all__ = ["compare_markdown", "failed_gates", "figure_cells", "figure_text", "print_comparison"]

_COLUMNS = ("dimension", "figure", "baseline", "candidate", "effect", "95 %", "margin", "n")
_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow", "not applicable": "dim"}


def compare_markdown(document: dict[str, Any]) -> str:
    """Render a `compare` document as GitHub's step summary shows it."""
    whole = document["verdict"]
    lines = [
        f"# {str(whole).capitalize()}: {escape_cell(document['candidate'])} against"
        f" {escape_cell(document['baseline'])}",
        "",
        f"Policy `{document['policy']}`, {document['n_pairs']} pairs. {_meaning(document)}",
        "",
    ]
    lines += [f"**{escape_cell(text)}**\n" for text in failed_gates(document)]
    for comparison in document["comparisons"]:
        lines += [f"## {escape_cell(comparison['title'])}", "", about(comparison), ""]
        head = ["verdict", *_COLUMNS]
        lines += [_line(head), _line(["---"] * 4 + ["---:"] * 5)]
        for dimension, found in comparison["dimensions"].items():
            cells = [[f["verdict"], dimension, *figure_cells(f)] for f in found["figures"]]
            rows = cells if cells else [[found["verdict"], dimension, *["–"] * 7]]
            lines += [_line([escape_cell(str(c)) for c in row]) for row in rows]
        lines += ["", *_reasons(comparison), ""]
    lines += [f"Warning: {escape_cell(text)}\n" for text in document["warnings"]]
    return "\n".join(lines).rstrip() + "\n"


def print_comparison(document: dict[str, Any], console: Console) -> None:
    """Print the verdict first, then each setting's figures and what differs."""
    whole = document["verdict"]
    console.print(
        f"[bold {_COLOURS[whole]}]{whole}[/]: {escape(document['candidate'])} against"
        f" {escape(document['baseline'])}, policy {escape(document['policy'])},"
        f" {document['n_pairs']} pairs"
    )
    for text in failed_gates(document):
        console.print(f"[{_COLOURS['fail']}]{escape(text)}[/]", soft_wrap=True)
    for comparison in document["comparisons"]:
        console.print(f"\n[bold]{escape(comparison['title'])}[/bold]")
        console.print(escape(about(comparison)), soft_wrap=True)
        console.print(_table(comparison))
        for reason in _reasons(comparison):
            console.print(escape(reason.removeprefix("- ")), soft_wrap=True)
    for text in document["warnings"]:
        console.print(f"[yellow]warning[/yellow] {escape(text)}", soft_wrap=True)


def failed_gates(document: Mapping[str, Any]) -> list[str]:
    """What failed the comparison as a whole, beside its dimensions."""
    failed = (item for item in document["gate"].items() if item[1]["verdict"] == "fail")
    return [f"{name}: fail: {found['reason']}" for name, found in failed]


def _table(comparison: dict[str, Any]) -> Table:
    """Figures that were measured, narrow enough for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "figure", "baseline → candidate", "effect, 95 %", "margin", "n"):
        table.add_column(name, no_wrap=name == "")
    for dimension, found in comparison["dimensions"].items():
        for figure in found["figures"]:
            if figure["verdict"] == "not applicable":
                continue
            name, before, after, effect, interval, margin, n = map(escape, figure_cells(figure))
            verdict = f"[{_COLOURS[figure['verdict']]}]{figure['verdict']}[/]"
            sides = f"{before} → {after}"
            table.add_row(verdict, f"{dimension} {name}", sides, f"{effect} {interval}", margin, n)
    return table


def about(comparison: dict[str, Any]) -> str:
    """Pairs, prompts, and the fields in which the sides differ."""
    fields = {**comparison["differs"], **comparison["environment_differs"]}
    said = [f"{name}: {_short(a)} → {_short(b)}" for name, (a, b) in fields.items()]
    differs = "; ".join(said) if said else "nothing"
    return (
        f"{comparison['n_pairs']} pairs of {comparison['n_prompts']} prompts. Differs: {differs}."
    )


def figure_cells(figure: dict[str, Any]) -> list[str]:
    """Name, baseline, candidate, effect, interval, margin and n of a figure."""
    ratio = figure["kind"] == "ratio"
    ends = figure["ci95"]
    share = figure["unit"] == "share of trials"
    margin = f"×{figure['margin']:g}" if ratio else _amount(figure["margin"], share)
    return [
        str(figure["name"]),
        _value(figure["baseline"], figure["unit"]),
        _value(figure["candidate"], figure["unit"]),
        _effect(figure["effect"], ratio, share),
        "–" if ends is None else f"[{', '.join(_effect(end, ratio, share) for end in ends)}]",
        margin,
        str(figure["n"]) if figure["n"] else "–",
    ]


def figure_text(figure: dict[str, Any]) -> str:
    """One figure on one line."""
    if figure["effect"] is None:
        return f"{figure['name']}: {figure['verdict']}: {figure['note']}"
    name, before, after, effect, interval, margin, n = figure_cells(figure)
    text = (
        f"{name}: {figure['verdict']}; baseline {before}, candidate {after}, effect {effect}"
        f" {interval}, margin {margin}, n {n}"
    )
    return text if figure["note"] is None else f"{text}; {figure['note']}"


def _reasons(comparison: dict[str, Any]) -> list[str]:
    """Why a dimension did not pass, and the notes of figures."""
    found = []
    for name, dimension in comparison["dimensions"].items():
        if dimension["verdict"] in ("fail", "not applicable"):
            needed = ", required" if dimension["required"] else ""
            found.append(f"- {name}{needed}: {dimension['verdict']}: {dimension['reason']}")
        notes = [f["note"] for f in dimension["figures"] if f["note"] and _worth_saying(f)]
        found += [f"- {name}: {note}" for note in dict.fromkeys(notes)]
        absent = [f["name"] for f in dimension["figures"] if _unscored(f)]
        if absent:
            found.append(f"- {name}: scored on neither side: {', '.join(absent)}")
    return found


def _worth_saying(figure: dict[str, Any]) -> bool:
    """Whether a note is about a measured number, or says why a set metric was refused."""
    return figure["effect"] is not None or figure["unit"] == "set metric"


def _unscored(figure: dict[str, Any]) -> bool:
    """Whether a metric that the policy names is on neither side."""
    return figure["verdict"] == "not applicable" and figure["unit"] == "metric"


def _meaning(document: dict[str, Any]) -> str:
    if document["verdict"] != "undecided":
        return "Brackets: 95 % intervals; a figure fails where its interval is beyond the margin."
    passes = "fails" if document["undecided_fails"] else "passes with a warning"
    return f"Undecided {passes} under this policy: the data do not show either."


def _effect(value: float | None, ratio: bool, share: bool) -> str:
    if value is None:
        return "–"
    if ratio:
        return f"×{value:.3f}"
    return f"{'' if value < 0 else '+'}{_amount(value, share)}"


def _amount(value: float, share: bool) -> str:
    return f"{100 * value:.3g} %" if share else f"{value:.3g}"


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "share of trials":
        return _amount(value, True)
    return f"{value:.4g}{' s' if unit == 's' else ''}"


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
