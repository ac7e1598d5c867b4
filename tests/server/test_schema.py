"""What is asked for: both dialects of numbers, clear refusals, a schema that tells the truth."""

import dataclasses
import json
import math

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sd35bench.server.schema import (
    body_schema,
    input_schema,
    parse_json,
    read_create,
    to_request,
)
from sd35bench.server.settings import Refusal
from sd35bench.types import Task
from tests.server.live import MODEL

TEXT_ONLY = dataclasses.replace(MODEL, takes_images=False)


def read(model=MODEL, **inputs):
    body = {"model": "nano", "input": {"prompt": "a cat", **inputs}}
    return read_create(body, model, draw_seed=lambda: 17).input


def reason(**inputs) -> str:
    with pytest.raises(Refusal) as caught:
        read(**inputs)
    assert caught.value.status == 400
    return str(caught.value)


def test_defaults_are_the_vendors():
    assert read() == {
        "prompt": "a cat",
        "aspect_ratio": "1:1",
        "cfg": 5.0,
        "steps": 40,
        "prompt_strength": 0.85,
        "seed": 17,
        "image": None,
        "output_format": "webp",
        "output_quality": 90,
    }


def test_strings_and_numbers_mean_the_same():
    texts = read(
        steps="28",
        cfg="7.5",
        prompt_strength="0.5",
        seed="18446744073709551615",
        output_quality="0",
    )
    numbers = read(steps=28.0, cfg=7.5, prompt_strength=0.5, seed=2**64 - 1, output_quality=0)
    assert texts == numbers
    assert [type(texts[n]) for n in ("steps", "cfg", "seed")] == [int, float, int]


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "steps": [
            0,
            51,
            "0",
            "51",
            "070",
            " 7",
            "7.0",
            7.5,
            True,
            None,
            math.nan,
            [],
            {},
            "٧",
            "7\n",
        ],
        "cfg": [-0.1, 20.01, "-1", "1e1", "inf", "nan", math.inf, False, None, "20.1", ""],
        "prompt_strength": [-0.1, 1.01, "1.5", "-0", True, None],
        "seed": [-1, 2**64, "18446744073709551616", "-1", 0.5, True, "x"],
        "output_quality": [-1, 101, "101", 50.5, None],
        "aspect_ratio": ["2:1", "3:2", "", None, 1],
        "output_format": ["gif", "PNG", None],
        "prompt": ["", " \n", None, 7, "x" * 10_001, "a\0b", "\ud800"],
        "image": [7, [], "http://x/" + "y" * 4096, "http://x/\ud800"],
    }.items(),
)
def test_wrong_values_are_refused_by_name(name, values):
    for value in values:
        assert reason(**{name: value}).startswith(f"input.{name}="), value


def test_every_wrong_field_is_named_at_once():
    assert "input.steps=99" in (text := reason(steps=99, cfg=21))
    assert "input.cfg=21" in text


def test_unknown_fields_are_named():
    assert "input.negative_prompt" in reason(negative_prompt="dog")
    with pytest.raises(Refusal, match="unknown field flow_id"):
        read_create({"model": "nano", "input": {"prompt": "x"}, "flow_id": 1}, MODEL)


def test_strength_zero_acts_only_with_an_image():
    assert read(prompt_strength="0")["prompt_strength"] == 0.0
    assert "nothing is left to denoise" in reason(prompt_strength=0, image="http://x/y.png")


def test_image_is_refused_where_the_backend_takes_none():
    with pytest.raises(Refusal, match="from text only"):
        read(TEXT_ONLY, image="http://x/y.png")
    assert read(TEXT_ONLY, image="")["image"] is None


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ([], 400, "JSON object"),
        ({}, 400, "model"),
        ({"model": 1}, 400, "model"),
        ({"model": "nano"}, 400, "input"),
        ({"model": "nano", "input": "x"}, 400, "input"),
        ({"model": "nano", "input": {}}, 400, "input.prompt"),
        ({"model": "sana", "input": {"prompt": "x"}}, 404, "Model not found"),
        ({"model": "nano", "version": 1, "input": {"prompt": "x"}}, 400, "version"),
        (
            {"model": "nano", "input": {"prompt": "x"}, "webhook_url": "http://x"},
            400,
            "webhooks are not served",
        ),
    ],
)
def test_wrong_bodies_are_refused(body, status, words):
    with pytest.raises(Refusal, match=words) as caught:
        read_create(body, MODEL)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b"9" * 5000,
        b"{'a': 1}",
    ],
    ids=lambda data: data[:12].decode("latin-1") or "empty",
)
def test_hostile_json_is_a_400(data):
    with pytest.raises(Refusal) as caught:
        parse_json(data)
    assert caught.value.status == 400


def test_request_is_what_run_would_ask_for():
    asked = read(aspect_ratio="16:9", steps="7", output_format="png")
    request = to_request(asked, MODEL, None)
    assert (request.width, request.height) == (88, 48)
    assert (request.steps, request.sampler, request.shift) == (7, "euler", None)
    assert request.prompt_strength is None  # accepted, and ignored without an image
    edited = to_request(asked, MODEL, "ab" * 32)
    assert (edited.task, edited.prompt_strength) == (Task.IMAGE_TO_IMAGE, 0.85)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 120),
    st.integers(2**64 - 3, 2**64 + 3),
    st.floats(-1, 30),
    st.sampled_from(
        ["", "0", "1", "1.0", "0.5", "19.99", "20", "20.1", "50", "051", str(2**64 - 1)]
    ),
    st.sampled_from([*MODEL.sizes, "webp", "jpg", "tiff"]),
    st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=6),
    st.lists(st.integers(), max_size=1),
)
NAMES = st.sampled_from([*input_schema(MODEL)["properties"], "other"])


@settings(max_examples=120, deadline=None)
@given(inputs=st.dictionaries(NAMES, VALUES, max_size=4))
@example(inputs={"prompt": "x", "cfg": "20.0"})
@example(inputs={"prompt": "x", "seed": str(2**64)})
def test_schema_allows_exactly_what_is_accepted(inputs):
    body = {"model": "nano", "input": inputs}
    try:
        read_create(json.loads(json.dumps(body)), MODEL)
        accepted = True
    except Refusal as exc:
        accepted = False
        only_together = "nothing is left" in str(exc)
        if only_together:  # image with strength 0: each is fine by itself
            return
    assert jsonschema.Draft202012Validator(body_schema(MODEL)).is_valid(body) == accepted
