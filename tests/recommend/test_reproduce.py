"""The printed snippet, run as it is, makes the very image that the backend made.

The API body is one that the protocol's own server takes, and asks for the same image.
"""

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import yaml
from PIL import Image

from sd35bench.backends.base import load_backend
from sd35bench.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.config.files import config_dir
from sd35bench.config.models import check_field
from sd35bench.config.overrides import parse, sweep_values
from sd35bench.recommend.reproduce import INIT_IMAGE, Elsewhere, api_body, run_command, snippet
from sd35bench.remote.providers.wire import schema_input
from sd35bench.server.schema import parse_json, read_create, to_request
from sd35bench.server.settings import ServedModel
from sd35bench.types import BackendSpec, SkipLayerGuidance
from tests.studies.memory import LOAD, record
from tests.studies.tiny import TOKENS, write_tiny_sd3
from tests.studies.tiny_families import write_tiny

SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.01, stop=0.6)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = write_tiny_sd3(tmp_path_factory.mktemp("weights") / "it's tiny")
    model = replace(LOAD.model, path=str(path), max_sequence_length=TOKENS)
    backend = BackendSpec(name="eager", kind="eager", options={"dtype": "fp32"})
    return replace(LOAD, model=model, backend=backend, threads=1)


@pytest.mark.parametrize(
    "fields",
    [
        {"negative_prompt": "blur"},
        {"shift": 1.5, "seed": 7, "width": 48, "max_sequence_length": 8},
        {"skip_layer_guidance": SKIPPING, "output_format": "jpg"},
        {"init_image": "i" * 64, "prompt_strength": 0.6, "seed": 3},
        {"sampler": "heun", "steps": 6, "skip_layer_guidance": SKIPPING},
        {"sampler": "dpmpp_2m", "shift": 1.5},
        {"sampler": "unipc", "init_image": "i" * 64, "prompt_strength": 0.6},
    ],
    ids=[
        *("text-to-image", "shift-and-size", "skip-layer-guidance-jpg", "image-to-image"),
        *("heun-skip-layers", "dpmpp_2m-shift", "unipc-image-to-image"),
    ],
)
def test_snippet_makes_the_backends_image(load, fields, tmp_path, monkeypatch):
    row = record(0, load=load, prompt="a 'red' \"fox\"\\", **{"steps": 4, "height": 32, **fields})
    request = row.trial.request
    init = None
    if request.init_image is not None:
        init = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
        Image.fromarray(init).save(tmp_path / "init.png")
    backend = load_backend(load)
    expected = backend.generate([request], [init]).images[0]
    backend.close()
    monkeypatch.chdir(tmp_path)
    text = snippet(row, tmp_path / "init.png")
    assert text is not None
    exec(compile(text, "snippet", "exec"), {})
    if request.output_format == "png":
        assert np.array_equal(np.asarray(Image.open("image.png")), expected)
    else:
        Image.fromarray(expected).save("expected.jpg", quality=request.output_quality)
        assert (tmp_path / "image.jpg").read_bytes() == (tmp_path / "expected.jpg").read_bytes()


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("sana", {"sampler": "dpmpp_2m", "shift": 1.5}),
        ("sana", {"sampler": "euler"}),
        ("pixart", {"sampler": "dpmpp_2m"}),
    ],
    ids=["sana-own-shift", "sana-euler", "pixart"],
)
def test_snippet_makes_other_families_images(family, fields, tmp_path, monkeypatch, load):
    path = write_tiny(family, tmp_path / family)
    load = replace(load, model=replace(load.model, path=str(path), family=family))
    row = record(0, load=load, steps=3, width=64, height=32, **fields)
    backend = load_backend(load)
    expected = backend.generate([row.trial.request], [None]).images[0]
    backend.close()
    monkeypatch.chdir(tmp_path)
    text = snippet(row, None)
    assert text is not None
    exec(compile(text, "snippet", "exec"), {})
    assert np.array_equal(np.asarray(Image.open("image.png")), expected)


def test_command_gives_sampler_and_skip_layer_guidance_exactly(load):
    row = record(0, load=load, sampler="heun", skip_layer_guidance=SKIPPING)
    command = run_command([row], "again")
    assert " sampler=heun " in command
    assert " skip_layer_guidance=1@2.8:0.01-0.6 " in command
    assert "sampler" not in run_command([record(0, load=load)], "again")
    sana = replace(load, model=replace(load.model, family="sana"))
    assert " sampler=euler " in run_command([record(0, load=sana)], "again")


def test_noise_has_a_command_and_no_snippet(load):
    noise = replace(load.model, path="", weights="random", layers=4, text_encoders=False)
    row = record(0, load=replace(load, model=noise))
    assert snippet(row, None) is None
    assert " model.weights=random model.layers=4 " in run_command([row], "again")


