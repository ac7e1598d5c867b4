"""How many prompts, seeds, timed images and starts would decide, from a pilot's variances.

*Decide* is what `stats.decision` calls definitive: the cheapest setting is shown to be within the
margin of every other one. The number is planned for settings that are truly equal, the usual design
of a non-inferiority study (Chow, Shao and Wang 2008, section 3.2): a cheaper setting that is truly
worse by half of the margin takes four times as many prompts.

With m the margin and s_j the deviation of the difference from setting j between prompts, n prompts
decide where ``min_j (Z_j + m sqrt(n) / s_j) >= t(n - 1, 5 %)`` for Z normal with the differences'
correlation. A pilot of k prompts knows s_j with k - 1 degrees of freedom only, so its uncertainty
is averaged over, which asks for more (Julious and Owen 2006, "Sample size calculations for clinical
studies allowing for uncertainty about the variance"). Measured power at the planned n:
docs/validity.md (`python -m tests.validity planned`).

Cost model: 4,000 fixed draws, about 20 looks at them; 30 ms for 10 settings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sd35bench import words
from sd35bench.stats.decision import LEVEL
from sd35bench.stats.verdicts import TAIL

MOST_PROMPTS = 100_000
_DRAWS = 4000
_SEED = 20261130
_FEWEST_PILOT = 4
"""Prompts of a pilot below which its spread says next to nothing (3 degrees of freedom)."""
_NEAR = 1e-12
_MOST_STARTS = 40
_MOST_TIMED = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pilot:
    """Spread of paired differences, the cheapest setting minus each of J others.

    `between` and `within` [J, J] are covariances over prompts and over the images of one prompt;
    `within` is ``None`` where each prompt has one image. Then `between` holds both. `prompts` and
    `images` (a prompt) are the pilot's own.
    """

    between: Floats
    within: Floats | None
    prompts: int
    images: float

    def covariance(self, images: int) -> Floats | None:
        """Covariance [J, J] between prompts of so many images; ``None`` where it is not known."""
        if self.within is None:
            return self.between if images == round(self.images) else None
        return self.between + self.within / images


@dataclass(frozen=True, slots=True)
class Timing:
    """Spread of log latencies: within a start, of ratios between starts, and of neighbours.

    `between_sd` is ``None`` where one start was seen. `worth` is how many unrelated images one is
    worth, at most 1: neighbours of a start are alike.
    """

    within_sd: float
    between_sd: float | None
    worth: float


def read_pilot(
    quality: Floats, clusters: NDArray[np.int64], cheapest: int, span: float | None = None
) -> Pilot | None:
    """Read the spread of the differences off quality [S, n] and the prompts [n] of its pairs.

    A pair of settings that no prompt told apart differs on at most a share of ``1 - 0.5^(1/k)`` of
    all prompts, as likely as not; with `span`, the largest loss, that is taken for its spread.
    ``None`` with fewer than 4 prompts, or without any spread where the span is not known.
    """
    others = [i for i in range(len(quality)) if i != cheapest]
    paired = quality[cheapest] - quality[others]
    labels = np.unique(clusters, return_inverse=True)[1]
    counts = np.bincount(labels).astype(np.float64)
    k = len(counts)
    if k < _FEWEST_PILOT or not others:
        return None
    means = np.stack([np.bincount(labels, weights=row) for row in paired]) / counts
    total = np.atleast_2d(np.cov(means))
    images = float(counts.mean())
    within = None
    if images > 1.0 + _NEAR:
        left = paired - means[:, labels]
        within = left @ left.T / max(len(labels) - k, 1)
        total = total - within / images
    flat = np.diag(total) + (0.0 if within is None else np.diag(within)) <= _NEAR
    if flat.any():
        if span is None:
            return None
        total[np.diag_indices_from(total)] += flat * span**2 * (1.0 - 0.5 ** (1.0 / k))
    return Pilot(_no_negative(total), within, k, images)


def prompts_for(pilot: Pilot, margin: float, power: float, images: int) -> int | None:
    """Fewest prompts of so many images each that decide with that power, where all are equal.

    ``None`` where the pilot cannot tell, or where it takes more than `MOST_PROMPTS`.
    """
    covariance = pilot.covariance(images)
    if covariance is None or margin <= 0.0:
        return None
    sd = np.sqrt(np.diag(covariance))
    rng = np.random.default_rng(_SEED)
    correlation = covariance / np.maximum(np.outer(sd, sd), _NEAR)
    z = rng.standard_normal((_DRAWS, len(sd))) @ _root(correlation).T
    degrees = pilot.prompts - 1
    known = np.sqrt(rng.chisquare(degrees, _DRAWS) / degrees)
    # Where one of two draws is just beyond a whole prompt, both have to hold: the least of all.
    reach = known[:, None] * margin / np.maximum(sd, _NEAR)

    def decides(n: int) -> bool:
        needed = special.stdtrit(n - 1, 1.0 - LEVEL)
        return float(np.mean((z + reach * np.sqrt(n)).min(axis=1) >= needed)) >= power

    return _least(decides, 2, MOST_PROMPTS)


def seeds_for(pilot: Pilot, margin: float, power: float, most: int | None) -> tuple[int, int]:
    """Prompts and images a prompt that decide with the fewest images; 0 prompts where none do.

    A new prompt tells at least as much as a new seed, so there is one image a prompt, or what the
    pilot had where that is not known, and more only where a set has no more than `most` prompts.
    """
    first = 1 if pilot.within is not None else round(pilot.images)
    needed = prompts_for(pilot, margin, power, first)
    if needed is not None and (most is None or needed <= most):
        return needed, first
    if needed is None or most is None or pilot.within is None:
        return needed or 0, first

    def decides(images: int) -> bool:
        prompts = prompts_for(pilot, margin, power, images)
        return prompts is not None and prompts <= most

    images = _least(decides, first + 1, 100)
    if images is None:
        return needed, first
    return prompts_for(pilot, margin, power, images) or 0, images


def margin_for(pilot: Pilot, prompts: int, power: float, images: int) -> float | None:
    """Smallest margin, to three digits, that so many prompts decide with that power."""
    least = prompts_for(pilot, 1.0, power, images)
    if least is None:
        return None
    low, high = 0.0, 1.0
    while (needed := prompts_for(pilot, high, power, images)) is None or needed > prompts:
        low, high = high, 2.0 * high
    for _ in range(12):
        middle = (low + high) / 2.0
        needed = prompts_for(pilot, middle, power, images)
        low, high = (low, middle) if needed and needed <= prompts else (middle, high)
    return float(words.digits(high))


def read_timing(log_latency: list[list[Floats]]) -> Timing | None:
    """Read the spread of log latencies [setting][start][image], images in the order of time.

    ``None`` where no start of a setting has two images.
    """
    runs = [x for starts in log_latency for x in starts if len(x) > 1]
    if not runs:
        return None
    degrees = sum(len(x) - 1 for x in runs)
    variance = sum(float(np.square(x - x.mean()).sum()) for x in runs) / degrees
    like = sum(float((x[1:] - x.mean()) @ (x[:-1] - x.mean())) for x in runs)
    rho = float(np.clip(like / max(variance * degrees, _NEAR), 0.0, 0.97))
    starts = min(map(len, log_latency))
    between = None
    if starts > 1 and len(log_latency) > 1:
        means = np.array([[float(x.mean()) for x in s[:starts]] for s in log_latency])
        apart = (means[1:] - means[:1]).var(axis=1, ddof=1)
        noise = 2.0 * variance * float(np.mean([1.0 / len(x) for x in runs]))
        between = float(np.sqrt(max(0.0, float(apart.mean()) - noise)))
    return Timing(float(np.sqrt(variance)), between, (1.0 - rho) / (1.0 + rho))


def timed_for(
    timing: Timing, margin: float, power: float, start_images: float
) -> tuple[int, int] | None:
    """Starts and timed images of each that tell a latency ratio of 1 + margin from 1.

    Two-sided at 5 %, with that power; over one start, where no other was seen, which holds within
    one run only. `start_images` is what a start costs, in images.
    """
    distance = log(1.0 + margin)
    worth = 2.0 * timing.within_sd**2 / timing.worth

    def told(starts: int, images: int) -> bool:
        between = 0.0 if timing.between_sd is None else timing.between_sd**2 / starts
        units = starts if timing.between_sd is not None else images
        quantiles = special.stdtrit(units - 1, 1.0 - TAIL) + special.stdtrit(units - 1, power)
        return distance >= quantiles * np.sqrt(between + worth / (starts * images))

    if timing.between_sd is None:
        images = _least(lambda m: told(1, m), 2, _MOST_TIMED)
        return None if images is None else (1, images)
    found = [
        (starts, images)
        for starts in range(2, _MOST_STARTS + 1)
        if (images := _least(lambda m, r=starts: told(r, m), 2, _MOST_TIMED)) is not None
    ]
    return min(found, key=lambda x: x[0] * (x[1] + start_images), default=None)


def _least(holds: Callable[[int], bool], low: int, most: int) -> int | None:
    """Least whole number from `low` on for which something monotone holds."""
    high = low
    while not holds(high):
        if high >= most:
            return None
        low, high = high + 1, min(most, 2 * high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return ceil(high)


def _no_negative(covariance: Floats) -> Floats:
    """The covariance without the negative parts that taking noise off left."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * values.clip(0.0)) @ vectors.T


def _root(correlation: Floats) -> Floats:
    values, vectors = np.linalg.eigh(correlation)
    return vectors * np.sqrt(values.clip(0.0))
