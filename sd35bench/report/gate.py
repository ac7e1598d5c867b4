"""A comparison: for the terminal, for a Markdown step summary, as one HTML page, as JUnit XML.

The page shows the verdicts and the worst pairs: side by side, under a slider, blinking, and as
their difference. Like the report it needs nothing else: images are data URIs, and a content
security policy lets run only what is in the file. In JUnit a test is a setting's dimension; what is
asked of the comparison as a whole is a suite of its own, so that a gate that failed always has a
failing test.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from PIL import Image

from sd35bench import words
from sd35bench.gate.sides import named_weights
from sd35bench.pictures import PIXEL_ART_PX, webp_uri
from sd35bench.report.render import (
    MARKDOWN,
    TERMINAL,
    WRAPPED,
    Cell,
    Column,
    Heading,
    Layout,
    Part,
    Table,
    Text,
    content_policy,
    html_templates,
    paragraph,
    say,
    text_table,
)
from sd35bench.report.rows import metric_label
from sd35bench.report.svg import read_asset
from sd35bench.words import MISSING

_COLUMNS = ("dimension", "figure", "baseline", "candidate", "effect", "interval", "margin", "n")
_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow", "not applicable": "dim"}
_WORST_FIRST = ("fail", "undecided", "pass")
_ORDER = ("fail", "undecided", "not applicable", "pass")
_LEAST_SETTING = 26
"""Characters of a setting's name and the table's edges, below which it would break at each word."""
_LONGEST_PX = 384
"""Images are kept without loss, since small differences are what matters; 24 of them in all."""

FindImage = Callable[[str], Path | None]


def comparison_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """A `compare` document: the verdict first, then each setting's figures and what differs."""
    whole = document["verdict"]
    sides = f": {document['candidate']} against {document['baseline']}"
    pairs = words.plural(document["n_pairs"], "pair")
    policy = document["policy"]
    yield say((whole, f"bold {_COLOURS[whole]}"), f"{sides}, policy {policy}, {pairs}", wraps=True)
    yield Heading(f"{str(whole).capitalize()}{sides}", 1, forms=(MARKDOWN,))
    yield paragraph("Policy ", (policy, "code"), f", {pairs}. {_meaning(document)}")
    for text in failed_gates(document):
        yield say((text, _COLOURS["fail"]))
        yield paragraph((text, "strong"))
    ordered = worst_first(document["comparisons"])
    if len(ordered) > 1:
        yield from _many(ordered)
    for comparison in ordered if len(ordered) == 1 else ():
        yield from _detail(comparison)
    for text in document["warnings"]:
        yield say(("warning", "yellow"), f" {text}")
        yield paragraph(f"Warning: {text}")


