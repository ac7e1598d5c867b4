"""The rule that names a setting: the burden of proof lies on the cheaper one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sd35bench.stats import decision
from sd35bench.stats.decision import decide, front_by_cost, p_loss


def _outcomes(shares: list[float], prompts: int) -> np.ndarray:
    """Right and wrong images [S, n] with these shares; settings fail on nearly the same prompts."""
    rows = []
    for row, share in enumerate(shares):
        wrong = round((1.0 - share) * prompts)
        values = np.ones(prompts)
        values[(np.arange(wrong) + row) % prompts] = 0.0
        rows.append(values)
    return np.array(rows)


def _decide(quality, cost, margin=0.02, **more):
    return decide(quality, np.arange(quality.shape[1]), np.array(cost), margin, span=1.0, **more)


def test_where_nothing_is_shown_the_better_looking_is_named_provisionally():
    found = _decide(_outcomes([0.62, 0.81], 16), [1.0, 7.0])
    assert (found.chosen, found.definitive) == (1, False)


def test_one_prompt_shows_nothing():
    rng = np.random.default_rng(0)
    quality = (rng.random((2, 20)) < np.array([[0.1], [0.9]])).astype(float)
    found = decide(quality, np.zeros(20, np.int64), np.array([1.0, 2.0]), 0.02, span=1.0)
    assert (found.chosen, found.definitive) == (1, False)


def test_a_cheaper_setting_that_is_shown_is_named():
    found = _decide(_outcomes([0.5, 0.8, 0.81], 400), [1.0, 2.0, 4.0], margin=0.08)
    assert (found.chosen, found.definitive) == (1, True)
    assert found.tests[0].beyond


def test_the_walk_stops_at_the_first_setting_that_is_not_shown():
    # The cheapest would pass by itself, the one before it is too noisy to.
    rng = np.random.default_rng(1)
    best = np.full(64, 0.80)
    noisy = 0.79 + rng.normal(0, 1.0, 64)
    noisy += 0.79 - noisy.mean()
    cheap = np.full(64, 0.78) + rng.normal(0, 1e-3, 64)
    found = _decide(np.array([cheap, noisy, best]), [1.0, 2.0, 3.0], margin=0.05)
    assert not found.tests[1].shown
    assert found.tests[0].p_adjusted >= found.tests[1].p
    assert found.chosen == 2


def test_costs_decide_by_what_was_measured():
    # Medians 0.195 and 0.38: never told apart by four images, and never the same.
    found = _decide(_outcomes([0.80, 0.81], 192), [0.195, 0.38], margin=0.08)
    assert (found.chosen, found.definitive) == (0, True)


@pytest.mark.parametrize(
    ("cost", "front"), [([1.0, 1.01], [1]), ([1.0, 1.5], [1, 0])], ids=["same-cost", "dearer"]
)
def test_costs_within_two_percent_are_no_difference(cost, front):
    assert front_by_cost(np.array([0.5, 0.6]), np.array(cost), [0, 1]) == front


def test_ties_in_quality_go_to_the_cheaper():
    assert front_by_cost(np.array([0.5, 0.5]), np.array([2.0, 1.0]), [0, 1]) == [1]


def test_a_named_reference_stays_where_nothing_cheaper_is_shown():
    quality = _outcomes([0.7, 0.8, 0.9], 24)
    found = _decide(quality, [1.0, 2.0, 3.0], reference=1)
    assert (found.chosen, found.walk, found.definitive) == (1, [0], False)


def test_best_quality_is_definitive_only_against_every_rival():
    assert not _decide(_outcomes([0.7, 0.8], 12), [1.0, 2.0], fastest=False).definitive
    assert _decide(_outcomes([0.3, 0.9], 200), [1.0, 2.0], fastest=False).definitive


def test_differences_without_spread_show_nothing_until_prompts_are_many():
    assert p_loss(np.zeros(8), np.ones(8), 0.08, 1.0) > 0.05
    assert p_loss(np.zeros(36), np.ones(36), 0.08, 1.0) <= 0.05  # 0.92^36 = 0.0497
    assert p_loss(np.zeros(35), np.ones(35), 0.08, 1.0) > 0.05
    assert p_loss(np.zeros(500), np.ones(500), 0.08, None) == 1.0  # how far one may go is unknown


def test_p_loss_is_the_one_sided_t_test():
    values = np.random.default_rng(2).normal(0.1, 1.0, 30)
    expected = stats.ttest_1samp(values, -0.05, alternative="greater").pvalue
    assert p_loss(values, np.ones(30), 0.05, None) == pytest.approx(expected, rel=1e-12)


def before_minus(quality, chosen):
    """Paired differences of the setting that was chosen minus the one added last."""
    return quality[chosen] - quality[-1]


@st.composite
def _studies(draw):
    count, prompts = draw(st.integers(2, 6)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quality = (rng.random((count, prompts)) < rng.random((count, 1))).astype(float)
    return quality, rng.uniform(0.1, 4.0, count), rng


@settings(max_examples=60, deadline=None)
@given(_studies(), st.sampled_from([0.0, 0.02, 0.08, 0.3]), st.booleans())
def test_a_dominated_setting_changes_no_name_and_no_certainty_that_it_does_not_share(
    study, margin, fastest
):
    quality, cost, rng = study
    before = _decide(quality, cost, margin, fastest=fastest)
    beaten = int(rng.integers(len(cost)))
    if not quality[beaten].any():
        return  # nothing is worse than no right image at all
    worse = quality[beaten].copy()
    right = np.flatnonzero(worse)
    worse[rng.choice(right, size=int(rng.integers(1, len(right) + 1)), replace=False)] = 0.0
    more = np.vstack([quality, worse])
    slower = np.append(cost, cost[beaten] * rng.uniform(1.001, 5.0))
    after = _decide(more, slower, margin, fastest=fastest)
    assert after.chosen == before.chosen
    alone = p_loss(before_minus(more, before.chosen), np.ones(more.shape[1]), margin, 1.0)
    told = alone <= decision.LEVEL and (margin == 0.0 or after.expected_loss <= margin)
    assert after.definitive == (before.definitive and told)


def test_mutant_that_corrects_over_all_settings_is_seen(monkeypatch):
    """With every setting on the front, hopeless ones would change the answer."""
    quality = _outcomes([0.9, 0.91], 90)
    assert _decide(quality, [1.0, 2.0], 0.08).chosen == 0
    monkeypatch.setattr(
        decision,
        "front_by_cost",
        lambda means, cost, allowed: sorted(allowed, key=lambda i: -cost[i]),
    )
    hopeless = np.vstack([quality, np.zeros(90)])
    assert _decide(hopeless, [1.0, 2.0, 9.0], 0.08).best == 2


def test_share_of_false_claims_is_kept_and_a_mutant_with_the_easiest_rival_fails():
    # All but the dearest truly lie on the margin below it; a claim for any of them is false.
    truth, margin, repetitions = np.array([0.5] * 5 + [0.6]), 0.1, 300
    cost, rng = np.arange(1.0, 7.0), np.random.default_rng(5)
    false_claims, easiest = 0, 0
    for _ in range(repetitions):
        quality = rng.normal(truth[:, None], 0.3, (6, 40))
        found = decide(quality, np.arange(40), cost, margin)
        false_claims += found.chosen != 5 and found.definitive
        p = [
            min(
                p_loss(quality[i] - quality[j], np.ones(40), margin, None)
                for j in range(6)
                if j != i
            )
            for i in range(5)
        ]
        easiest += min(p) < decision.LEVEL / 5
    allowed = decision.LEVEL + 3 * np.sqrt(decision.LEVEL * (1 - decision.LEVEL) / repetitions)
    assert false_claims / repetitions < allowed
    assert easiest / repetitions > allowed
