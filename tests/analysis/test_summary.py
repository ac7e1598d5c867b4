import json
import time
from dataclasses import replace

import numpy as np
import pytest

from sd35bench.analysis.reference import Reference, write_reference
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import GUARD
from sd35bench.stats.frechet import fit, frechet_distance
from sd35bench.types import Memory, Status, Timings
from tests.studies.memory import LOAD, MemoryStudy, planted, record, session

CONTRACT = {
    *("model", "backend", "steps", "cfg", "prompt_strength", "n", "failed", "latency_s"),
    *("stage_s", "load_s", "first_call_s", "peak_vram_bytes", "peak_rss_bytes", "in_force"),
    *("metrics", "width", "height", "sampler", "shift", "task", "quality_batch_size"),
    *("warnings", "latency_ratio", "environment", "environment_id", "weights_digest"),
}


def test_show_document_keeps_the_contract_and_is_json(tmp_path):
    study = planted(tmp_path, {(4, 1.0): (0.5, 0.1), (8, 4.0): (0.9, 0.2)}, prompts=16)
    document = show_document(study)
    json.dumps(document, allow_nan=False)
    assert document["study"] == "synthetic"
    assert [(s["steps"], s["cfg"]) for s in document["settings"]] == [(4, 1.0), (8, 4.0)]
    row = document["settings"][1]
    assert row.keys() >= CONTRACT
    assert {"p50", "p90", "p99", "mean", "ci95"} <= row["latency_s"].keys()
    assert row["latency_s"]["p50"] == pytest.approx(0.2, rel=0.05)
    assert row["latency_s"]["ci95"][0] <= row["latency_s"]["p50"] <= row["latency_s"]["ci95"][1]
    accuracy = row["metrics"]["prompt_accuracy"]
    assert accuracy["value"] == pytest.approx(0.9, abs=0.1)
    assert accuracy["ci95"][0] < accuracy["value"] < accuracy["ci95"][1]
    assert (accuracy["n"], accuracy["n_prompts"]) == (32, 16)
    assert (row["n"], row["failed"], row["load_s"], row["first_call_s"]) == (32, 0, 2.0, 1.0)


def test_unknown_is_null_never_zero(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0, batch_size=4, batch_actual=4), prompt_accuracy=None)
    row = show_document(study.touch_images())["settings"][0]
    assert row["latency_s"]["p50"] is None
    assert row["latency_s"]["n"] == 0
    assert row["latency_ratio"] is None
    assert row["peak_vram_bytes"] is None
    assert row["stage_s"]["text_s"] is None
    assert row["metrics"]["prompt_accuracy"]["value"] is None
    assert row["metrics"]["prompt_accuracy"]["reason"]


def test_latency_comes_from_lone_trials_only(tmp_path):
    study = MemoryStudy(tmp_path)
    for p in range(6):
        study.add(record(p, timings=Timings(generate_s=0.9, encode_s=0.1)))
        slow = Timings(generate_s=50.0, encode_s=0.1)
        study.add(record(p, batch_size=8, batch_actual=6, timings=slow))
        study.add(record(p, seed=1, batch_actual=2, timings=slow))
    row = show_document(study.touch_images())["settings"][0]
    assert row["latency_s"]["mean"] == pytest.approx(1.0)
    assert row["latency_s"]["n"] == 6
    assert row["n"] == 18


def test_metrics_come_from_the_batch_size_with_most_images(tmp_path):
    study = MemoryStudy(tmp_path)
    for p in range(8):
        study.add(record(p, batch_size=8, batch_actual=8), prompt_accuracy=1.0)
        if p < 4:
            study.add(record(p), prompt_accuracy=0.0)
    row = show_document(study.touch_images())["settings"][0]
    assert row["quality_batch_size"] == 8
    assert row["metrics"]["prompt_accuracy"]["value"] == 1.0
    assert row["metrics"]["prompt_accuracy"]["n"] == 8


