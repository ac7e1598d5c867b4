"""A/A with real reruns: one backend, started again and again, each start held against each other.

The same seeds give the same files on one machine, so quality and drift cannot raise an alarm here
unless the harness itself mixes something up; time and memory can. Pairs of a few starts are not
independent of each other, so disjoint neighbours are counted beside all pairs.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

from sd35bench.analysis.equivalence import Verdict
from tests.validity_runs.matrix import POLICIES, STARTED
from tests.validity_runs.sides import Amount, judge, run_side

__all__ = ["STARTS", "measure"]

STARTS = 10


def measure(
    root: Path, seed: int, starts: int = STARTS, amount: Amount = STARTED
) -> dict[str, Any]:
    """Start the backend `starts` times; verdicts of every pair of starts, by policy.

    Returns: ``{"seed", "starts", "images", "policies": {name: {"pairs", "verdicts": {verdict: n},
    "neighbours": {verdict: n}}}, "largest": {figure: largest ratio or difference seen}}``.
    """
    names = [
        run_side(root, f"{seed}-again-{i}", amount, seed, defect=None, backend="eager").name
        for i in range(starts)
    ]
    policies = {}
    largest: dict[str, float] = {}
    for policy in POLICIES:
        counts = {"verdicts": dict.fromkeys(map(str, Verdict), 0)}
        counts["neighbours"] = dict(counts["verdicts"])
        for i, j in combinations(range(starts), 2):
            document, _ = judge(root, names[i], names[j], policy)
            counts["verdicts"][document["verdict"]] += 1
            if j == i + 1 and i % 2 == 0:
                counts["neighbours"][document["verdict"]] += 1
            _widen(largest, document)
        policies[policy] = counts
    return {
        "seed": seed,
        "starts": starts,
        "images": amount.images,
        "policies": policies,
        "largest": largest,
    }


def _widen(largest: dict[str, float], document: dict[str, Any]) -> None:
    """Remember how far two starts were apart, whichever was the slower or larger."""
    for part in document["comparisons"][0]["dimensions"].values():
        for figure in part["figures"]:
            effect = figure["effect"]
            if effect is None:
                continue
            apart = max(effect, 1 / effect) if figure["kind"] == "ratio" else abs(effect)
            largest[figure["name"]] = max(apart, largest.get(figure["name"], 0.0))
