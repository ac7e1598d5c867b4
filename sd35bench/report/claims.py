"""Claims with their verdicts: for the terminal, in Markdown, and as the report's section."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sd35bench import words
from sd35bench.report.provenance import closing_parts
from sd35bench.report.render import (
    MARKDOWN,
    TERMINAL,
    Cell,
    Column,
    Heading,
    Layout,
    Part,
    Table,
    paragraph,
    say,
    text_column,
    text_table,
)
from sd35bench.report.rows import metric_label
from sd35bench.words import MISSING

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
    " intervals, clustered by prompt, with each end corrected as its test is. A verdict is of the"
    " model that was measured and of no other."
)
_LAYOUTS = (Layout(from_width=110, wraps=True), Layout(between="\n", wraps=True))
"""From 110 columns on an interval stands beside its value."""
_LONG_VERDICT = 24
"""Characters beyond which a verdict and its model may be broken, so that claims have room."""


def claims_section(document: Mapping[str, Any]) -> dict[str, Any]:
    """The report's section: how many of what, each claim, and how verdicts come about."""
    return {
        "title": _title(document),
        "lead": _lead(document),
        "claims": [_view(claim) for claim in document["claims"]],
        "rules": _RULES,
    }


def claims_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A claims document: the verdicts, what is missing; in Markdown designs and every effect."""
    claims, lead = document["claims"], _lead(document)
    yield say((str(document["study"]), "bold"), f"  {lead}", wraps=True)
    yield Heading(f"{_title(document)}: study {document['study']}", 1, forms=(MARKDOWN,))
    yield paragraph((lead, "raw"))
    yield _verdicts(claims)
    yield paragraph(_RULES)
    for claim in claims:
        if claim["verdict"] not in ("supported", "refuted"):
            open_ = "" if claim["deciding"] is None else f"{claim['deciding']}: "
            command = "" if claim["command"] is None else f": {claim['command']}"
            yield say(f"{claim['name']}: {open_}{claim['reason']}{command}")
        yield from _detail(claim)
    for note in document["notes"]:
        yield say(("warning", "yellow"), f" {note}")
    yield from closing_parts(document["environments"], document["notes"])
    yield say((_RULES, "dim"), wraps=True)


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> Table:
    """A row per claim, with the effect that its verdict hangs on."""
    deciding = [_deciding(claim) for claim in claims]
    found = [_figures(one) for one in deciding]
    verdicts = tuple(Cell(text=_verdict(c), style=_COLOURS[c["verdict"]]) for c in claims)
    hangs = (
        c["reason"] if one is None else one["name"] for c, one in zip(claims, deciding, strict=True)
    )
    prompts = (MISSING if one is None else str(one["clusters"]) for one in deciding)
    effects, least, images = text_table(("effect", "must exceed", "images"), found, _NUMERIC)
    columns = (
        Column(title="verdict", cells=verdicts, numeric=False),
        text_column("claim", map(_says, claims)),
        text_column("hangs on", hangs, forms=(MARKDOWN,)),
        replace(effects, title="effect, 95 %", numeric=False, forms=(TERMINAL,)),
        replace(effects, forms=(MARKDOWN,)),
        least,
        images,
        replace(text_column("prompts", prompts, forms=(MARKDOWN,)), numeric=True),
        replace(text_column("p (Holm)", map(_p, claims), forms=(MARKDOWN,)), numeric=True),
    )
    long = max(len(cell.text) for cell in verdicts) > _LONG_VERDICT
    breaks = ("claim", "verdict") if long else ("claim",)
    kept = tuple(replace(c, wraps=c.title in breaks) for c in columns)
    return Table(columns=kept, layouts=_LAYOUTS)


def _detail(claim: Mapping[str, Any]) -> Iterator[Part]:
    """A claim's design and all its effects, in Markdown."""
    view = _view(claim)
    yield Heading(f"{words.first_upper(view['says'])}: {view['verdict']}", forms=(MARKDOWN,))
    yield paragraph(" ".join(part for part in (view["design"], view["note"]) if part))
    yield paragraph(f"{words.first_upper(view['reason'])}.")
    if view["command"]:
        yield paragraph((view["command"], "code"))
    if view["contrasts"] is not None:
        yield replace(view["contrasts"], forms=(MARKDOWN,))


