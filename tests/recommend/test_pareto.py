"""The front and its resampling; what a profile's limits rule out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sd35bench.analysis.pairs import candidates, compare, pick_family
from sd35bench.analysis.table import GUARD, read_table
from sd35bench.recommend import pareto
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.pareto import (
    CostErrors,
    cost_errors,
    front_of,
    pareto_front,
    resampled_front,
    speeds,
)
from sd35bench.recommend.profiles import load_profiles
from sd35bench.types import Memory, Status, Task, Timings
from tests.studies.memory import MemoryStudy, planted, record


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


def _slower(ratio: float, timed: int, shared: float, rng: np.random.Generator) -> float:
    """How surely a setting of equal quality that took `ratio` times as long is dominated."""
    turns = shared * rng.standard_normal(timed)
    logs = [turns + 0.03 * rng.standard_normal(timed) for _ in range(2)]
    seconds = [np.exp(x - np.median(x)) * r for x, r in zip(logs, (1.0, ratio), strict=True)]
    errors = cost_errors([{"s": x} for x in seconds])
    cost = np.array([1.0, ratio])
    found = resampled_front(np.ones((2, 40)), np.arange(40), cost, errors)
    assert found.dominated is not None
    return float(found.dominated[1])


def test_few_timed_images_leave_open_which_setting_is_slower():
    """10 % slower: sure with 64 images of 3 % noise, open with 3; a slow minute that both shared
    changes nothing. The mutant, two images drawn with replacement, is sure with 3."""
    rng = np.random.default_rng(4)
    assert np.mean([_slower(1.1, 64, 0.3, rng) for _ in range(20)]) > 0.97
    assert np.mean([_slower(1.1, 3, 0.0, rng) for _ in range(20)]) < 0.9
    assert np.mean([_slower(1.0, 8, 0.0, rng) for _ in range(20)]) < 0.5


def test_starts_that_differ_say_how_sure_a_latency_is():
    """Two settings of unlike starts: 5 % slower is open where starts lie 5 % apart, however many
    images each has."""
    apart = [{f"{side}{i}": np.full(30, 1.0 + 0.05 * i) for i in range(3)} for side in "ab"]
    errors = cost_errors(apart)
    assert errors.degrees.tolist() == [2.0, 2.0]
    assert errors.error == pytest.approx([0.0282] * 2, abs=0.001)


def test_a_setting_timed_once_has_the_largest_error_of_the_others():
    errors = cost_errors([{"s": np.array([1.0, 1.1, 0.9, 1.0])}, {"s": np.array([2.0])}])
    assert errors.error[1] == errors.error[0] > 0.0


def test_one_prompt_says_nothing_of_how_sure_it_is():
    found = resampled_front(np.array([[1.0], [0.0]]), np.zeros(1, np.int64), np.array([1.0, 2.0]))
    assert found.on_front.tolist() == [True, False]
    assert found.dominated is None


@pytest.mark.parametrize(
    ("quality", "clusters", "cost", "errors"),
    [
        (np.ones((2, 3)), np.arange(3), np.ones(3), None),
        (np.ones((2, 3)), np.arange(2), np.ones(2), None),
        (np.ones(2), np.arange(2), np.ones(2), None),
        (np.ones((2, 3)), np.arange(3), np.ones(2), CostErrors(np.ones(1), np.ones(1))),
    ],
    ids=["cost", "clusters", "one axis", "errors"],
)
def test_shapes_that_do_not_fit_are_refused(quality, clusters, cost, errors):
    with pytest.raises(ValueError, match="front"):
        resampled_front(quality, clusters, cost, errors)


def test_front_of_a_study_is_of_its_p50s(tmp_path, monkeypatch):
    grid = {(4, 1.0): (0.2, 0.05), (12, 4.0): (0.9, 0.3), (28, 4.0): (0.5, 0.7)}
    study = planted(tmp_path, grid, prompts=40)
    table = read_table(study)
    rows, _ = pick_family(table.rows, Task.TEXT_TO_IMAGE)
    comparison = compare(*candidates(table, rows, Task.TEXT_TO_IMAGE))
    speed = speeds(comparison)
    assert speed.basis == "latency_s"
    seen = {}

    def watched(quality, clusters, cost, errors):
        seen.update(cost=cost, errors=errors.error)
        return resampled_front(quality, clusters, cost, errors)

    monkeypatch.setattr(pareto, "resampled_front", watched)
    found = front_of(comparison, speed)
    steps = [c.row.setting["steps"] for c in comparison.candidates]
    assert dict(zip(steps, found.on_front.tolist(), strict=True)) == {4: True, 12: True, 28: False}
    assert found.dominated[steps.index(28)] > 0.99
    assert max(found.dominated[steps.index(4)], found.dominated[steps.index(12)]) < 0.01
    assert seen["cost"].tolist() == speed.values
    assert all(0.0 < error < 0.05 for error in seen["errors"])


T2I = "text-to-image"
GIB = 2**30
GRID = {(4, 1.0): (0.20, 0.05), (12, 4.0): (0.80, 0.30), (28, 4.0): (0.95, 0.70)}


def _entry(study: MemoryStudy, **profile: Any) -> dict[str, Any]:
    return recommend_document(study, {"p": profile})["profiles"]["p"][T2I]


def _study(tmp_path, **memory: Memory) -> MemoryStudy:
    """The grid; a setting's memory by `steps_N`."""
    study = planted(tmp_path, {}, prompts=1)
    for (steps, cfg), planned in GRID.items():
        fields = {"memory": memory.get(f"steps_{steps}", Memory(peak_rss_bytes=GIB))}
        part = planted(tmp_path, {(steps, cfg): planned}, prompts=60, seeds=1, **fields)
        study.kept += part.kept
        study.score_rows += part.score_rows
    return study


