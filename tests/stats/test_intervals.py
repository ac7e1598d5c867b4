import numpy as np
import pytest
from scipy import stats

from sd35bench.stats.intervals import (
    expanded_tail,
    mean_interval,
    resampled_means,
    weight_chunks,
)


def test_mean_interval_is_the_mean_and_is_seeded():
    x = np.random.default_rng(0).normal(3.0, 1.0, 200)
    first = mean_interval(x, np.arange(200))
    assert first.value == pytest.approx(x.mean())
    assert first == mean_interval(x, np.arange(200))
    assert first.low < first.value < first.high


def test_mean_interval_agrees_with_theory_for_independent_values():
    x = np.random.default_rng(1).normal(size=400)
    found = mean_interval(x, np.arange(400))
    half = stats.t.ppf(0.975, 399) * x.std(ddof=1) / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def _coverage(prompts: int, clustered: bool) -> float:
    """Share of intervals that hold the true mean 0, with 4 alike seeds per prompt."""
    rng = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        x = np.repeat(rng.normal(size=prompts), 4) + 0.2 * rng.normal(size=4 * prompts)
        labels = np.repeat(np.arange(prompts), 4) if clustered else np.arange(4 * prompts)
        found = mean_interval(x, labels, resamples=1000)
        hits += found.low <= 0.0 <= found.high
    return hits / 300


@pytest.mark.parametrize("prompts", [8, 64], ids=["8-prompts", "64-prompts"])
def test_mean_interval_covers_where_seeds_of_a_prompt_are_alike(prompts):
    assert 0.91 <= _coverage(prompts, clustered=True) <= 0.99


def test_mean_interval_mutant_that_ignores_prompts_undercovers():
    assert _coverage(64, clustered=False) < 0.8


def test_mean_interval_of_one_prompt_has_no_ends():
    found = mean_interval([0.0, 1.0], [3, 3])
    assert (found.value, found.ci95, found.clusters) == (0.5, None, 1)


def test_mean_interval_of_unanimous_prompts_is_a_point():
    assert mean_interval([0.1] * 20, np.arange(20)).ci95 == pytest.approx([0.1, 0.1])


def test_expanded_tail_is_wider_for_few_prompts_and_nominal_for_many():
    assert expanded_tail(5) < expanded_tail(20) < expanded_tail(10_000) < 0.0251
    assert expanded_tail(10_000) == pytest.approx(0.025, rel=0.01)


@pytest.mark.parametrize("clusters", [7, 30_000], ids=["kept-table", "drawn-in-pieces"])
def test_weight_chunks_draw_as_many_as_there_are(clusters):
    pieces = list(weight_chunks(clusters, 1000, 0))
    assert sum(len(p) for p in pieces) == 1000
    assert all((p.sum(axis=1) == clusters).all() for p in pieces[:3])
    assert np.array_equal(pieces[0], next(weight_chunks(clusters, 1000, 0)))


def test_resampled_means_of_undrawn_columns_are_nan():
    sums = np.array([[1.0, 0.0], [2.0, 5.0]])
    counts = np.array([[1.0, 0.0], [1.0, 1.0]])
    draws = resampled_means(sums, counts, resamples=1000)
    assert not np.isnan(draws[:, 0]).any()
    assert np.isnan(draws[:, 1]).mean() == pytest.approx(0.25, abs=0.05)
    assert np.nanmax(np.abs(draws[:, 1] - 5.0)) < 1e-12
