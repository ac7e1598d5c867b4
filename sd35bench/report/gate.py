"""A comparison: for the terminal, for a Markdown step summary, as one HTML page, as JUnit XML.

The page shows the verdicts and the worst pairs: side by side, under a slider, blinking, and as
their difference. Like the report it needs nothing else: images are data URIs, and a content
security policy lets run only what is in the file. In JUnit a test is a setting's dimension; what is
asked of the comparison as a whole is a suite of its own, so that a gate that failed always has a
failing test.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from PIL import Image
from rich.console import Console

from sd35bench import words
from sd35bench.report.page import content_policy
from sd35bench.report.render import (
    MARKDOWN,
    TERMINAL,
    WRAPPED,
    Cell,
    Heading,
    Part,
    Table,
    html_templates,
    markdown_document,
    paragraph,
    print_document,
    say,
    text_table,
)
from sd35bench.report.rows import metric_label
from sd35bench.report.svg import read_asset
from sd35bench.words import MISSING

_COLUMNS = ("dimension", "figure", "baseline", "candidate", "effect", "interval", "margin", "n")
_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow", "not applicable": "dim"}
_PIXEL_ART_PX = 128
_LONGEST_PX = 384
"""Images are kept without loss, since small differences are what matters; 24 of them in all."""

FindImage = Callable[[str], Path | None]


def print_comparison(document: Mapping[str, Any], console: Console) -> None:
    """Print the verdict first, then each setting's figures and what differs."""
    print_document(_parts(document), console)


def compare_markdown(document: Mapping[str, Any]) -> str:
    """Render a `compare` document as GitHub's step summary shows it."""
    return markdown_document(_parts(document))


def _parts(document: Mapping[str, Any]) -> Iterator[Part]:
    whole = document["verdict"]
    sides = f": {document['candidate']} against {document['baseline']}"
    pairs = f"{document['n_pairs']} pairs"
    policy = document["policy"]
    yield say((whole, f"bold {_COLOURS[whole]}"), f"{sides}, policy {policy}, {pairs}", wraps=True)
    yield Heading(f"{str(whole).capitalize()}{sides}", 1, forms=(MARKDOWN,))
    yield paragraph("Policy ", (policy, "code"), f", {pairs}. {_meaning(document)}")
    for text in failed_gates(document):
        yield say((text, _COLOURS["fail"]))
        yield paragraph((text, "strong"))
    for comparison in document["comparisons"]:
        yield Heading(comparison["title"])
        yield say(about(comparison))
        yield paragraph((about(comparison), "raw"))
        yield _table(comparison)
        yield _paper_table(comparison)
        for i, reason in enumerate(_reasons(comparison)):
            yield say(reason)
            yield paragraph((f"- {reason}", "raw"), joined=i > 0)
    for text in document["warnings"]:
        yield say(("warning", "yellow"), f" {text}")
        yield paragraph(f"Warning: {text}")


def print_plan(document: Mapping[str, Any], console: Console) -> None:
    """Print what each policy sees at which n."""
    print_document(_plan_parts(document), console)


def plan_markdown(document: Mapping[str, Any]) -> str:
    """Render a plan document."""
    return markdown_document(_plan_parts(document))


def _plan_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    pilot = document["candidate"]
    by = "with spreads that are assumed (*)" if pilot is None else f"by the pilot {pilot}"
    title = f"What a gate against {document['baseline']} sees, {by}"
    yield say((title, "bold"), wraps=True)
    yield Heading(title, 1, forms=(MARKDOWN,))
    for policy, found in document["policies"].items():
        for counts in dict.fromkeys(row["counts"] for row in found["rows"]):
            yield Heading(f"{policy}, by {counts}")
            yield _plan_table([row for row in found["rows"] if row["counts"] == counts])
    rule = (
        f"The smallest harm that fails in {words.percent(document['power'])} of cases, as one of"
        " all figures of its policy; of a share, by a loss that goes one way. 'from': the n from"
        " which a candidate that lost nothing passes. Images that are the same on both sides pass"
        " at any n."
    )
    yield say((rule, "dim"), wraps=True)
    yield paragraph(rule)


