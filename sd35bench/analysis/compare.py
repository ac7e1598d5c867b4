"""The gate: a candidate against a baseline, dimension by dimension, under a policy.

Each figure passes where its interval shows that no more than the margin is lost, fails where it
shows that more is, and is undecided in between. All figures of a comparison, over all settings,
are one family for Holm's correction: what a gate fails by chance is at most 2.5 % in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35bench.analysis.dimensions import Distances, Figure, figures, start_drifts
from sd35bench.analysis.equivalence import Judgement, Verdict, decide, holm, judge, worst
from sd35bench.analysis.policy import Dimension, Policy
from sd35bench.analysis.sides import Side, match_pairs, match_sides
from sd35bench.analysis.worst import worst_pairs
from sd35bench.errors import ConfigError

__all__ = ["compare_sides", "gate_fails"]

_QUIET = frozenset({"setting", "commit", "dirty", "target_latency_s"})
_ENVIRONMENT_QUIET = frozenset({"hostname", "pid", "boot_id"})


@dataclass(slots=True)
class _Judged:
    """One figure on its way to a verdict."""

    dimension: str
    figure: Figure
    tested: Judgement | None
    p_adjusted: float | None = None
    verdict: Verdict = Verdict.UNDECIDED


def compare_sides(
    baselines: Sequence[Side],
    candidates: Sequence[Side],
    policy: Policy,
    distances: Distances,
) -> dict[str, Any]:
    """Hold candidates against baselines.

    `distances` is asked for the distance of matched images where the policy judges drift.

    Returns: ``{"baseline", "candidate", "policy", "verdict", "undecided_fails", "n_pairs",
    "dimensions": {name: {"verdict", "required", "reason"}}, "comparisons", "warnings"}``. A
    comparison has `baseline_setting`, `candidate_setting`, `title`, `differs`,
    `environment_differs` ({field: [baseline's, candidate's]}), `n_pairs`, `n_prompts`,
    `latency_drift` and `dimensions`, each with `verdict`, `required`, `reason` and `figures`:
    `name`, `unit`, `kind`, `baseline`, `candidate`, `effect`, `ci95`, `margin`, `worse`, `n`,
    `n_prompts`, `p`, `p_adjusted`, `verdict`, `note`; and `worst` (see `worst_pairs`). Effects of
    kind "ratio" and their ends are ratios, candidate over baseline; others are candidate minus
    baseline.

    Raises: ConfigError where nothing can be compared.
    """
    matches, warnings = match_sides(baselines, candidates)
    kept = [(a, b) for a, b in matches if len(match_pairs(a, b).clusters)]
    warnings += [f"no shared pair: {b.title}" for a, b in matches if (a, b) not in kept]
    if not kept:
        raise ConfigError(
            f"nothing to compare: {baselines[0].study} and {candidates[0].study} share no pair"
            " (0 pairs with the same prompt, negative prompt, seed, size and init image); run both"
            " on the same prompts and seeds"
        )
    judged = [_measure(a, b, policy, distances) for a, b in kept]
    _decide([j for part in judged for j in part])
    comparisons: list[dict[str, Any]] = [
        _comparison(a, b, policy, part) | {"worst": worst_pairs(a, b, policy, distances)}
        for (a, b), part in zip(kept, judged, strict=True)
    ]
    dimensions = {name: _overall(name, comparisons) for name in policy.dimensions}
    for name, found in dimensions.items():
        if found["verdict"] == Verdict.UNDECIDED:
            warnings.append(f"{name} is undecided: {found['reason']}")
    warnings += [w for c in comparisons for w in _comparison_warnings(c)]
    return {
        "baseline": baselines[0].study,
        "candidate": candidates[0].study,
        "policy": policy.name,
        "verdict": _whole(dimensions),
        "undecided_fails": policy.undecided_fails,
        "n_pairs": sum(c["n_pairs"] for c in comparisons),
        "dimensions": dimensions,
        "comparisons": comparisons,
        "warnings": list(dict.fromkeys(warnings)),
    }


def gate_fails(document: dict[str, Any]) -> bool:
    """Whether a comparison's document means a failed gate (exit code 1)."""
    verdict = document["verdict"]
    if verdict == Verdict.UNDECIDED:
        return bool(document["undecided_fails"])
    return verdict != Verdict.PASS


def _measure(a: Side, b: Side, policy: Policy, distances: Distances) -> list[_Judged]:
    found = []
    for name, wanted in policy.dimensions.items():
        for figure in figures(name, wanted, a, b, distances):
            effect = figure.effect
            tested = None
            if effect is not None:
                tested = judge(effect, figure.allowed, figure.margin.direction)
            found.append(_Judged(name, figure, tested))
    return found


def _decide(family: Sequence[_Judged]) -> None:
    """Give every figure of the whole comparison its verdict."""
    tested = [(j, j.tested) for j in family if j.tested is not None]
    for (item, test), p in zip(tested, holm([t.p_fail for _, t in tested]), strict=True):
        item.p_adjusted, item.verdict = p, decide(test, p)
    for item in family:
        if item.figure.absent:
            item.verdict = Verdict.NOT_APPLICABLE


