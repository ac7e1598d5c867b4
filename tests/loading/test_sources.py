"""Loading a diffusers folder, what is refused, and the proof of what was loaded."""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd35bench.architectures import PIPELINES
from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import (
    BackendError,
    OptimizationNotApplied,
)
from sd35bench.loading.sources import load_model
from sd35bench.types import Task
from tests.backends.bare import (
    IDENTICAL,
    bare_images,
    differs,
    make_inits,
)
from tests.backends.conftest import make_load
from tests.studies.tiny import SHIFT
from tests.studies.tiny_families import write_tiny


def test_in_force_is_true(eager: EagerBackend) -> None:
    proven = eager.in_force
    assert proven["dtype"] == "fp32"
    assert set(proven["component_dtypes"].values()) == {"fp32"}
    assert proven["device"] == str(eager._pipes[Task.TEXT_TO_IMAGE].device)
    assert proven["threads"] == torch.get_num_threads() == 1
    assert proven["attention"] == "JointAttnProcessor2_0"
    assert proven["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert proven["shift"] == SHIFT


def test_prove_dtypes_shows_the_part_of_t5_that_stays_in_fp32(tiny_path: Path) -> None:
    backend = EagerBackend(make_load(tiny_path, dtype="fp16"))
    assert backend.in_force["component_dtypes"]["text_encoder_3"] == "fp16+fp32"
    assert backend.in_force["component_dtypes"]["transformer"] == "fp16"
    backend.close()


def test_prove_refuses_a_layer_in_another_dtype(fresh: EagerBackend) -> None:
    pipe = fresh._pipes[Task.TEXT_TO_IMAGE]
    pipe.transformer.proj_out.to(torch.bfloat16)
    with pytest.raises(OptimizationNotApplied, match="dtype=fp32 asked, transformer"):
        fresh.prove(pipe)


def test_prove_refuses_another_thread_count(fresh: EagerBackend) -> None:
    try:
        torch.set_num_threads(2)
        with pytest.raises(OptimizationNotApplied, match="threads=1 asked, torch uses 2"):
            fresh.prove(fresh._pipes[Task.TEXT_TO_IMAGE])
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_eager_refuses_cuda_where_there_is_none(tiny_path: Path) -> None:
    with pytest.raises(OptimizationNotApplied, match=r"backend\.device=cuda.*backend\.device=cpu"):
        EagerBackend(make_load(tiny_path, device="cuda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, r"backend\.dtype='int4' is unknown; known: fp32, bf16, fp16"),
        ({"dtype": None}, r"backend\.dtype=None is unknown"),
        ({"device": "tpu"}, r"backend\.device='tpu' is unknown; known: auto, cpu, cuda"),
        ({"dtyp": "fp32"}, "has no option 'dtyp'; known: device, dtype"),
    ],
    ids=["dtype", "dtype-none", "device", "typo"],
)
def test_eager_refuses_unknown_options(
    tiny_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        EagerBackend(make_load(tiny_path, **options))


def remove_part(path: Path, part: str) -> None:
    target = path / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()


def remove_weight(path: Path, part: str) -> None:
    (weights_path,) = (path / part).glob("*.safetensors")
    weights = load_file(weights_path)
    del weights[sorted(weights)[3]]
    save_file(weights, weights_path, metadata={"format": "pt"})


def truncate_weights(path: Path, part: str) -> None:
    (weights_path,) = (path / part).glob("*.safetensors")
    weights_path.write_bytes(weights_path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("breaking", "message"),
    [
        (functools.partial(remove_part, part="model_index.json"), "no readable model_index.json"),
        (functools.partial(remove_part, part="vae"), "vae/ is missing"),
        (functools.partial(remove_part, part="tokenizer_2"), "tokenizer_2/ is missing"),
        (functools.partial(remove_weight, part="transformer"), "transformer lacks 1 weights"),
        (functools.partial(remove_weight, part="text_encoder"), "text_encoder lacks 1 weights"),
        (functools.partial(remove_weight, part="text_encoder_3"), "text_encoder_3 lacks 1"),
        (functools.partial(truncate_weights, part="transformer"), "cannot be loaded"),
    ],
    ids=["index", "vae", "tokenizer", "weight", "clip-weight", "t5-weight", "truncated-file"],
)
def test_load_refuses_an_incomplete_folder(
    tiny_path: Path, tmp_path: Path, breaking: Callable[[Path], None], message: str
) -> None:
    broken = shutil.copytree(tiny_path, tmp_path / "broken")
    load = make_load(broken)
    breaking(broken)
    with pytest.raises(BackendError, match=message) as caught:
        EagerBackend(load)
    assert "point model.path at a complete diffusers folder" in str(caught.value)


def test_load_takes_a_checkpoint_without_t5(tiny_path: Path, tmp_path: Path) -> None:
    without = shutil.copytree(tiny_path, tmp_path / "without-t5")
    index = json.loads((without / "model_index.json").read_text())
    t5 = {"text_encoder_3": None, "tokenizer_3": None}
    for part in t5:
        index[part] = [None, None]
        shutil.rmtree(without / part)
    (without / "model_index.json").write_text(json.dumps(index))
    backend = EagerBackend(make_load(without))
    requests = IDENTICAL["text-batch-3"]
    images = backend.generate(requests, make_inits(requests)).images
    backend.close()
    assert "text_encoder_3" not in backend.in_force["component_dtypes"]
    assert not differs(images, bare_images(without, requests, **t5))
    assert differs(images, bare_images(tiny_path, requests))


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
def test_load_takes_a_folder_with_weights_under_a_variants_name(
    tiny_path: Path, tmp_path: Path, variant: str
) -> None:
    """Sana's bf16 repository has no others."""
    renamed = shutil.copytree(tiny_path, tmp_path / variant)
    for part in ("transformer", "text_encoder"):
        (weights,) = (renamed / part).glob("*.safetensors")
        weights.rename(weights.with_name(f"{weights.stem}.{variant}.safetensors"))
    own, found = (load_model(make_load(p).model, torch.float32) for p in (tiny_path, renamed))
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        wanted = getattr(own, part).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in getattr(found, part).state_dict().items())


@pytest.mark.parametrize("family", ["sana", "pixart"])
def test_load_takes_other_families_and_refuses_what_they_lack(family: str, tmp_path: Path) -> None:
    path = write_tiny(family, tmp_path / family)
    spec = dataclasses.replace(make_load(path).model, family=family)
    pipe = load_model(spec, torch.float32)
    assert type(pipe).__name__ == PIPELINES[family]
    assert pipe.facts == {"weights": "checkpoint", "format": "diffusers folder", "revision": None}
    remove_weight(path, "text_encoder")
    with pytest.raises(BackendError, match="text_encoder lacks 1 weights"):
        load_model(spec, torch.float32)
    remove_part(path, "tokenizer")
    with pytest.raises(BackendError, match="tokenizer/ is missing"):
        load_model(spec, torch.float32)


def test_load_refuses_a_folder_of_another_family(tiny_path: Path) -> None:
    spec = dataclasses.replace(make_load(tiny_path).model, family="sana")
    with pytest.raises(BackendError, match=r"holds a StableDiffusion3Pipeline, this model is a S"):
        load_model(spec, torch.float32)


def test_facts_say_which_revision_was_loaded(tiny_path: Path) -> None:
    spec = dataclasses.replace(make_load(tiny_path).model, revision="abc123")
    assert load_model(spec, torch.float32).facts["revision"] == "abc123"


def test_load_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"model\.path=.*nowhere"):
        EagerBackend(make_load(tmp_path / "nowhere"))


class _Payload:
    """A pickle of this writes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def _as_pickle(folder: Path, marker: Path) -> None:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.unlink()
    torch.save({"x": _Payload(marker)}, folder / "transformer" / "diffusion_pytorch_model.bin")


def _as_own_code(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Transformer: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["evil", "Transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))


def _as_auto_map(folder: Path, marker: Path) -> None:
    (folder / "text_encoder" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModel": "evil.Encoder"}
    config["architectures"] = ["Encoder"]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("plant", [_as_pickle, _as_own_code, _as_auto_map])
def test_load_runs_no_code_of_a_model_folder(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_path, folder)
    plant(folder, marker)
    monkeypatch.chdir(folder)
    with contextlib.suppress(BackendError):
        load_model(make_load(folder).model, torch.float32)
    assert not marker.exists()


def test_mutant_that_trusts_a_pickle_runs_it(tiny_path: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(tiny_path, folder)
    _as_pickle(folder, marker)
    torch.load(folder / "transformer" / "diffusion_pytorch_model.bin", weights_only=False)
    assert marker.exists()
