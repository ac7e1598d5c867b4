import json
import shlex
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sd35bench.analysis import pairs
from sd35bench.analysis.pairs import EDIT_QUALITY
from sd35bench.analysis.table import read_table
from sd35bench.errors import ConfigError
from sd35bench.recommend import choice
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.decision import decide
from sd35bench.types import Status, Task, Timings
from tests.studies.memory import LOAD, MemoryStudy, planted, record, session

T2I, I2I = "text-to-image", "image-to-image"
# The best is slow, a fast one is nearly as good, two are clearly worse.
GRID = {
    (4, 1.0): (0.20, 0.05),
    (4, 4.0): (0.45, 0.10),
    (12, 4.0): (0.88, 0.30),
    (28, 4.0): (0.92, 0.70),
    (28, 12.0): (0.50, 0.71),
}


def _profile(**fields: Any) -> dict[str, Profile]:
    return {"p": Profile(name="p", **fields)}


def _entry(study, task: str = T2I, **fields: Any) -> dict[str, Any]:
    return recommend_document(study, _profile(**fields))["profiles"]["p"][task]


def _chosen(study, **fields: Any) -> tuple[int, float]:
    setting = _entry(study, **fields)["setting"]
    return setting["steps"], setting["cfg"]


def test_recommend_finds_the_planted_best(tmp_path):
    assert _chosen(planted(tmp_path, GRID, prompts=200)) == (28, 4.0)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(0.0, (28, 4.0)), (0.12, (12, 4.0)), (0.6, (4, 4.0)), (1.0, (4, 1.0))],
    ids=["none", "middling", "large", "anything-goes"],
)
def test_margin_trades_quality_for_speed(tmp_path, margin, expected):
    study = planted(tmp_path, GRID, prompts=200)
    assert _chosen(study, margins={"prompt_accuracy": margin}) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({"latency_limit_s": 0.5}, (12, 4.0)),
        ({"evaluations_limit": 20}, (4, 4.0)),
        ({"latency_limit_s": 0.5, "evaluations_limit": 20}, (4, 4.0)),
    ],
    ids=["seconds", "evaluations", "the-stricter"],
)
def test_limit_takes_the_best_of_the_fast_ones(tmp_path, limit, expected):
    entry = _entry(planted(tmp_path, GRID, prompts=200), **limit)
    assert (entry["setting"]["steps"], entry["setting"]["cfg"]) == expected
    slow = next(a for a in entry["alternatives"] if a["setting"]["cfg"] == 12.0)
    assert slow["why_not"].startswith("too slow")


def test_limit_that_nothing_meets_is_an_answer(tmp_path):
    entry = _entry(planted(tmp_path, GRID, prompts=20), latency_limit_s=0.001)
    assert entry["setting"] is None
    assert "no setting is within" in entry["evidence"]["reason"]


def test_pairs_are_respected_where_an_unpaired_shortcut_would_differ(tmp_path, monkeypatch):
    # Prompts differ a lot, settings little: only the paired difference is narrow enough.
    grid = {(2, 1.0): (0.2, 0.05), (12, 4.0): (0.52, 0.3), (28, 4.0): (0.55, 0.7)}
    study = planted(tmp_path, grid, prompts=100, difficulty=0.5)
    margins = {"prompt_accuracy": 0.09}
    assert _chosen(study, margins=margins) == (12, 4.0)

    def unpaired(quality, clusters, cost, margin, **more):
        rng = np.random.default_rng(0)
        shuffled = np.array([rng.permutation(row) for row in quality])
        return decide(shuffled, np.arange(quality.shape[1]), cost, margin, **more)

    monkeypatch.setattr(choice, "decide", unpaired)
    assert _chosen(study, margins=margins) == (28, 4.0)


def test_only_common_pairs_are_compared(tmp_path):
    # The worse setting saw only the easy half of the prompts; unpaired means would prefer it.
    study = MemoryStudy(tmp_path)
    for p in range(60):
        easy = p < 30
        study.add(record(p, steps=28), prompt_accuracy=1.0 if easy or p % 6 == 0 else 0.0)
        if easy:
            study.add(record(p, steps=4), prompt_accuracy=float(p % 10 != 0))
    entry = _entry(study.touch_images())
    assert entry["setting"]["steps"] == 28
    assert entry["evidence"]["n_pairs"] == 30
    assert entry["evidence"]["quality"]["value"] == 1.0


def test_setting_without_guidance_pairs_with_others_under_any_negative_prompt(tmp_path):
    # A plan has its image once, under the first of the negative prompts.
    study = MemoryStudy(tmp_path)
    for p in range(40):
        study.add(record(p, steps=4, cfg=1.0, negative_prompt="a"), prompt_accuracy=0.0)
        for negative in ("a", "b"):
            row = record(p, steps=28, negative_prompt=negative)
            study.add(row, prompt_accuracy=float(negative == "a" or p % 2))
    entry = _entry(study.touch_images())
    assert entry["setting"]["steps"] == 28
    assert (entry["evidence"]["n_pairs"], entry["evidence"]["n_prompts"]) == (80, 40)
    assert entry["evidence"]["quality"]["value"] == 0.75


