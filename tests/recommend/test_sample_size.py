"""`recommend --plan`: what a study says as a pilot, and what is said where it cannot."""

import dataclasses
import io

import pytest
from rich.console import Console

from sd35bench.errors import ConfigError
from sd35bench.recommend.profiles import Profile
from sd35bench.recommend.sample_size import Asked, plan_document
from sd35bench.report.recommend import plan_parts
from sd35bench.report.render import markdown_document, print_document
from tests.recommend.test_advice import GRID, T2I
from tests.studies.hosted_calls import HOSTED, call
from tests.studies.memory import MemoryStudy, planted

NEAR = {(4, 4.0): (0.80, 0.10), (12, 4.0): (0.82, 0.30), (28, 4.0): (0.30, 0.70)}


def _plan(study, margin=0.1, profile=None, **asked):
    profiles = {"p": Profile(name="p") if profile is None else profile}
    return plan_document(study, profiles, Asked(margin=margin, **asked))


def _entry(study, **fields):
    return _plan(study, **fields)["profiles"]["p"][T2I]


def _text(document) -> str:
    out = io.StringIO()
    print_document(plan_parts(document), Console(file=out, width=200))
    return out.getvalue()


def test_settings_beyond_the_margin_get_no_more_images(tmp_path):
    entry = _entry(planted(tmp_path, NEAR, prompts=40))
    assert [c["setting"]["steps"] for c in entry["contenders"]] == [4, 12]
    assert [s["steps"] for s in entry["settled"]] == [28]


def test_half_the_margin_takes_about_four_times_the_prompts(tmp_path):
    study = planted(tmp_path, NEAR, prompts=40)
    wide, narrow = (_entry(study, margin=m)["prompts"] for m in (0.04, 0.02))
    assert narrow / wide == pytest.approx(4.0, rel=0.1)


def test_images_that_are_there_are_not_asked_for_again(tmp_path):
    entry = _entry(planted(tmp_path, NEAR, prompts=40))
    first = entry["contenders"][0]
    needed = entry["prompts"] * entry["images_per_prompt"]
    assert first["more_images"] == max(0, needed - 40 * entry["images_per_prompt"])
    assert f"prompts.limit={entry['prompts']} seed=0 " in first["command"]


def test_a_set_that_is_too_small_names_the_margin_that_it_decides(tmp_path):
    entry = _entry(planted(tmp_path, NEAR, prompts=40, seeds=1), margin=0.002)
    assert entry["prompts"] > entry["set_size"] == 400
    assert entry["smallest_margin"] > 0.002
    assert "the set has 400 prompts" in entry["why"]
    assert f"{entry['smallest_margin']:g}" in entry["why"]


def test_hosted_study_shows_what_the_plan_costs(tmp_path):
    study = MemoryStudy(tmp_path)
    study.lives = {"h": dataclasses.replace(study.lives["s"], id="h", load=HOSTED)}
    for number in range(24):
        for steps in (8, 28):
            row = call(number, at_s=number, total_s=steps / 4, steps=steps, cost_reported=False)
            study.add(row, prompt_accuracy=float((number + steps) % 5 > 0))
    document = _plan(study.touch_images())
    entry = document["profiles"]["p"][T2I]
    assert entry["usd_per_image"] == 0.035
    assert entry["usd"] == pytest.approx(0.035 * entry["more_images"])
    assert entry["timed"]["starts"] == 1
    assert "$0.0350 an image" in _text(document)


def test_one_start_says_that_starts_were_not_seen(tmp_path):
    document = _plan(planted(tmp_path, NEAR, prompts=40))
    assert document["profiles"]["p"][T2I]["timed"]["one_start"]
    assert "starts=2 would say" in _text(document)


def test_forms_show_the_numbers_and_the_commands(tmp_path):
    document = _plan(planted(tmp_path, NEAR, prompts=40), margin=0.03)
    entry = document["profiles"]["p"][T2I]
    for text in (_text(document), markdown_document(plan_parts(document))):
        assert f"{entry['prompts']} x {entry['images_per_prompt']}" in text
        assert entry["contenders"][0]["command"] in text


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"margin": None}, "margin of 0"),
        ({"profile": Profile(name="p", latency_limit_s=0.01)}, "no setting is within the limits"),
        ({"margin": 1e-7}, "no practicable number"),
    ],
    ids=["no-margin", "limits", "too-fine"],
)
def test_what_cannot_be_planned_says_why(tmp_path, fields, why):
    entry = _entry(planted(tmp_path, NEAR, prompts=40), **fields)
    assert entry["prompts"] is None
    assert why in entry["why"]


def test_one_clear_winner_needs_no_plan(tmp_path):
    entry = _entry(planted(tmp_path, {k: GRID[k] for k in ((4, 1.0), (28, 4.0))}, prompts=40))
    assert "one setting is left" in entry["why"]


@pytest.mark.parametrize("asked", [{"margin": 0.0}, {"power": 1.0}, {"power": 0.1}])
def test_bad_wishes_are_refused(asked):
    with pytest.raises(ConfigError, match=next(iter(asked))):
        Asked(**asked)


def test_a_study_with_one_setting_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no plan from study"):
        _plan(planted(tmp_path, {(4, 4.0): (0.8, 0.1)}, prompts=8))
