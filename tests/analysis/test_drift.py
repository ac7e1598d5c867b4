from dataclasses import replace

import numpy as np
import pytest

from sd35bench.analysis.drift import drift_document, psnr_db
from sd35bench.analysis.table import read_table
from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import Profile
from sd35bench.types import Load
from tests.studies.memory import LOAD, MemoryStudy, planted, record, session

FIGURES = (
    "max_abs",
    "mean_abs",
    "psnr_db",
    "ssim",
    "flip",
    "latent_rel_first",
    "latent_rel_last",
)


def load(backend: str, threads: int = 2) -> Load:
    return replace(LOAD, backend=replace(LOAD.backend, name=backend), threads=threads)


def _detail(mean_abs: float, reference, **fields) -> dict:
    return {
        "max_abs": int(4 * mean_abs),
        "mean_abs": mean_abs,
        "mse": mean_abs**2,
        "psnr_db": psnr_db(mean_abs**2),
        "ssim": 1 - mean_abs / 255,
        "flip": mean_abs / 100,
        "latent_rel_first": None,
        "latent_rel_last": None,
        "reference": "eager",
        "reference_key": reference.trial.key,
        "reference_image": reference.image,
        **fields,
    }


class Made:
    """A study in memory with images of eager and of others held against it."""

    def __init__(self, path, prompts: int = 12, **fields):
        self.study = MemoryStudy(path)
        self.fields, self.prompts = fields, prompts
        self.eager = self.images(LOAD)

    def images(self, where: Load, **fields) -> list:
        rows = [record(i, load=where, **{**self.fields, **fields}) for i in range(self.prompts)]
        for row in rows:
            self.study.add(row)
        return rows

    def held(self, where: Load, values, references=None, metric: str = "drift", **fields) -> list:
        """Images of a load whose mean differences are `values`."""
        rows = self.images(where, **fields)
        references = self.eager if references is None else references
        for row, reference, value in zip(rows, references, values, strict=True):
            self.study.score(row, metric, value, **_detail(float(value), reference))
        return rows

    def document(self) -> dict:
        study = self.study.touch_images()
        return drift_document(study, read_table(study))


def _around(value: float, prompts: int = 12) -> np.ndarray:
    return value + np.linspace(-0.1, 0.1, prompts) * value


def test_nothing_scored_gives_nothing(tmp_path):
    assert Made(tmp_path).document() == {}


def test_document_has_a_row_per_setting_with_every_figure(tmp_path):
    made = Made(tmp_path)
    made.held(load("int8"), _around(3.0))
    made.held(load("compile"), _around(1.0))
    document = made.document()
    assert [row["backend"] for row in document["rows"]] == ["compile", "int8"]
    assert document["reference"]["backend"] == "eager"
    assert document["noise_floor"] == []
    assert "noise_floor=" in document["warnings"][0]
    row = document["rows"][1]
    assert (row["n_pairs"], row["n_prompts"], row["batch_size"]) == (12, 12, 1)
    assert (row["reference_batch_size"], row["reference_threads"]) == (1, 2)
    assert row["same_environment"] is True
    assert row["beyond_noise"] is None
    assert row["mean_abs"]["value"] == pytest.approx(3.0)
    low, high = row["mean_abs"]["ci95"]
    assert 2.7 < low < 3.0 < high < 3.3
    assert row["max_abs"] == {"value": 13, "ci95": None, "n": 12}
    assert all(row[name].keys() == {"value", "ci95", "n"} for name in FIGURES)
    assert row["latent_rel_last"] == {"value": None, "ci95": None, "n": 0}


def test_intervals_are_over_prompts_not_images(tmp_path):
    def width(prompts: list[int]) -> float:
        made = Made(tmp_path / str(len(set(prompts))), prompts=0)
        values = np.tile([1.0, 3.0], 8)
        for i, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
            reference = record(prompt, load=LOAD, seed=i)
            row = record(prompt, load=load("int8"), seed=i)
            made.study.add(reference)
            made.study.add(row)
            made.study.score(row, "drift", value, **_detail(value, reference))
        low, high = made.document()["rows"][0]["mean_abs"]["ci95"]
        return high - low

    # With 2 prompts, whose seeds agree, there is less to go by than with 16.
    assert width([i % 2 for i in range(16)]) > 1.5 * width(list(range(16)))


def test_psnr_is_that_of_all_pixels_and_never_infinite(tmp_path):
    made = Made(tmp_path)
    values = np.zeros(12)
    values[:2] = 6.0
    made.held(load("onnx"), values)
    made.held(load("same"), np.zeros(12))
    onnx, same = made.document()["rows"]
    assert onnx["identical"] == 10
    assert onnx["psnr_db"]["value"] == pytest.approx(psnr_db(2 * 36 / 12))
    low, high = onnx["psnr_db"]["ci95"]
    assert low < onnx["psnr_db"]["value"] < high
    assert high <= psnr_db(1 / (64 * 64 * 3 * 12))
    assert same["identical"] == 12
    assert same["psnr_db"] == {"value": None, "ci95": None, "n": 12}
    assert same["mean_abs"]["ci95"] == [0.0, 0.0]