def test_setting_with_few_pairs_does_not_shrink_the_rest(tmp_path):
    study = planted(tmp_path, GRID, prompts=60)
    for p in range(3):
        study.add(record(p, steps=99), prompt_accuracy=1.0)
    entry = _entry(study.touch_images())
    assert entry["evidence"]["n_pairs"] == 120
    few = next(a for a in entry["alternatives"] if a["setting"]["steps"] == 99)
    assert few["why_not"] == "too few pairs: 3"


def _warnings(study) -> list[str]:
    return recommend_document(study, _profile())["warnings"]


def _why(entry: dict[str, Any]) -> dict[int, str]:
    return {a["setting"]["steps"]: a["why_not"] for a in entry["alternatives"]}


def test_setting_that_was_not_scored_is_named(tmp_path):
    study = planted(tmp_path, GRID, prompts=20)
    for p in range(20):
        study.add(record(p, steps=99))
    study.touch_images()
    assert _why(_entry(study))[99] == "not scored: none of its 20 images has prompt_accuracy"
    said = "99 steps, cfg 4 is in no comparison: not scored: none of its 20 images"
    assert any(said in text for text in _warnings(study))
    # The mutant: rows without a score are left out before anybody could name them.
    table = read_table(study)
    _, found = pairs.candidates(table, table.rows, Task.TEXT_TO_IMAGE)
    assert pairs.compare("prompt_accuracy", found).left_out == []


def test_setting_of_which_every_trial_failed_is_named(tmp_path):
    study = planted(tmp_path, GRID, prompts=20)
    for p in range(20):
        study.add(record(p, steps=99, status=Status.ERROR))
    said = "99 steps, cfg 4 is in no comparison: none of its 20 trials made an image that counts"
    assert _warnings(study.touch_images())[-1] == f"text-to-image: {said}"


def test_setting_that_takes_pairs_away_from_all_others_is_named(tmp_path):
    study = planted(tmp_path, GRID, prompts=64, seeds=1)
    for p in range(38):
        study.add(record(p, steps=99), prompt_accuracy=1.0)
    document = recommend_document(study.touch_images(), _profile())
    assert document["profiles"]["p"][T2I]["evidence"]["n_pairs"] == 38
    assert document["warnings"] == [
        "text-to-image: compared on 38 pairs, of which a setting has up to 64: 99 steps, cfg 4"
        " lacks 26; run and score them on the others, or leave them out"
    ]
    assert _warnings(planted(tmp_path, GRID, prompts=64)) == []


@pytest.mark.parametrize("few", [3, 8])
def test_settings_judged_on_other_prompts_share_no_ranking_and_are_named(tmp_path, few):
    study = MemoryStudy(tmp_path)
    for p in range(12):
        for steps in (8, 28):
            row = record(p, steps=steps, prompt_set="mine.txt")
            study.add(row, prompt_accuracy=float(p % 4 > 0))
    for p in range(100, 100 + few):
        for steps in (4, 16):
            study.add(record(p, steps=steps), prompt_accuracy=1.0)
    document = recommend_document(study.touch_images(), _profile())
    entry = document["profiles"]["p"][T2I]
    assert entry["setting"]["steps"] == 8, "4 and 16 steps look better on easier prompts"
    why = f"judged on other prompts: {few} pairs of nano"
    assert _why(entry) == {28: _why(entry)[28], 4: why, 16: why}
    said = "2 settings on mine.txt; 2 settings on nano"
    assert any(f"unlike prompts ({said})" in text for text in document["warnings"])
    assert sum(why in text for text in document["warnings"]) == 2


def test_what_the_headline_warns_of_is_among_the_warnings(tmp_path):
    study = planted(tmp_path, GRID, prompts=1, seeds=1)
    document = recommend_document(study, _profile(latency_limit_s=5.0))
    (caveat,) = document["profiles"]["p"][T2I]["evidence"]["caveats"]
    assert document["warnings"] == [f"p (text-to-image): {caveat}"]


def test_nothing_distinguishable_names_the_best_looking_provisionally(tmp_path):
    study = MemoryStudy(tmp_path)
    for p in range(12):
        study.add(record(p, steps=8), prompt_accuracy=float(p not in (0, 1, 2)))
        study.add(record(p, steps=28), prompt_accuracy=float(p not in (2, 3)))
    entry = _entry(study.touch_images(), margins={"prompt_accuracy": 0.02})
    evidence = entry["evidence"]
    assert entry["setting"]["steps"] == 28
    assert (evidence["distinguishable"], evidence["definitive"]) == (False, False)
    assert evidence["expected_loss"] > 0.02
    assert "provisional: about" in evidence["headline"]
    assert "provisional" in evidence["reason"]