def test_ratio_is_to_the_target_and_stages_add_up(tmp_path):
    load = replace(LOAD, model=replace(LOAD.model, target_latency_s=8.0))
    stages = Timings(
        generate_s=3.75, encode_s=0.25, text_s=0.5, denoise_s=2.0, decode_s=1.0, step_s=(1.0, 1.0)
    )
    study = MemoryStudy(tmp_path)
    for p in range(4):
        memory = Memory(peak_rss_bytes=100 + p, peak_vram_bytes=7)
        study.add(record(p, load=load, timings=stages, memory=memory))
    row = show_document(study.touch_images())["settings"][0]
    assert row["latency_ratio"] == pytest.approx(0.5)
    assert row["stage_s"] == {
        "text_s": 0.5,
        "denoise_s": 2.0,
        "decode_s": 1.0,
        "encode_s": 0.25,
        "other_s": 0.25,
        "step_s": 1.0,
    }
    # The mutant without `other_s` leaves 250 ms of each image in no stage.
    parts = sum(v for k, v in row["stage_s"].items() if k != "step_s")
    assert parts == pytest.approx(row["latency_s"]["mean"])
    assert (row["peak_rss_bytes"], row["peak_vram_bytes"]) == (103, 7)


def test_unlike_environments_are_never_pooled(tmp_path):
    study = MemoryStudy(tmp_path, lives={"s": session(), "t": session("t", "f" * 64)})
    for p in range(4):
        study.add(record(p), prompt_accuracy=1.0)
        study.add(record(p, seed=1, session_id="t"), prompt_accuracy=0.0)
    document = show_document(study.touch_images())
    assert [s["n"] for s in document["settings"]] == [4, 4]
    assert {s["environment_id"] for s in document["settings"]} == {"e" * 64, "f" * 64}
    assert {s["metrics"]["prompt_accuracy"]["value"] for s in document["settings"]} == {0.0, 1.0}
    assert any("unlike environments" in w for w in document["warnings"])


def test_failures_are_counted_even_without_a_session(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0), prompt_accuracy=1.0)
    study.add(record(1, status=Status.OUT_OF_MEMORY))
    study.add(record(2, status=Status.CRASHED, session_id="never-wrote"))
    study.add(record(3, status=Status.CRASHED, session_id="never-wrote", steps=99))
    rows = show_document(study.touch_images())["settings"]
    assert [(r["steps"], r["n"], r["failed"]) for r in rows] == [(8, 1, 2), (99, 0, 1)]
    assert rows[1]["environment_id"] is None


def _with_bad_images(tmp_path) -> MemoryStudy:
    study = MemoryStudy(tmp_path)
    good, black, gone = record(0), record(1), record(2)
    for row in (good, black, gone):
        study.add(row, prompt_accuracy=1.0)
    study.score(black, GUARD, 0.0, reason="black image")
    for seed in (0, 1):  # the seed is ignored: one file for two seeds
        study.add(record(3, seed=seed, image="5" * 64), prompt_accuracy=0.0)
    return study.touch_images(absent=(gone.image or "",))


def test_guards_exclude_and_say_so(tmp_path):
    document = show_document(_with_bad_images(tmp_path))
    row = document["settings"][0]
    assert row["metrics"]["prompt_accuracy"] | {"levels": None} == {
        "value": 1.0,
        "ci95": None,
        "n": 1,
        "n_prompts": 1,
        "levels": None,
    }
    assert row["excluded"] == {
        "black image": 1,
        "image file missing": 1,
        "same image under different seeds": 2,
    }
    assert any("2 images" in w and "different seeds" in w for w in document["warnings"])
    assert GUARD not in row["metrics"]
    assert row["latency_s"]["n"] == 4  # all but the black one


def test_equal_images_of_one_seed_in_two_batch_sizes_are_fine(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0, image="5" * 64), prompt_accuracy=1.0)
    study.add(record(0, batch_size=4, image="5" * 64), prompt_accuracy=1.0)
    assert show_document(study.touch_images())["settings"][0]["excluded"] == {}


def test_levels_are_reported_apart(tmp_path):
    study = MemoryStudy(tmp_path)
    for p in range(8):
        level = "single" if p < 4 else "overlap"
        study.add(record(p, level=level), prompt_accuracy=float(p < 4))
    levels = show_document(study.touch_images())["settings"][0]["metrics"]["prompt_accuracy"][
        "levels"
    ]
    assert (levels["single"]["value"], levels["overlap"]["value"]) == (1.0, 0.0)
    assert levels["single"]["n"] == 4
    assert levels["single"]["ci95"][0] < 1.0


