"""The page's tables from the kept results; nothing in them is typed.

`write` puts them between two marks of docs/validity.md and leaves the rest of the page alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd35bench.disk import write_atomic
from sd35bench.stats.verdicts import Verdict
from tests.validity_runs.defects import CONTROL, DEFECTS, SYSTEMATIC, Defect
from tests.validity_runs.figure import FIGURES, regret_figure
from tests.validity_runs.kept import read
from tests.validity_runs.matrix import (
    FEW_POLICIES,
    POLICIES,
    REFUSED,
    caught_by,
    figures_of,
    images_needed,
    policy_verdict,
)
from tests.validity_runs.truth_page import (
    FIGURE,
    choice_section,
    choice_table,
    grid_section,
    grid_table,
    search_section,
    search_table,
    table,
)

__all__ = [
    "PAGE",
    "alarm_table",
    "choice_table",
    "drawn",
    "grid_table",
    "matrix_table",
    "search_table",
    "sections",
    "systematic_table",
    "write",
    "written",
]

PAGE = Path(__file__).parents[2] / "docs" / "validity.md"
BEGIN = "<!-- made by python -m tests.validity_runs page -->"
END = "<!-- end of what python -m tests.validity_runs page makes -->"
_WORDS: dict[str, str] = {Verdict.FAIL: "**fail**", Verdict.NOT_APPLICABLE: "–"}
_SHOWN = ("prompt_accuracy", "clip_score", "mean_abs", "failed", "p50", "peak_rss_bytes")
_UNITS = {"prompt_accuracy": "accuracy", "clip_score": "CLIP", "mean_abs": "levels"}
_SHOWN += ("shift_red", "shift_green", "shift_blue", "changed")
_UNITS |= {name: name.removeprefix("shift_") for name in _SHOWN[-4:]}
_UNITS |= {"failed": "failures", "p50": "p50", "peak_rss_bytes": "memory"}


def matrix_table(cells: dict[str, Any]) -> str:
    """One row per defect: each policy's verdict, and what its figures were."""
    head = ["planted", "how", *POLICIES, "effect and 95 % interval, candidate against baseline"]
    rows = [_matrix_row(defect, cells[defect.name]) for defect in _known(cells)]
    return table(head, rows)


def systematic_table(cells: dict[str, Any]) -> str:
    """One row per systematic defect: each policy's verdict, and its drift."""
    head = ["planted", "how", *FEW_POLICIES, "levels of 255 under `drift`; share changed"]
    rows = []
    for defect in (d for d in SYSTEMATIC.values() if d.name in cells):
        found = cells[defect.name]["policies"]
        verdicts = [_word(policy_verdict(found[p])) for p in FEW_POLICIES]
        drift = [f for f in found["drift"]["figures"] if f["dimension"] == "drift"]
        changed = [f for f in found["exact"]["figures"] if f["name"] == "changed"]
        effects = "; ".join(_effect(f) for f in (*drift, *changed))
        rows.append([defect.title, defect.how, *verdicts, effects])
    return table(head, rows)


def _known(cells: dict[str, Any]) -> list[Defect]:
    return [d for d in (CONTROL, *DEFECTS.values()) if d.name in cells]


def _matrix_row(defect: Defect, cell: dict[str, Any]) -> list[str]:
    verdicts = [_word(policy_verdict(cell["policies"][p])) for p in POLICIES]
    effects = "; ".join(_effect(f) for f in figures_of(cell, _told(defect)))
    return [defect.title, defect.how, *verdicts, effects]


def _told(defect: Defect) -> Sequence[str]:
    """Seconds of one couple of starts tell nothing, so they are shown where they were planted."""
    if defect.paired_starts:
        return ("p50", "peak_rss_bytes")
    if defect.name == "memory":
        return ("peak_rss_bytes", "prompt_accuracy")
    return ("prompt_accuracy", "clip_score", "mean_abs", "failed")