def test_equal_speed_is_decided_by_quality(tmp_path):
    grid = {(4, 1.0): (0.2, 0.1), (12, 3.0): (0.80, 0.300), (12, 5.0): (0.84, 0.301)}
    study = planted(tmp_path, grid, prompts=150)
    assert _chosen(study, margins={"prompt_accuracy": 0.3}) == (12, 5.0)


def test_without_timings_evaluations_stand_in_and_it_is_said(tmp_path):
    study = planted(tmp_path, GRID, prompts=100, batch_size=16, batch_actual=16)
    entry = _entry(study, margins={"prompt_accuracy": 0.12})
    assert entry["setting"]["steps"] == 12
    assert entry["evidence"]["speed_basis"] == "evaluations"
    assert entry["evidence"]["latency_s"]["p50"] is None
    assert "not every setting was timed" in _entry(study, latency_limit_s=1.0)["evidence"]["reason"]


def test_document_says_that_it_is_not_confirmed(tmp_path):
    document = recommend_document(planted(tmp_path, GRID, prompts=20), _profile())
    json.dumps(document, allow_nan=False)
    assert document["confirmed"] is False
    assert document["prompts"] == [{"task": T2I, "set": "nano", "split": "tune"}]
    assert document["profiles"]["p"][I2I] is None


def test_alternatives_name_every_other_setting_with_a_reason(tmp_path):
    entry = _entry(planted(tmp_path, GRID, prompts=200), margins={"prompt_accuracy": 0.03})
    assert len(entry["alternatives"]) == len(GRID) - 1
    reasons = {(a["setting"]["steps"], a["setting"]["cfg"]): a for a in entry["alternatives"]}
    worst = reasons[4, 1.0]
    assert worst["why_not"] == "faster; worse than the best by more than the margin"
    assert worst["difference_from_best"]["ci95"][1] < -0.03


def test_entry_says_what_is_on_the_front_and_how_surely_not(tmp_path):
    study = planted(tmp_path, GRID, prompts=60)
    study.add(record(0, steps=99), prompt_accuracy=1.0)
    entry = _entry(study.touch_images())
    found = {(a["setting"]["steps"], a["setting"]["cfg"]): a for a in entry["alternatives"]}
    found[28, 4.0] = entry["evidence"]
    on_front = {key: f["on_front"] for key, f in found.items()}
    assert on_front == {
        (4, 1.0): True,
        (4, 4.0): True,
        (12, 4.0): True,
        (28, 4.0): True,
        (28, 12.0): False,
        (99, 4.0): None,
    }
    assert found[28, 12.0]["p_dominated"] > 0.99
    assert max(found[key]["p_dominated"] for key in GRID if key != (28, 12.0)) < 0.15
    assert found[99, 4.0]["p_dominated"] is None
    assert entry["evidence"]["resamples"] == 2000


@pytest.mark.parametrize("case", ["one-setting", "no-shared-pair", "no-metric", "no-image"])
def test_nothing_to_compare_is_the_users_error(tmp_path, case):
    study = MemoryStudy(tmp_path)
    if case == "one-setting":
        study = planted(tmp_path, {(4, 1.0): (0.5, 0.1)}, prompts=8)
    for p in range(8):
        if case == "no-shared-pair":
            study.add(record(p, steps=4, seed=0), prompt_accuracy=1.0)
            study.add(record(p, steps=8, seed=1), prompt_accuracy=1.0)
        if case == "no-metric":
            study.add(record(p, steps=4))
            study.add(record(p, steps=8))
    with pytest.raises(ConfigError, match="nothing to compare"):
        recommend_document(study.touch_images(), _profile())


def _edit_study(tmp_path, prompts: int = 80) -> MemoryStudy:
    """Low strength keeps the init image, high strength follows the prompt, 0.6 does both."""
    rng = np.random.default_rng(0)
    study = MemoryStudy(tmp_path)
    for strength, followed, kept in ((0.2, 0.02, 0.98), (0.6, 0.8, 0.85), (0.95, 0.9, 0.1)):
        for p in range(prompts):
            row = record(p, init_image=f"{p:064d}", prompt_strength=strength, steps=20)
            study.add(row, prompt_accuracy=float(rng.random() < followed), init_kept=kept)
    return study.touch_images()


def test_image_to_image_needs_the_prompt_followed_and_the_init_kept(tmp_path):
    entry = _entry(_edit_study(tmp_path), I2I)
    assert entry["setting"]["prompt_strength"] == 0.6
    assert entry["evidence"]["quality"]["metric"] == EDIT_QUALITY
    assert "prompt_strength=0.6" in entry["command"]
    assert "prompts.task=edit" in entry["command"]


