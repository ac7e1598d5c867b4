"""Kernel distances: against torchmetrics and closed forms, and how well their intervals hold."""

import numpy as np
import pytest

from sd35bench.stats.kernel import (
    Sample,
    Subsets,
    gaussian_kernel,
    kernel_distance,
    kernel_interval,
    polynomial_kernel,
)


def _cloud(rng: np.random.Generator, n: int, d: int = 8, shift: float = 0.0) -> np.ndarray:
    return rng.normal(shift, 1.0, size=(n, d))


def test_kid_agrees_with_torchmetrics_on_the_same_features():
    torch = pytest.importorskip("torch")
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    x, y = _cloud(rng, 60, 24), _cloud(rng, 60, 24, 0.3)
    ours = kernel_distance(Sample(x, np.arange(60)), Sample(y), polynomial_kernel).value
    theirs = float(poly_mmd(torch.from_numpy(y), torch.from_numpy(x)))
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_kid_agrees_with_torch_fidelity_on_the_same_features():
    kid = pytest.importorskip(
        "torch_fidelity.metric_kid", reason="torch-fidelity is not installed; not a dependency"
    )
    rng = np.random.default_rng(1)
    x, y = _cloud(rng, 50, 24), _cloud(rng, 50, 24, 0.3)
    theirs = kid.polynomial_mmd(x, y, 3, None, 1)
    ours = kernel_distance(Sample(x, np.arange(50)), Sample(y), polynomial_kernel).value
    assert ours == pytest.approx(float(theirs), rel=1e-6)


def test_one_subset_of_all_images_is_the_distance_itself_and_more_are_near_it():
    rng = np.random.default_rng(2)
    x, y = Sample(_cloud(rng, 80), np.arange(80)), Sample(_cloud(rng, 80, shift=0.4))
    whole = kernel_distance(x, y, polynomial_kernel).value
    one = kernel_distance(x, y, polynomial_kernel, Subsets(size=80, count=1)).value
    many = kernel_distance(x, y, polynomial_kernel, Subsets(size=40, count=200)).value
    again = kernel_distance(x, y, polynomial_kernel, Subsets(size=40, count=200)).value
    other = kernel_distance(x, y, polynomial_kernel, Subsets(size=40, count=200, seed=1)).value
    assert one == pytest.approx(whole, rel=1e-10)
    assert many == again != other
    assert many == pytest.approx(whole, rel=0.1)


def test_gaussian_kernel_distance_of_gaussians_is_the_closed_form():
    """E exp(-|x-y|²/2σ²) of independent Gaussians is a Gaussian integral: no sample is needed."""
    rng = np.random.default_rng(3)
    d, shift, scale, sigma = 6, 0.5, 1.4, 2.0

    def mean(variance: float, offset: float) -> float:
        total = sigma**2 + variance
        return (sigma**2 / total) ** (d / 2) * np.exp(-d * offset**2 / (2 * total))

    expected = mean(2 * scale**2, 0) + mean(2.0, 0) - 2 * mean(1 + scale**2, shift)
    found = [
        kernel_distance(
            Sample(_cloud(rng, 400, d) * scale + shift, np.arange(400)),
            Sample(_cloud(rng, 400, d)),
            gaussian_kernel(sigma),
        ).value
        for _ in range(12)
    ]
    assert np.mean(found) == pytest.approx(expected, abs=4 * np.std(found) / np.sqrt(12))
    assert np.std(found) < 0.2 * expected


def test_polynomial_kernel_distance_of_shifted_points_is_the_closed_form():
    """Two point masses a and b: MMD² is k(a, a) + k(b, b) - 2 k(a, b), whatever n is."""
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    x, y = Sample(np.repeat(a, 5, 0), np.arange(5)), Sample(np.repeat(b, 7, 0))
    expected = (1 / 2 + 1) ** 3 + (4 / 2 + 1) ** 3 - 2 * 1.0
    assert kernel_distance(x, y, polynomial_kernel).value == pytest.approx(expected)


def _naive(x, labels, y, theirs, kernel) -> float:
    """Weighted means over pairs of unlike prompts, one pair at a time."""
    share = {p: np.sum(labels == p) / np.sum(theirs == p) for p in labels}
    sides = [(x, labels, np.ones(len(x))), (y, theirs, np.array([share[p] for p in theirs]))]

    def mean(a, b):
        top = bottom = 0.0
        for u, p, v in zip(*a, strict=True):
            for w, q, z in zip(*b, strict=True):
                if p != q:
                    top += v * z * kernel(u[None], w[None])[0, 0]
                    bottom += v * z
        return top / bottom

    return mean(sides[0], sides[0]) + mean(sides[1], sides[1]) - 2 * mean(sides[0], sides[1])


@pytest.mark.parametrize("block", [4_000_000, 20], ids=["one-block", "blocks"])
def test_distance_from_the_prompts_own_renders_uses_pairs_of_unlike_prompts(monkeypatch, block):
    monkeypatch.setattr("sd35bench.stats.kernel._BLOCK_ELEMENTS", block)
    rng = np.random.default_rng(4)
    labels = np.array(["b", "a", "a", "c", "b", "b"])
    theirs = np.array(["a", "a", "c", "b", "c", "a", "b"])
    x, y = _cloud(rng, 6, 3), _cloud(rng, 7, 3)
    ours = kernel_distance(Sample(x, labels), Sample(y, theirs), polynomial_kernel).value
    assert ours == pytest.approx(_naive(x, labels, y, theirs, polynomial_kernel), rel=1e-10)