def _many(ordered: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    """A matrix of all settings, then the details of those that did not pass.

    The terminal shows of these the figures that did not pass, Markdown all, and the settings that
    passed folded.
    """
    yield _matrix(ordered)
    common = common_differences(ordered)
    if common:
        yield say(f"every setting differs in {common}", wraps=True)
        yield paragraph((f"Every setting differs in {common}.", "raw"))
    passed = [c for c in ordered if verdict_of(c) == "pass"]
    for comparison in ordered:
        if comparison not in passed:
            yield from _detail(comparison, common, brief=True)
    if passed:
        count = words.plural(len(passed), "setting")
        told = "passed; their figures are in --markdown, --html and --json"
        yield say((f"{count} {told}", "dim"), gap=True, wraps=True)
        yield paragraph((f"<details><summary>{count} passed</summary>", "raw"))
        for comparison in passed:
            details = (p for p in _detail(comparison, common) if MARKDOWN in p.forms)
            yield from (replace(p, forms=(MARKDOWN,)) for p in details)
        yield paragraph(("</details>", "raw"))


def _matrix(ordered: Sequence[Mapping[str, Any]]) -> Table:
    """Setting by dimension: each one's verdict; a dash where a dimension does not apply.

    A terminal of 80 columns has room for no more; on paper the worst verdict and the pairs, too.
    """
    names = list(dict.fromkeys(name for c in ordered for name in c["dimensions"]))
    rows = [
        [_verdict_cell(verdict_of(c)), c["title"]]
        + [_verdict_cell(_verdict_in(c, name)) for name in names]
        + [words.count(c["n_pairs"])]
        for c in ordered
    ]
    first, setting, *others, pairs = text_table(
        ("verdict", "setting", *names, "pairs"), rows, ("pairs",)
    )
    columns = (
        replace(first, forms=(MARKDOWN,)),
        setting,
        *(replace(c, wraps=False, said=_not_passed(c)) for c in others),
        replace(pairs, forms=(MARKDOWN,)),
    )
    room = sum(max(len(c.title), *(len(cell.text) for cell in c.cells)) + 3 for c in others)
    beside = Layout(wraps=True, from_width=_LEAST_SETTING + room)
    layouts = (beside, Layout(wraps=True, folds=True))
    return Table(columns=columns, layouts=layouts, frame="edged", folded="not passed")


def _not_passed(column: Column) -> tuple[str, ...]:
    """A dimension's verdicts with its name, for a terminal without room for a column of each."""
    told = (_COLOURS["fail"], _COLOURS["undecided"])
    return tuple(f"{column.title} {c.text}" if c.style in told else "" for c in column.cells)


def _verdict_in(comparison: Mapping[str, Any], name: str) -> str:
    found = comparison["dimensions"].get(name)
    return "not applicable" if found is None else str(found["verdict"])


def _verdict_cell(verdict: str) -> Cell:
    text = MISSING if verdict == "not applicable" else verdict
    return Cell(text=text, style=_COLOURS[verdict])


def verdict_of(comparison: Mapping[str, Any]) -> str:
    """A setting's verdict: the worst of its dimensions."""
    found = {str(d["verdict"]) for d in comparison["dimensions"].values()}
    return next((v for v in _WORST_FIRST if v in found), "not applicable")


def worst_first(comparisons: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Failures, then what is undecided or was not measured, then what passed; else as they came."""
    return sorted(comparisons, key=lambda c: _ORDER.index(verdict_of(c)))


def common_differences(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """What every one of several comparisons differs in, alike."""
    shared = set.intersection(*(set(_differences(c)) for c in comparisons))
    return "; ".join(text for text in _differences(comparisons[0]) if text in shared)


def _detail(comparison: Mapping[str, Any], common: str = "", brief: bool = False) -> Iterator[Part]:
    """One setting's figures; where `brief`, a terminal gets those alone that did not pass."""
    yield Heading(comparison["title"])
    yield Text(((about(comparison, common), "raw"),))
    yield from _table(comparison, brief)
    yield _paper_table(comparison)
    yield from map(say, _reasons(comparison, brief))
    for i, reason in enumerate(_reasons(comparison)):
        yield paragraph((f"- {reason}", "raw"), joined=i > 0)


def plan_parts(document: Mapping[str, Any]) -> Iterator[Part]:
    """What each policy sees at which n."""
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
    yield Text(((rule, "dim"),), wraps=True)


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


def _table(comparison: Mapping[str, Any], brief: bool) -> Iterator[Table]:
    """Figures that were measured, narrow enough for a terminal of 80 columns."""
    left_out = ("not applicable", "pass") if brief else ("not applicable",)
    rows = []
    for dimension, found in comparison["dimensions"].items():
        for figure in found["figures"]:
            if figure["verdict"] in left_out:
                continue
            name, before, after, effect, interval, margin, n = figure_cells(figure)
            verdict = Cell(text=figure["verdict"], style=_COLOURS[figure["verdict"]])
            change = Cell(text=effect, beside=interval)
            rows.append((verdict, f"{dimension} {name}", f"{before} → {after}", change, margin, n))
    if not rows and brief:
        return
    titles = ("", "figure", "baseline → candidate", "effect, interval", "margin", "n")
    first, *others = text_table(titles, rows)
    columns = (replace(first, wraps=False), *others)
    yield Table(columns=columns, layouts=WRAPPED, frame="edged", forms=(TERMINAL,))


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


def about(comparison: Mapping[str, Any], common: str = "") -> str:
    """Pairs, prompts, and the fields in which the sides differ; `common` was said already."""
    known = common.split("; ")
    said = [text for text in _differences(comparison) if text not in known]
    differs = "; ".join(said) if said else "nothing else" if common else "nothing"
    prompts = words.plural(comparison["n_prompts"], "prompt")
    pairs = f"{words.plural(comparison['n_pairs'], 'pair')} of {prompts}"
    same, images = comparison["n_identical"], comparison["n_images"]
    seen = f", {same} of {words.plural(images, 'image')} bit-identical" if images else ""
    return f"{pairs}{seen}. Differs: {differs}."


def _differences(comparison: Mapping[str, Any]) -> list[str]:
    """Each field in which the sides differ with its two values; weights by the names of files."""
    found = []
    sides = [comparison.get(f"{side}_setting") or {} for side in ("baseline", "candidate")]
    for name, values in {**comparison["differs"], **comparison["environment_differs"]}.items():
        told = named_weights(name, *sides)
        mine, theirs = values if told == name else (side[told] for side in sides)
        found.append(f"{told}: {_short(mine)} → {_short(theirs)}")
    return found


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


def _reasons(comparison: Mapping[str, Any], brief: bool = False) -> list[str]:
    """Why a dimension did not pass, and the notes of figures; `brief`: of what did not pass."""
    found = []
    for name, dimension in comparison["dimensions"].items():
        if dimension["verdict"] in ("fail", "not applicable"):
            needed = ", required" if dimension["required"] else ""
            found.append(f"{name}{needed}: {dimension['verdict']}: {dimension['reason']}")
        if brief and dimension["verdict"] in ("pass", "not applicable"):
            continue
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
        return words.size_in(value, "MiB", 0)
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
    ordered = worst_first(document["comparisons"])
    common = common_differences(ordered) if len(ordered) > 1 else ""
    comparisons = [
        {
            **comparison,
            "mark": verdict_of(comparison).replace(" ", "-"),
            "verdict": verdict_of(comparison),
            "about": about(comparison, common),
            "rows": _rows(comparison),
            "notes": _notes(comparison),
            "pairs": _pairs(comparison, baseline, candidate, said),
        }
        for comparison in ordered
    ]
    template = html_templates().get_template("compare.html.j2")
    return template.render(
        d={**document, "comparisons": comparisons, "failed_gates": failed_gates(document)},
        dimensions=list(dict.fromkeys(n for c in ordered for n in c["dimensions"])),
        pairs=words.plural(document["n_pairs"], "pair"),
        common=common,
        policy=content_policy(script, style),
        script=script,
        style=style,
    )


def _rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "verdict": figure["verdict"],
            "mark": figure["verdict"].replace(" ", "-"),
            "dimension": dimension,
            "cells": figure_cells(figure),
        }
        for dimension, found in comparison["dimensions"].items()
        for figure in found["figures"]
    ]


