import numpy as np
import pytest

from sd35bench.stats.frechet import (
    Gaussian,
    fit,
    frechet_distance,
    frechet_interval,
    influence,
)


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