def test_noise_floor_is_the_reference_against_itself_and_bounds_what_is_beyond(tmp_path):
    made = Made(tmp_path)
    made.held(load("eager"), _around(1.0), batch_size=16)
    made.held(load("eager", threads=1), _around(0.2))
    made.held(load("compile"), _around(0.9))
    made.held(load("int8"), _around(4.0))
    document = made.document()
    said = {entry["what"]: entry["mean_abs"]["value"] for entry in document["noise_floor"]}
    assert said == {
        "batch size 16 instead of 1": pytest.approx(1.0),
        "1 thread instead of 2": pytest.approx(0.2),
    }
    beyond = {row["backend"]: row["beyond_noise"] for row in document["rows"]}
    assert beyond == {"compile": False, "int8": True}
    assert document["warnings"] == []


def test_floor_of_another_setting_says_nothing(tmp_path):
    made = Made(tmp_path)
    made.held(load("eager"), _around(0.1), batch_size=16)
    other = made.images(LOAD, steps=28)
    made.held(load("int8"), _around(4.0), other, steps=28)
    made.held(load("int8"), _around(4.0))
    found = {row["steps"]: row["beyond_noise"] for row in made.document()["rows"]}
    assert found == {8: True, 28: None}


def test_one_prompt_has_no_interval_and_no_verdict(tmp_path):
    made = Made(tmp_path, prompts=1)
    made.held(load("eager"), [0.1], batch_size=4)
    made.held(load("int8"), [4.0])
    (row,) = made.document()["rows"]
    assert row["mean_abs"] == {"value": 4.0, "ci95": None, "n": 1}
    assert row["beyond_noise"] is None


def test_row_is_of_one_batch_size_against_one(tmp_path):
    made = Made(tmp_path)
    batched = made.images(LOAD, batch_size=16)
    made.held(load("int8"), _around(9.0))  # equally many: the larger batch size counts
    rows = made.held(load("int8"), _around(2.0), batched, batch_size=16)
    lone = rows[0]
    made.study.score(lone, "drift", 50.0, **_detail(50.0, made.eager[0]))  # its batch had failed
    document = made.document()
    (row,) = document["rows"]
    assert (row["batch_size"], row["reference_batch_size"], row["n_pairs"]) == (16, 16, 11)
    assert row["mean_abs"]["value"] == pytest.approx(_around(2.0)[1:].mean())
    assert any("1 of its pairs left out" in w for w in document["warnings"])


def test_other_environment_is_said(tmp_path):
    made = Made(tmp_path)
    made.study.lives["t"] = session("t", "f" * 64)
    made.held(load("int8"), _around(2.0), session_id="t")
    document = made.document()
    assert document["rows"][0]["same_environment"] is False
    assert any("another environment" in w for w in document["warnings"])


def test_score_against_an_image_that_is_gone_is_left_out(tmp_path):
    made = Made(tmp_path)
    made.held(load("int8"), _around(2.0))
    gone = replace(made.eager[0], image="9" * 64)
    made.study.kept[0] = gone
    document = made.document()
    assert document["rows"][0]["n_pairs"] == 11
    assert any("score again" in w for w in document["warnings"])


def test_named_reference_is_shown_where_eager_has_none(tmp_path):
    made = Made(tmp_path)
    made.held(load("int8"), _around(2.0), metric="drift_eager-bf16")
    assert made.document()["metric"] == "drift_eager-bf16"


def test_recommend_refuses_random_weights(tmp_path):
    study = planted(tmp_path, {(4, 1.0): (0.2, 0.1), (8, 4.0): (0.9, 0.2)}, prompts=8)
    profiles = {"p": Profile(name="p")}
    assert recommend_document(study, profiles)
    noise = replace(LOAD, model=replace(LOAD.model, weights="random"))
    study.kept = [replace(r, trial=replace(r.trial, load=noise)) for r in study.kept]
    with pytest.raises(ConfigError, match=r"random weights.*model\.weights=checkpoint"):
        recommend_document(study, profiles)


def test_share_changed_and_shifts_have_their_intervals(tmp_path):
    made = Made(tmp_path, prompts=24)
    rows = made.images(load("int8"))
    for i, (row, reference) in enumerate(zip(rows, made.eager, strict=True)):
        apart = 0.5 if i % 2 else 0.0
        shifts = {"shift_red": apart, "shift_green": -0.3 + 0.01 * (i % 3), "shift_blue": 0.0}
        made.study.score(row, "drift", apart, **_detail(apart, reference, **shifts))
    (found,) = made.document()["rows"]
    assert (found["identical"], found["changed"]["value"]) == (12, 0.5)
    low, high = found["changed"]["ci95"]
    assert 0.2 < low < 0.5 < high < 0.8
    green = found["shift_green"]
    assert green["value"] == pytest.approx(-0.29)
    assert green["ci95"][0] < -0.29 < green["ci95"][1] < -0.28
    assert found["shift_blue"]["ci95"] == [0.0, 0.0]


def test_scores_of_earlier_versions_have_no_shift(tmp_path):
    made = Made(tmp_path)
    made.held(load("int8"), _around(0.5))
    (found,) = made.document()["rows"]
    assert "shift_red" not in found
    assert found["changed"]["value"] == 1.0
