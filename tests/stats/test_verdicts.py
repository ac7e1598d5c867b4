"""Non-inferiority of one and against everything that could be best; images that would decide it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.stats.clustered import mean_t, student
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import (
    TAIL,
    Direction,
    Judgement,
    Verdict,
    decide,
    holm,
    images_between,
    judge,
    p_within,
    prompts_needed,
    spread,
    worst,
)

reals = st.floats(-10, 10, allow_nan=False)
positive = st.floats(1e-3, 10)


def _interval(value, below, above, clusters=128):
    return Interval(value, value - below, value + above, 256, clusters)


def _verdict(effect, margin, direction=Direction.LESS):
    tested = judge(effect, margin, direction)
    return decide(tested, tested.p_fail)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, Verdict.PASS),
        (-0.05, Verdict.UNDECIDED),
        (-0.2, Verdict.FAIL),
        (0.2, Verdict.PASS),
    ],
)
def test_less_is_worse_beyond_the_margin(value, expected):
    assert _verdict(_interval(value, 0.03, 0.03), 0.05) == expected


def test_swapped_sides_turn_the_verdict_round():
    rng = np.random.default_rng(0)
    drop = mean_t(rng.normal(-0.2, 0.1, 64), np.arange(64))
    rise = Interval(-drop.value, -drop.high, -drop.low, drop.n, drop.clusters)
    assert _verdict(drop, 0.05) == Verdict.FAIL
    assert _verdict(rise, 0.05) == Verdict.PASS
    assert _verdict(drop, 0.05, Direction.MORE) == Verdict.PASS


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (_interval(0.0, 0.04, 0.04), Verdict.PASS),
        (_interval(0.03, 0.04, 0.04), Verdict.UNDECIDED),
        (_interval(0.2, 0.04, 0.04), Verdict.FAIL),
        (_interval(-0.2, 0.04, 0.04), Verdict.FAIL),
    ],
)
def test_equivalence_needs_both_sides(effect, expected):
    assert _verdict(effect, 0.05, Direction.BOTH) == expected


@given(value=reals, below=positive, above=positive, margin=st.floats(0, 5))
def test_p_value_agrees_with_the_interval_s_end(value, below, above, margin):
    effect = _interval(value, below, above)
    tested = judge(effect, margin, Direction.MORE)
    end = value - below
    if abs(end - margin) > 1e-6:
        assert (tested.p_fail < 0.025) == (end > margin)
    assert not (tested.passes and tested.p_fail < 0.025)


def test_no_interval_decides_nothing():
    tested = judge(Interval(-1.0, None, None, 1, 1), 0.05, Direction.LESS)
    assert decide(tested, tested.p_fail) == Verdict.UNDECIDED


def test_point_interval_decides_by_its_value():
    assert _verdict(Interval(0.5, 0.5, 0.5, 9, 9), 0.1, Direction.MORE) == Verdict.FAIL
    assert _verdict(Interval(0.0, 0.0, 0.0, 9, 9), 0.1, Direction.MORE) == Verdict.PASS


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_p_value_and_bonferroni(p):
    adjusted = holm(p)
    for raw, found in zip(p, adjusted, strict=True):
        assert raw <= found <= min(1.0, len(p) * raw) or found == pytest.approx(max(adjusted))
    order = np.argsort(p, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


def _false_alarms(correct):
    """Share of 200 families of 10 candidates, which lose exactly the margin, with any alarm."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        tests = [
            judge(mean_t(rng.normal(-0.1, 0.5, 48), np.arange(48)), 0.1, Direction.LESS)
            for _ in range(10)
        ]
        raw = [t.p_fail for t in tests]
        found = holm(raw) if correct else raw
        alarms += any(decide(t, p) == Verdict.FAIL for t, p in zip(tests, found, strict=True))
    return alarms / 200


def test_holm_keeps_false_alarms_of_a_family_and_the_mutant_without_does_not():
    assert _false_alarms(correct=True) <= 0.055  # 2.5 % and 2.7 standard errors of 200
    assert _false_alarms(correct=False) > 0.12