def _view(claim: Mapping[str, Any]) -> dict[str, Any]:
    """A claim as a page shows it; `effect` is the deciding one in words."""
    one = _deciding(claim)
    found, least, _ = _figures(one)
    return {
        **claim,
        "verdict": _verdict(claim),
        "mark": claim["verdict"].replace(" ", "-"),
        "says": _says(claim),
        "effect": "" if one is None else f"{one['name']}: {found.line}, must exceed {least}",
        "note": claim["note"] or "",
        "contrasts": _contrasts(claim),
    }


_NUMERIC = ("effect", "found", "must exceed", "images", "prompts")
_CONTRASTS = ("effect", "found", "must exceed", "images", "prompts", "sides")


def _contrasts(claim: Mapping[str, Any]) -> Table | None:
    if not claim["contrasts"]:
        return None
    columns = text_table(_CONTRASTS, map(_contrast, claim["contrasts"]), _NUMERIC[1:])
    return Table(columns=columns)


def _contrast(one: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    sides = " against ".join(
        side["label"] if side["value"] is None else f"{side['label']} ({_mean(side['value'])})"
        for side in one["sides"]
    )
    prompts = str(one["clusters"]) if one["paired"] else f"{one['clusters']} in the smaller"
    return one["name"], *_figures(one), prompts, sides if sides else MISSING


def _deciding(claim: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((c for c in claim["contrasts"] if c["name"] == claim["deciding"]), None)


def _figures(one: Mapping[str, Any] | None) -> tuple[Cell, str, str]:
    """An effect with its interval, the least that counts, and the images behind it."""
    if one is None:
        return Cell(text=MISSING), MISSING, MISSING
    estimate = words.read_estimate({**one, "ci95": one["interval"]}, "effect")
    digits = max(0 if one["unit"] == "points" else 2, words.decimals_for(estimate))
    ratio = one["unit"] == "ratio"
    unit = f" {one['unit']}" if one["unit"] in ("dB", "levels", "points") else ""
    value = words.number(one["effect"], digits, "" if ratio else "+")
    least = words.number(one["least"], 2, "" if ratio else "+")
    sign = "×" if ratio else ""
    found = Cell(text=f"{sign}{value}{unit}", beside=words.interval(estimate, digits))
    return found, f"{sign}{least}{unit}", words.count(one["images"])


def _mean(value: float) -> str:
    return words.count(value) if abs(value) >= 1000 else words.digits(value)


def _title(document: Mapping[str, Any]) -> str:
    return f"Claims of SD 3.5 Medium's model page, tested on {document['model']}"


def _verdict(claim: Mapping[str, Any]) -> str:
    return f"{claim['verdict']} on {claim['model']}"


def _says(claim: Mapping[str, Any]) -> str:
    """The page's words, and what was tested where that is not all that they say."""
    tested = claim["tested"]
    return claim["says"] if tested is None else f"{claim['says']} (tested: {tested})"


def _lead(document: Mapping[str, Any]) -> str:
    counts = document["counts"]
    said = [f"{counts[name]} {name}" for name in _COLOURS if counts.get(name)]
    judge = document["quality"]
    by = "" if judge is None else f" Following the prompt is judged by {metric_label(judge)}."
    return (
        f"Of {len(document['claims'])} claims of the model page, tested on {document['model']}:"
        f" {', '.join(said)}.{by}"
    )


def _p(claim: Mapping[str, Any]) -> str:
    if claim["p_supported"] is None:
        return MISSING
    return words.p_value(claim["p_refuted" if claim["verdict"] == "refuted" else "p_supported"])
