"""The printed snippet, run as it is, makes the very image that the backend made.

The API body is one that the protocol's own server takes, and asks for the same image.
"""

import json
import shlex
from dataclasses import fields, replace

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from sd35bench.analysis import commands
from sd35bench.analysis.commands import Elsewhere
from sd35bench.backends.base import load_backend
from sd35bench.cli.parser import parse as parse_words
from sd35bench.cli.run import COMMANDS as RUN
from sd35bench.config import compose, freeze
from sd35bench.config.files import config_dir
from sd35bench.config.models import check_field
from sd35bench.config.overrides import check_overrides, parse, sweep_values, written
from sd35bench.evaluations import parse_skip_layers
from sd35bench.fields import FIELDS
from sd35bench.loading.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.plan import expand
from sd35bench.recommend.reproduce import INIT_IMAGE, api_body, run_command, snippet
from sd35bench.remote.providers.wire import schema_input
from sd35bench.report.provenance import rerun_commands
from sd35bench.server.schema import parse_json, read_create, to_request
from sd35bench.server.settings import ServedModel
from sd35bench.types import BackendSpec, Change, Load, ModelSpec, SkipLayerGuidance
from tests.kept_models import keep_models
from tests.studies.memory import LOAD, record
from tests.studies.tiny import TOKENS, write_tiny_sd3
from tests.studies.tiny_families import write_tiny

SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.01, stop=0.6)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    path = write_tiny_sd3(tmp_path_factory.mktemp("weights") / "it's tiny")
    model = replace(LOAD.model, path=str(path), max_sequence_length=TOKENS)
    backend = BackendSpec(name="eager", kind="eager", options={"dtype": "fp32"})
    with pytest.MonkeyPatch.context() as patch:
        keep_models(patch)
        yield replace(LOAD, model=model, backend=backend, threads=1)


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


# The very same setting, read back ---------------------------------------------------------------

OFF = {
    "steps": 9,
    "cfg": 3.25,
    "prompt_strength": 0.61,
    "sampler": "heun",
    "shift": 1.2345678,
    "skip_layer_guidance": SKIPPING,
    "guidance": "apg",
    "zero_init_steps": 3,
    "apg_eta": 0.5,
    "apg_norm": 7.5,
    "apg_momentum": -0.5,
    "guidance_interval": "0.1-0.7",
    "step_cache": "0-1-3",
    "max_sequence_length": 9,
    "negative_prompt": "blurry, dark",
    "seed": 2**64 - 1,
    "width": 88,
    "height": 48,
    "output_format": "webp",
    "output_quality": 71,
    "extra": (("mode", "fast, cheap"),),
    "images": (("mask", "f" * 64),),
}
"""A value of each field of a request that no run has unasked."""
OF_PROMPTS = ("prompt", "init_image", "prompt_2", "prompt_3", "prompt_weights")
"""Fields that the prompt set brings, which is named."""
COMMANDS = {
    "recommend": lambda row: run_command([row], "again"),
    "report": lambda row: rerun_commands("again", [row])[0]["command"],
}


def _read_back(command: str) -> dict[str, tuple]:
    """What our own parsers make of a command: name → values."""
    given = parse_words("run", RUN["run"], shlex.split(command)[2:], as_json=True)
    check_overrides(given.settings, given.has("-m"))
    overrides = map(parse, written(given.settings))
    return {o.get_key_element().lstrip("+"): tuple(sweep_values(o)) for o in overrides}


def _asked(name: str, command: str) -> object:
    """One field's value as a request has it."""
    found = _read_back(command)
    if name in ("extra", "images"):
        return tuple((n.partition(".")[2], *v) for n, v in found.items() if n.startswith(name))
    (value,) = found[name]
    if name == "skip_layer_guidance":
        return parse_skip_layers(value)
    return check_field(name, value)


def test_every_field_of_a_request_is_here():
    assert set(OFF) | set(OF_PROMPTS) == set(FIELDS)


@pytest.mark.parametrize("made_by", COMMANDS)
@pytest.mark.parametrize("name", OFF)
def test_every_field_of_a_request_comes_back_from_the_command(name, made_by):
    row = record(0, **{name: OFF[name]})
    wanted = (("mask", "MASK_FILE"),) if name == "images" else OFF[name]
    assert _asked(name, COMMANDS[made_by](row)) == wanted


@pytest.mark.parametrize("made_by", COMMANDS)
def test_mutant_that_forgets_a_field_of_a_request_fails(made_by, monkeypatch):
    setting = [name for name in OFF if name in commands.SETTING and FIELDS[name].typed]
    for name in setting:
        left = tuple(n for n in commands.SETTING if n != name)
        with monkeypatch.context() as patch:
            patch.setattr(commands, "SETTING", left)
            with pytest.raises(KeyError):
                _asked(name, COMMANDS[made_by](record(0, **{name: OFF[name]})))