def _why(entry: dict[str, Any], steps: int) -> str:
    return next(a["why_not"] for a in entry["alternatives"] if a["setting"]["steps"] == steps)


def test_memory_limit_rules_out_what_is_too_large(tmp_path):
    study = _study(tmp_path, steps_28=Memory(peak_rss_bytes=8 * GIB))
    entry = _entry(study, memory_limit_bytes=4 * GIB)
    assert entry["setting"]["steps"] == 12
    assert entry["evidence"]["peak_bytes"] == GIB
    assert _why(entry, 28) == "too large: 8.00 GiB, limit 4.00 GiB"
    assert _entry(study)["setting"]["steps"] == 28


def test_gpu_memory_counts_where_there_is_a_gpu(tmp_path):
    on_gpu = Memory(peak_rss_bytes=64 * GIB, peak_vram_bytes=3 * GIB)
    study = _study(tmp_path, steps_28=on_gpu)
    assert _entry(study, memory_limit_bytes=4 * GIB)["setting"]["steps"] == 28


def test_cost_limit_prices_this_machines_hours(tmp_path):
    # 36 USD an hour: 0.01 USD a second.
    entry = _entry(_study(tmp_path), cost_limit_usd=0.004, usd_per_hour=36.0)
    assert entry["setting"]["steps"] == 12
    assert entry["evidence"]["usd_per_image"] == pytest.approx(0.003, rel=0.1)
    assert _why(entry, 28).startswith("too dear: 0.007")


def _failing(tmp_path) -> MemoryStudy:
    """As above; the best setting fails on every third prompt."""
    study = _study(tmp_path)
    for row in [r for r in study.kept if r.trial.request.steps == 28][::3]:
        study.kept.remove(row)
        study.kept.append(replace(row, status=Status.ERROR, image=None, timings=None, error="x"))
    return study


def test_setting_that_fails_is_not_recommended_and_its_evidence_says_so(tmp_path):
    study = _failing(tmp_path)
    entry = _entry(study)
    assert entry["setting"]["steps"] == 12
    assert _why(entry, 28) == "failed 20 of 60 trials, limit 1 %"
    found = {a["setting"]["steps"]: (a["failed"], a["n_trials"]) for a in entry["alternatives"]}
    assert found[28] == (20, 60)
    evidence = entry["evidence"]
    assert (evidence["failed"], evidence["n_trials"], evidence["failures_limit"]) == (0, 60, 0.01)
    # It takes no prompt away from the others.
    assert evidence["n_pairs"] == 60
    allowed = _entry(study, failures_limit=0.5, objective="best-quality")
    assert allowed["setting"]["steps"] == 12  # a failed image is worth 0: 0.95 of two thirds
    slower = next(a for a in allowed["alternatives"] if a["setting"]["steps"] == 28)
    assert slower["quality"]["value"] == pytest.approx(0.95 * 2 / 3, abs=0.08)