def _word(verdict: str) -> str:
    return _WORDS.get(verdict, verdict)


def _effect(figure: dict[str, Any]) -> str:
    name = next(n for n in _SHOWN if figure["name"].startswith(n))
    low, high = figure["interval"] or (None, None)
    if figure["kind"] == "ratio":
        value, ends = f"x {figure['effect']:.3f}", f"{low:.3f} to {high:.3f}"
    else:
        value, ends = f"{figure['effect']:+.3g}", f"{low:+.3g} to {high:+.3g}"
    mark = {"fail": "**", "pass": "", "undecided": "*"}[figure["verdict"]]
    return f"{mark}{_UNITS[name]} {value} ({ends}){mark}"


def blind_text(cells: dict[str, Any]) -> str:
    """Which defects the policy `quality` lets pass, which no policy catches, and what n would."""
    planted = [d for d in _known(cells) if d is not CONTROL]
    unseen = [d for d in planted if "quality" not in caught_by(cells[d.name])]
    missed = [d for d in unseen if not caught_by(cells[d.name])]
    lines = [
        f"{len(planted) - len(missed)} of {len(planted)} are caught by at least one policy."
        f" Quality alone does not see: {_titles(unseen)}."
    ]
    if diluted := [d for d in planted if d not in missed and "all" not in caught_by(cells[d.name])]:
        lines.append(
            f"Caught by a policy of its own but undecided under `all`, where Holm's correction is"
            f" over more figures: {_titles(diluted)}."
        )
    for defect in missed:
        cell = cells[defect.name]
        needed = [
            f"{_effect(f)}: about {n:,} images at the noise seen, on a machine shared with others"
            for f in cell["policies"]["all"]["figures"]
            if f["verdict"] == Verdict.UNDECIDED
            and f["ci95"] is not None
            and f["name"].startswith(_SHOWN)
            and (n := images_needed(f, cell["images"], defect.ratio)) is not None
        ]
        why = "; ".join(needed) if needed else "its effect is within every margin"
        lines.append(f"Not caught with {cell['images']} images: {defect.title}; {why}.")
    return "\n\n".join(lines)


def _titles(defects: Sequence[Defect]) -> str:
    return ", ".join(d.title for d in defects) if defects else "none"


def alarm_table(rows: dict[str, Any]) -> str:
    """Verdicts of one backend's starts against each other, by policy, and of couples of them."""
    head = ["policy", "held against each other", "times", "fail", "refused", "undecided", "pass"]
    found = rows["starts"]
    lines = []
    for name in POLICIES:
        counts = found["policies"][name]
        lines.append([name, "every pair of starts", *_counts(counts["verdicts"])])
        lines.append([name, "disjoint neighbours", *_counts(counts["neighbours"])])
    couples = found["couples"]
    ways = f"{couples['couples']} couples of neighbours, every way to say which is the baseline"
    return table(head, [*lines, ["speed", ways, *_counts(couples["verdicts"])]])


def _counts(verdicts: dict[str, int]) -> list[str]:
    kinds = (Verdict.FAIL, REFUSED, Verdict.UNDECIDED, Verdict.PASS)
    shown = [str(verdicts[v]) for v in kinds]
    return [str(sum(verdicts.values())), *shown]


def sections() -> str:
    """The Markdown between the marks."""
    on_truth = {"grid": grid_section, "tune": search_section, "recommend": choice_section}
    parts = [make(rows) for name, make in _MADE.items() if (rows := read(name))]
    parts += [make(rows, _made(rows)) for name, make in on_truth.items() if (rows := read(name))]
    return "\n\n".join(parts)