def test_worst_of_several():
    assert worst([Verdict.PASS, Verdict.UNDECIDED]) == Verdict.UNDECIDED
    assert worst([Verdict.FAIL, Verdict.UNDECIDED]) == Verdict.FAIL
    assert worst([Verdict.NOT_APPLICABLE, Verdict.PASS]) == Verdict.PASS
    assert worst([]) == Verdict.NOT_APPLICABLE
    assert decide(Judgement(True, 0.01), 0.01) == Verdict.FAIL


def _differences(rng: np.random.Generator, mean: float, sd: float, k: int) -> Interval:
    return mean_t(rng.normal(mean, sd, k), np.arange(k))


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.2])
def test_p_and_interval_say_the_same(margin):
    rng = np.random.default_rng(1)
    for mean in (-0.3, -0.1, 0.0, 0.1):
        found = _differences(rng, mean, 0.3, 40)
        assert found.low is not None
        assert (p_within(found, margin) < TAIL) == (found.low > -margin)


def test_p_fails_with_the_margins_sign_flipped():
    found = _differences(np.random.default_rng(2), -0.05, 0.1, 200)
    assert p_within(found, 0.1) < TAIL
    assert p_within(found, -0.1) > 1 - TAIL


def test_difference_beyond_the_margin_is_rarely_shown_to_be_within():
    # At the margin itself the level is exact: 2.5 % of 4,000, within 3.5 standard errors.
    rng = np.random.default_rng(3)
    x = rng.normal(-0.1, 0.3, (4000, 30))
    half = float(student(29)) * x.std(axis=1, ddof=1) / np.sqrt(30)
    ends = zip(x.mean(axis=1), half, strict=True)
    found = [Interval(float(m), float(m - h), float(m + h), 30, 30) for m, h in ends]
    share = np.mean([p_within(d, 0.1) < TAIL for d in found])
    assert abs(share - TAIL) < 3.5 * np.sqrt(TAIL * (1 - TAIL) / 4000)


def test_unknown_and_constant_differences_are_said_plainly():
    assert p_within(Interval(0.5, None, None, 4, 1), 0.1) == 1.0
    same = Interval(0.0, 0.0, 0.0, 8, 8)
    assert (p_within(same, 0.1), p_within(same, 0.0)) == (0.0, 1.0)
    assert spread(Interval(0.5, None, None, 4, 1)) is None
    assert images_between(Interval(0.5, None, None, 4, 1), 0.1) is None


@pytest.mark.parametrize("distance", [0.05, 0.15])
def test_needed_prompts_have_the_stated_power_in_simulation(distance):
    sd, repetitions = 0.4, 4000
    k = prompts_needed(sd, distance)
    assert k is not None
    rng = np.random.default_rng(4)
    x = rng.normal(distance, sd, (repetitions, k)).astype(np.float32)
    low = x.mean(axis=1) - float(student(k - 1)) * x.std(axis=1, ddof=1) / np.sqrt(k)
    power = np.mean(low > 0)
    assert abs(power - 0.8) < 0.02 + 3 * np.sqrt(0.16 / repetitions)
    half = prompts_needed(sd, distance, power=0.5)
    assert half is not None
    assert half < k


def test_images_are_for_both_sides_and_all_seeds():
    # 20 prompts, 3 seeds each: as many again for the prompts that are missing.
    found = mean_t(np.random.default_rng(0).normal(-0.02, 0.3, 60), np.repeat(np.arange(20), 3))
    sd = spread(found)
    assert sd is not None
    needed = prompts_needed(sd, abs(found.value + 0.1))
    assert needed is not None
    assert images_between(found, 0.1) == {"prompts": needed - 20, "images": 6 * (needed - 20)}


def test_difference_on_the_margin_is_decided_by_no_number():
    assert prompts_needed(0.3, 0.0) is None
    assert prompts_needed(0.3, 1e-6) is None
    assert images_between(Interval(-0.1, -0.2, 0.0, 40, 40), 0.1) is None


def test_no_spread_needs_two_prompts():
    assert prompts_needed(0.0, 0.1) == 2
