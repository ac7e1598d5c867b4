"""FID∞ on Gaussians, whose distance is known in closed form."""

import numpy as np
import pytest

from sd35bench.stats.frechet import Gaussian, fit, frechet_distance
from sd35bench.stats.frechet_infinity import (
    frechet_infinity,
    frechet_infinity_interval,
    least_prompts,
)
from sd35bench.stats.kernel_distance import Sample

SHIFT, SCALE, NOISE = 0.2, 1.1, 0.6
VARIANCE = 1 + NOISE**2


def _truth(d: int) -> float:
    """Of N(shift, scale² v) from N(0, v), in d dimensions."""
    return d * (SHIFT**2 + VARIANCE * (SCALE - 1) ** 2)


def _draw(rng: np.random.Generator, prompts: int, seeds: int, d: int) -> tuple[Sample, Sample]:
    """Images of prompts, and four renders of each: what a prompt shows is the same in both."""
    base = rng.normal(size=(prompts, 1, d))
    x = SCALE * (base + NOISE * rng.normal(size=(prompts, seeds, d))) + SHIFT
    y = base + NOISE * rng.normal(size=(prompts, 4, d))
    labels = np.arange(prompts)
    return (
        Sample(x.reshape(-1, d), np.repeat(labels, seeds)),
        Sample(y.reshape(-1, d), np.repeat(labels, 4)),
    )


@pytest.mark.parametrize("paired", [True, False], ids=["renders", "reference"])
def test_extrapolation_takes_the_bias_of_n_away(paired):
    rng = np.random.default_rng(0)
    d = 12
    exact = Gaussian(np.zeros(d), VARIANCE * np.eye(d), 10**9)
    found = []
    for _ in range(40):
        x, y = _draw(rng, 64, 2, d)
        found.append(
            frechet_infinity(x, fit(y.features) if paired else exact, y if paired else None)
        )
    value = np.mean([f.value for f in found])
    at_n = np.mean([f.at_n for f in found])
    error = np.std([f.value for f in found]) / np.sqrt(40)
    assert value == pytest.approx(_truth(d), abs=3.5 * error)
    assert at_n > value + 5 * error  # the mutant that extrapolates nothing


def test_value_at_n_is_the_distance_of_all_images_from_the_same_prompts_renders():
    rng = np.random.default_rng(1)
    x, y = _draw(rng, 40, 2, 6)
    more = Sample(
        np.concatenate([y.features, rng.normal(9, 1, size=(8, 6))]),
        np.concatenate([y.prompts, np.repeat([98, 99], 4)]),
    )
    expected = frechet_distance(fit(x.features), fit(y.features))
    assert frechet_infinity(x, fit(more.features), more).at_n == pytest.approx(expected)


def test_reference_that_lacks_a_prompt_is_taken_as_it_is():
    rng = np.random.default_rng(2)
    x, y = _draw(rng, 40, 2, 6)
    fewer = Sample(y.features[4:], y.prompts[4:])
    reference = fit(y.features)
    expected = frechet_distance(fit(x.features), reference)
    assert frechet_infinity(x, reference, fewer).at_n == pytest.approx(expected)


def test_extrapolation_is_repeatable_and_owns_up_to_its_line():
    x, y = _draw(np.random.default_rng(3), 48, 2, 8)
    first, again = (frechet_infinity_interval(x, fit(y.features), y) for _ in range(2))
    interval, line = first
    assert first == again
    assert line.fit_se > 0
    assert interval.low < interval.value == line.value < interval.high
    assert (interval.n, interval.clusters) == (96, 48)


def test_least_prompts_grows_with_the_dimensions():
    assert (least_prompts(2), least_prompts(48)) == (16, 96)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds", "d", "paired"),
    [(64, 2, 16, True), (64, 2, 16, False), (128, 1, 16, True), (96, 4, 48, True)],
    ids=["renders", "reference", "one-seed", "48-dimensions"],
)
def test_interval_covers_the_true_distance(prompts, seeds, d, paired):
    rng = np.random.default_rng(4)
    exact = Gaussian(np.zeros(d), VARIANCE * np.eye(d), 10**9)
    hits = 0
    for _ in range(300):
        x, y = _draw(rng, prompts, seeds, d)
        reference, renders = (fit(y.features), y) if paired else (exact, None)
        found, _ = frechet_infinity_interval(x, reference, renders, resamples=1000)
        hits += found.low <= _truth(d) <= found.high
    assert hits / 300 >= 0.92