def _plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        ratio, share = row["kind"] == "ratio", _is_share(row)
        sees = [_harm(harm, ratio, share) for _, harm in row["sees"]]
        clear = MISSING if row["passes_from"] is None else words.count(row["passes_from"])
        mark = "*" if row["assumed"] else ""
        name = metric_label(row["name"]) if row["dimension"] == "quality" else row["name"]
        cells.append((name + mark, _harm(row["margin"], ratio, share), *sees, clear))
    numeric = ("margin", *(str(n) for n, _ in rows[0]["sees"]), "from")
    return Table(columns=text_table(("figure", *numeric), cells, numeric), layouts=WRAPPED)


def _is_share(row: Mapping[str, Any]) -> bool:
    return row["unit"].startswith("share of ")


def _harm(value: float | None, ratio: bool, share: bool) -> str:
    if value is None:
        return MISSING
    if ratio:
        return f"×{words.number(value, 2)}"
    return f"{words.digits(100 * value, 2)} %" if share else words.digits(value, 2)


def _table(comparison: Mapping[str, Any]) -> Table:
    """Figures that were measured, narrow enough for a terminal of 80 columns."""
    rows = []
    for dimension, found in comparison["dimensions"].items():
        for figure in found["figures"]:
            if figure["verdict"] == "not applicable":
                continue
            name, before, after, effect, interval, margin, n = figure_cells(figure)
            verdict = Cell(text=figure["verdict"], style=_COLOURS[figure["verdict"]])
            change = Cell(text=effect, beside=interval)
            rows.append((verdict, f"{dimension} {name}", f"{before} → {after}", change, margin, n))
    titles = ("", "figure", "baseline → candidate", "effect, interval", "margin", "n")
    first, *others = text_table(titles, rows)
    columns = (replace(first, wraps=False), *others)
    return Table(columns=columns, layouts=WRAPPED, frame="edged", forms=(TERMINAL,))


def _paper_table(comparison: Mapping[str, Any]) -> Table:
    rows = []
    for dimension, found in comparison["dimensions"].items():
        cells = [[f["verdict"], dimension, *figure_cells(f)] for f in found["figures"]]
        rows += cells if cells else [[found["verdict"], dimension, *[MISSING] * 7]]
    columns = text_table(("verdict", *_COLUMNS), rows, _COLUMNS[3:])
    return Table(columns=columns, forms=(MARKDOWN,))


def failed_gates(document: Mapping[str, Any]) -> list[str]:
    """What failed the comparison as a whole, beside its dimensions."""
    failed = (item for item in document["gate"].items() if item[1]["verdict"] == "fail")
    return [f"{name}: fail: {found['reason']}" for name, found in failed]


def about(comparison: Mapping[str, Any]) -> str:
    """Pairs, prompts, and the fields in which the sides differ."""
    fields = {**comparison["differs"], **comparison["environment_differs"]}
    said = [f"{name}: {_short(a)} → {_short(b)}" for name, (a, b) in fields.items()]
    differs = "; ".join(said) if said else "nothing"
    pairs = f"{comparison['n_pairs']} pairs of {comparison['n_prompts']} prompts"
    same, images = comparison["n_identical"], comparison["n_images"]
    seen = f", {same} of {images} images bit-identical" if images else ""
    return f"{pairs}{seen}. Differs: {differs}."


