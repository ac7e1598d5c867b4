import numpy as np
import pytest

from sd35bench.analysis.pairs import candidates, compare, pick_family
from sd35bench.analysis.table import read_table
from sd35bench.recommend import pareto
from sd35bench.recommend.constraints import speeds
from sd35bench.recommend.pareto import front_of, pareto_front, resampled_front
from sd35bench.types import Task
from tests.analysis.synthetic import planted


def test_front_leaves_out_what_is_worse_in_both():
    quality, cost = np.array([0.5, 0.8, 0.9, 0.7]), np.array([1.0, 2.0, 4.0, 3.0])
    assert pareto_front(quality, cost).tolist() == [True, True, True, False]


def test_equal_settings_do_not_dominate_each_other():
    assert pareto_front(np.array([0.1 + 0.2, 0.3]), np.array([1.0, 1.0])).all()


def test_costs_within_2_percent_are_no_difference():
    quality = np.array([0.5, 0.6])
    assert pareto_front(quality, np.array([1.0, 1.019])).tolist() == [False, True]
    assert pareto_front(quality, np.array([1.0, 1.021])).all()
    equal = np.array([0.5, 0.5])
    assert pareto_front(equal, np.array([1.0, 1.019])).all()
    assert pareto_front(equal, np.array([1.0, 1.021])).tolist() == [True, False]


def test_probabilities_say_how_sure_the_front_is():
    rng = np.random.default_rng(0)
    k, seeds = 96, 2
    prompts = np.repeat(np.arange(k), seeds)
    ease = np.repeat(rng.normal(size=k), seeds)
    truth = np.array([0.0, 0.5, 0.5, -1.0])  # 1 and 2 are equally good, 3 is worse and slower
    cost = np.array([1.0, 2.0, 2.0, 3.0])
    quality = truth[:, None] + ease + 0.5 * rng.normal(size=(4, k * seeds))
    found = resampled_front(quality, prompts, cost)
    assert found.dominated[0] == 0.0
    assert found.dominated[3] == 1.0
    assert found.dominated[1] + found.dominated[2] == pytest.approx(1.0)
    assert 0.001 < found.dominated[1] < 0.999
    assert found.on_front[0]


def test_resampling_settings_apart_would_lose_what_prompts_share():
    """Shared difficulty of prompts moves all settings alike, so a small gap is certain."""
    rng = np.random.default_rng(1)
    ease = rng.normal(size=64)
    cost, prompts = np.array([1.0, 1.0]), np.arange(64)
    found = resampled_front(np.stack([ease, ease + 0.05]), prompts, cost)
    assert found.dominated.tolist() == [1.0, 0.0]
    apart = np.stack([ease, rng.permutation(ease) + 0.05])  # the mutant: pairs torn apart
    assert resampled_front(apart, prompts, cost).dominated[0] < 0.9


def test_seeds_of_one_prompt_are_drawn_together():
    """16 seeds of 8 prompts are worth 8: drawn one by one (the mutant) they look like 128."""
    rng = np.random.default_rng(2)
    gap = np.repeat(rng.normal(0.4, 1.0, 8), 16)
    gap += 0.25 - gap.mean()
    quality, cost = np.stack([np.zeros(128), gap]), np.ones(2)
    right = resampled_front(quality, np.repeat(np.arange(8), 16), cost).dominated[0]
    mutant = resampled_front(quality, np.arange(128), cost).dominated[0]
    assert right < 0.9 < 0.97 < mutant


def test_latency_is_drawn_with_quality_and_by_its_median():
    """Equal quality; the second is 1.5 times slower on 45 % of the prompts, and rarely in its p50.

    The mutant, a mean, would have it slower nearly always.
    """
    k = 40
    slow = np.where(np.arange(k) < 18, 1.5, 1.0)
    timed = [(np.ones(k), np.arange(k)), (slow, np.arange(k))]
    found = resampled_front(np.ones((2, k)), np.arange(k), np.array([1.0, 1.0]), timed)
    assert found.on_front.all()
    assert found.dominated[0] == 0.0
    assert 0.15 < found.dominated[1] < 0.4


def test_latency_and_quality_of_one_prompt_are_drawn_together():
    """Where the second setting is slow it is also better, so it is never slower and no better.

    Drawn apart (the mutant: the timings belong to other prompts) it often is.
    """
    k = 41
    hard = np.arange(k) < 21
    quality = np.stack([np.zeros(k), np.where(hard, 1.0, -0.98)])
    latency = np.where(hard, 1.2, 0.8)

    def dominated(prompts):
        timed = [(np.ones(k), np.arange(k)), (latency, prompts)]
        return resampled_front(quality, np.arange(k), np.array([1.0, 1.2]), timed).dominated[1]

    assert dominated(np.arange(k)) == 0.0
    assert dominated(np.arange(k)[::-1].copy()) > 0.2


def test_prompts_that_were_timed_alone_count_for_latency_only():
    timed = [(np.array([1.0, 1.0]), np.array([4, 5])), (np.array([9.0]), np.array([5]))]
    found = resampled_front(np.ones((2, 4)), np.arange(4), np.array([1.0, 9.0]), timed)
    # Where nothing timed was drawn, what was seen stands: it is slower in every resample.
    assert found.dominated.tolist() == [0.0, 1.0]


def test_one_prompt_says_nothing_of_how_sure_it_is():
    found = resampled_front(np.array([[1.0], [0.0]]), np.zeros(1, np.int64), np.array([1.0, 2.0]))
    assert found.on_front.tolist() == [True, False]
    assert found.dominated is None


@pytest.mark.parametrize(
    ("quality", "clusters", "cost", "timed"),
    [
        (np.ones((2, 3)), np.arange(3), np.ones(3), None),
        (np.ones((2, 3)), np.arange(2), np.ones(2), None),
        (np.ones(2), np.arange(2), np.ones(2), None),
        (np.ones((2, 3)), np.arange(3), np.ones(2), [(np.ones(1), np.zeros(1, np.int64))]),
    ],
    ids=["cost", "clusters", "one axis", "timed"],
)
def test_shapes_that_do_not_fit_are_refused(quality, clusters, cost, timed):
    with pytest.raises(ValueError, match="front"):
        resampled_front(quality, clusters, cost, timed)


def test_front_of_a_study_is_of_its_p50s(tmp_path, monkeypatch):
    grid = {(4, 1.0): (0.2, 0.05), (12, 4.0): (0.9, 0.3), (28, 4.0): (0.5, 0.7)}
    study = planted(tmp_path, grid, prompts=40)
    table = read_table(study)
    rows, _ = pick_family(table.rows, Task.TEXT_TO_IMAGE)
    comparison = compare(*candidates(table, rows, Task.TEXT_TO_IMAGE))
    speed = speeds(comparison)
    assert speed.basis == "latency_s"
    seen = {}

    def watched(quality, clusters, cost, timed):
        seen.update(cost=cost, medians=[np.median(x) for x, _ in timed])
        return resampled_front(quality, clusters, cost, timed)

    monkeypatch.setattr(pareto, "resampled_front", watched)
    found = front_of(comparison, speed)
    steps = [c.row.setting["steps"] for c in comparison.candidates]
    assert dict(zip(steps, found.on_front.tolist(), strict=True)) == {4: True, 12: True, 28: False}
    assert found.dominated[steps.index(28)] > 0.99
    assert max(found.dominated[steps.index(4)], found.dominated[steps.index(12)]) < 0.01
    assert seen["cost"] == pytest.approx(seen["medians"])
