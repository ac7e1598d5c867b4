"""The Fréchet distance and FID∞ on Gaussians, whose distance is known in closed form."""

import numpy as np
import pytest

from sd35bench.stats.frechet import (
    Gaussian,
    fit,
    frechet_distance,
    frechet_infinity_interval,
    frechet_interval,
    influence,
    least_prompts,
)
from sd35bench.stats.kernel import Sample


def _spd(rng: np.random.Generator, d: int) -> np.ndarray:
    a = rng.normal(size=(d, 2 * d))
    return a @ a.T / d


def test_distance_of_commuting_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    s, t = rng.uniform(0.1, 3.0, 12), rng.uniform(0.1, 3.0, 12)
    mean = rng.normal(size=12)
    a = Gaussian(mean, (q * s) @ q.T, 100)
    b = Gaussian(np.zeros(12), (q * t) @ q.T, 100)
    expected = mean @ mean + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_of_one_dimension_is_the_textbook_value():
    a = Gaussian(np.array([1.0]), np.array([[4.0]]), 9)
    b = Gaussian(np.array([-2.0]), np.array([[1.0]]), 9)
    assert frechet_distance(a, b) == pytest.approx(9.0 + 1.0)


def test_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(1)
    a = Gaussian(rng.normal(size=20), _spd(rng, 20), 50)
    b = Gaussian(rng.normal(size=20), _spd(rng, 20), 50)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("n", [30, 400], ids=["fewer-images-than-dimensions", "plenty"])
def test_distance_agrees_with_torchmetrics_on_the_same_features(n):
    torch = pytest.importorskip("torch")
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(torch.nn.Module):
        """Passes features through: images that are features already."""

        num_features = 48

        def forward(self, x):
            return x.flatten(1)

    rng = np.random.default_rng(2)
    real = rng.normal(size=(500, 48)) @ _spd(rng, 48)
    fake = rng.normal(0.3, 1.2, size=(n, 48)) @ _spd(rng, 48)
    metric = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(fake), real=False)
    ours = frechet_distance(fit(fake), fit(real))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_distance_mutant_without_the_shared_trace_is_caught():
    rng = np.random.default_rng(3)
    a = Gaussian(np.zeros(5), _spd(rng, 5), 50)
    wrong = np.trace(a.cov) * 2
    assert abs(wrong - frechet_distance(a, a)) > 0.1


def test_influence_is_the_derivative_in_the_images_weights():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(400, 6)) @ _spd(rng, 6)
    reference = fit(rng.normal(0.5, 1.0, size=(4000, 6)))
    here = influence(x, reference)
    assert here.mean() == pytest.approx(0.0, abs=0.02 * here.std())
    for i in (0, 17, 399):  # doubling one image's weight moves the distance by influence / n
        more = frechet_distance(fit(np.concatenate([x, x[i : i + 1]])), reference)
        moved = (more - frechet_distance(fit(x), reference)) * 401
        assert moved == pytest.approx(here[i], rel=0.1, abs=0.05 * here.std())


def test_interval_covers_the_expected_distance_at_this_n():
    rng = np.random.default_rng(5)
    reference = fit(rng.normal(size=(20_000, 8)))
    found = []
    labels = np.repeat(np.arange(48), 4)
    for _ in range(120):
        shared = 0.5 * rng.normal(size=(48, 1, 8))
        x = (1.2 * rng.normal(size=(48, 4, 8)) + shared).reshape(-1, 8)
        found.append(frechet_interval(x, labels, reference, resamples=1000))
    expected = np.mean([f.value for f in found])
    covered = np.mean([f.low <= expected <= f.high for f in found])
    assert covered >= 0.9
    true_width = 3.92 * np.std([f.value for f in found])
    width = np.mean([f.high - f.low for f in found])
    assert width == pytest.approx(true_width, rel=0.45)


def test_interval_without_prompts_to_resample_has_no_ends():
    x = np.random.default_rng(6).normal(size=(50, 3))
    assert frechet_interval(x, np.zeros(50), fit(x)).ci95 is None


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


def _extrapolated(*about):
    """The line alone: its interval takes as long again."""
    return frechet_infinity_interval(*about, resamples=2)[1]


@pytest.mark.parametrize("paired", [True, False], ids=["renders", "reference"])
def test_extrapolation_takes_the_bias_of_n_away(paired):
    rng = np.random.default_rng(0)
    d = 12
    exact = Gaussian(np.zeros(d), VARIANCE * np.eye(d), 10**9)
    found = []
    for _ in range(20):
        x, y = _draw(rng, 64, 2, d)
        found.append(_extrapolated(x, fit(y.features) if paired else exact, y if paired else None))
    value = np.mean([f.value for f in found])
    at_n = np.mean([f.at_n for f in found])
    error = np.std([f.value for f in found]) / np.sqrt(20)
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
    assert _extrapolated(x, fit(more.features), more).at_n == pytest.approx(expected)


def test_reference_that_lacks_a_prompt_is_taken_as_it_is():
    rng = np.random.default_rng(2)
    x, y = _draw(rng, 40, 2, 6)
    fewer = Sample(y.features[4:], y.prompts[4:])
    reference = fit(y.features)
    expected = frechet_distance(fit(x.features), reference)
    assert _extrapolated(x, reference, fewer).at_n == pytest.approx(expected)


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