def figure_cells(figure: Mapping[str, Any]) -> list[str]:
    """Name, baseline, candidate, effect, interval, margin and n of a figure."""
    ratio = figure["kind"] == "ratio"
    ends = figure["interval"]
    share = _is_share(figure)
    margin = f"×{words.plain(figure['margin'])}" if ratio else _amount(figure["margin"], share)
    return [
        str(figure["name"]),
        _value(figure["baseline"], figure["unit"]),
        _value(figure["candidate"], figure["unit"]),
        _effect(figure["effect"], ratio, share),
        MISSING if ends is None else words.bracketed(*(_effect(end, ratio, share) for end in ends)),
        margin,
        str(figure["n"]) if figure["n"] else MISSING,
    ]


def figure_text(figure: Mapping[str, Any]) -> str:
    """One figure on one line."""
    if figure["effect"] is None:
        return f"{figure['name']}: {figure['verdict']}: {figure['note']}"
    name, before, after, effect, interval, margin, n = figure_cells(figure)
    text = (
        f"{name}: {figure['verdict']}; baseline {before}, candidate {after}, effect {effect}"
        f" {interval}, margin {margin}, n {n}"
    )
    return text if figure["note"] is None else f"{text}; {figure['note']}"


def _reasons(comparison: Mapping[str, Any]) -> list[str]:
    """Why a dimension did not pass, and the notes of figures."""
    found = []
    for name, dimension in comparison["dimensions"].items():
        if dimension["verdict"] in ("fail", "not applicable"):
            needed = ", required" if dimension["required"] else ""
            found.append(f"{name}{needed}: {dimension['verdict']}: {dimension['reason']}")
        notes = [f["note"] for f in dimension["figures"] if f["note"] and _worth_saying(f)]
        found += [f"{name}: {note}" for note in dict.fromkeys(notes)]
        absent = [f["name"] for f in dimension["figures"] if _unscored(f)]
        if absent:
            found.append(f"{name}: scored on neither side: {', '.join(absent)}")
    return found


def _worth_saying(figure: Mapping[str, Any]) -> bool:
    """Whether a note is about a measured number, or says why a set metric was refused."""
    return figure["effect"] is not None or figure["unit"] == "set metric"


def _unscored(figure: Mapping[str, Any]) -> bool:
    """Whether a metric that the policy names is on neither side."""
    return figure["verdict"] == "not applicable" and figure["unit"] == "metric"


def _meaning(document: Mapping[str, Any]) -> str:
    rule = (
        "Brackets: 95 % intervals; a figure passes where its interval is within the margin and"
        " fails where it is beyond. For a figure that does not pass, the end on the side of harm is"
        " corrected for the number of figures (Holm)."
    )
    if document["verdict"] != "undecided":
        return rule
    passes = "fails" if document["undecided_fails"] else "passes with a warning"
    return f"Undecided {passes} under this policy: the data do not show either. {rule}"


def _effect(value: float | None, ratio: bool, share: bool) -> str:
    if value is None:
        return MISSING
    if ratio:
        return f"×{words.number(value, 3)}"
    return f"{'' if value < 0 else '+'}{_amount(value, share)}"


def _amount(value: float, share: bool) -> str:
    return f"{words.digits(100 * value)} %" if share else words.digits(value)


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return MISSING
    if unit == "bytes":
        return f"{words.number(value / 2**20, 0)} MiB"
    if unit.startswith("share of "):
        return _amount(value, True)
    return f"{words.digits(value, 4)}{' s' if unit == 's' else ''}"


def _short(value: Any) -> str:
    text = words.plain(value) if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# The page -------------------------------------------------------------------------------------


def compare_page(
    document: Mapping[str, Any],
    baseline: FindImage,
    candidate: FindImage,
    captions: Mapping[str, str] | None = None,
) -> str:
    """Render a `compare` document.

    Args:
        document: of `compare_sides`.
        baseline: finds its images by digest.
        candidate: finds its own.
        captions: what was asked for a candidate's image, by digest.
    """
    said = {} if captions is None else captions
    script = Markup(read_asset("compare.js"))
    style = Markup(read_asset("charts.css") + read_asset("report.css") + read_asset("compare.css"))
    comparisons = [
        {
            **comparison,
            "about": about(comparison),
            "rows": _rows(comparison),
            "pairs": _pairs(comparison, baseline, candidate, said),
        }
        for comparison in document["comparisons"]
    ]
    return (
        html_templates()
        .get_template("compare.html.j2")
        .render(
            d={**document, "comparisons": comparisons, "failed_gates": failed_gates(document)},
            policy=content_policy(script, style),
            script=script,
            style=style,
        )
    )