def _defects_section(cells: dict[str, Any]) -> str:
    seeds = sorted({c["seed"] for c in cells.values()})
    most = max(c["images"] for c in cells.values())
    started = next((c for c in cells.values() if c["starts"] > 1), None)
    speed = "" if started is None else f"; 10 % slower from {started['starts']} couples of starts"
    return (
        "**Planted defects,** on nano: 8 steps, cfg 4, requests alike on both sides, at most"
        f" {most} images a side{speed}; seed {', '.join(map(str, seeds))}. Bold figures fail,"
        " slanted ones are undecided; an undecided gate passes with a warning. *Refused*: the gate"
        " fails because the machine ran at unlike speeds under the two sides, so that no latency"
        " can be told; nothing is caught by that. One of them from a fresh seed:"
        " `python -m tests.validity_runs defects --defect guidance --seed 7`.\n\n"
        f"{matrix_table(cells)}\n\n{blind_text(cells)}\n\n{_made(cells)}"
    )


def _systematic_section(cells: dict[str, Any]) -> str:
    planted = [d for d in SYSTEMATIC.values() if d.name in cells and d.name != CONTROL.name]
    by = {p: [d for d in planted if p in caught_by(cells[d.name])] for p in FEW_POLICIES}
    counts = ", ".join(f"`{p}` {len(found)}" for p, found in by.items())
    blind = [d for d in planted if not caught_by(cells[d.name])]
    return (
        "**Systematic defects,** which change every image by a little: 64 images a side, else as"
        " above. `exact` is for sides that should be alike to the bit; `drift` sees a shift of the"
        " colours beyond 0.05 level (`python -m tests.validity_runs systematic`; one of them:"
        " `--defect gamma --seed 7`).\n\n"
        f"{systematic_table(cells)}\n\nOf {len(planted)} caught: {counts}. Caught by no policy:"
        f" {_titles(blind)}. `drift` does not see: "
        f"{_titles([d for d in planted if d not in by['drift']])}.\n\n{_made(cells)}"
    )


def _alarms_section(rows: dict[str, Any]) -> str:
    found = rows["starts"]
    apart = found["largest"]
    return (
        f"**A/A, truly rerun:** {found['starts']} starts of {found['backend']},"
        f" {found['images']} images made alone in each"
        " (`python -m tests.validity_runs alarms --seed 7`).\n\n"
        f"{alarm_table(rows)}\n\nTwo starts furthest apart: {_apart(apart)}. Refused: the machine"
        " ran at speeds a fifth apart under the two starts, so no latency was told.\n\n"
        f"{_made(rows)}"
    )


_MADE = {
    "defects": _defects_section,
    "systematic": _systematic_section,
    "alarms": _alarms_section,
}


def _apart(largest: dict[str, float]) -> str:
    names = [n for n in _SHOWN if any(k.startswith(n) for k in largest)]
    found = {n: next(v for k, v in largest.items() if k.startswith(n)) for n in names}
    return ", ".join(f"{_UNITS[n]} {v:.3g}" for n, v in found.items())


def _made(rows: dict[str, Any]) -> str:
    made = [row["made"] for row in rows.values()]
    commits = sorted({str(m["commit"])[:10] + (" and edits" if m["dirty"] else "") for m in made})
    days = sorted({m["at"] for m in made})
    machines = sorted({str(m.get("cpu_model")) for m in made})
    return (
        f"Made {', '.join(days)}, commit {', '.join(commits)}, on {', '.join(machines)}, 1 thread."
    )


def written() -> str:
    """The page as it should be: its own text, and the sections between the marks."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before.rstrip()}\n\n{BEGIN}\n\n{sections()}\n\n{END}\n{after.lstrip()}"


def write() -> None:
    """Put the sections into the page, and draw its figure."""
    write_atomic(PAGE, written().encode())
    if rows := read("tune"):
        FIGURES.mkdir(exist_ok=True)
        write_atomic(PAGE.parent / FIGURE, drawn(rows).encode())


def drawn(rows: dict[str, Any]) -> str:
    """The figure of `tune` against the truth, as an SVG file."""
    return regret_figure(rows)._repr_svg_() + "\n"