def _comparison(a: Side, b: Side, policy: Policy, judged: Sequence[_Judged]) -> dict[str, Any]:
    matched = match_pairs(a, b)
    parts = {name: [j for j in judged if j.dimension == name] for name in policy.dimensions}
    return {
        "baseline_setting": a.setting,
        "candidate_setting": b.setting,
        "title": b.title if a.title == b.title else f"{b.title} against {a.title}",
        "differs": _differs(a.setting, b.setting, _QUIET),
        "environment_differs": _differs(a.environment, b.environment, _ENVIRONMENT_QUIET),
        "n_pairs": len(matched.clusters),
        "n_prompts": int(matched.clusters.max()) + 1,
        "only_baseline": len(np.unique(a.pairs)) - len(matched.clusters),
        "only_candidate": len(np.unique(b.pairs)) - len(matched.clusters),
        "latency_drift": {"baseline": start_drifts(a), "candidate": start_drifts(b)},
        "dimensions": {n: _dimension(policy.dimensions[n], part) for n, part in parts.items()},
    }


def _dimension(wanted: Dimension, judged: Sequence[_Judged]) -> dict[str, Any]:
    verdict, reason = _dimension_verdict(wanted, judged)
    return {
        "verdict": verdict,
        "required": wanted.required,
        "reason": reason,
        "figures": [_figure(j) for j in judged],
    }


def _dimension_verdict(wanted: Dimension, judged: Sequence[_Judged]) -> tuple[Verdict, str]:
    """The worst of its figures; what is required and was not measured fails."""
    verdict = worst([j.verdict for j in judged])
    blind = [j for j in judged if j.figure.unmeasured]
    if wanted.required and verdict != Verdict.FAIL:
        if verdict == Verdict.NOT_APPLICABLE:
            why = next((j.figure.note for j in judged if j.figure.note), "neither side has it")
            return Verdict.FAIL, f"required, and could not be measured: {why}"
        if blind:
            return Verdict.FAIL, f"required, and could not be measured: {blind[0].figure.note}"
    at_fault = [j for j in judged if j.verdict == verdict]
    said: dict[Verdict, Callable[[_Judged], str]] = {
        Verdict.FAIL: lambda j: f"{j.figure.name} is worse than the margin allows",
        Verdict.UNDECIDED: _doubt,
        Verdict.PASS: lambda j: f"{j.figure.name} is within the margin",
        Verdict.NOT_APPLICABLE: lambda j: str(j.figure.note),
    }
    texts = [said[verdict](j) for j in at_fault]
    return verdict, "; ".join(dict.fromkeys(texts)) if texts else "neither side has it"


def _doubt(item: _Judged) -> str:
    if item.figure.unmeasured:
        return str(item.figure.note)
    effect = item.figure.effect
    if effect is None or effect.low is None:
        return f"{item.figure.name} has too few prompts or images for an interval"
    return f"{item.figure.name}: the interval reaches across the margin"


def _figure(item: _Judged) -> dict[str, Any]:
    figure, effect = item.figure, item.figure.effect
    back = np.exp if figure.kind == "ratio" else np.float64
    ends = None if effect is None else effect.ci95
    return {
        "name": figure.name,
        "unit": figure.unit,
        "kind": figure.kind,
        "baseline": figure.baseline,
        "candidate": figure.candidate,
        "effect": None if effect is None else float(back(effect.value)),
        "ci95": None if ends is None else [float(back(end)) for end in ends],
        "margin": figure.margin.margin,
        "worse": str(figure.margin.direction),
        "n": 0 if effect is None else effect.n,
        "n_prompts": None if effect is None or figure.kind == "ratio" else effect.clusters,
        "p": None if item.tested is None else item.tested.p_fail,
        "p_adjusted": item.p_adjusted,
        "verdict": item.verdict,
        "note": figure.note,
    }


def _overall(name: str, comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [c["dimensions"][name] for c in comparisons]
    verdict = worst([f["verdict"] for f in found])
    why = next(f["reason"] for f in found if f["verdict"] == verdict)
    return {"verdict": verdict, "required": found[0]["required"], "reason": why}


def _whole(dimensions: dict[str, dict[str, Any]]) -> Verdict:
    """The worst dimension; a gate that measured nothing at all has failed."""
    verdict = worst([d["verdict"] for d in dimensions.values()])
    return Verdict.FAIL if verdict == Verdict.NOT_APPLICABLE else verdict


def _differs(a: dict[str, Any], b: dict[str, Any], quiet: frozenset[str]) -> dict[str, list[Any]]:
    names = [n for n in (*a, *(n for n in b if n not in a)) if n not in quiet]
    return {n: [a.get(n), b.get(n)] for n in names if a.get(n) != b.get(n)}


def _comparison_warnings(comparison: dict[str, Any]) -> list[str]:
    found = []
    for side in ("baseline", "candidate"):
        alone = comparison[f"only_{side}"]
        if alone:
            found.append(f"{comparison['title']}: {alone} pairs of the {side} only, left out")
        for start in comparison["latency_drift"][side]:
            if start["drifting"]:
                found.append(
                    f"latency of the {side} changed by {start['change_frac']:+.0%} during start"
                    f" {start['start']}: the machine was not steady"
                )
    names = [
        n for n in ("device", "cpu_model", "gpu_name") if n in comparison["environment_differs"]
    ]
    if names:
        found.append(
            f"the sides ran on unlike machines ({', '.join(names)}): latency and memory compare"
            " the machines too"
        )
    return found