def _rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "verdict": figure["verdict"],
            "mark": figure["verdict"].replace(" ", "-"),
            "dimension": dimension,
            "cells": figure_cells(figure),
            "note": figure["note"],
        }
        for dimension, found in comparison["dimensions"].items()
        for figure in found["figures"]
    ]


def _pairs(
    comparison: Mapping[str, Any],
    baseline: FindImage,
    candidate: FindImage,
    captions: Mapping[str, str],
) -> list[dict[str, str]]:
    """The worst pairs of which both images are there."""
    found = []
    for pair in comparison["worst"]:
        paths = baseline(pair["baseline_image"]), candidate(pair["candidate_image"])
        if paths[0] is None or paths[1] is None:
            continue
        images = [_decode(path.read_bytes()) for path in paths if path is not None]
        found.append(
            {
                "baseline": _data_uri(images[0]),
                "candidate": _data_uri(images[1]),
                "grain": "pixels" if max(images[0].size) <= _PIXEL_ART_PX else "smooth",
                "caption": captions.get(pair["candidate_image"], ""),
                "lost": f"{pair['by']} {words.digits(pair['value'], sign='+')}",
            }
        )
    return found


def _decode(data: bytes) -> Image.Image:
    """Pixels of an image file, at most 384 px wide and high."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    return image


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


# JUnit ----------------------------------------------------------------------------------------


def junit_xml(document: Mapping[str, Any]) -> str:
    """Render a `compare` document.

    A failed dimension is a failure; what does not apply is skipped, and so is what is undecided,
    unless the policy says that it fails.
    """
    root = ElementTree.Element("testsuites", name="sd35bench compare")
    for comparison in document["comparisons"]:
        name = f"{document['candidate']} against {document['baseline']}: {comparison['title']}"
        _suite(root, document, name, comparison["dimensions"])
    _suite(root, document, "the gate as a whole", document["gate"])
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _suite(
    root: ElementTree.Element, document: Mapping[str, Any], name: str, judged: Mapping[str, Any]
) -> None:
    suite = ElementTree.SubElement(root, "testsuite", name=_clean(name))
    outcomes = []
    for dimension, found in judged.items():
        outcome = _outcome(found["verdict"], document["undecided_fails"])
        outcomes.append(outcome)
        case = ElementTree.SubElement(
            suite, "testcase", classname=_clean(f"compare.{document['policy']}"), name=dimension
        )
        figures = found.get("figures")
        text = found["reason"] if figures is None else "\n".join(map(figure_text, figures))
        if outcome is not None:
            message = _clean(f"{found['verdict']}: {found['reason']}")
            ElementTree.SubElement(case, outcome, message=message).text = _clean(text)
        else:
            ElementTree.SubElement(case, "system-out").text = _clean(text)
    suite.set("tests", str(len(outcomes)))
    suite.set("failures", str(outcomes.count("failure")))
    suite.set("skipped", str(outcomes.count("skipped")))
    suite.set("errors", "0")


def _outcome(verdict: str, undecided_fails: bool) -> str | None:
    if verdict == "pass":
        return None
    fails = verdict == "fail" or (verdict == "undecided" and undecided_fails)
    return "failure" if fails else "skipped"


def _clean(text: str) -> str:
    """Leave out the control characters that XML 1.0 cannot hold."""
    return "".join(c for c in text if c in "\t\n\r" or (c >= " " and c not in "\ufffe\uffff"))
