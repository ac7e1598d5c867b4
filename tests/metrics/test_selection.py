import pytest

from sd35bench.errors import MetricError
from sd35bench.score import score_study
from sd35bench.study.store import Study
from sd35bench.types import Load
from tests.metrics.doubles import pictures
from tests.metrics.drifted import load, nudge, put
from tests.studies.memory import LOAD


@pytest.fixture
def study(tmp_path):
    return Study.open(tmp_path, "s", create=True)


def _random(backend: str, **fields) -> Load:
    return load(backend, model="sd35-medium", weights="random", **fields)


def test_drift_is_a_default_of_two_loads_with_a_reference_among_them(study):
    images = pictures(2)
    put(study, images, _random("eager"))
    put(study, images, _random("eager"), batch_size=2)
    assert score_study(study)["scored"] == {}  # one load is no comparison
    put(study, [nudge(i) for i in images], _random("compile"))
    assert score_study(study)["scored"] == {"drift": 4}


def test_drift_is_no_default_without_its_reference(study):
    for backend in ("compile", "int8"):
        put(study, pictures(2), _random(backend))
    assert "drift" not in score_study(study)["scored"]
    counts = score_study(study, ["drift"])
    assert "metric.drift.reference=" in counts["refused"]["drift"]
    assert score_study(study, options={"drift": {"reference": "int8"}})["scored"] == {
        "drift_int8": 2
    }


@pytest.mark.parametrize("model", ["sd35-medium", "nano", "nano-random-wide"])
def test_random_weights_get_drift_and_no_quality(study, model):
    images = pictures(2)
    for backend in ("eager", "compile"):
        put(study, images, load(backend, model=model, weights="random"))
    counts = score_study(study)
    assert counts["scored"] == {"drift": 2}
    assert counts["refused"]
    assert all("model.weights=checkpoint" in why for why in counts["refused"].values())
    for name in ("prompt_accuracy", "clip_score_nano", "fid_nano"):
        if model == "sd35-medium":
            continue  # these know nano's world only, and say so
        with pytest.raises(MetricError, match="random weights"):
            score_study(study, [name])
    with pytest.raises(MetricError, match=r"random weights.*model\.weights=checkpoint"):
        score_study(study, ["clip_score_ViT-B-32_openai"])


def test_random_weights_beside_a_checkpoint_are_left_out_and_said(study):
    images = pictures(2)
    put(study, images, LOAD)
    put(study, images, load("eager", model="nano-random", weights="random"))
    counts = score_study(study, ["prompt_accuracy"])
    assert counts["scored"] == {"prompt_accuracy": 2}
    assert counts["refused"]["prompt_accuracy"].startswith("2 images made with random weights")
