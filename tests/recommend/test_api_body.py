"""The API body is one that the protocol's own server takes, and asks for the same image."""

import json

import pytest
import yaml

from sd35bench.config.files import config_dir
from sd35bench.recommend.api_body import INIT_IMAGE, api_body
from sd35bench.remote.providers.wire import schema_input
from sd35bench.server.schema import parse_json, read_create, to_request
from sd35bench.server.settings import ServedModel
from sd35bench.types import SkipLayerGuidance
from tests.analysis.synthetic import record

RATIOS = ("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")
SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.5, start=0.0, stop=0.2)


def _sizes(name: str) -> dict[str, tuple[int, int]]:
    text = (config_dir() / "model" / f"{name}.yaml").read_text()
    return {ratio: tuple(size) for ratio, size in yaml.safe_load(text)["aspect_ratios"].items()}


@pytest.mark.parametrize("model", ["nano", "sd35-medium"])
def test_every_ratio_of_a_model_is_named_as_its_configuration_names_it(model):
    sizes = _sizes(model)
    assert set(sizes) == set(RATIOS)
    for ratio, (width, height) in sizes.items():
        body = api_body(record(0, width=width, height=height))["body"]
        assert body["input"]["aspect_ratio"] == ratio


def _served(name: str) -> ServedModel:
    return ServedModel(
        name=name,
        slugs=("stable-diffusion-3-5-medium",),
        sizes=_sizes(name),
        sampler="euler",
        steps=28,
        cfg=4.0,
        takes_images=True,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {
            "prompt": 'a "red" circle\n\\ é',
            "steps": 12,
            "cfg": 4.5,
            "seed": 3,
            "width": 88,
            "height": 48,
        },
        {"init_image": "i" * 64, "prompt_strength": 0.6, "output_format": "webp"},
    ],
    ids=["text-to-image", "image-to-image"],
)
def test_server_reads_the_body_as_the_very_request(fields):
    request = record(0, **fields).trial.request
    found = api_body(record(0, **fields))
    text = json.dumps(found["body"], ensure_ascii=False).encode()
    model = _served("nano")
    asked = read_create(parse_json(text), model)
    assert asked.image == (None if request.init_image is None else INIT_IMAGE)
    assert to_request(asked.input, model, request.init_image) == request
    assert found["not_sent"] == ["width", "height"]


def test_body_is_what_the_hosted_client_sends():
    row = record(0, steps=12, cfg=4.5, seed=3)
    sent = schema_input(row.trial.request, {(64, 64): "1:1"}, None)
    assert api_body(row)["body"]["input"] == sent
    edit = record(0, init_image="i" * 64, prompt_strength=0.6)
    sent = schema_input(edit.trial.request, {(64, 64): "1:1"}, INIT_IMAGE)
    assert api_body(edit)["body"]["input"] == sent


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"steps": 51}, "1 to 50 steps, not 51"),
        ({"cfg": 20.5}, "cfg 0 to 20"),
        ({"sampler": "heun"}, "sampler heun"),
        ({"negative_prompt": "blur"}, "negative prompt"),
        ({"skip_layer_guidance": SKIPPING}, "skip-layer guidance"),
        ({"shift": 2.0}, "cannot ask for a shift"),
        ({"width": 128, "height": 48}, "no aspect ratio"),
    ],
    ids=["steps", "cfg", "sampler", "negative", "skip-layers", "shift", "ratio"],
)
def test_setting_that_the_protocol_cannot_ask_for_has_no_body(fields, why):
    found = api_body(record(0, **fields))
    assert found["body"] is None
    assert why in found["why_not"]


def test_what_does_not_reach_the_service_is_named():
    found = api_body(record(0, shift=3.0, max_sequence_length=8))
    assert found["not_sent"] == ["width", "height", "shift", "max_sequence_length"]