def _notes(comparison: Mapping[str, Any]) -> list[str]:
    """Each note once, after the figures that have it; of a whole dimension, after its name."""
    figures: dict[str, dict[str, list[str]]] = {}
    for dimension, found in comparison["dimensions"].items():
        for figure in found["figures"]:
            if figure["note"]:
                of_note = figures.setdefault(figure["note"], {})
                of_note.setdefault(dimension, []).append(figure["name"])
    sizes = {name: len(found["figures"]) for name, found in comparison["dimensions"].items()}
    return [
        "; ".join(d if len(n) == sizes[d] else f"{d} {', '.join(n)}" for d, n in of.items())
        + f": {note}"
        for note, of in figures.items()
    ]


def _pairs(
    comparison: Mapping[str, Any],
    baseline: FindImage,
    candidate: FindImage,
    captions: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The worst pairs; a baseline's image that is not there leaves the candidate's alone."""
    found = []
    for pair in comparison["worst"]:
        after = candidate(pair["candidate_image"])
        if after is None:
            continue
        before = baseline(pair["baseline_image"])
        image = _decode(after.read_bytes())
        found.append(
            {
                "baseline": None if before is None else webp_uri(_decode(before.read_bytes())),
                "candidate": webp_uri(image),
                "grain": "pixels" if max(image.size) <= PIXEL_ART_PX else "smooth",
                "caption": captions.get(pair["candidate_image"], ""),
                "lost": _lost(pair),
            }
        )
    return found


def _lost(pair: Mapping[str, Any]) -> str:
    if pair["by"] == "changed":
        return "another file than the baseline's"
    return f"{pair['by']} {words.digits(pair['value'], sign='+')}"


def _decode(data: bytes) -> Image.Image:
    """Pixels of an image file, at most 384 px wide and high."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    return image


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
