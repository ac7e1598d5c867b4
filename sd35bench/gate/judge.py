"""The gate: a candidate against a baseline, dimension by dimension, under a policy.

Each figure passes where its interval shows that no more than the margin is lost, fails where it
shows that more is, and is undecided in between. All figures of a comparison, over all settings,
are one family for Holm's correction: what a gate fails by chance is at most 2.5 % in all. The
interval beside a verdict is the one that decided it: that of a figure which does not pass has its
end on the side of harm at the corrected level. A figure in which no pair differs could not fail at
any level, and is not in the family (Tarone 1990, "A modified Bonferroni method for discrete data").
What is read off images that are the same files on both sides is the same, at any n. Two things are
asked of the comparison as a whole: that it covers what the baseline made, and that
anything could be measured at all.

Coverage: every figure compares pairs that both sides have, so a candidate that died after its first
images would be judged by those alone. A trial that was recorded counts as there, however it ended,
since the failures dimension judges how it ended; under a policy without that dimension nothing else
would, and then only what was made counts. What ran in another environment is missing: figures from
unlike environments are never pooled.

Beside the verdicts stand the pairs that lost most, which a person looks at when a gate fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import words
from sd35bench.errors import ConfigError
from sd35bench.gate.dimensions import Distances, figures, start_drifts
from sd35bench.gate.figure import Figure
from sd35bench.gate.policy import Dimension, Policy
from sd35bench.gate.sides import Side, has_image, match_pairs, match_sides, same_files
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import (
    TAIL,
    Direction,
    Judgement,
    Verdict,
    decide,
    decisive,
    harm_of,
    holm,
    holm_sizes,
    judge,
    worst,
)

_ROUNDING = 1e-9
"""A share such as 7/10 is below the 0.7 of a policy in the last digit."""


def count_covered(baseline: Side, candidate: Side, policy: Policy) -> tuple[int, int]:
    """How many of the baseline's pairs the candidate has, and how many there are to have."""
    pairs, made = (_recorded(side, policy) for side in (baseline, candidate))
    asked = np.union1d(pairs, baseline.elsewhere)
    return len(np.intersect1d(asked, made)), len(asked)


def judge_coverage(
    matches: Sequence[tuple[Side, Side]], alone: Sequence[Side], policy: Policy
) -> dict[str, Any]:
    """Hold each setting's share of pairs, and the share of settings, against the policy's.

    Args:
        matches: settings of the baseline and of the candidate that belong together.
        alone: settings of the baseline for which the candidate has none.
        policy: says which share must be there.

    Returns: ``{"verdict", "reason", "share", "required"}``; `share` is the least one.
    """
    settings = len({id(a) for a, _ in matches})
    counts = [(b.title, *count_covered(a, b, policy)) for a, b in matches]
    shares = [n / total if total else 1.0 for _, n, total in counts]
    shares.append(settings / (settings + len(alone)))
    least = min(shares)
    lacks = [
        f"{title}: {n} of {total} pairs"
        for (title, n, total), share in zip(counts, shares, strict=False)
        if share < 1.0
    ]
    lacks += [f"{side.title}: no such setting" for side in alone]
    passes = least >= policy.coverage - _ROUNDING
    reason = "everything that the baseline recorded is there"
    if lacks:
        kept = "recorded" if "failures" in policy.dimensions else "made"
        reason = f"of the baseline's, the candidate {kept} {'; '.join(lacks)}"
    if not passes:
        reason += (
            f" (coverage {words.digits(least)}, the policy asks for {policy.coverage:g}): run the"
            " candidate on the baseline's settings, prompts and seeds, to its end and in one"
            " environment, or set the policy's coverage where fewer are meant"
        )
    return {
        "verdict": Verdict.PASS if passes else Verdict.FAIL,
        "reason": reason,
        "share": least,
        "required": policy.coverage,
    }


