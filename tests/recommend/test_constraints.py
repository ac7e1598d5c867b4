from dataclasses import replace
from typing import Any

import pytest

from sd35bench.analysis.table import GUARD
from sd35bench.recommend.advice import recommend_document
from sd35bench.types import Memory, Status
from tests.analysis.synthetic import MemoryStudy, planted, record

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
