"""How far two sides are apart in a set metric, by its statistic, where an interval of it is known.

A paired interval is given for the kernel distances (`sd35bench.stats.kernel`) and the
Fréchet distance (`sd35bench.stats.frechet`), from as many prompts on as its coverage
was measured with (docs/validity.md, docs/adr/0012-set-metrics-in-the-gate.md). The others are
refused: the extrapolated distance has more noise than the plain one, recall's manifold is made of
the images themselves, and for precision the reference's balls are taken as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sd35bench.analysis.reference import Reference
from sd35bench.analysis.set_metrics import (
    CMMD_SCALE,
    CMMD_SIGMA,
    FRECHET,
    at_length,
    compute,
)
from sd35bench.errors import MetricError
from sd35bench.stats.frechet import frechet_difference
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel import (
    Sample,
    Twins,
    gaussian_kernel,
    kernel_difference,
    polynomial_kernel,
)

__all__ = ["LEAST_PROMPTS", "SetDifference", "least_prompts", "set_difference"]

LEAST_PROMPTS = {"kid": 128, "cmmd": 128, FRECHET: 256}
"""Fewest prompts for which the difference's interval was shown to hold, by statistic."""
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


def least_prompts(statistic: str) -> int | None:
    """Fewest prompts to compare two sides by a statistic; ``None`` where no interval is known."""
    return LEAST_PROMPTS.get(statistic)


def set_difference(
    statistic: str, twins: Twins, reference: Reference, parameters: Mapping[str, Any]
) -> SetDifference:
    """Hold both sides against one reference.

    Raises: MetricError for a statistic without a paired interval, too few prompts, or a reference
    that it cannot be computed against.
    """
    least = least_prompts(statistic)
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
