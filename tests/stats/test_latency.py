import numpy as np
import pytest

from sd35bench.stats.latency import (
    LEAST_FOR_DRIFT,
    Spread,
    block_error,
    block_quantile,
    couple_starts,
    log_ratio,
    run_drift,
)

SPREAD = Spread(0.126, 2)


def _times(rng, n, correlation=0.0, noise=0.03):
    """Latencies around 1 s whose neighbours correlate, in the order of time."""
    e = rng.normal(size=n + 50)
    for t in range(1, n + 50):
        e[t] = correlation * e[t - 1] + np.sqrt(1 - correlation**2) * e[t]
    return np.exp(noise * e[50:])


def _coverage(correlation, block):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        x = _times(rng, 256, correlation)
        x = x if block else rng.permutation(x)  # the mutant forgets the order of time
        found = block_quantile(x, 0.5)
        hits += found.low <= 1.0 <= found.high
    return hits / 300


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.6])
def test_median_covers_where_neighbours_are_alike(correlation):
    assert 0.91 <= _coverage(correlation, block=True) <= 0.985


def test_median_mutant_that_forgets_time_undercovers():
    assert _coverage(0.6, block=False) < 0.85


def test_block_error_of_unrelated_values_is_the_standard_error():
    x = np.random.default_rng(1).normal(size=(200, 400))
    squares = [block_error(row)[0] ** 2 for row in x]
    assert np.sqrt(np.mean(squares)) == pytest.approx(1 / np.sqrt(400), rel=0.1)


def test_series_whose_neighbours_are_too_alike_has_no_interval():
    """128 images at a correlation of 0.9 are worth 7 unrelated ones; 24 unrelated ones are 24."""
    rng = np.random.default_rng(7)
    refused = [block_quantile(_times(rng, 128, 0.9), 0.5).ci95 is None for _ in range(100)]
    assert np.mean(refused) > 0.85
    told = [block_quantile(_times(rng, 24), 0.5).ci95 is not None for _ in range(100)]
    assert np.mean(told) > 0.9
    assert block_quantile(_times(rng, 512, 0.6), 0.5).ci95 is not None
    assert block_quantile(_times(rng, 128, 0.6), 0.95).ci95 is None


def test_quantile_is_in_its_interval_and_needs_enough_images():
    x = _times(np.random.default_rng(2), 64)
    found = block_quantile(x, 0.5)
    assert found.low < found.value < found.high
    assert block_quantile(x[:12], 0.99).ci95 is None


def test_constant_times_have_a_point():
    found = block_quantile(np.ones(20), 0.5)
    assert found.ci95 == [1.0, 1.0]


@pytest.mark.parametrize(
    ("baseline", "candidate", "expected"),
    [
        ("13", "24", [(0, 0), (1, 1)]),
        ("14", "23", [(0, 0), (1, 1)]),
        ("12", "34", [(1, 0)]),
        ("34", "12", [(0, 1)]),
        ("1", "", []),
        ("135", "246", [(0, 0), (1, 1), (2, 2)]),
    ],
    ids=["abab", "abba", "aabb", "bbaa", "a", "ababab"],
)
def test_couples_are_starts_that_follow_each_other(baseline, candidate, expected):
    assert sorted(couple_starts(list(baseline), list(candidate))) == expected


def test_one_couple_gets_the_known_spread_between_runs():
    rng = np.random.default_rng(3)
    a, b = _times(rng, 256), 1.1 * _times(rng, 256)
    found = log_ratio([a], [b], 0.5, SPREAD)
    within = log_ratio([a], [b], 0.5, Spread(0.0, 2))
    assert np.exp(found.value) == pytest.approx(1.1, abs=0.02)
    assert found.low < np.log(1 / 1.4)  # 4.3 times 0.126
    assert within.low > np.log(1.05)
    assert found.clusters == 3


def test_couples_share_the_machine_s_state():
    """Starts that differ by 30 % among themselves decide, if couples agree."""
    rng = np.random.default_rng(4)
    states = [1.0, 1.3, 0.8, 1.1]
    a = [s * _times(rng, 64) for s in states]
    b = [1.1 * s * _times(rng, 64) for s in states]
    found = log_ratio(a, b, 0.5, SPREAD)
    assert np.log(1.05) < found.low < np.log(1.1) < found.high
    assert found.clusters == 4


def test_swapped_sides_turn_the_ratio_round():
    rng = np.random.default_rng(6)
    a, b = [_times(rng, 40) for _ in range(3)], [_times(rng, 40) for _ in range(3)]
    for n in (1, 3):
        there, back = log_ratio(a[:n], b[:n], 0.5, SPREAD), log_ratio(b[:n], a[:n], 0.5, SPREAD)
        assert there.ci95 == pytest.approx([-back.high, -back.low])


def test_no_couple_has_no_ratio():
    assert log_ratio([], [], 0.5, SPREAD) is None


def test_drift_within_a_run_is_found_and_steady_runs_are_not():
    rng = np.random.default_rng(6)
    steady = sum(run_drift(_times(rng, 128)).drifting for _ in range(200)) / 200
    x = _times(rng, 128) * np.linspace(1.0, 1.1, 128)
    x[60] = 30.0  # one image met a garbage collection
    found = run_drift(x)
    assert steady <= 0.08
    assert found.drifting
    assert found.change.value == pytest.approx(0.1, abs=0.03)


def test_drift_of_few_images_is_not_asked_for():
    assert run_drift(np.ones(LEAST_FOR_DRIFT - 1)) is None
    assert run_drift(np.ones(LEAST_FOR_DRIFT)).drifting is False
