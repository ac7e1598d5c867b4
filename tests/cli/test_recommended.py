"""`run from=recommended.yaml`: the file's command, with words of one's own on top."""

import pytest
import yaml

from sd35bench.cli.parser import Given
from sd35bench.cli.recommended import with_recommended
from sd35bench.errors import ConfigError

COMMAND = (
    "sd35bench run model=nano backend=fake steps=8 cfg=4 'negative_prompt=low, dull' prompts=nano"
    " prompts.split=tune prompts.limit=4 seed=0 study=recommended-final"
)


@pytest.fixture
def path(tmp_path):
    answer = {"text-to-image": {"setting": {"steps": 8}, "command": COMMAND}}
    none = {"text-to-image": {"setting": None, "answer": "no setting: too slow"}}
    file = tmp_path / "recommended.yaml"
    file.write_text(yaml.safe_dump({"profiles": {"balanced": answer, "preview": none}}))
    return file


def settings(*words: str) -> list[str]:
    given = Given(verb="run", words=[], settings=list(words), flags={}, as_json=False)
    return with_recommended(given).settings


def test_without_from_nothing_changes():
    assert settings("steps=4", "profile=x") == ["steps=4", "profile=x"]


def test_the_command_s_words_are_taken_and_own_ones_win(path):
    found = settings(f"from={path}", "profile=balanced", "steps=4", "study=mine")
    assert found == [
        *("model=nano", "backend=fake", "cfg=4", "negative_prompt=low, dull", "prompts=nano"),
        *("prompts.split=tune", "prompts.limit=4", "seed=0", "steps=4", "study=mine"),
    ]


def test_own_prompts_replace_all_of_the_file_s(path):
    found = settings(f"from={path}", "profile=balanced", "prompts.path=mine.txt")
    assert [w for w in found if w.startswith("prompts")] == ["prompts.path=mine.txt"]
    found = settings(f"from={path}", "profile=balanced", "prompts.limit=2")
    assert [w for w in found if w.startswith("prompts")] == [
        *("prompts=nano", "prompts.split=tune", "prompts.limit=2")
    ]


def test_a_choice_made_on_several_seeds_is_a_sweep_over_them(path):
    """It said "'-m': expected NAME=VALUE"."""
    path.write_text(path.read_text().replace("run model=", "run -m model=").replace("=0 ", "=0,1 "))
    words = [f"from={path}", "profile=balanced"]
    found = with_recommended(Given(verb="run", words=[], settings=words, flags={}, as_json=False))
    assert found.has("-m")
    assert "-m" not in found.settings
    assert "seed=0,1" in found.settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give profile=, one of balanced, preview"),
        (["profile=balance"], "did you mean balanced"),
        (["profile=preview"], "no setting: too slow"),
        (["profile=balanced", "task=edit"], "there: text-to-image"),
    ],
)
def test_what_the_file_does_not_hold_is_said(path, words, said):
    with pytest.raises(ConfigError, match=said):
        settings(f"from={path}", *words)


@pytest.mark.parametrize("text", ["", "a: [", "steps: 4"])
def test_what_is_no_recommendation_is_said(path, text):
    path.write_text(text)
    with pytest.raises(ConfigError, match="from="):
        settings(f"from={path}", "profile=balanced")