def _recorded(side: Side, policy: Policy) -> NDArray[np.uint64]:
    """Pairs that count as there; one that failed at any batch size has failed."""
    if "failures" in policy.dimensions:
        return np.unique(side.pairs)
    return np.setdiff1d(side.pairs, side.pairs[side.failed])


SHOWN = 12


def worst_pairs(a: Side, b: Side, policy: Policy, distances: Distances) -> list[dict[str, Any]]:
    """Rank pairs with two images by what they lost, the worst first, at most 12.

    By drift where the policy judges it, else by its first metric that both sides have, else, where
    drift could not be measured, by which files changed; pairs that lost nothing are not among them.

    Returns: ``{"by", "value", "baseline_image", "candidate_image"}`` each; `value` is the effect.
    """
    matched = match_pairs(a, b, (has_image(a), has_image(b)))
    found: tuple[str, NDArray[np.float64], NDArray[np.float64]] | None = None
    if len(matched.clusters):
        if "drift" in policy.dimensions:
            measured = distances(a, b, matched)
            if not isinstance(measured, str):
                found = ("mean_abs", measured[:, 0], measured[:, 0])
        if found is None and "quality" in policy.dimensions:
            found = _by_metric(a, b, policy, matched.baseline, matched.candidate)
        if found is None and "drift" in policy.dimensions:
            changed = (~same_files(a, b, matched)).astype(np.float64)
            found = ("changed", changed, changed)
    if found is None:
        return []
    by, effect, harm = found
    lost = np.flatnonzero(np.nan_to_num(harm, nan=0.0) > 0.0)
    order = lost[np.argsort(-harm[lost], kind="stable")][:SHOWN]
    return [
        {
            "by": by,
            "value": float(effect[i]),
            "baseline_image": a.images[matched.baseline[i]],
            "candidate_image": b.images[matched.candidate[i]],
        }
        for i in order
    ]


def _by_metric(
    a: Side, b: Side, policy: Policy, mine: NDArray[np.int64], theirs: NDArray[np.int64]
) -> tuple[str, NDArray[np.float64], NDArray[np.float64]] | None:
    """The first metric of both sides: its name, effects and harms [n]."""
    wanted = policy.dimensions["quality"]
    for name in sorted(set(a.metrics) & set(b.metrics), reverse=True):
        margin = wanted.margin(name)
        if margin is not None:
            effect = b.metrics[name][theirs] - a.metrics[name][mine]
            harms = {Direction.LESS: -effect, Direction.MORE: effect}
            return name, effect, harms.get(margin.direction, np.abs(effect))
    return None


_QUIET = frozenset({"setting", "weights", "commit", "dirty", "target_latency_s"})
_CODE = frozenset({"commit", "dirty"})
_ENVIRONMENT_QUIET = frozenset({"hostname", "pid", "boot_id"})


@dataclass(slots=True)
class _Judged:
    """One figure on its way to a verdict."""

    dimension: str
    figure: Figure
    tested: Judgement | None
    p_adjusted: float | None = None
    size: int | None = None
    verdict: Verdict = Verdict.UNDECIDED

    @property
    def interval(self) -> Interval | None:
        """The interval that the verdict follows from."""
        figure = self.figure
        if figure.effect is None or self.size is None or self.verdict is Verdict.PASS:
            return figure.effect
        return decisive(figure.effect, figure.margin.direction, self.size, figure.span)