def _set_study(tmp_path, n: int, least: int) -> tuple[MemoryStudy, np.ndarray, Reference]:
    rng = np.random.default_rng(0)
    study = MemoryStudy(tmp_path)
    features = rng.normal(0.2, 1.1, size=(n, 4)).astype(np.float32)
    gaussian = fit(rng.normal(size=(500, 4)))
    reference = Reference(name="x-1", gaussian=gaussian, source="a test", min_images=least)
    write_reference(study, reference)
    kept = study.kept_features.setdefault("x", {})
    for i in range(n):
        row = record(i // 2, seed=i % 2)
        study.add(row)
        study.score(row, "fid_x", None, extractor="x", reference="x-1", min_images=least)
        kept[row.image or ""] = features[i]
    return study.touch_images(), features, reference


def test_set_metric_is_computed_from_kept_features(tmp_path):
    study, features, reference = _set_study(tmp_path, n=64, least=16)
    entry = show_document(study)["settings"][0]["metrics"]["fid_x"]
    assert entry["value"] == pytest.approx(frechet_distance(fit(features), reference.gaussian))
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert (entry["n"], entry["n_prompts"], entry["reference"]) == (64, 32, "x-1")


@pytest.mark.parametrize("n", [15, 2], ids=["one-too-few", "two"])
def test_set_metric_below_its_minimum_is_refused_with_the_count(tmp_path, n):
    study, _, _ = _set_study(tmp_path, n=n, least=16)
    entry = show_document(study)["settings"][0]["metrics"]["fid_x"]
    assert entry["value"] is None
    assert entry["ci95"] is None
    assert (entry["needs"], entry["n"]) == (16, n)
    assert "needs 16 images" in entry["reason"]


@pytest.mark.parametrize(
    ("settings", "limit_s"),
    [(10, 10.0), pytest.param(100, 30.0, marks=pytest.mark.slow)],
    ids=["10000-records", "100000-records"],
)
def test_show_document_of_many_records_takes_seconds(tmp_path, settings, limit_s):
    study = MemoryStudy(tmp_path)
    study.lives = {"s": session()}
    rng = np.random.default_rng(0)
    for i in range(1000):
        study.add(record(i % 500, seed=i // 500), prompt_accuracy=float(rng.random() < 0.5))
    study.touch_images()
    # Many records without the cost of making them: the same images under more settings.
    base, scores = list(study.kept), list(study.score_rows)
    for steps in range(100, 99 + settings):
        for row, score in zip(base, scores, strict=True):
            key = f"{row.trial.key}-{steps}"
            request = replace(row.trial.request, steps=steps)
            trial = replace(row.trial, key=key, request=request)
            study.kept.append(replace(row, trial=trial))
            study.score_rows.append(type(score)(**{**vars(score), "key": key}))
    started = time.process_time()
    document = show_document(study)
    assert len(document["settings"]) == settings
    assert time.process_time() - started < limit_s
    assert document["settings"][9]["metrics"]["prompt_accuracy"]["n"] == 1000


def test_held_out_images_of_a_few_settings_are_in_no_row_and_said(tmp_path):
    """Beside the others a confirmed setting would be compared by what prompts it had."""
    study = planted(tmp_path, {(4, 1.0): (0.5, 0.1), (8, 4.0): (0.9, 0.2)}, prompts=16)
    before = show_document(study)
    for number in range(100, 110):
        study.add(record(number, steps=8, cfg=4.0, split="heldout"), prompt_accuracy=0.0)
    after = show_document(study.touch_images())
    assert [s["metrics"] for s in after["settings"]] == [s["metrics"] for s in before["settings"]]
    assert [s["n"] for s in after["settings"]] == [s["n"] for s in before["settings"]]
    assert any("10 images on held-out prompts" in w for w in after["warnings"])
    assert not any("held-out" in w for w in before["warnings"])


def test_a_study_of_held_out_prompts_alone_has_its_rows(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0, split="heldout"), prompt_accuracy=1.0)
    (row,) = show_document(study.touch_images())["settings"]
    assert row["n"] == 1


def test_prompts_that_were_cut_are_counted_once(tmp_path):
    study = MemoryStudy(tmp_path)
    for number, cut in ((0, 0), (1, 5), (2, None)):
        for seed in (0, 1):
            study.add(record(number, seed=seed, truncated_tokens=cut), prompt_accuracy=0.5)
    said = [w for w in show_document(study.touch_images())["warnings"] if "cut" in w]
    assert len(said) == 1
    assert said[0].startswith("1 of 3 prompts were cut")