def test_trials_that_a_stopped_run_skipped_are_no_failures(tmp_path):
    study = _study(tmp_path)
    for row in [r for r in study.kept if r.trial.request.steps == 28][::10]:
        study.kept.remove(row)
        study.kept.append(replace(row, status=Status.SKIPPED, image=None, timings=None))
    entry = _entry(study)
    assert (entry["setting"]["steps"], entry["evidence"]["n_trials"]) == (28, 54)
    assert entry["evidence"]["n_pairs"] == 54


def test_image_that_the_guards_refused_is_a_failure(tmp_path):
    study = _study(tmp_path)
    for row in [r for r in study.kept if r.trial.request.steps == 28][:6]:
        study.score(row, GUARD, 0.0, reason="black")
    assert _why(_entry(study), 28) == "failed 6 of 60 trials, limit 1 %"


def test_unknown_cost_and_memory_are_no_pass(tmp_path):
    entry = _entry(_study(tmp_path), cost_limit_usd=1.0)
    assert entry["setting"] is None
    assert "its cost is unknown" in entry["evidence"]["reason"]
    study = planted(tmp_path, GRID, prompts=20, memory=None)
    assert "its memory is unknown" in _entry(study, memory_limit_bytes=GIB)["evidence"]["reason"]


def test_every_broken_limit_is_named(tmp_path):
    study = _study(tmp_path, steps_28=Memory(peak_rss_bytes=8 * GIB))
    entry = _entry(study, memory_limit_bytes=4 * GIB, latency_limit_s=0.5)
    assert "too slow" in _why(entry, 28)
    assert "too large" in _why(entry, 28)


def test_latency_that_is_only_just_within_its_limit_is_said(tmp_path):
    study = planted(tmp_path, GRID, prompts=60, seeds=1)
    found = {a["setting"]["steps"]: a["speed"] for a in _entry(study)["alternatives"]}
    entry = _entry(study, latency_limit_s=found[12] * 1.0001)
    assert entry["setting"]["steps"] == 12
    assert entry["evidence"]["limit_close"] is True
    assert _entry(study, latency_limit_s=0.6)["evidence"]["limit_close"] is False


def test_latency_whose_interval_is_not_known_is_not_surely_within_its_limit(tmp_path):
    study = planted(tmp_path, GRID, prompts=1, seeds=1)
    evidence = _entry(study, latency_limit_s=5.0)["evidence"]
    assert evidence["limit_close"] is True
    assert "is not surely within the limit of 5 s" in evidence["headline"]


def test_hopeless_slow_setting_moves_no_profile_s_choice(tmp_path):
    """With a limit relative to the slowest (the mutant) it moves `preview` from 4 to 12 steps."""
    profiles = load_profiles(Path(__file__).parents[2] / "configs" / "profile")
    slow = GRID | {(200, 4.0): (0.0, 9.0)}
    small, large = (planted(tmp_path, g, prompts=60, seeds=1) for g in (GRID, slow))

    def chosen(study, **mutant):
        found = {n: replace(p, **(mutant if n == "preview" else {})) for n, p in profiles.items()}
        entries = recommend_document(study, found)["profiles"]
        return [entry["text-to-image"]["setting"]["steps"] for entry in entries.values()]

    assert chosen(small) == chosen(large) == [4, 28, 28]
    relative = [
        {"latency_limit_s": 0.4 * slowest, "evaluations_limit": None} for slowest in (0.7, 9)
    ]
    mutants = [chosen(small, **relative[0]), chosen(large, **relative[1])]
    assert mutants[0] != mutants[1]


def _with_rare_stalls(tmp_path, prompts: int = 40) -> MemoryStudy:
    """Equal quality; 8 steps take 0.1 s, and every tenth call 5 s; 16 steps take 0.2 s."""
    study = MemoryStudy(tmp_path)
    for p in range(prompts):
        for steps, seconds in ((8, 5.0 if p % 10 == 0 else 0.1), (16, 0.2)):
            timings = Timings(generate_s=seconds, encode_s=0.0)
            study.add(record(p, steps=steps, timings=timings), prompt_accuracy=float(p % 4 > 0))
    return study.touch_images()


