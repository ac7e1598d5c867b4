"""The table of fields: every field of a request has its answers, and they are what keys rest on."""

import dataclasses
from typing import get_args

import pytest

from sd35bench import fields
from sd35bench.analysis.grouping import setting_key
from sd35bench.fields import (
    FIELDS,
    KEYED,
    PAIR,
    SETTING,
    allowed,
    completed,
    describe,
    field_words,
    is_unasked,
    make_trial,
    pair_identity,
    request_identity,
    setting_identity,
    value_text,
    work_identity,
)
from sd35bench.types import PromptRef, Request, SkipLayerGuidance
from tests.studies.fakes import fake_load

FIRST = {
    *("prompt", "negative_prompt", "steps", "cfg", "seed", "width", "height", "init_image"),
    *("prompt_strength", "sampler", "shift", "skip_layer_guidance", "max_sequence_length"),
    *("output_format", "output_quality"),
}
"""Fields of the first release: always in the key, so that their studies stay readable."""

OTHER = {
    "steps": 8,
    "cfg": 7.0,
    "prompt_strength": 0.5,
    "sampler": "heun",
    "shift": 1.0,
    "skip_layer_guidance": SkipLayerGuidance(layers=(7,), scale=2.5, start=0.01, stop=0.2),
    "guidance": "apg",
    "zero_init_steps": 2,
    "apg_eta": 0.5,
    "apg_norm": 2.5,
    "apg_momentum": -0.5,
    "guidance_interval": "0.1-0.7",
    "step_cache": "2",
    "max_sequence_length": 8,
    "width": 32,
    "height": 32,
    "output_format": "webp",
    "output_quality": 50,
    "extra": (("style_type", "Anime"),),
    "images": (("style", "0" * 64),),
}


def request(**given) -> Request:
    plain = {"prompt": "a heron", "steps": 4, "cfg": 4.0, "seed": 0, "width": 64, "height": 48}
    return Request(**(plain | given))


def key(made: Request) -> str:
    ref = PromptRef(id="0", set="test")
    return make_trial(load=fake_load(), request=made, batch_size=1, prompt=ref).key


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Request)])
def test_every_field_of_a_request_has_its_answers(name):
    assert name in FIELDS, f"add {name} to fields.py"
    field = FIELDS[name]
    assert field.setting or field.pair, "images that differ in it would be pooled"
    assert field.means
    assert field.default
    assert allowed(field.takes)
    assert (field.neutral is KEYED) == (name in FIRST), "a later field needs a neutral value"
    if field.neutral is not KEYED:
        assert field.quiet == field.neutral, "old journals read back with Request's default"


def test_the_table_has_no_other_field():
    assert list(FIELDS) == list(dict.fromkeys(FIELDS))
    assert set(FIELDS) == {f.name for f in dataclasses.fields(Request)}
    assert set(OTHER) == set(SETTING)


@pytest.mark.parametrize("name", SETTING)
def test_settings_that_differ_in_one_field_are_two_settings_with_two_names(name):
    # A mutant: drop the field from `SETTING`, as shift was from alternate.py's own list.
    one, other = request(), request(**{name: OTHER[name]})
    assert setting_identity(one) != setting_identity(other)
    assert key(one) != key(other)
    found = [fields.asked_fields(r) for r in (one, other)]
    if name not in ("width", "height"):
        assert describe(found[0]) != describe(found[1])
    assert describe(found[0], found) != describe(found[1], found)


def test_pair_and_setting_keys_are_those_of_earlier_versions():
    first = ("prompt", "negative_prompt", "seed", "width", "height", "init_image")
    assert (*first, "prompt_2", "prompt_3", "prompt_weights") == PAIR
    assert pair_identity(request()) == tuple(getattr(request(), name) for name in first)
    weighted = pair_identity(request(prompt_weights="otter:2"))
    assert weighted == (*pair_identity(request()), ("prompt_weights", "otter:2"))
    trial = make_trial(
        load=fake_load(),
        request=request(shift=3.0, skip_layer_guidance=OTHER["skip_layer_guidance"]),
        batch_size=1,
        prompt=PromptRef(id="0", set="test"),
    )
    assert trial.key == "abf6e711bc4675924119"
    assert setting_key(trial) == "f8002c39f3e8"


