"""Set metrics as figures of a gate's quality: the paired difference of both sides, or why not.

Both sides' images of the matched pairs are held against one reference. What was not scored on
either side, or has fewer prompts than its interval was shown to hold with, does not apply; what one
side has and the other lacks could not be measured.

A paired interval is given for the kernel distances (`sd35bench.stats.kernel`) and the Fréchet
distance (`sd35bench.stats.frechet`), from as many prompts on as its coverage was measured with
(docs/validity.md, docs/adr/0012-set-metrics-in-the-gate.md). The others are refused: the
extrapolated distance has more noise than the plain one, recall's manifold is made of the images
themselves, and for precision the reference's balls are taken as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.reference import Reference
from sd35bench.analysis.set_metrics import CMMD_SCALE, CMMD_SIGMA, FRECHET, at_length, compute
from sd35bench.errors import MetricError
from sd35bench.gate.figure import Figure, difference
from sd35bench.gate.policy import MetricMargin
from sd35bench.gate.sides import Matched, SetScore, Side, has_image, match_pairs, prompt_hash
from sd35bench.prompts import same_prompt
from sd35bench.stats.frechet import frechet_difference
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel import (
    Sample,
    Twins,
    gaussian_kernel,
    kernel_difference,
    polynomial_kernel,
)

LEAST_PROMPTS = {"kid": 128, "cmmd": 128, FRECHET: 256}
"""Fewest prompts for which the difference's interval was shown to hold, by statistic.

Of others no interval is known."""
_PROMPTS_PER_DIMENSION = 5
"""A Fréchet distance's: 256 prompts at 48 dimensions."""
_MOST_DIMENSIONS = 512
"""Of a Fréchet distance: at 2048 each prompt that is left out takes seconds."""


@dataclass(frozen=True, slots=True)
class SetDifference:
    """A set metric of both sides as `show` has it, and the candidate minus the baseline.

    The effect has no bias of n; where the statistic has one, it is not the difference of the two.
    """

    baseline: float
    candidate: float
    effect: Interval


Difference = Callable[[Twins, Reference, Mapping[str, Any]], Interval]


def set_difference(
    statistic: str, twins: Twins, reference: Reference, parameters: Mapping[str, Any]
) -> SetDifference:
    """Hold both sides against one reference.

    Raises: MetricError for a statistic without a paired interval, too few prompts, or a reference
    that it cannot be computed against.
    """
    least = LEAST_PROMPTS.get(statistic)
    if least is None:
        raise MetricError(f"no paired interval of {statistic} is known; gate kid or cmmd")
    prompts = len(np.unique(twins.prompts))
    if prompts < least:
        raise MetricError(f"needs {least} prompts, there are {prompts}")
    effect = _DIFFERENCES[statistic](twins, reference, parameters)
    sides = [Sample(x, twins.prompts) for x in (twins.baseline, twins.candidate)]
    before, after = (compute(statistic, side, reference, parameters)[0].value for side in sides)
    return SetDifference(before, after, effect)


def _frechet(twins: Twins, reference: Reference, _: Mapping[str, Any]) -> Interval:
    dimensions = twins.baseline.shape[1]
    if dimensions > _MOST_DIMENSIONS:
        raise MetricError(
            f"a paired Fréchet distance of {dimensions} dimensions takes too long (at most"
            f" {_MOST_DIMENSIONS}); gate kid on the same features"
        )
    prompts, least = len(np.unique(twins.prompts)), _PROMPTS_PER_DIMENSION * dimensions
    if prompts < least:
        raise MetricError(f"needs {least} prompts at {dimensions} dimensions, there are {prompts}")
    renders = None if reference.prompts is None else reference.sample
    return frechet_difference(twins, reference.gaussian, renders)


def _kid(twins: Twins, reference: Reference, parameters: Mapping[str, Any]) -> Interval:
    """Of all pairs at once: what a mean over subsets estimates too."""
    sample = reference.sample
    if parameters.get("normalise"):
        length = float(np.sqrt(twins.baseline.shape[1]))
        twins, sample = _at_length(twins, length), at_length(sample, length)
    return kernel_difference(twins, sample, polynomial_kernel)


def _cmmd(twins: Twins, reference: Reference, _: Mapping[str, Any]) -> Interval:
    kernel = gaussian_kernel(CMMD_SIGMA)
    sides = _at_length(twins, 1.0), at_length(reference.sample, 1.0)
    return kernel_difference(*sides, kernel, scale=CMMD_SCALE)


def _at_length(twins: Twins, length: float) -> Twins:
    a, b = (at_length(Sample(x), length).features for x in (twins.baseline, twins.candidate))
    return replace(twins, baseline=a, candidate=b)


_DIFFERENCES: dict[str, Difference] = {FRECHET: _frechet, "kid": _kid, "cmmd": _cmmd}

