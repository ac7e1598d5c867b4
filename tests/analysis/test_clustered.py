import numpy as np
import pytest

from sd35bench.analysis.clustered import (
    FEW_TELLING,
    mean_bounds,
    mean_t,
    proportion,
    proportion_bounds,
    quantile_bounds,
    quantile_t,
    ratio_of_sums,
)
from sd35bench.analysis.intervals import mean_interval

REPEATS, SEEDS = 2000, 4


def _prompts(rng, k, columns=REPEATS):
    """Values [k, SEEDS, columns] of mean 0 whose seeds correlate by 1/2 within a prompt."""
    shared = rng.normal(size=(k, 1, columns))
    return (shared + rng.normal(size=(k, SEEDS, columns))) / np.sqrt(2)


def _covered(found, truth):
    return float(((found.low <= truth) & (truth <= found.high)).mean())


@pytest.mark.parametrize("k", [128, 512])
@pytest.mark.parametrize("transform", [lambda x: x, lambda x: np.exp(0.5 * x)], ids=["n", "logn"])
def test_mean_covers_where_seeds_of_a_prompt_are_alike(k, transform):
    x = transform(_prompts(np.random.default_rng(k), k))
    truth = transform(_prompts(np.random.default_rng(1), 20_000, 20)).mean()
    found = mean_bounds(x.sum(axis=1), np.full(k, float(SEEDS)))
    assert 0.928 <= _covered(found, truth) <= 0.972  # 4.5 standard errors of 2,000


def test_mean_mutant_that_resamples_images_instead_of_prompts_undercovers():
    x = _prompts(np.random.default_rng(3), 128)
    images = x.reshape(128 * SEEDS, REPEATS)
    found = mean_bounds(images, np.ones(128 * SEEDS))
    assert _covered(found, 0.0) < 0.85


@pytest.mark.parametrize("k", [128, 512])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.97])
def test_proportion_covers(k, p):
    rng = np.random.default_rng(k)
    chance = rng.beta(p, 1 - p, size=(k, REPEATS))  # seeds correlate by 1/2
    found = proportion_bounds(rng.binomial(SEEDS, chance), np.full(k, float(SEEDS)))
    assert 0.928 <= _covered(found, p) <= 0.972


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05])
def test_difference_is_careful_where_failures_are_rare(share):
    rng = np.random.default_rng(4)
    failed = rng.binomial(2, share, size=(128, REPEATS))
    found = mean_bounds(failed.astype(float), np.full(128, 2.0), bounds=(-1.0, 1.0))
    assert _covered(found, share) >= 0.93
    assert (found.low <= found.value).all()


def test_few_telling_prompts_are_not_trusted():
    """1 % of prompts lose an image: t alone is far too sure, as the mutant without bounds shows."""
    rng = np.random.default_rng(5)
    lost = -rng.binomial(1, 0.01, size=(128, REPEATS)).astype(float)
    careful = mean_bounds(lost, np.ones(128), bounds=(-1.0, 1.0))
    mutant = mean_bounds(lost, np.ones(128))
    assert _covered(careful, -0.01) >= 0.95
    assert _covered(mutant, -0.01) < 0.85


def test_many_telling_prompts_give_students_interval():
    x = np.random.default_rng(6).uniform(-0.5, 0.5, size=FEW_TELLING + 20)
    assert mean_t(x, range(len(x)), bounds=(-1.0, 1.0)) == mean_t(x, range(len(x)))


def test_mean_agrees_with_the_bootstrap():
    rng = np.random.default_rng(7)
    x, labels = rng.normal(size=600), np.arange(600) // 3
    found, drawn = mean_t(x, labels), mean_interval(x, labels)
    assert found.value == pytest.approx(drawn.value)
    assert (found.high - found.low) == pytest.approx(drawn.high - drawn.low, rel=0.06)


def test_mean_weighs_images_not_prompts():
    found = mean_t([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1])
    assert found.value == 0.75


@pytest.mark.parametrize(
    "measure",
    [
        lambda: mean_t([1.0, 2.0], [0, 0]),
        lambda: proportion([True, False], [3, 3]),
        lambda: ratio_of_sums([1.0, 2.0], [2.0, 3.0], [1, 1]),
        lambda: quantile_t([1.0, 2.0], [1, 1], 0.5),
    ],
    ids=["mean", "proportion", "ratio", "quantile"],
)
def test_one_prompt_has_no_ends(measure):
    assert measure().ci95 is None
    assert measure().clusters == 1


def test_proportion_of_no_failure_is_wilsons_and_never_below_0():
    from scipy import stats

    found = proportion(np.zeros(64), np.arange(64))
    t2 = stats.t.ppf(0.975, 63) ** 2
    assert found.low == 0.0
    assert found.high == pytest.approx(t2 / (64 + t2))


def test_swapped_sides_turn_ratio_and_difference_round():
    rng = np.random.default_rng(8)
    a, b, labels = rng.lognormal(size=90), rng.lognormal(size=90), np.arange(90) // 3
    there, back = ratio_of_sums(a, b, labels), ratio_of_sums(b, a, labels)
    assert there.ci95 == pytest.approx([1 / back.high, 1 / back.low])
    one, other = (mean_t(x, labels) for x in (a - b, b - a))
    assert one.ci95 == pytest.approx([-other.high, -other.low])


@pytest.mark.parametrize(("q", "k"), [(0.5, 128), (0.5, 512), (0.95, 512)])
def test_quantile_covers_over_prompts(q, k):
    x = _prompts(np.random.default_rng(9), k, 500)
    labels = np.repeat(np.arange(k), SEEDS)
    found = quantile_bounds(x.reshape(k * SEEDS, 500), labels, q)
    truth = {0.5: 0.0, 0.95: 1.6448536}[q]
    assert 0.92 <= _covered(found, truth) <= 0.98


def test_quantile_that_the_sample_cannot_tell_has_no_ends():
    assert quantile_t(np.arange(12.0), np.arange(12), 0.99).ci95 is None
