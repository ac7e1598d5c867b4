"""Claims with their verdicts: for the terminal, in Markdown, and as the report's section."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sd35bench.report.blocks import Block
from sd35bench.report.figures import MISSING, Estimate, decimals_for, format_interval, format_number
from sd35bench.report.markdown import environment_lines, escape_cell
from sd35bench.report.rows import metric_label

__all__ = ["ClaimView", "ClaimsSection", "claims_markdown", "claims_section", "print_claims"]

_COLOURS = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not testable": "dim",
    "not measured": "dim",
}
_RULES = (
    "An effect is written so that the claim says: more than what it must exceed. Supported: the"
    " intervals' test shows every effect of the claim above that; refuted: one is shown below it;"
    " one-sided at 2.5 % each, corrected over the claims by Holm's method. Brackets are 95 %"
    " intervals, clustered by prompt and not corrected."
)
_WIDE = 110
"""Columns of a terminal from which on an interval stands beside its value."""
_CONTRASTS = (
    ("effect", False),
    ("found", True),
    ("must exceed", True),
    ("images", True),
    ("prompts", True),
    ("sides", False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimView:
    """One claim as the report shows it; `effect` is the deciding one in words."""

    verdict: str
    mark: str
    says: str
    effect: str
    reason: str
    design: str
    note: str
    command: str
    contrasts: Block | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimsSection:
    """The report's section: how many of what, each claim, and how verdicts come about."""

    lead: str
    claims: tuple[ClaimView, ...]
    rules: str


def claims_section(document: Mapping[str, Any]) -> ClaimsSection:
    """Turn a claims document into what the template shows."""
    return ClaimsSection(
        lead=_lead(document),
        claims=tuple(_view(claim) for claim in document["claims"]),
        rules=_RULES,
    )