SET_UNIT = "set metric"
"""Unit of a figure that no single image has."""


class _Unmeasured(Exception):
    """One side cannot be held against the other; says why."""


def set_figure(name: str, margin: MetricMargin, a: Side, b: Side) -> Figure:
    """Hold the candidate `b` against the baseline `a` by a set metric that either has."""
    asked = difference(name, SET_UNIT, margin)
    scores = (a.sets.get(name), b.sets.get(name))
    rows = [
        has_image(side) if score is None else score.rows
        for score, side in zip(scores, (a, b), strict=True)
    ]
    matched = match_pairs(a, b, (rows[0], rows[1]))
    refusal = next((r for s in scores if s is not None and (r := _refusal(s, matched))), None)
    if refusal is not None:
        return asked(note=f"{name} is refused: {refusal}")
    try:
        return _measured(asked, scores, (a, b), matched)
    except _Unmeasured as why:
        return asked(unmeasured=True, note=f"{name} {why}")
    except MetricError as why:
        return asked(note=f"{name} is refused: {why}")


def _refusal(score: SetScore, matched: Matched) -> str | None:
    """Why there is no interval of a difference, or ``None``."""
    least = LEAST_PROMPTS.get(score.statistic)
    if least is None:
        return f"no interval of its paired difference is known ({score.statistic}); gate kid"
    n, prompts = len(matched.clusters), len(np.unique(matched.clusters))
    if n >= score.min_images and prompts >= least:
        return None
    return (
        f"its interval holds from {least} prompts and {score.min_images} images on, there are"
        f" {prompts} and {n}"
    )


def _measured(
    asked: Callable[..., Figure],
    scores: tuple[SetScore | None, SetScore | None],
    sides: tuple[Side, Side],
    matched: Matched,
) -> Figure:
    before, after = scores
    if before is None or after is None:
        lacking = "baseline" if before is None else "candidate"
        raise _Unmeasured(f"was not scored on the {lacking} (a baseline file: make it again)")
    _require_alike(before, after)
    features = [
        _features(score, side, rows)
        for score, side, rows in zip(
            (before, after), sides, (matched.baseline, matched.candidate), strict=True
        )
    ]
    prompts = sides[1].prompts[matched.candidate]
    reference, labels, note = _reference(before, after, prompts)
    twins = Twins(features[0], features[1], labels)
    found = set_difference(after.statistic, twins, reference, after.parameters)
    return asked(baseline=found.baseline, candidate=found.candidate, effect=found.effect, note=note)


def _require_alike(before: SetScore, after: SetScore) -> None:
    for what in ("extractor", "statistic", "parameters"):
        mine, theirs = getattr(before, what), getattr(after, what)
        if mine != theirs:
            raise _Unmeasured(
                f"has another {what} on the sides, {mine} and {theirs}: score both alike"
            )


def _features(score: SetScore, side: Side, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Features [n, d] of a side's images."""
    kept = score.read_features()
    found = [kept.get(str(side.images[i])) for i in rows]
    there = [x for x in found if x is not None]
    if len(there) < len(found):
        raise _Unmeasured(
            f"cannot be computed: features of {len(found) - len(there)} of {len(found)} images of"
            f" {side.study} are not there; a baseline file has them beside it (.features.npz):"
            " make it again, or compare with the study itself"
        )
    return np.stack(there)


def _reference(
    before: SetScore, after: SetScore, prompts: NDArray[np.uint64]
) -> tuple[Reference, NDArray, str | None]:
    """What both sides are held against, the prompts as it knows them [n], and a note.

    Scored against two references, they are comparable by one that has renders of all the matched
    prompts: a lost image takes its prompt out of a reference of true renders.
    """
    one = before.reference == after.reference
    for score in (after, before):
        if score.reference is None or score.read_reference is None:
            continue
        reference = score.read_reference()
        labels, covers = _labels(reference, prompts)
        if one or covers:
            note = None if one else f"both sides held against {reference.name}, of two references"
            return reference, labels, note
    if one:
        raise _Unmeasured("has no reference here: compare with a study, not with two files")
    raise _Unmeasured(
        f"was scored against unlike references, {before.reference} and {after.reference}: score"
        " both against one"
    )


def _labels(reference: Reference, prompts: NDArray[np.uint64]) -> tuple[NDArray, bool]:
    """Prompts as the reference spells them, or as numbers, and whether it has all of them."""
    if reference.prompts is None:
        return prompts, False
    known = {prompt_hash(str(t)): same_prompt(str(t)) for t in np.unique(reference.prompts)}
    labels = np.array([known.get(int(p), f"#{int(p)}") for p in prompts])
    return labels, all(int(p) in known for p in np.unique(prompts))
