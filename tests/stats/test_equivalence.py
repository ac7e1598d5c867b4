import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.stats.clustered import mean_t
from sd35bench.stats.equivalence import Direction, Judgement, Verdict, decide, holm, judge, worst
from sd35bench.stats.intervals import Interval

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
    """Share of 400 families of 20 candidates, which lose exactly the margin, with any alarm."""
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(400):
        tests = [
            judge(mean_t(rng.normal(-0.1, 0.5, 48), np.arange(48)), 0.1, Direction.LESS)
            for _ in range(20)
        ]
        raw = [t.p_fail for t in tests]
        found = holm(raw) if correct else raw
        alarms += any(decide(t, p) == Verdict.FAIL for t, p in zip(tests, found, strict=True))
    return alarms / 400


def test_holm_keeps_false_alarms_of_a_family_and_the_mutant_without_does_not():
    assert _false_alarms(correct=True) <= 0.045  # 2.5 % and 2.5 standard errors of 400
    assert _false_alarms(correct=False) > 0.2


def test_worst_of_several():
    assert worst([Verdict.PASS, Verdict.UNDECIDED]) == Verdict.UNDECIDED
    assert worst([Verdict.FAIL, Verdict.UNDECIDED]) == Verdict.FAIL
    assert worst([Verdict.NOT_APPLICABLE, Verdict.PASS]) == Verdict.PASS
    assert worst([]) == Verdict.NOT_APPLICABLE
    assert decide(Judgement(True, 0.01), 0.01) == Verdict.FAIL
