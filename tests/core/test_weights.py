"""Both layouts fuse to the same weights, each finds its place, and a step is diffusers'."""

from pathlib import Path

import pytest
import torch

from sd35bench.core.model import Config, Embedder, TorchExecutor, Weights, modulation_names
from sd35bench.core.weights import (
    config_of_diffusers,
    config_of_stability,
    fuse,
    read_file,
    stability_layout,
)
from sd35bench.loading.checkpoint import LAYOUT
from tests.original_layout import write_original
from tests.studies.tiny import build_tiny_sd3

STEP = 5e-6
"""One step's rounding: outputs are of the order of 5, float32's epsilon is 1.2e-7."""


@pytest.fixture(scope="module")
def transformer():
    return build_tiny_sd3().transformer


@pytest.fixture
def fused(transformer) -> tuple[Config, Weights]:
    config = config_of_diffusers(transformer.config)
    return config, fuse(config, dict(transformer.state_dict()), torch.float32)


def test_both_layouts_fuse_to_the_same(fused: tuple[Config, Weights], tmp_path: Path) -> None:
    path = write_original(build_tiny_sd3(), tmp_path / "tiny.safetensors")
    weights = read_file(path, LAYOUT["transformer"])
    config = config_of_stability(weights)
    assert config == fused[0]
    other = fuse(config, weights, torch.float32, stability_layout)
    assert set(other) == set(fused[1])
    assert all(torch.equal(other[name], value) for name, value in fused[1].items())


@pytest.mark.parametrize("skip", [(), (1,), (0, 2)], ids=str)
def test_a_step_is_diffusers(transformer, fused: tuple[Config, Weights], skip) -> None:
    config, weights = fused
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 8, 4, generator=g)
    text = torch.randn(2, 10, config.context_width, generator=g)
    pooled = torch.randn(2, config.pooled_width, generator=g)
    times = torch.tensor([700.0, 30.0])
    given = Embedder(config, weights, torch.float32).condition(text, pooled, times, (8, 4))
    executor = TorchExecutor(config, weights)
    for e, time in enumerate(times):
        made = executor.step(latents, given.context, given.table[e], given.position, skip)
        with torch.inference_mode():
            true = transformer(
                latents, text, pooled, time.expand(2), return_dict=False, skip_layers=list(skip)
            )[0]
        assert float((made - true).abs().max()) <= STEP


def test_modulations_are_named_in_their_order(fused: tuple[Config, Weights]) -> None:
    config, weights = fused
    names = modulation_names(config)
    assert len(weights["modulation.bias"]) == len(names) * config.width
    assert names[6:9] == [f"blocks.0.image.dual_{kind}" for kind in ("shift", "scale", "gate")]
    assert names[-4:-2] == ["blocks.2.text.shift", "blocks.2.text.scale"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("proj_out.bias"), "lacks weights, first proj_out.bias"),
        (lambda w: w.update(stray=torch.zeros(1)), "without a place, first stray"),
    ],
    ids=["too-few", "too-many"],
)
def test_weights_too_few_or_too_many_are_refused(transformer, change, said: str) -> None:
    weights = dict(transformer.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=said):
        fuse(config_of_diffusers(transformer.config), weights, torch.float32)
