"""What is put on top of a model: found, named by digest, in the key, or refused before loading."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sd35bench.analysis.commands import load_overrides
from sd35bench.config import compose
from sd35bench.config.model_weights import ON_TOP, model_notes, model_spec, notes_of
from sd35bench.config.models import ModelConf, read
from sd35bench.config.overrides import check_overrides, parse, written
from sd35bench.config.unread import refuse_unread
from sd35bench.errors import ConfigError
from sd35bench.loading.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.types import BackendSpec, Load, ModelSpec, from_json, to_json


@pytest.fixture(scope="module")
def nano() -> ModelConf:
    return read(ModelConf, compose(["model=nano"]).model)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for i, name in enumerate("ab"):
        pair = {"x.lora_A.weight": torch.full((1,), float(i)), "x.lora_B.weight": torch.ones(1)}
        save_file(pair, folder / f"{name}.safetensors")
    save_file({"decoder.conv_in.weight": torch.ones(1)}, folder / "vae.safetensors")
    save_file({"joint_blocks.0.x": torch.ones(1)}, folder / "mmdit.safetensors")
    fp8 = {"joint_blocks.0.x": torch.ones(1).to(torch.float8_e4m3fn)}
    save_file(fp8, folder / "fp8.safetensors")
    return folder


def spec(nano: ModelConf, **fields: Any) -> ModelSpec:
    return model_spec(nano.model_copy(update=fields))


def key(model: ModelSpec) -> str:
    return Load(model=model, backend=BackendSpec(name="eager", kind="eager"), threads=1).key


def test_nothing_on_top_leaves_the_digest_that_it_was(nano: ModelConf) -> None:
    own = spec(nano)
    assert own.weights_digest == weights_digest(NANO_WEIGHTS)
    assert (own.changes, own.variant) == ((), None)
    assert from_json(ModelSpec, {k: v for k, v in to_json(own).items() if k != "changes"}) == own


def test_every_change_is_in_the_key_and_in_the_record(nano: ModelConf, files: Path) -> None:
    a, b = files / "a.safetensors", files / "b.safetensors"
    asked = [
        {},
        {"lora": f"{a}"},
        {"lora": f"{a}:0.5"},
        {"lora": f"{b}"},
        {"lora": f"{a},{b}:0.5"},
        {"transformer": f"{files / 'mmdit.safetensors'}"},
        {"vae": f"{files / 'vae.safetensors'}"},
        {"vae": f"{NANO_WEIGHTS}"},
    ]
    specs = [spec(nano, **fields) for fields in asked]
    assert len({key(each) for each in specs}) == len(asked)
    assert specs[1].changes[0].weight == 1.0
    assert specs[7].changes[0].path == str(NANO_WEIGHTS / "vae")
    assert from_json(ModelSpec, to_json(specs[4])) == specs[4]


def test_the_order_of_loras_and_a_weight_of_one_are_no_other_model(
    nano: ModelConf, files: Path
) -> None:
    a, b = files / "a.safetensors", files / "b.safetensors"
    assert key(spec(nano, lora=f"{a}:1.0,{b}")) == key(spec(nano, lora=f"{b}, {a}"))


def test_a_change_is_named_by_content_and_not_by_place(nano: ModelConf, files: Path) -> None:
    copy = files / "elsewhere,0.safetensors"  # a comma of its own: one file, not two
    copy.write_bytes((files / "a.safetensors").read_bytes())
    assert key(spec(nano, lora=f"{copy}")) == key(spec(nano, lora=f"{files / 'a.safetensors'}"))


def test_pefts_settings_beside_a_file_are_in_the_digest(
    nano: ModelConf, files: Path, tmp_path: Path
) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes((files / "a.safetensors").read_bytes())
    before = spec(nano, lora=f"{tmp_path}")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 4}')
    assert key(spec(nano, lora=f"{tmp_path}")) != key(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": "gone.safetensors"}, r"model\.lora=gone\.safetensors: no such file"),
        ({"lora": "{files}/a.safetensors:0"}, "must be a number from -100 to 100 and not 0"),
        ({"lora": "{files}/a.safetensors:much"}, "must be a number from -100 to 100"),
        ({"lora": "{files}/mmdit.safetensors"}, r"no LoRA in it.*goes to model\.transformer="),
        ({"lora": "{files}"}, "none of pytorch_lora_weights.safetensors, adapter_model"),
        ({"transformer": "{files}"}, "no config.json there"),
        ({"transformer": "gone"}, r"model\.transformer=gone: no such file or folder"),
        ({"vae": "{files}/../own.gguf"}, r"must be a folder, or a file of \.safetensors, \.bin"),
        ({"variant": "fp16"}, r"model\.variant=fp16: no part of"),
        ({"lora": "{files}/a.safetensors", "weights": "random"}, "weights=random reads no"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(
    nano: ModelConf, files: Path, fields: dict[str, str], message: str
) -> None:
    (files.parent / "own.gguf").write_bytes(b"GGUF")
    asked = {name: text.replace("{files}", str(files)) for name, text in fields.items()}
    with pytest.raises(ConfigError, match=message):
        spec(nano, **asked)


def test_gguf_without_its_package_is_refused_with_the_remedy(
    nano: ModelConf, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gguf.*is not installed; pip install 'gguf"):
        spec(nano, transformer=f"{tmp_path / 'own.gguf'}")


def test_the_plan_says_what_becomes_of_the_weights(nano: ModelConf, files: Path) -> None:
    own = spec(
        nano, lora=f"{files / 'a.safetensors'}:0.8", transformer=f"{files / 'fp8.safetensors'}"
    )
    notes = "\n".join(notes_of(own))
    assert "merged into the weights at load, times 0.8" in notes
    assert "in the place of the model's own transformer" in notes
    assert "model.transformer: 1 fp8 tensors are dequantised on load" in notes


def test_a_backend_without_weights_refuses_or_says_that_nothing_is_changed(
    nano: ModelConf, files: Path
) -> None:
    lora = f"model.lora={files / 'a.safetensors'}"
    with pytest.raises(ConfigError, match="no backend of this run reads weights"):
        refuse_unread([lora], [compose(["model=nano", "backend=fake"])])
    asked = nano.model_copy(update=dict.fromkeys(ON_TOP, "x"))
    said = model_notes(asked, needs_weights=False)
    assert {f"model.{name} has no effect: this backend reads no weights" for name in ON_TOP} <= {
        *said
    }


def test_commas_between_lora_files_are_one_value(files: Path) -> None:
    text = f"model.lora={files}/a.safetensors:0.5,{files}/b.safetensors"
    check_overrides([text], multirun=False)
    (override,) = written([text])
    assert not parse(override).is_sweep_override()
    assert compose(["model=nano", override]).model.lora == text.partition("=")[2]


def test_the_command_that_repeats_a_run_names_every_change(nano: ModelConf, files: Path) -> None:
    own = spec(nano, lora=f"{files}/a.safetensors:0.5,{files}/b.safetensors", vae=f"{NANO_WEIGHTS}")
    load = Load(model=own, backend=BackendSpec(name="eager", kind="eager"), threads=1)
    said = (f"{n}={text}" for n, text in load_overrides(load).items() if n.startswith("model."))
    words = shlex.split(shlex.join(said))
    again = compose(["model=nano", *written(words)]).model
    assert model_spec(read(ModelConf, again)) == own