def test_renders_of_prompts_that_a_set_does_not_have_play_no_part():
    rng = np.random.default_rng(5)
    x, labels = _cloud(rng, 8, 3), np.repeat(["a", "b", "c", "d"], 2)
    y, theirs = _cloud(rng, 8, 3), np.repeat(["a", "b", "c", "d"], 2)
    more = np.concatenate([y, _cloud(rng, 5, 3) + 100])
    named = np.concatenate([theirs, ["z"] * 5])
    expected = kernel_distance(Sample(x, labels), Sample(y, theirs), polynomial_kernel)
    found = kernel_distance(Sample(x, labels), Sample(more, named), polynomial_kernel)
    assert found.value == pytest.approx(expected.value)


def test_seeds_of_a_prompt_add_no_bias_and_the_mutant_that_pairs_them_does():
    rng = np.random.default_rng(6)
    right, wrong = [], []
    for _ in range(60):
        base = rng.normal(size=(24, 1, 4))
        x = (base + 0.2 * rng.normal(size=(24, 4, 4))).reshape(-1, 4)
        y = Sample(np.sqrt(1.04) * rng.normal(size=(96, 4)))
        right.append(kernel_distance(Sample(x, np.arange(96) // 4), y, polynomial_kernel).value)
        wrong.append(kernel_distance(Sample(x, np.arange(96)), y, polynomial_kernel).value)
    error = np.std(right) / np.sqrt(60)
    assert abs(np.mean(right)) < 3 * error
    assert np.mean(wrong) > 4 * error


def test_biased_mutant_with_each_images_pair_with_itself_is_caught():
    rng = np.random.default_rng(7)
    kernel = gaussian_kernel(10.0)
    found, mutant = [], []
    for _ in range(40):
        x, y = _cloud(rng, 64), _cloud(rng, 64)
        found.append(kernel_distance(Sample(x, np.arange(64)), Sample(y), kernel).value)
        mutant.append(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    error = np.std(found) / np.sqrt(40)
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(mutant) > 10 * error


def test_slopes_are_the_derivative_in_a_prompts_weight():
    rng = np.random.default_rng(8)
    labels = np.arange(90) // 3
    x = Sample(_cloud(rng, 90), labels)
    renders = Sample(_cloud(rng, 60, shift=0.5), np.arange(60) // 2)
    found = kernel_distance(x, renders, polynomial_kernel)
    assert found.slopes.sum() == pytest.approx(0.0, abs=1e-9)
    for prompt in (0, 11):  # leaving a prompt out is a weight of 0: minus its slope, to first order
        kept, theirs = labels != prompt, renders.prompts != prompt
        less = kernel_distance(
            Sample(x.features[kept], labels[kept]),
            Sample(renders.features[theirs], renders.prompts[theirs]),
            polynomial_kernel,
        )
        moved = found.value - less.value
        assert moved == pytest.approx(found.slopes[prompt], rel=0.15, abs=0.002 * found.value)


def test_a_single_prompt_has_a_value_and_no_interval():
    rng = np.random.default_rng(9)
    one = Sample(_cloud(rng, 30), np.zeros(30))
    found = kernel_interval(one, Sample(_cloud(rng, 40)), polynomial_kernel)
    assert found.ci95 is None
    assert (found.n, found.clusters) == (30, 1)


def test_interval_is_repeatable_and_scales():
    rng = np.random.default_rng(10)
    x, y = Sample(_cloud(rng, 64), np.arange(64) // 2), Sample(_cloud(rng, 64, shift=0.5))
    plain, again = (kernel_interval(x, y, polynomial_kernel) for _ in range(2))
    scaled = kernel_interval(x, y, polynomial_kernel, scale=1000.0)
    assert plain == again
    assert plain.low < plain.value < plain.high
    assert (scaled.value, scaled.low) == pytest.approx((1000 * plain.value, 1000 * plain.low))


CASES = [
    pytest.param(64, 1, 0.5, True, id="renders-far"),
    pytest.param(64, 4, 0.5, True, id="renders-far-4-seeds"),
    pytest.param(128, 1, 0.1, True, id="renders-near"),
    pytest.param(64, 1, 0.5, False, id="reference-far"),
    pytest.param(128, 2, 0.5, False, id="reference-far-2-seeds"),
    pytest.param(64, 2, 0.0, True, id="no-difference"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(4.0)], ids=["kid", "rbf"])
@pytest.mark.parametrize(("prompts", "seeds", "shift", "paired"), CASES)
def test_interval_covers_the_true_distance(kernel, prompts, seeds, shift, paired):
    """Images of k prompts, each prompt a point of its own; truth from 100,000s of pairs."""
    rng = np.random.default_rng(11)
    d = 16
    fixed = Sample(np.sqrt(1.36) * rng.normal(size=(512, d)))

    def draw(k: int, s: int) -> tuple[Sample, Sample]:
        base = rng.normal(size=(k, 1, d))
        x = (base + 0.6 * rng.normal(size=(k, s, d)) + shift).reshape(-1, d)
        y = (base + 0.6 * rng.normal(size=(k, 4, d))).reshape(-1, d)
        images = Sample(x, np.repeat(np.arange(k), s))
        return images, Sample(y, np.repeat(np.arange(k), 4)) if paired else fixed

    truth = np.mean([kernel_distance(*draw(1000, 1), kernel).value for _ in range(40)])
    found = [kernel_interval(*draw(prompts, seeds), kernel, resamples=1000) for _ in range(600)]
    covered = np.mean([f.low <= truth <= f.high for f in found])
    assert covered >= 0.925
    assert covered <= (0.97 if shift == 0.5 else 1.0)  # near 0 it is known to be too wide
