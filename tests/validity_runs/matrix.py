"""Defect x policy: what the gate says of each planted defect, by at most 256 images a side.

Every cell runs, scores and compares through the command line. The baseline is run once for all
defects of one seed. Speed has sides of its own: a few images, made alone, in many process starts of
both sides in turn, since seconds of one start say little of the next.
"""

from collections.abc import Iterable, Sequence
from math import log
from pathlib import Path
from typing import Any

from sd35bench.gate.rerun import reruns_of
from sd35bench.stats.verdicts import Verdict
from sd35bench.study.store import Study
from tests.validity_runs.defects import Defect
from tests.validity_runs.sides import Amount, alternate, judge, run_side

__all__ = [
    "BATCHED",
    "POLICIES",
    "REFUSED",
    "STARTED",
    "SUBTLE",
    "images_needed",
    "run_cell",
    "summarise",
    "verdict_of",
]

POLICIES = ("quality", "drift", "speed", "all")
FEW_POLICIES = ("quality", "drift", "exact")
BATCHED = Amount(prompts=60, seeds=2, batch=16, alone=8)
SUBTLE = Amount(prompts=124, seeds=2, batch=16, alone=8)
STARTED = Amount(prompts=12, seeds=1, batch=1)
FEW = Amount(prompts=64, seeds=1, batch=16, alone=0)
ROUNDS = 9
REFUSED = "refused"
"""A gate that fails for want of a figure it requires: no defect was seen, and none is excluded."""


def run_cell(
    root: Path, seed: int, defect: Defect, amount: Amount | None = None, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Run one defect against its baseline below `root` and have every policy judge it.

    Returns: ``{"defect", "seed", "images", "starts", "policies": {name: summarise(document)}}``,
    where `images` and `starts` are of one side.
    """
    role, own = _amount(defect)
    own_name = f"few-{defect.name}" if defect.systematic else defect.name
    policies = FEW_POLICIES if defect.systematic else POLICIES
    chosen = own if amount is None else amount
    sides = [
        run_side(
            root,
            f"{seed}-{name}",
            chosen,
            seed,
            defect=planted,
            backend=defect.backend,
            words=defect.words,
        )
        for name, planted in ((f"{defect.backend}-{role}", None), (own_name, defect))
    ]
    if defect.paired_starts:
        _top_up(sides[0], sides[1], rounds, defect)
    starts = 1 + (rounds if defect.paired_starts else 0)
    found = {p: judge(root, sides[0].name, sides[1].name, p) for p in policies}
    return {
        "defect": defect.name,
        "seed": seed,
        "images": chosen.images * starts,
        "starts": starts,
        "policies": {p: summarise(document, code) for p, (document, code) in found.items()},
    }


def _amount(defect: Defect) -> tuple[str, Amount]:
    """What the baseline's study is called, and how many images a side has."""
    if defect.systematic:
        return "few" if defect.words is None else "edits", FEW
    if defect.paired_starts:
        return "starts", STARTED
    return ("images", SUBTLE) if defect.subtle else ("fewer", BATCHED)


def _top_up(baseline: Study, candidate: Study, rounds: int, defect: Defect) -> None:
    """Make the rounds that are missing, so that a cut-off command can be repeated."""
    missing = rounds - len(reruns_of(candidate))
    if missing > 0:
        alternate(baseline, candidate, missing, defect)


def summarise(document: dict[str, Any], code: int) -> dict[str, Any]:
    """Keep of a comparison what the page shows: verdicts, and each figure's effect and interval."""
    (comparison,) = document["comparisons"]
    kept = ("name", "kind", "unit", "baseline", "candidate", "effect", "ci95", "interval")
    kept += ("margin", "worse", "n", "p_adjusted", "verdict")
    figures = [
        {"dimension": name, **{k: figure[k] for k in kept}}
        for name, part in comparison["dimensions"].items()
        for figure in part["figures"]
        if figure["effect"] is not None
    ]
    return {
        "verdict": document["verdict"],
        "exit_code": code,
        "n_pairs": document["n_pairs"],
        "differs": sorted(comparison["differs"]),
        "dimensions": {name: d["verdict"] for name, d in document["dimensions"].items()},
        "figures": figures,
    }


def images_needed(figure: dict[str, Any], images: int, ratio: float | None = None) -> int | None:
    """About how many images would fail a figure that is worse than its margin, in the mean.

    The interval shrinks with the root of n, and its end has to pass the margin. ``None`` where the
    effect seen is within the margin, so that no number would. A known `ratio` stands in for the
    one that was seen, which noise may have made larger.
    """
    move = log if figure["kind"] == "ratio" else float
    value, margin = move(figure["effect"]), move(figure["margin"])
    low, high = (move(end) for end in figure["ci95"])
    if figure["worse"] == "less":
        value, low, high = -value, -high, -low
    error = value - low
    truth = value if ratio is None or figure["kind"] != "ratio" else log(ratio)
    return None if truth <= margin else round(images * (error / (truth - margin)) ** 2)


def verdict_of(gate: str, figures: Iterable[dict[str, Any]]) -> str:
    """What the gate said, or `REFUSED` where it failed although no figure did.

    Latency cannot be measured where the machine ran at unlike speeds under the two sides.
    """
    failed = gate == Verdict.FAIL and all(f["verdict"] != Verdict.FAIL for f in figures)
    return REFUSED if failed else str(gate)


def figures_of_document(document: dict[str, Any]) -> list[dict[str, Any]]:
    """All figures of a comparison of one setting."""
    (comparison,) = document["comparisons"]
    return [f for part in comparison["dimensions"].values() for f in part["figures"]]


def policy_verdict(found: dict[str, Any]) -> str:
    """`verdict_of` a kept cell's policy."""
    return verdict_of(found["verdict"], found["figures"])


def caught_by(cell: dict[str, Any]) -> list[str]:
    """Policies of which a figure failed."""
    return [name for name, f in cell["policies"].items() if policy_verdict(f) == Verdict.FAIL]


def figures_of(cell: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Figures by the beginning of their names, from the policy `all`."""
    figures = cell["policies"]["all"]["figures"]
    return [f for f in figures if any(f["name"].startswith(n) for n in names)]
