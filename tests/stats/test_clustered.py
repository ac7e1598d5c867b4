import numpy as np
import pytest

from sd35bench.stats import clustered
from sd35bench.stats.clustered import (
    SAME_SIDE,
    mean_bounds,
    mean_t,
    quantile_bounds,
    quantile_t,
    ratio_of_sums,
)
from sd35bench.stats.intervals import mean_interval

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
def test_share_covers(k, p):
    rng = np.random.default_rng(k)
    chance = rng.beta(p, 1 - p, size=(k, REPEATS))  # seeds correlate by 1/2
    hits = rng.binomial(SEEDS, chance).astype(float)
    found = mean_bounds(hits, np.full(k, float(SEEDS)), bounds=(0.0, 1.0))
    assert 0.928 <= _covered(found, p) <= 0.972


def _errs_above(found, truth):
    """How often the truth lies above the interval."""
    return float((found.high < truth).mean())


def test_long_tail_s_end_moves_out_and_the_mutant_without_it_undercovers():
    x = np.exp(_prompts(np.random.default_rng(10), 64))
    found = mean_bounds(x.sum(axis=1), np.full(64, float(SEEDS)))
    y, truth = x.mean(axis=1), np.exp(0.5)
    student_half = 1.998 * y.std(axis=0, ddof=1) / 8
    assert 0.935 <= _covered(found, truth) <= 0.972
    assert float((y.mean(axis=0) + student_half < truth).mean()) > 0.06 > _errs_above(found, truth)


def test_heavy_tails_do_not_pull_an_end_nearer_than_students():
    rng = np.random.default_rng(11)
    y = rng.standard_t(3, size=(32, 400))
    found = mean_bounds(y, np.ones(32))
    half = 2.0395 * y.std(axis=0, ddof=1) / np.sqrt(32)
    assert (found.low <= found.value - half + 1e-3).all()
    assert (found.high >= found.value + half - 1e-3).all()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.05])
def test_difference_covers_where_failures_are_rare(share):
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


def test_one_lost_image_is_no_proof_of_a_loss_but_a_dozen_are():
    def lost(number):
        return mean_t([-1.0] * number + [0.0] * (128 - number), range(128), bounds=(-1.0, 1.0))

    assert lost(1).high >= 0.0
    assert lost(SAME_SIDE).high < -0.02
    assert lost(0).ci95 == pytest.approx([-0.0284, 0.0284], abs=1e-4)  # never seen in 128


@pytest.mark.parametrize(
    ("value", "bounds"), [(1.0, (0.0, 1.0)), (0.0, (0.0, 1.0)), (0.0, (-1.0, 1.0))]
)
def test_unanimous_prompts_are_exact_not_a_point(value, bounds):
    found = mean_t([value] * 20, np.arange(20), bounds=bounds)
    share = 1 - 0.025 ** (1 / 20)
    assert found.low == pytest.approx(value - (value - bounds[0]) * share)
    assert found.high == pytest.approx(value + (bounds[1] - value) * share)


def test_a_rare_event_s_share_does_not_go_below_0():
    assert mean_t([1.0] * 2 + [0.0] * 46, np.arange(48) // 2, bounds=(0.0, 1.0)).low >= 0.0


def test_a_share_near_its_bound_has_wilsons_interval():
    t2, p, k = 1.97196**2, 0.97, 200
    found = mean_t([1.0] * 194 + [0.0] * 6, range(k), bounds=(0.0, 1.0))
    half = np.sqrt(t2 * p * (1 - p) / k + t2**2 / (4 * k * k))
    ends = [(p + t2 / (2 * k) + sign * half) / (1 + t2 / k) for sign in (-1, 1)]
    assert found.ci95 == pytest.approx(ends, abs=1.5e-3)


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
        lambda: ratio_of_sums([1.0, 2.0], [2.0, 3.0], [1, 1]),
        lambda: quantile_t([1.0, 2.0], [1, 1], 0.5),
    ],
    ids=["mean", "ratio", "quantile"],
)
def test_one_prompt_has_no_ends(measure):
    assert measure().ci95 is None
    assert measure().clusters == 1


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


@pytest.mark.parametrize(
    "mutant", [None, lambda labels: labels.dtype == np.int64], ids=["", "gaps too"]
)
def test_labels_that_are_numbers_without_gaps_are_not_sorted_and_give_the_same(monkeypatch, mutant):
    rng = np.random.default_rng(5)
    values, labels = rng.normal(size=60), rng.permutation(np.arange(60) % 9)
    if mutant is not None:
        monkeypatch.setattr(clustered, "_are_dense", mutant)
    found = [mean_t(values, names) for names in (labels, labels * 3, labels.astype(str))]
    assert all(each == found[0] for each in found) is (mutant is None)