def test_command_can_ask_for_other_prompts_of_the_same_set():
    row = record(0)
    asked = Elsewhere(split="heldout", limit=96, results_dir="elsewhere", skip_layers="stability")
    command = run_command([row], "again", asked)
    for part in (
        "prompts.split=heldout",
        "prompts.limit=96",
        "results_dir=elsewhere",
        "skip_layer_guidance=stability",
    ):
        assert f" {part}" in command
    mine = run_command([record(0, prompt_set="mine.txt")], "again", asked)
    assert " prompts=file prompts.path=mine.txt prompts.split=heldout prompts.limit=96 " in mine
    row = record(0, prompt_set="mine.csv", split="all")
    source = {"path": "my data/mine.csv", "columns.prompt": "text"}
    ref = replace(row.trial.prompt, source=source)
    there = run_command([replace(row, trial=replace(row.trial, prompt=ref))], "again")
    said = shlex.split(there)
    assert 'prompts.path="my data/mine.csv"' in said
    assert {"prompts.columns.prompt=text", "prompts.split=all"} <= set(said)
    starter = run_command([record(0, prompt_set="starter.txt", split="all")], "again")
    assert " prompts=starter prompts.split=all prompts.limit=1 " in starter


def _options(command: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)


def test_command_reaches_the_prompts_that_a_search_took_and_no_fewer():
    taken = [record(number) for number in (5, 17, 6)]
    assert _options(run_command(taken, "again"))["prompts.limit"] == "18"
    mine = [record(number, prompt_set="mine.txt", split="all") for number in (5, 17)]
    assert _options(run_command(mine, "again"))["prompts.limit"] == "18"
    named = replace(mine[0].trial.prompt, id="fox")
    own = [replace(mine[0], trial=replace(mine[0].trial, prompt=named)), mine[1]]
    assert "prompts.limit" not in _options(run_command(own, "again"))
    overlap = replace(taken[0].trial.prompt, id="tune-overlap-3-0005")
    hard = [replace(taken[0], trial=replace(taken[0].trial, prompt=overlap))]
    found = _options(run_command(hard, "again"))
    assert (found["prompts.task"], found["prompts.seed"]) == ("overlap", "3")


@pytest.mark.parametrize(
    "negatives",
    [("blurry",), ("blurry, low quality",), ("", 'it\'s "soft"\\'), ("null",)],
    ids=["word", "comma", "two", "null"],
)
def test_command_asks_for_the_negative_prompts_that_all_prompts_had(negatives):
    rows = [record(n, negative_prompt=text) for n in range(3) for text in negatives]
    command = shlex.split(run_command(rows, "again"))
    (given,) = (word for word in command if word.startswith("negative_prompt="))
    assert tuple(sweep_values(parse(given))) == tuple(sorted(negatives))
    assert ("-m" in command) == (len(negatives) > 1)


def test_negative_prompts_of_a_file_come_with_the_file():
    own = [record(n, negative_prompt=f"no {n}", prompt_set="mine.csv") for n in range(3)]
    assert "negative_prompt" not in run_command(own, "again")
    # Guidance is off: it has no effect, and a run refuses it.
    assert "negative_prompt" not in run_command([record(0, cfg=1.0, negative_prompt="x")], "again")


def test_guidance_has_a_command_and_neither_snippet_nor_body():
    given = {
        "guidance": "apg",
        "apg_eta": 0.5,
        "apg_momentum": -0.5,
        "guidance_interval": "0.1-0.7",
        "step_cache": "0-1-3",
    }
    row = record(0, **given)
    found = _options(run_command([row], "again"))
    for name, value in given.items():
        (typed,) = sweep_values(parse(f"{name}={found[name]}"))
        assert check_field(name, typed) == value
    assert not {"zero_init_steps", "apg_norm"} & set(found)
    assert snippet(row, None) is None
    assert api_body(row)["why_not"] == "the protocol cannot ask for guidance"


def test_command_names_weights_that_a_run_would_not_find_by_itself(tmp_path):
    path = str(tmp_path / "my weights")
    mine = replace(LOAD, model=replace(LOAD.model, path=path, components="/c"))
    found = _options(run_command([record(0, load=mine)], "again"))
    assert sweep_values(parse(f"model.path={found['model.path']}")) == [path]
    assert found["model.components"] == "/c"
    packaged = replace(LOAD.model, path=str(NANO_WEIGHTS))
    digest = weights_digest(NANO_WEIGHTS)
    elsewhere = replace(LOAD.model, path="/other/clone/weights", weights_digest=digest)
    for model in (packaged, elsewhere):
        row = record(0, load=replace(LOAD, model=model))
        assert "model.path" not in run_command([row], "again")


RATIOS = ("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")


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
