"""A study that fixed how many prompts it will look at."""

import pytest

from sd35bench.errors import ConfigError, StoreError
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.look_plan import FILE, plan_looks, read_planned
from sd35bench.recommend.profiles import Profile
from tests.recommend.test_advice import T2I
from tests.studies.memory import planted

EQUAL = {(4, 4.0): (0.80, 0.10), (12, 4.0): (0.81, 0.30)}


def _evidence(study):
    profile = Profile(name="p", margins={"prompt_accuracy": 0.06})
    return recommend_document(study, {"p": profile})["profiles"]["p"][T2I]["evidence"]


def test_an_early_look_needs_more_than_the_last(tmp_path):
    study = planted(tmp_path, EQUAL, prompts=64)
    assert _evidence(study)["definitive"]
    assert "look" not in _evidence(study)
    plan_looks(study, 400)
    found = _evidence(study)
    assert not found["definitive"]
    assert found["look"]["planned"] == 400
    assert found["look"]["level"] < 1e-4


def test_beyond_the_plan_nothing_is_shown(tmp_path):
    study = planted(tmp_path, EQUAL, prompts=64)
    plan_looks(study, 32)
    assert not _evidence(study)["definitive"]


def test_the_number_is_fixed_once(tmp_path):
    study = planted(tmp_path, EQUAL, prompts=8)
    plan_looks(study, 64)
    plan_looks(study, 64)
    with pytest.raises(ConfigError, match="planned for 64"):
        plan_looks(study, 128)
    assert read_planned(study) == 64


@pytest.mark.parametrize("text", ["{", "[]", '{"prompts": "many"}'])
def test_a_damaged_plan_is_named(tmp_path, text):
    study = planted(tmp_path, EQUAL, prompts=8)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(StoreError, match=FILE):
        read_planned(study)


def test_a_plan_of_one_prompt_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 2"):
        plan_looks(planted(tmp_path, EQUAL, prompts=8), 1)
