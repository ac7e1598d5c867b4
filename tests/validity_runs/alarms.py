"""A/A with real reruns: one backend, started again and again, each start held against each other.

The same seeds give the same files on one machine, so quality and drift cannot raise an alarm here
unless the harness itself mixes something up; time and memory can. Three ways to look at ten starts:
every pair of them, the disjoint neighbours among those pairs (pairs that share a start are not
independent), and couples of neighbours as `compare --rerun` makes them, with every way to say which
start of a couple was the baseline.

128 images a start: 5 would do for a median and 40 for a p95, but the p95's interval has no upper
end in one run below about 100, and quality is judged on as many prompts as elsewhere on the page.
"""

import shutil
from collections.abc import Sequence
from functools import reduce
from itertools import combinations, product
from pathlib import Path
from typing import Any

from sd35bench.config import config_dir
from sd35bench.gate.dimensions import ImageDistances
from sd35bench.gate.judge import compare_sides
from sd35bench.gate.policy import load_policy
from sd35bench.gate.sides import Side, merge_starts, read_sides
from sd35bench.stats.verdicts import Verdict
from sd35bench.study.store import Study
from tests.validity_runs.matrix import POLICIES, REFUSED, figures_of_document, verdict_of
from tests.validity_runs.sides import Amount, judge, run_side

__all__ = ["ALONE", "STARTS", "measure"]

BACKEND = "core"
STARTS = 10
ALONE = Amount(prompts=128, seeds=1, batch=1)


def measure(
    root: Path, seed: int, starts: int = STARTS, amount: Amount = ALONE, backend: str = BACKEND
) -> dict[str, Any]:
    """Start the backend `starts` times; verdicts of every pair of starts, by policy.

    Returns: ``{"seed", "starts", "images", "backend", "policies": {name: {"verdicts": {verdict: n},
    "neighbours": {verdict: n}}}, "couples": {"couples", "verdicts": {verdict: n}}, "largest":
    {figure: largest ratio or difference seen}}``; `images` are of one start.
    """
    studies = [_start(root, f"{seed}-again-{i}", amount, seed, backend) for i in range(starts)]
    largest: dict[str, float] = {}
    policies = {p: _pairs(root, [s.name for s in studies], p, largest) for p in POLICIES}
    return {
        "seed": seed,
        "starts": starts,
        "images": amount.images,
        "backend": backend,
        "policies": policies,
        "couples": _couples(studies),
        "largest": largest,
    }


def _start(root: Path, name: str, amount: Amount, seed: int, backend: str) -> Study:
    """One process start; one that was cut off is made anew, since a second process would end it."""
    if (root / name / "study.json").exists():
        study = Study.open(root, name)
        if len(study.done_keys()) == amount.images and len(study.sessions()) == 1:
            return study
        shutil.rmtree(root / name)
    return run_side(root, name, amount, seed, defect=None, backend=backend)


def _pairs(
    root: Path, names: Sequence[str], policy: str, largest: dict[str, float]
) -> dict[str, dict[str, int]]:
    counts = {"verdicts": _none_yet()}
    counts["neighbours"] = dict(counts["verdicts"])
    for i, j in combinations(range(len(names)), 2):
        document, _ = judge(root, names[i], names[j], policy)
        found = verdict_of(document["verdict"], figures_of_document(document))
        counts["verdicts"][found] += 1
        if j == i + 1 and i % 2 == 0:
            counts["neighbours"][found] += 1
        _widen(largest, document)
    return counts


def _couples(studies: Sequence[Study]) -> dict[str, Any]:
    """Verdicts of `speed` over couples of neighbours, for each way to say who was the baseline.

    Raises: RuntimeError where the starts are not alike, so that they cannot be of one side.
    """
    policy = load_policy("speed", config_dir() / "policy")
    sides = [_one(read_sides(study)) for study in studies]
    couples = list(zip(sides[::2], sides[1::2], strict=False))
    verdicts = _none_yet()
    for turned in product((0, 1), repeat=len(couples)):
        baseline, candidate = (
            _merged([couple[first ^ role] for couple, first in zip(couples, turned, strict=True)])
            for role in (0, 1)
        )
        nowhere = ImageDistances(lambda _: None, lambda _: None)
        document = compare_sides([baseline], [candidate], policy, nowhere)
        verdicts[verdict_of(document["verdict"], figures_of_document(document))] += 1
    return {"couples": len(couples), "verdicts": verdicts}


def _none_yet() -> dict[str, int]:
    return dict.fromkeys([*map(str, Verdict), REFUSED], 0)


def _one(sides: list[Side]) -> Side:
    (side,) = sides
    return side


def _merged(sides: Sequence[Side]) -> Side:
    whole = reduce(lambda side, other: merge_starts(side, [other]), sides)
    if len(whole.starts) != len(sides):
        raise RuntimeError("the starts ran unlike code: give an empty --results-dir")
    return whole


def _widen(largest: dict[str, float], document: dict[str, Any]) -> None:
    """Remember how far two starts were apart, whichever was the slower or larger."""
    for part in document["comparisons"][0]["dimensions"].values():
        for figure in part["figures"]:
            effect = figure["effect"]
            if effect is None:
                continue
            apart = max(effect, 1 / effect) if figure["kind"] == "ratio" else abs(effect)
            largest[figure["name"]] = max(apart, largest.get(figure["name"], 0.0))
