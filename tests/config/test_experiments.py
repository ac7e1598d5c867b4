"""An experiment with another model takes that model's prompts and batch size, and says so."""

import pytest

from sd35bench.config.experiments import with_models_own
from sd35bench.errors import ConfigError

MEDIUM = ["experiment=defaults", "model=sd35-medium"]


def test_another_model_gets_its_own_prompts_and_one_image_a_call():
    settings, notes = with_models_own(MEDIUM)
    assert settings == [*MEDIUM, "prompts=starter", "batch_size=1"]
    assert notes == [
        "experiment=defaults was made for nano; here sd35-medium: prompts=starter, not nano;"
        " batch_size=1, not 24"
    ]


def test_a_model_made_from_another_has_that_ones_prompts():
    assert "prompts=starter" in with_models_own([MEDIUM[0], "model=sd35-large-turbo"])[0]


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (["experiment=defaults"], []),
        (["experiment=defaults", "model=nano"], []),
        (["model=sd35-medium"], []),
        (["experiment=gpu", "model=sd35-medium"], []),
        ([*MEDIUM, "prompts=nano", "batch_size=4"], []),
        ([*MEDIUM, "prompts=coco"], ["batch_size=1"]),
        ([*MEDIUM, "prompt=a cat", "batch_size=2"], []),
        (["experiment=nosuch", "model=sd35-medium"], []),
        (["experiment=claims", "model=sana,pixart-xl-2"], ["prompts=starter", "batch_size=1"]),
    ],
)
def test_what_was_asked_for_stays(settings, added):
    assert with_models_own(settings)[0] == [*settings, *added]


def test_models_with_unlike_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"\(nano: nano, sana: starter\); give one for all"):
        with_models_own(["experiment=defaults", "model=nano,sana"])


def test_a_model_of_ones_own_says_its_prompts(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults: [sd35-medium, {override /prompts@_global_.prompts: nano}]\nname: mine\n"
    )
    settings = ["experiment=defaults", "model=mine", "batch_size=2"]
    assert with_models_own(settings, tmp_path)[0] == settings
