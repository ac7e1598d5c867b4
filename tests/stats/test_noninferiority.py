"""Non-inferiority against everything that could be best, and the images that would decide it."""

import numpy as np
import pytest

from sd35bench.stats.clustered import mean_t, student
from sd35bench.stats.intervals import Interval
from sd35bench.stats.noninferiority import (
    TAIL,
    against_all,
    images_between,
    p_within,
    prompts_needed,
    spread,
)


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


def _family(truth: list[float], k: int, seed: int):
    """Candidates of these true qualities: differences of each from every other."""
    rng = np.random.default_rng(seed)
    x = rng.normal(np.array(truth)[:, None], 0.3, (len(truth), k))
    return {
        i: {j: mean_t(x[i] - x[j], np.arange(k)) for j in range(len(truth)) if j != i}
        for i in range(len(truth))
    }


def test_against_all_takes_the_hardest_rival():
    found = against_all(range(3), _family([0.5, 0.9, 0.7], 200, 0), 0.05)
    assert found[0].rival == 1
    assert found[2].rival == 1
    assert found[1].rival == 2
    assert [found[i].shown for i in range(3)] == [False, True, False]
    assert all(t.p_holm >= t.p for t in found.values())


def test_share_of_false_claims_is_kept_and_a_mutant_with_the_easiest_rival_fails():
    # All but one truly lie on the margin below the true best; a claim for any of them is false.
    truth, margin, repetitions = np.array([0.6] + [0.5] * 5), 0.1, 300
    rng, settings = np.random.default_rng(5), range(6)
    false_claims, easiest = 0, 0
    for _ in range(repetitions):
        x = rng.normal(truth[:, None], 0.3, (6, 40))
        pairwise = {
            i: {j: mean_t(x[i] - x[j], np.arange(40)) for j in settings if j != i} for i in settings
        }
        found = against_all(settings, pairwise, margin)
        false_claims += any(found[i].shown for i in settings[1:])
        p = {i: min(p_within(d, margin) for d in pairwise[i].values()) for i in settings}
        easiest += min(p[i] for i in settings[1:]) < TAIL / 6
    allowed = TAIL + 3 * np.sqrt(TAIL * (1 - TAIL) / repetitions)
    assert false_claims / repetitions < allowed
    assert easiest / repetitions > allowed


def test_candidate_without_rivals_is_not_tested():
    assert against_all([0], {0: {}}, 0.1) == {}


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