def compare_sides(
    baselines: Sequence[Side], candidates: Sequence[Side], policy: Policy, distances: Distances
) -> dict[str, Any]:
    """Hold candidates against baselines.

    `distances` is asked for the distance of matched images where the policy judges drift.

    Returns: ``{"baseline", "candidate", "policy", "verdict", "undecided_fails", "n_pairs",
    "gate": {"coverage" | "measured": {"verdict", "reason"}}, "dimensions": {name: {"verdict",
    "required", "reason"}}, "comparisons", "warnings"}``; `gate` is what fails or passes the whole
    beside its dimensions; its coverage also has `share` and `required` (see `judge_coverage`). A
    comparison has `baseline_setting`, `candidate_setting`, `title`, `differs`,
    `environment_differs` ({field: [baseline's, candidate's]}), `n_pairs`, `n_prompts`, `n_images`
    (pairs with an image on both sides) and `n_identical` of them that are the same file,
    `latency_drift` and `dimensions`, each with `verdict`, `required`, `reason` and `figures`:
    `name`, `unit`, `kind`, `baseline`, `candidate`, `effect`, `ci95`, `interval`, `margin`,
    `worse`, `n`, `n_prompts`, `p`, `p_adjusted`, `family`, `verdict`, `note`; and `worst` (see
    `worst_pairs`). Effects of kind "ratio" and their ends are ratios, candidate over baseline;
    others are candidate minus baseline. `ci95` is the plain 95 % interval; `interval` the one that
    the verdict follows from, with its end of harm corrected for `family` figures where it does not
    pass. What no data could have failed has no p, and is in no family.

    Raises: ConfigError where nothing can be compared.
    """
    matches, alone = match_sides(baselines, candidates)
    kept = [(a, b) for a, b in matches if len(match_pairs(a, b).clusters)]
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
    lost = [side for side in alone if any(side is b for b in baselines)]
    gate = {
        "coverage": judge_coverage(matches, lost, policy),
        "measured": _anything_measured(dimensions),
    }
    warnings = [f"no counterpart: {s.title} of {s.study}" for s in alone]
    warnings += [f"no shared pair: {b.title}" for a, b in matches if (a, b) not in kept]
    warnings += _doubts(dimensions)
    warnings += [w for c in comparisons for w in _comparison_warnings(c)]
    warnings += [w for (a, _), c in zip(kept, comparisons, strict=True) for w in _unexplained(a, c)]
    warnings += [w for side in (*baselines, *candidates) for w in _elsewhere(side)]
    warnings += [w for a, b in kept for w in _same_runs(a, b)]
    return {
        "baseline": baselines[0].study,
        "candidate": candidates[0].study,
        "policy": policy.name,
        "verdict": worst([found["verdict"] for found in (*gate.values(), *dimensions.values())]),
        "undecided_fails": policy.undecided_fails,
        "n_pairs": sum(c["n_pairs"] for c in comparisons),
        "gate": gate,
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
    return [
        _tested(name, figure)
        for name, wanted in policy.dimensions.items()
        for figure in figures(name, wanted, a, b, distances)
    ]


def _tested(dimension: str, figure: Figure) -> _Judged:
    if figure.effect is None:
        return _Judged(dimension, figure, None)
    tested = judge(figure.effect, figure.allowed, figure.margin.direction)
    if figure.unchanged or figure.certain:
        tested = replace(tested, can_fail=False)
    return _Judged(dimension, figure, tested)


def _decide(family: Sequence[_Judged]) -> None:
    """Give every figure of the whole comparison its verdict."""
    tested = [(j, j.tested) for j in family if j.tested is not None]
    # What cannot fail would only cost the others power.
    able = [(j, t) for j, t in tested if t.can_fail]
    p_values = [t.p_fail for _, t in able]
    for (item, test), p, size in zip(able, holm(p_values), holm_sizes(p_values), strict=True):
        item.p_adjusted, item.size, item.verdict = p, size, decide(test, p)
    for item, test in tested:
        if item.figure.certain:
            item.verdict = Verdict.FAIL if _beyond(item.figure) else Verdict.PASS
        elif not test.can_fail and test.passes:
            item.verdict = Verdict.PASS
    for item in family:
        if item.figure.absent:
            item.verdict = Verdict.NOT_APPLICABLE


def _beyond(figure: Figure) -> bool:
    """Whether the effect that was seen is worse than the margin allows."""
    assert figure.effect is not None
    harms = harm_of(figure.effect, figure.margin.direction)
    return any(harm.value > figure.allowed for harm in harms)


def _comparison(a: Side, b: Side, policy: Policy, judged: Sequence[_Judged]) -> dict[str, Any]:
    matched = match_pairs(a, b)
    shown = match_pairs(a, b, (has_image(a), has_image(b)))
    parts = {name: [j for j in judged if j.dimension == name] for name in policy.dimensions}
    return {
        "baseline_setting": a.setting,
        "candidate_setting": b.setting,
        "title": b.title if a.title == b.title else f"{b.title} against {a.title}",
        "differs": _differs(a.setting, b.setting, _QUIET),
        "environment_differs": _differs(a.environment, b.environment, _ENVIRONMENT_QUIET),
        "n_pairs": len(matched.clusters),
        "n_prompts": int(matched.clusters.max()) + 1,
        "n_images": len(shown.clusters),
        "n_identical": int(same_files(a, b, shown).sum()),
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
    if wanted.required and verdict != Verdict.FAIL:
        why = _why_unmeasured(judged, verdict)
        if why is not None:
            return Verdict.FAIL, f"required, and could not be measured: {why}"
    at_fault = [j for j in judged if j.verdict == verdict]
    said: dict[Verdict, Callable[[_Judged], str]] = {
        Verdict.FAIL: lambda j: f"{j.figure.name} is worse than the margin allows",
        Verdict.UNDECIDED: _doubt,
        Verdict.PASS: lambda j: f"{j.figure.name} is within the margin",
        Verdict.NOT_APPLICABLE: lambda j: str(j.figure.note),
    }
    texts = [said[verdict](j) for j in at_fault]
    return verdict, "; ".join(dict.fromkeys(texts)) if texts else "neither side has it"


def _why_unmeasured(judged: Sequence[_Judged], verdict: Verdict) -> str | None:
    """Why a dimension was not measured; ``None`` where it was.

    It was not where one side lacks a figure, where neither has one that is needed, and where no
    figure has an interval, so that whatever the candidate did could not have failed it.
    """
    blind = [j for j in judged if j.figure.unmeasured or (j.figure.needed and j.figure.absent)]
    if blind:
        return "; ".join(dict.fromkeys(str(j.figure.note) for j in blind))
    if verdict == Verdict.NOT_APPLICABLE:
        return next((j.figure.note for j in judged if j.figure.note), "neither side has it")
    if not any(map(_was_measured, judged)):
        return "; ".join(_doubt(j) for j in judged if not j.figure.absent)
    return None


def _was_measured(item: _Judged) -> bool:
    """Whether the figure has an interval, so that data could have failed it."""
    figure, tested = item.figure, item.tested
    if tested is None:
        return False
    return tested.can_fail or tested.passes or figure.certain or _has_ends(figure.effect)


def _has_ends(effect: Interval | None) -> bool:
    return effect is not None and effect.low is not None


def _doubt(item: _Judged) -> str:
    """Why a figure is undecided, by what decided it."""
    if item.figure.unmeasured:
        return str(item.figure.note)
    name, tested = item.figure.name, item.tested
    if tested is None or not _has_ends(item.figure.effect):
        return f"{name} has too few prompts or images for an interval"
    if item.p_adjusted is not None and tested.p_fail < TAIL:
        return (
            f"{name}: alone it would fail (p {words.digits(tested.p_fail, 2)}); as one of"
            f" {item.size} figures it does not (corrected p {words.digits(item.p_adjusted, 2)},"
            f" {TAIL:g} fails)"
        )
    return f"{name}: the interval reaches across the margin"


def _figure(item: _Judged) -> dict[str, Any]:
    figure, effect = item.figure, item.figure.effect
    back = np.exp if figure.kind == "ratio" else np.float64

    def ends(interval: Interval | None) -> list[float] | None:
        found = None if interval is None else interval.ci95
        return None if found is None else [float(back(end)) for end in found]

    return {
        "name": figure.name,
        "unit": figure.unit,
        "kind": figure.kind,
        "baseline": figure.baseline,
        "candidate": figure.candidate,
        "effect": None if effect is None else float(back(effect.value)),
        "ci95": ends(effect),
        "interval": ends(item.interval),
        "margin": figure.margin.margin,
        "worse": str(figure.margin.direction),
        "n": 0 if effect is None else effect.n,
        "n_prompts": None if effect is None or figure.kind == "ratio" else effect.clusters,
        "p": item.tested.p_fail if item.tested is not None and item.tested.can_fail else None,
        "p_adjusted": item.p_adjusted,
        "family": item.size,
        "verdict": item.verdict,
        "note": figure.note,
    }


def _overall(name: str, comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [c["dimensions"][name] for c in comparisons]
    verdict = worst([f["verdict"] for f in found])
    why = next(f["reason"] for f in found if f["verdict"] == verdict)
    return {"verdict": verdict, "required": found[0]["required"], "reason": why}


def _anything_measured(dimensions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A gate that measured nothing at all has failed."""
    if all(d["verdict"] == Verdict.NOT_APPLICABLE for d in dimensions.values()):
        reason = f"nothing was measured: {next(iter(dimensions.values()))['reason']}"
        return {"verdict": Verdict.FAIL, "reason": reason}
    return {"verdict": Verdict.PASS, "reason": "at least one dimension was measured"}


def _differs(a: dict[str, Any], b: dict[str, Any], quiet: frozenset[str]) -> dict[str, list[Any]]:
    names = [n for n in (*a, *(n for n in b if n not in a)) if n not in quiet]
    return {n: [a.get(n), b.get(n)] for n in names if a.get(n) != b.get(n)}


def _doubts(dimensions: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{name} is undecided: {found['reason']}"
        for name, found in dimensions.items()
        if found["verdict"] == Verdict.UNDECIDED
    ]


def _elsewhere(side: Side) -> list[str]:
    n = len(side.elsewhere)
    if not n:
        return []
    differs = ", ".join(side.elsewhere_differs) if side.elsewhere_differs else "what is not known"
    return [
        f"{side.title}: {n} pairs of {side.study} ran in another environment (another {differs})"
        " and are in no figure; run that study anew in one environment"
    ]


def _unexplained(a: Side, comparison: dict[str, Any]) -> list[str]:
    """Images that changed though nothing that is recorded did, where no figure says so."""
    changed = comparison["n_images"] - comparison["n_identical"]
    drift = comparison["dimensions"].get("drift", {"figures": ()})
    judged = any(figure["name"] == "changed" for figure in drift["figures"])
    differs = {*comparison["differs"], *comparison["environment_differs"]} - _CODE
    if not changed or judged or differs:
        return []
    floor = a.floor_levels
    noise = "" if floor is None else f" (noise floor {words.digits(floor, 2)} levels)"
    return [
        f"{comparison['title']}: {changed} of {comparison['n_images']} images are not"
        f" bit-identical, though no setting and no machine differs{noise}; --policy exact fails for"
        " that"
    ]


def _same_runs(a: Side, b: Side) -> list[str]:
    if a.study != b.study or not {s.id for s in a.starts} & {s.id for s in b.starts}:
        return []
    return [
        f"{b.title}: both sides are the same runs of {a.study}, which pass whatever they are; name"
        " another baseline or candidate"
    ]


def _comparison_warnings(comparison: dict[str, Any]) -> list[str]:
    found = []
    for side in ("baseline", "candidate"):
        alone = comparison[f"only_{side}"]
        if alone:
            found.append(
                f"{comparison['title']}: {words.plural(alone, 'pair')} of the {side} only, left out"
            )
        for start in comparison["latency_drift"][side]:
            if start["drifting"]:
                change = words.number(100 * start["change_frac"], 0, "+")
                found.append(
                    f"latency of the {side} changed by {change}% during start"
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
