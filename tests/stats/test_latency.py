import numpy as np
import pytest

from sd35bench.stats.latency import (
    LEAST_FOR_DRIFT,
    Spread,
    block_error,
    block_quantile,
    couple_starts,
    latency_interval,
    likeness,
    log_ratio,
    mean_latency,
    run_drift,
    speed_centres,
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


def test_two_or_three_images_have_no_interval_and_four_have_one_that_leaves_their_range():
    """A bootstrap cannot leave [least, largest], which holds the median of 2 in half of cases."""
    assert latency_interval([[0.2, 4.0]]).ci95 is None  # was "2 [0, 4] s"
    assert latency_interval([[0.502, 0.502]]).ci95 is None  # was "0.502 [0.502, 0.502] s"
    assert latency_interval([[0.5, 0.51, 0.49]]).ci95 is None
    found = latency_interval([[0.50, 0.51, 0.49, 0.505]])
    assert found.value == pytest.approx(0.5025)
    assert 0.4 < found.low < 0.49
    assert 0.51 < found.high < 0.6
    assert found.clusters == 1
    assert latency_interval([[0.5]]).ci95 is None


def test_a_slow_image_now_and_then_does_not_move_an_interval_of_eight():
    times = [0.50, 0.51, 0.49, 0.50, 0.52, 0.48, 0.50, 0.51]
    quiet, slow = latency_interval([times]), latency_interval([[*times[:-1], 5.0]])
    assert slow.high < 1.1 * quiet.high
    assert mean_latency([times]).ci95 is None
    # A mean needs the slow ones in its sample: 64 images.
    many = mean_latency([np.random.default_rng(1).lognormal(0.0, 0.1, 64)])
    assert many.low < many.value < many.high


def test_several_starts_are_the_units_and_a_start_of_few_images_is_none():
    rng = np.random.default_rng(8)
    starts = [m * np.exp(0.001 * rng.standard_normal(30)) for m in (1.0, 1.1, 1.2)]
    found = latency_interval(starts)
    half = 4.303 * np.std(np.log([1.0, 1.1, 1.2]), ddof=1) / np.sqrt(3)
    assert found.clusters == 3
    assert np.log(found.high / found.low) / 2 == pytest.approx(half, rel=0.05)
    # The mutant: Student's t of 90 unrelated images.
    logs = np.log(np.concatenate(starts))
    assert 1.99 * logs.std(ddof=1) / np.sqrt(90) < 0.1 * half
    assert latency_interval([starts[0], starts[1][:5]]).clusters == 1


def test_two_starts_that_agree_by_chance_still_have_the_spread_of_their_images():
    starts = [[1.0, 1.1, 0.9, 1.05], [0.9, 1.0, 1.05, 1.1]]
    assert np.ptp([np.mean(np.log(x)) for x in starts]) < 0.005
    found = latency_interval(starts)
    assert found.high / found.low > 1.1


def test_parts_of_a_call_may_be_nothing():
    found = latency_interval([[0.0, 0.0, 0.1, 0.2]])
    assert found.low == 0.0 < found.value < found.high


def test_likeness_is_taken_to_be_that_of_a_real_study_where_too_few_images_tell():
    rng = np.random.default_rng(6)
    assert likeness(rng.standard_normal((8, 3))) == pytest.approx([0.66] * 3)
    many = likeness(rng.standard_normal((512, 200)))
    assert 0.05 < many.mean() < 0.15
    assert likeness(np.stack([_times(rng, 512, 0.9) for _ in range(20)], axis=1)).mean() > 0.8


def test_ratio_of_starts_is_over_couples_from_three_on_else_over_all_starts():
    rng = np.random.default_rng(7)
    moods = 0.2 * rng.standard_normal(3)
    sides = [
        [0.01 * rng.standard_normal((20, 1)) + mood + offset for mood in moods]
        for offset in (0.3, 0.0)
    ]
    coupled = speed_centres(sides[0], sides[1], [(0, 0), (1, 1), (2, 2)])
    apart = speed_centres(sides[0], sides[1], [(0, 0)])
    assert coupled.value[0] == pytest.approx(apart.value[0])
    assert coupled.value[0] == pytest.approx(0.3, abs=0.01)
    assert coupled.half[0] < 0.02 < 0.1 < apart.half[0]
    assert (coupled.degrees, apart.degrees) == (2, 4)
    one = speed_centres(sides[0][:1], sides[1][:1], [(0, 0)])
    assert one.half[0] < 0.02


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