@pytest.mark.parametrize("metric", ["prompt_accuracy", "init_kept"])
def test_image_to_image_mutant_with_half_the_objective_picks_an_extreme(
    tmp_path, metric, monkeypatch
):
    monkeypatch.setattr(pairs, "_objective", lambda table, rows, task: (metric, [metric]))
    entry = _entry(_edit_study(tmp_path), I2I)
    expected = {"prompt_accuracy": 0.95, "init_kept": 0.2}[metric]
    assert entry["setting"]["prompt_strength"] == expected


def test_tasks_are_recommended_separately(tmp_path):
    both = planted(tmp_path, GRID, prompts=80)
    edits = _edit_study(tmp_path)
    both.kept += edits.kept
    both.score_rows += edits.score_rows
    entries = recommend_document(both, _profile())["profiles"]["p"]
    assert entries[T2I]["setting"]["prompt_strength"] is None
    assert entries[I2I]["setting"]["prompt_strength"] == 0.6


def test_other_environments_and_sizes_are_left_out_and_named(tmp_path):
    study = planted(tmp_path, GRID, prompts=60)
    study.lives["t"] = session("t", "f" * 64)
    for p in range(60):
        study.add(record(p, steps=1, session_id="t"), prompt_accuracy=1.0)
        study.add(record(p, steps=1, width=72), prompt_accuracy=1.0)
    document = recommend_document(study.touch_images(), _profile())
    assert document["profiles"]["p"][T2I]["setting"]["steps"] != 1
    assert any("72x64" in note for note in document["notes"])
    assert any("ffffffff" in note for note in document["notes"])


def _tricky(tmp_path) -> dict[str, Any]:
    prompt = "a 'red' \"circle\"\n[bold]$(rm -rf /)[/bold] \\ on white"
    load = replace(LOAD, model=replace(LOAD.model, path="/models/it's here"))
    study = MemoryStudy(tmp_path)
    for steps in (4, 8):
        for p in range(6):
            row = record(p, prompt=f"{prompt}{p}", steps=steps, load=load, shift=2.5, seed=p % 2)
            study.add(row, prompt_accuracy=1.0)
    return _entry(study.touch_images())


def test_snippet_is_python_that_calls_diffusers_with_the_setting(tmp_path):
    entry = _tricky(tmp_path)
    compile(entry["snippet"], "snippet", "exec")
    for part in ("num_inference_steps=4", "guidance_scale=4.0", "shift=2.5", "width=64"):
        assert part in entry["snippet"]
    assert "max_sequence_length=16" in entry["snippet"]
    assert "set_num_threads(2)" in entry["snippet"]


def test_command_is_one_line_of_overrides_without_prompts(tmp_path):
    command = shlex.split(_tricky(tmp_path)["command"])
    assert command[:3] == ["sd35bench", "run", "-m"]
    overrides = dict(part.split("=", 1) for part in command[3:])
    assert overrides["steps"] == "4"
    assert overrides["cfg"] == "4"
    assert overrides["seed"] == "0,1"
    assert overrides["prompts.limit"] == "6"
    assert overrides["study"] == "recommended-p"
    assert "rm" not in " ".join(command)


def test_latency_pairs_use_lone_trials(tmp_path):
    study = planted(tmp_path, GRID, prompts=40)
    for p in range(40):
        slow = Timings(generate_s=99.0, encode_s=0.0)
        study.add(record(p, steps=12, batch_size=32, batch_actual=32, timings=slow))
    entry = _entry(study.touch_images(), margins={"prompt_accuracy": 0.2})
    assert entry["setting"]["steps"] == 12
    assert entry["evidence"]["speed"] == pytest.approx(0.3, rel=0.1)


def test_latency_order_is_that_of_the_medians_however_few_were_timed(tmp_path):
    """Near-equal quality, 4 lone images each: 8 steps at 0.195 s, 16 steps at 0.38 s."""
    times = {8: (0.18, 0.21, 0.19, 0.30), 16: (0.44, 0.36, 0.40, 0.33)}
    study = MemoryStudy(tmp_path)
    for p in range(192):
        for steps, seconds in times.items():
            good = p % 5 != 0 or (steps == 16 and p == 0)
            many = record(p, steps=steps, batch_size=16, batch_actual=16)
            study.add(many, prompt_accuracy=float(good))
            if p < len(seconds):
                timing = Timings(generate_s=seconds[p], encode_s=0.0)
                study.add(record(p, steps=steps, timings=timing))
    margins = {"prompt_accuracy": 0.08}
    assert _entry(study.touch_images(), margins=margins)["setting"]["steps"] == 8