def test_whole_numbers_of_a_real_field_are_one_setting():
    assert setting_identity(request(cfg=4)) == setting_identity(request(cfg=4.0))
    assert type(setting_identity(request(shift=3))[5]) is float


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"seed": 1}, True),
        ({"prompt": "an otter"}, True),
        ({"shift": 1.0}, True),
        ({"cfg": 7.0}, True),
        ({"cfg": 1.0}, False),
        ({"steps": 8}, False),
        ({"sampler": "heun"}, False),
        ({"width": 32}, False),
        ({"output_format": "webp"}, False),
    ],
)
def test_only_what_decides_the_work_needs_a_warm_up_of_its_own(given, same):
    assert (work_identity(request()) == work_identity(request(**given))) is same


def test_a_row_written_before_a_field_existed_gets_its_neutral_value(later):
    neutral = {**fields.GUIDES, "extra": {}, "images": {}, later.name: 0.0}
    assert completed({"steps": 4}) == {"steps": 4, **neutral}
    assert completed({later.name: 0.5})[later.name] == 0.5


def test_a_later_field_is_in_the_key_only_off_its_neutral_value(later):
    assert key(later.asked(0.0)) == later.old_key
    assert key(later.asked(0.5)) != later.old_key
    assert "eta" not in request_identity(later.asked(0.0))
    assert request_identity(later.asked(0.5))["eta"] == 0.5
    assert setting_identity(later.asked(0.0)) == later.old_setting
    assert setting_identity(later.asked(0.5)) == (*later.old_setting, ("eta", 0.5))
    assert fields.later_asked(later.asked(0.5)) == ["eta"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LaterRequest(Request):
    eta: float = 0.0


@dataclasses.dataclass
class _Later:
    name: str
    old_key: str
    old_setting: tuple

    def asked(self, eta: float) -> Request:
        return _LaterRequest(**{f: getattr(request(), f) for f in FIELDS if f != "eta"}, eta=eta)


@pytest.fixture
def later(monkeypatch):
    """A field `eta` with a configured default that is not its neutral value."""
    eta = fields.Field(
        name="eta", takes=float, means="noise", default="0.3", unasked=0.3, neutral=0.0
    )
    old = key(request()), setting_identity(request())
    monkeypatch.setattr(fields, "_LATER", (*fields._LATER, eta))
    monkeypatch.setattr(fields, "_SETTING_FIELDS", (*fields._SETTING_FIELDS, ("eta", eta)))
    return _Later("eta", *old)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("steps", 4, "4 steps"),
        ("cfg", 4.0, "cfg 4"),
        ("shift", 3.0, "shift 3"),
        ("prompt_strength", 0.5, "prompt_strength 0.5"),
        ("sampler", "heun", "heun"),
        ("max_sequence_length", 77, "77 tokens"),
        ("skip_layer_guidance", OTHER["skip_layer_guidance"], "skip 7@2.5:0.01-0.2"),
        ("guidance", "cfg-zero-star", "cfg-zero-star"),
        ("guidance_interval", "0.1-0.7", "guided 0.1-0.7"),
        ("step_cache", "2", "step cache 2"),
        ("apg_momentum", -0.5, "apg momentum -0.5"),
        ("threads", 2, "threads 2"),
    ],
)
def test_a_value_in_words(name, value, said):
    assert field_words(name, value) == said


def test_a_setting_in_words_says_size_and_backend_where_they_tell():
    found = {**fields.asked_fields(request(shift=3.0)), "backend": "fake"}
    assert describe(found) == "4 steps, cfg 4, shift 3"
    assert describe(found, [{**found, "width": 32}]) == "4 steps, cfg 4, shift 3, 64x48"
    assert describe(found, [{**found, "backend": "eager"}]) == "4 steps, cfg 4, shift 3, on fake"
    assert value_text(None) == "none"


@pytest.mark.parametrize(
    ("name", "value", "unasked"),
    [
        ("steps", 28, False),
        ("sampler", "euler", True),
        ("sampler", "heun", False),
        ("shift", None, True),
        ("skip_layer_guidance", None, True),
        ("output_quality", 90, True),
    ],
)
def test_what_a_run_asks_for_untold(name, value, unasked):
    assert is_unasked(name, value) is unasked


def test_a_search_steps_along_every_real_axis():
    numbers = [n for n, f in FIELDS.items() if f.axis and float in get_args(f.takes)]
    assert set(numbers) <= set(fields.GRIDS)
