import numpy as np
import pytest

from sd35bench.analysis.pareto import pareto_front, resampled_front


def test_front_leaves_out_what_is_worse_in_both():
    quality, cost = np.array([0.5, 0.8, 0.9, 0.7]), np.array([1.0, 2.0, 4.0, 3.0])
    assert pareto_front(quality, cost).tolist() == [True, True, True, False]


def test_equal_settings_do_not_dominate_each_other():
    assert pareto_front(np.array([0.1 + 0.2, 0.3]), np.array([1.0, 1.0])).all()


def test_probabilities_say_how_sure_the_front_is():
    rng = np.random.default_rng(0)
    k, seeds = 96, 2
    prompts = np.repeat(np.arange(k), seeds)
    ease = np.repeat(rng.normal(size=k), seeds)
    truth = np.array([0.0, 0.5, 0.5, -1.0])  # 1 and 2 are equally good, 3 is worse and slower
    cost = np.array([1.0, 2.0, 2.0, 3.0])
    quality = truth[:, None] + ease + 0.5 * rng.normal(size=(4, k * seeds))
    found = resampled_front(quality, cost, prompts)
    assert found.dominated[0] == 0.0
    assert found.dominated[3] == 1.0
    assert found.dominated[1] + found.dominated[2] == pytest.approx(1.0)
    assert 0.001 < found.dominated[1] < 0.999
    assert found.on_front[0]


def test_resampling_settings_apart_would_lose_what_prompts_share():
    """Shared difficulty of prompts moves all settings alike, so a small gap is certain."""
    rng = np.random.default_rng(1)
    ease = rng.normal(size=64)
    quality = np.stack([ease, ease + 0.05])
    found = resampled_front(quality, np.array([1.0, 1.0]), np.arange(64))
    assert found.dominated.tolist() == [1.0, 0.0]
    apart = np.stack([ease, rng.permutation(ease) + 0.05])  # the mutant: pairs torn apart
    assert resampled_front(apart, np.array([1.0, 1.0]), np.arange(64)).dominated[0] < 0.9


def test_latency_varies_by_pair_too():
    cost = np.stack([np.full(40, 1.0), np.linspace(0.8, 1.2, 40) + 0.001])
    found = resampled_front(np.ones((2, 40)), cost, np.arange(40))
    assert 0.2 < found.dominated[1] < 0.8


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="front"):
        resampled_front(np.ones((2, 3)), np.ones(3), np.arange(3))