CHANGES = (
    Change(kind="vae", path="/w/my vae", digest="a"),
    Change(kind="lora", path="/w/a, b.safetensors", digest="b", weight=0.8),
    Change(kind="lora", path="/w/c.safetensors", digest="c", weight=-0.1234567),
)
LOADS = {
    "model.name": ({"name": "mine"}, {"model": "mine"}),
    "model.path": ({"path": "/w/my weights"}, {"model.path": "/w/my weights"}),
    "model.components": ({"components": "/w/{c}"}, {"model.components": "/w/{c}"}),
    "model.changes": (
        {"changes": CHANGES},
        {
            "model.vae": "/w/my vae",
            "model.lora": "/w/a, b.safetensors:0.8,/w/c.safetensors:-0.1234567",
        },
    ),
    "model.variant": ({"variant": "fp16"}, {"model.variant": "fp16"}),
    "model.weights": ({"name": "nano-random", "weights": "random"}, {"model.weights": "random"}),
    "model.layers": (
        {"name": "nano-random-4-layers", "weights": "random", "layers": 4},
        {"model": "nano", "model.layers": 4},
    ),
    "model.text_encoders": (
        {"name": "nano-random-text-encoders", "weights": "random", "text_encoders": True},
        {"model": "nano", "model.text_encoders": True},
    ),
    "backend.name": ({"name": "compile"}, {"backend": "compile"}),
    "backend.options": ({"options": {"pitch": 2, "t5": False}}, {"backend.options.pitch": 2}),
    "threads": ({"threads": 3}, {"threads": 3}),
}
"""Each field of a load: another value, and what the command has to say of it."""


@pytest.fixture
def any_name(monkeypatch):
    """A model may have a name that no YAML file has."""
    monkeypatch.setattr("sd35bench.config.overrides._check_choice", lambda *_: None)


def _load_of(name: str) -> Load:
    part, _, field = name.rpartition(".")
    other = LOADS[name][0]
    if not part:
        return replace(LOAD, **other)
    plain = {"text_encoders": False} if "weights" in other and field != "text_encoders" else {}
    return replace(LOAD, **{part: replace(getattr(LOAD, part), **plain, **other)})


def test_every_field_of_a_load_is_said_or_follows_from_another():
    parts = {"model.": ModelSpec, "backend.": BackendSpec}
    known = {f"{part}{f.name}" for part, cls in parts.items() for f in fields(cls)}
    assert set(commands.OF_LOADS) | set(commands.IMPLIED) == known | {"threads"}
    assert set(commands.OF_LOADS) == set(LOADS)


@pytest.mark.parametrize("made_by", COMMANDS)
@pytest.mark.parametrize("name", LOADS)
@pytest.mark.usefixtures("any_name")
def test_every_field_of_a_load_comes_back_from_the_command(name, made_by, monkeypatch):
    row, wanted = record(0, load=_load_of(name)), LOADS[name][1]
    found = _read_back(COMMANDS[made_by](row))
    assert {n: found[n] for n in wanted} == {n: (value,) for n, value in wanted.items()}
    # The mutant, in a copy: what is put back into a dictionary comes last, in others' commands too.
    fewer = {n: said for n, said in commands.OF_LOADS.items() if n != name}
    monkeypatch.setattr(commands, "OF_LOADS", fewer)
    left = _read_back(COMMANDS[made_by](row))
    assert any(n not in left for n in wanted)


@pytest.mark.usefixtures("any_name")
def test_settings_of_unlike_loads_are_commands_of_their_own():
    """Mutant: one command with the options of the first, which the others do not take."""
    rows = [record(0, load=_load_of(name), steps=n) for n, name in enumerate(LOADS, 4)]
    found = [_read_back(entry["command"]) for entry in rerun_commands("again", rows, "elsewhere")]
    assert len(found) >= len(LOADS) - 2  # names and threads are swept
    assert all(each["results_dir"] == ("elsewhere",) for each in found)
    swept = [record(0, steps=4), record(0, load=_load_of("threads"), steps=4)]
    (together,) = rerun_commands("again", swept)
    assert _read_back(together["command"])["threads"] == (2, 3)


def test_the_command_freezes_to_the_very_same_trials(tmp_path):
    """Every key of every trial comes back, with a LoRA on weights that lie elsewhere."""
    (tmp_path / "my weights").symlink_to(NANO_WEIGHTS)
    lora = tmp_path / "a, b.safetensors"
    save_file({"transformer.x_embedder.lora_A.weight": np.ones((1, 1), np.float32)}, lora)
    asked = [
        *("backend=eager", "backend.dtype=bf16", "threads=1", "prompts.limit=2"),
        f'model.path="{tmp_path}/my weights"',
        f"model.lora={lora}:0.8",
        *("steps=9", "cfg=3.25", "sampler=heun", "shift=1.2345678", "width=88", "height=48"),
        *("guidance=apg", "apg_eta=0.5", "apg_norm=7.5", "guidance_interval=0.1-0.7"),
        *("max_sequence_length=9", "negative_prompt=blurry", "seed=5"),
        *("output_format=webp", "output_quality=71"),
    ]
    trials = expand(freeze(compose(written(asked))).sweep).trials
    rows = [replace(record(0), trial=trial) for trial in trials]
    command = run_command(rows, "again")
    assert run_command(rows, "again") == command
    words = shlex.split(rerun_commands("again", rows)[0]["command"])[3:]
    for again in (shlex.split(command)[2:], words):
        made = expand(freeze(compose(written(again))).sweep).trials
        assert [t.key for t in made] == [t.key for t in trials]


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
