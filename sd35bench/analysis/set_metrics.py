"""How a set metric's number is computed from features: one function per statistic.

A set metric's score names its statistic and the statistic's parameters; a score that names none is
a Fréchet distance, as all were once. Adding a statistic is a function here and a line in
`STATISTICS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.reference import Reference
from sd35bench.errors import MetricError
from sd35bench.stats.frechet import frechet_infinity_interval, frechet_interval, least_prompts
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel import (
    Sample,
    Subsets,
    gaussian_kernel,
    kernel_interval,
    polynomial_kernel,
)
from sd35bench.stats.neighbours import precision_interval, recall_interval

FRECHET = "frechet"
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Outcome = tuple[Interval, dict[str, Any]]
"""The number with its interval, and what else there is to say about it."""
Statistic = Callable[[Sample, Reference, Mapping[str, Any]], Outcome]


def compute(
    statistic: str, images: Sample, reference: Reference, parameters: Mapping[str, Any]
) -> Outcome:
    """Compute a statistic of images (features and their prompts) against a reference.

    Raises: MetricError for a statistic that this version does not know, or a reference that it
    cannot be computed against.
    """
    if statistic not in STATISTICS:
        raise MetricError(
            f"{statistic!r} is no statistic of this version; there are: {', '.join(STATISTICS)}"
        )
    theirs, mine = len(reference.gaussian.mean), images.features.shape[1]
    if theirs != mine:
        raise MetricError(
            f"the reference {reference.name} has {theirs} dimensions, the features have {mine}"
        )
    if len(images.features) <= parameters.get("k", 0):
        raise MetricError(
            f"{statistic} looks at {parameters['k']} neighbours of each image, and there are"
            f" {len(images.features)} images"
        )
    return STATISTICS[statistic](images, reference, parameters)


def _frechet(images: Sample, reference: Reference, _: Mapping[str, Any]) -> Outcome:
    # Numbered by appearance, so that an interval does not depend on how prompts are spelt.
    known, first, which = np.unique(_prompts(images), return_index=True, return_inverse=True)
    numbers = np.empty(len(known), np.int64)
    numbers[np.argsort(first)] = np.arange(len(known))
    return frechet_interval(images.features, numbers[which], reference.gaussian), {}


def _frechet_infinity(images: Sample, reference: Reference, _: Mapping[str, Any]) -> Outcome:
    prompts = len(np.unique(_prompts(images)))
    least = least_prompts(images.features.shape[1])
    if prompts < least:
        raise MetricError(f"needs {least} prompts to extrapolate over, there are {prompts}")
    renders = None if reference.prompts is None else reference.sample
    interval, line = frechet_infinity_interval(images, reference.gaussian, renders)
    return interval, {"at_n": line.at_n, "fit_se": line.fit_se}


def _kid(images: Sample, reference: Reference, parameters: Mapping[str, Any]) -> Outcome:
    size = parameters.get("subset_size")
    subsets = None
    if size is not None:
        subsets = Subsets(size=size, count=parameters["subsets"], seed=parameters["subset_seed"])
    mine, theirs = images, reference.sample
    if parameters.get("normalise"):  # the kernel divides by d: a·b / d is the cosine then
        length = float(np.sqrt(images.features.shape[1]))
        mine, theirs = at_length(mine, length), at_length(theirs, length)
    return kernel_interval(mine, theirs, polynomial_kernel, subsets=subsets), {}


def _cmmd(images: Sample, reference: Reference, _: Mapping[str, Any]) -> Outcome:
    mine, theirs = at_length(images, 1.0), at_length(reference.sample, 1.0)
    return kernel_interval(mine, theirs, gaussian_kernel(CMMD_SIGMA), scale=CMMD_SCALE), {}


def _precision(images: Sample, reference: Reference, parameters: Mapping[str, Any]) -> Outcome:
    rows = _rows(reference, parameters)
    return precision_interval(images.features, _prompts(images), rows, parameters["k"]), {}


def _recall(images: Sample, reference: Reference, parameters: Mapping[str, Any]) -> Outcome:
    rows = _rows(reference, parameters)
    return recall_interval(images.features, _prompts(images), rows, parameters["k"]), {}


STATISTICS: dict[str, Statistic] = {
    FRECHET: _frechet,
    "frechet_infinity": _frechet_infinity,
    "kid": _kid,
    "cmmd": _cmmd,
    "precision": _precision,
    "recall": _recall,
}


def _prompts(images: Sample) -> NDArray:
    return np.zeros(len(images.features)) if images.prompts is None else images.prompts


def _rows(reference: Reference, parameters: Mapping[str, Any]) -> NDArray:
    rows, k = reference.sample.features, parameters["k"]
    if len(rows) <= k:
        raise MetricError(
            f"the reference {reference.name} keeps {len(rows)} features, k={k} neighbours need"
            f" {k + 1}"
        )
    return rows


def at_length(sample: Sample, length: float) -> Sample:
    """Give features one length, so that they differ in direction only, as CLIP compares them."""
    x = np.asarray(sample.features, np.float64)
    return Sample(x * (length / np.linalg.norm(x, axis=1, keepdims=True)), sample.prompts)
