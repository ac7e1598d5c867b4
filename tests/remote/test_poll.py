"""Few polls, and a bound that holds: for any latency, expected or not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.remote.retry import ENOUGH, LONGEST_S, Latencies, intervals, shortest_gap_s

SECONDS = st.floats(0.01, 300.0)


def polled(latency_s: float, expected_s: float) -> tuple[int, float, float]:
    """Polls, the moment of the one that sees the end, and the gap before it."""
    at = 0.0
    for count, gap in enumerate(intervals(expected_s), start=1):
        at += gap
        if at >= latency_s:
            return count, at, gap
    raise AssertionError


@given(latency_s=SECONDS, expected_s=SECONDS)
def test_polls_are_few_whatever_was_expected(latency_s, expected_s):
    count, at, gap = polled(latency_s, expected_s)
    assert count <= 20 + latency_s / LONGEST_S
    assert at - gap < latency_s <= at
    assert gap <= max(expected_s, LONGEST_S)


@given(expected_s=SECONDS, factor=st.floats(0.5, 1.5))
def test_polls_are_close_where_the_guess_was_good(expected_s, factor):
    count, at, gap = polled(factor * expected_s, expected_s)
    assert count <= 7
    if factor > 1:  # gaps grow by half: the last is half of those before it, and one more
        assert gap <= 0.25 * expected_s + max(0.05 * expected_s, 0.02) + 1e-9
    else:
        assert at == pytest.approx(max(expected_s, 0.02))


@given(in_flight=st.integers(2, 100), per_minute=st.integers(1, 1000))
def test_polls_of_all_in_flight_keep_the_rate_limit(in_flight, per_minute):
    polls_a_minute = in_flight * 60.0 / shortest_gap_s(in_flight, per_minute)
    assert polls_a_minute <= per_minute * (1 + 1e-9)


def test_one_alone_is_polled_as_often_as_it_needs():
    assert shortest_gap_s(1, 60) == 0.0


def test_the_guess_holds_until_enough_were_seen():
    latencies = Latencies(8.0)
    for _ in range(ENOUGH - 1):
        latencies.saw("a", 1.0, 0.0)
        assert latencies.expected_s("a") == 8.0
    latencies.saw("a", 1.0, 0.0)
    assert latencies.expected_s("a") == 1.0
    assert latencies.expected_s("b") == 8.0


def test_six_in_ten_are_done_at_the_first_poll():
    latencies = Latencies(8.0)
    for seen_s in (9, 1, 8, 2, 7, 3, 6, 4, 5):
        latencies.saw("a", float(seen_s), 0.0)
    assert latencies.expected_s("a") == 6.0


@given(latency_s=st.floats(0.05, 60.0), guess_s=st.floats(0.05, 60.0))
def test_a_wrong_guess_is_unlearnt_in_both_directions(latency_s, guess_s):
    """However far off it was: after 60 predictions the first poll is within a factor of two."""
    latencies = Latencies(guess_s)
    for _ in range(60):
        expected_s = latencies.expected_s("a")
        _, at, gap = polled(latency_s, expected_s)
        latencies.saw("a", at, gap)
    assert 0.4 * latency_s - 0.02 <= latencies.expected_s("a") <= 2 * latency_s + 0.02


def test_old_latencies_are_forgotten():
    latencies = Latencies(8.0)
    for seen_s in [100.0] * 50 + [1.0] * 9:
        latencies.saw("a", seen_s, 0.0)
    assert latencies.expected_s("a") == 1.0