def print_claims(document: Mapping[str, Any], console: Console) -> None:
    """Print one row per claim, with the effect that its verdict hangs on; then what is missing."""
    console.print(f"[bold]{escape(str(document['study']))}[/bold]  {escape(_lead(document))}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("verdict", "claim", "effect, 95 %", "must exceed", "images"):
        right = name in ("must exceed", "images")
        table.add_column(name, no_wrap=name != "claim", justify="right" if right else "left")
    for claim in document["claims"]:
        verdict = claim["verdict"]
        found, least, images = _figures(_deciding(claim))
        shown = f"[{_COLOURS[verdict]}]{verdict}[/]"
        effect = found if console.width >= _WIDE else found.replace(" [", "\n[")
        table.add_row(shown, escape(claim["says"]), escape(effect), least, images)
    console.print(table)
    for claim in document["claims"]:
        if claim["verdict"] in ("supported", "refuted"):
            continue
        open_ = "" if claim["deciding"] is None else f"{claim['deciding']}: "
        text = f"{claim['name']}: {open_}{claim['reason']}"
        console.print(
            text if claim["command"] is None else f"{text}: {claim['command']}",
            markup=False,
            soft_wrap=True,
        )
    for note in document["notes"]:
        console.print(f"[yellow]warning[/yellow] {escape(note)}", soft_wrap=True)
    console.print(_RULES, style="dim")


def claims_markdown(document: Mapping[str, Any]) -> str:
    """Render a claims document: verdicts, every effect, designs, what ran."""
    lines = [f"# Claims: study {escape_cell(str(document['study']))}", "", _lead(document), ""]
    head = [
        "verdict",
        "claim",
        "hangs on",
        "effect",
        "must exceed",
        "images",
        "prompts",
        "p (Holm)",
    ]
    lines += [_line(head), _line(["---"] * 3 + ["---:"] * 5)]
    for claim in document["claims"]:
        one = _deciding(claim)
        found, least, images = _figures(one)
        hangs = claim["reason"] if one is None else one["name"]
        prompts = MISSING if one is None else str(one["clusters"])
        cells = [claim["verdict"], claim["says"], hangs, found, least, images, prompts, _p(claim)]
        lines.append(_line([escape_cell(cell) for cell in cells]))
    lines += ["", _RULES, ""]
    for claim in document["claims"]:
        lines += _detail(claim)
    lines += environment_lines(document["environments"])
    lines += [f"Warning: {escape_cell(note)}" for note in document["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _detail(claim: Mapping[str, Any]) -> list[str]:
    """A claim's design and all its effects."""
    view = _view(claim)
    lines = [f"## {escape_cell(_sentence(claim['says']))}: {claim['verdict']}", ""]
    text = " ".join(part for part in (view.design, view.note) if part)
    lines += [escape_cell(text), "", f"{escape_cell(_sentence(view.reason))}.", ""]
    if view.command:
        lines += [f"`{view.command}`", ""]
    if view.contrasts is not None:
        rule = ["---:" if numeric else "---" for _, numeric in view.contrasts.columns]
        lines += [_line([title for title, _ in view.contrasts.columns]), _line(rule)]
        lines += [_line([escape_cell(cell) for cell in row]) for row in view.contrasts.rows]
        lines.append("")
    return lines


def _view(claim: Mapping[str, Any]) -> ClaimView:
    verdict, one = claim["verdict"], _deciding(claim)
    found, least, _ = _figures(one)
    effect = "" if one is None else f"{one['name']}: {found}, must exceed {least}"
    return ClaimView(
        verdict=verdict,
        mark=verdict.replace(" ", "-"),
        says=claim["says"],
        effect=effect,
        reason=claim["reason"],
        design=claim["design"],
        note="" if claim["note"] is None else claim["note"],
        command="" if claim["command"] is None else claim["command"],
        contrasts=_contrasts(claim),
    )


def _contrasts(claim: Mapping[str, Any]) -> Block | None:
    if not claim["contrasts"]:
        return None
    rows = []
    for one in claim["contrasts"]:
        found, least, images = _figures(one)
        sides = " against ".join(
            side["label"] if side["value"] is None else f"{side['label']} ({_mean(side['value'])})"
            for side in one["sides"]
        )
        prompts = str(one["clusters"]) if one["paired"] else f"{one['clusters']} in the smaller"
        rows.append((one["name"], found, least, images, prompts, sides if sides else MISSING))
    return Block(title=claim["says"], columns=_CONTRASTS, rows=tuple(rows))


def _deciding(claim: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((c for c in claim["contrasts"] if c["name"] == claim["deciding"]), None)


def _figures(one: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """An effect with its interval, the least that counts, and the images behind it."""
    if one is None:
        return MISSING, MISSING, MISSING
    low, high = (None, None) if one["ci95"] is None else one["ci95"]
    estimate = Estimate(value=one["effect"], low=low, high=high)
    digits = max(2, decimals_for(estimate)) if one["unit"] != "points" else decimals_for(estimate)
    value = format_number(one["effect"], digits)
    sign = "×" if one["unit"] == "ratio" else "" if value.startswith("-") else "+"
    unit = f" {one['unit']}" if one["unit"] in ("dB", "levels", "points") else ""
    found = f"{sign}{value}{unit} {format_interval(estimate, digits)}".strip()
    least = f"×{one['least']:.2f}" if one["unit"] == "ratio" else f"{one['least']:+.2f}{unit}"
    return found, least, f"{one['images']:,}"


def _mean(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lead(document: Mapping[str, Any]) -> str:
    counts = document["counts"]
    said = [f"{counts[name]} {name}" for name in _COLOURS if counts.get(name)]
    judge = document["quality"]
    by = "" if judge is None else f" Following the prompt is judged by {metric_label(judge)}."
    return f"Of {len(document['claims'])} claims of the model page: {', '.join(said)}.{by}"


def _p(claim: Mapping[str, Any]) -> str:
    if claim["p_supported"] is None:
        return MISSING
    p = claim["p_refuted"] if claim["verdict"] == "refuted" else claim["p_supported"]
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
