"""Changed weights are the weights: a LoRA makes on every backend what a merged folder makes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sd35bench.backends.base import load_backend
from sd35bench.loading.checkpoint import path_digest
from sd35bench.loading.lora import merge_lora
from sd35bench.types import Change, Load
from tests.backends.conftest import make_load, make_request, untraced
from tests.studies.tiny import build_tiny_sd3

STRENGTH = 0.3
"""Of the factors: it moves the tiny model's images by tens of levels."""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Change, Path]:
    """A LoRA on every attention of the denoiser, and the folder with its product merged."""
    folder = tmp_path_factory.mktemp("changed")
    pipe, g = build_tiny_sd3(), torch.Generator().manual_seed(0)
    weights = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn.to_" in name:
            out, into = module.weight.shape
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, into, generator=g)
            weights[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2, generator=g)
    save_file({n: v * STRENGTH for n, v in weights.items()}, folder / "lora.safetensors")
    path = folder / "lora.safetensors"
    change = Change(kind="lora", path=str(path), digest=path_digest(path))
    merge_lora(pipe, change)
    pipe.save_pretrained(folder / "merged")
    return change, folder / "merged"


def image(load: Load) -> np.ndarray:
    with untraced():
        backend = load_backend(load)
        made = backend.generate([make_request(steps=2)], [None]).images[0]
    backend.close()
    return made.astype(int)


BACKENDS = {
    "eager": {},
    "compile": {"compiler": "aot_eager", "vae": False},
    "core": {"device": "cpu", "executor": "torch", "vae": "contiguous"},
    "int8": {},
}


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_merged_lora_is_the_same_model_on_every_backend(
    tiny_path: Path, changed: tuple[Change, Path], kind: str
) -> None:
    change, folder = changed
    base = make_load(tiny_path, kind, **BACKENDS[kind])
    model = replace(base.model, weights_digest="with a LoRA", changes=(change,))
    found = image(replace(base, model=model))
    assert np.array_equal(found, image(make_load(folder, kind, **BACKENDS[kind])))
    assert np.abs(found - image(base)).mean() > 2  # without the LoRA


@pytest.mark.slow
def test_an_exported_graph_has_the_merged_weights(
    tiny_path: Path, changed: tuple[Change, Path]
) -> None:
    change, folder = changed
    base = make_load(tiny_path, "onnx", device="cpu")
    model = replace(base.model, weights_digest="with a LoRA", changes=(change,))
    found = image(replace(base, model=model))
    assert np.abs(found - image(make_load(folder, "eager"))).max() <= 1
    assert np.abs(found - image(make_load(tiny_path, "eager"))).mean() > 2