def test_headline_says_where_the_mean_contradicts_p50(tmp_path):
    evidence = _entry(_with_rare_stalls(tmp_path))["evidence"]
    said = "by the mean it is slower than 16 steps, cfg 4: 0.59 s against 0.2 s"
    assert said in evidence["headline"]
    assert said in evidence["reason"]
    plain = _entry(planted(tmp_path, GRID, prompts=60), margins={"prompt_accuracy": 0.3})
    assert "slower than" not in plain["evidence"]["headline"]


@pytest.mark.parametrize(
    ("limit", "steps", "why"),
    [
        ({"latency_limit_s": 0.3}, 8, None),
        ({"latency_mean_limit_s": 0.3}, 16, "too slow: mean 0.59 s, limit 0.3 s"),
        ({"latency_p95_limit_s": 0.3}, 16, "too slow: p95 5 s, limit 0.3 s"),
    ],
    ids=["p50", "mean", "p95"],
)
def test_mean_and_p95_are_limited_where_p50_sees_nothing(tmp_path, limit, steps, why):
    entry = _entry(_with_rare_stalls(tmp_path), **limit)
    assert entry["setting"]["steps"] == steps
    if why is not None:
        assert _why(entry, 8) == why


def test_p95_of_few_images_is_no_pass(tmp_path):
    entry = _entry(_with_rare_stalls(tmp_path, prompts=19), latency_p95_limit_s=9.0)
    assert entry["setting"] is None
    assert "p95 is unknown with 19 timed images" in entry["evidence"]["reason"]


@pytest.mark.parametrize(("objective", "steps"), [("fastest", 12), ("best-quality", 28)])
def test_objective_decides_between_speed_and_quality(tmp_path, objective, steps):
    grid = {(4, 1.0): (0.2, 0.05), (12, 4.0): (0.88, 0.3), (28, 4.0): (0.93, 0.7)}
    study = planted(tmp_path, grid, prompts=200, seeds=1)
    entry = _entry(study, objective=objective, margins={"prompt_accuracy": 0.15})
    assert entry["setting"]["steps"] == steps


def test_what_is_not_distinguishable_names_how_many_images_would_decide(tmp_path):
    study = planted(tmp_path, {(8, 4.0): (0.80, 0.2), (28, 4.0): (0.84, 0.7)}, prompts=15)
    entry = _entry(study, margins={"prompt_accuracy": 0.02})
    more = entry["evidence"]["more_images"]
    assert entry["evidence"]["distinguishable"] is False
    assert more["images"] >= 4
    assert more["text"].startswith(f"about {more['images']} more images")
    assert "whether 8 steps, cfg 4 is within 0.02 of 28 steps, cfg 4" in more["text"]


def test_named_number_of_images_does_decide(tmp_path):
    # Truth: the fast one is within the margin. Ask with few prompts, then make what was asked for.
    rng_seeds = range(12)
    grid = {(8, 4.0): (0.80, 0.2), (28, 4.0): (0.84, 0.7), (2, 1.0): (0.1, 0.1)}
    margin = {"prompt_accuracy": 0.15}
    decided = 0
    for seed in rng_seeds:
        few = _entry(planted(tmp_path, grid, prompts=16, seeds=1, rng_seed=seed), margins=margin)
        more = few["evidence"]["more_images"]
        if more is None or more["prompts"] is None or more["prompts"] > 400:
            decided += more is None
            continue
        prompts = 16 + more["prompts"]
        study = planted(tmp_path, grid, prompts=prompts, seeds=1, rng_seed=seed + 100)
        decided += _entry(study, margins=margin)["evidence"]["more_images"] is None
    assert decided >= 0.6 * len(rng_seeds)


def test_no_pair_makes_no_number(tmp_path):
    study = MemoryStudy(tmp_path)
    for steps in (4, 8):
        study.add(record(0, steps=steps), prompt_accuracy=1.0)
    entry = _entry(study.touch_images())
    assert entry["evidence"]["more_images"] is None or entry["evidence"]["more_images"]["text"]
    assert entry["evidence"]["distinguishable"] is False
