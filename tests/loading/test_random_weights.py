"""Models of noise: true shapes, seeded, finite at every dtype, made without a second copy."""

import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from sd35bench.architectures import (
    architecture_names,
    random_digest,
    random_parts,
    random_suffix,
    read_architecture,
)
from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import ConfigError, OutOfMemory
from sd35bench.loading import random_weights
from sd35bench.loading.empty import build_empty, restore_buffers
from sd35bench.loading.random_weights import BLOCK, EncodedText, NoiseText, fill, size_bytes
from sd35bench.loading.sources import load_model, prove_device, prove_dtypes
from sd35bench.types import BackendSpec, Load, ModelSpec
from tests.backends.bare import differs
from tests.backends.conftest import make_request
from tests.studies.tiny import build_tiny_sd3

CPU = torch.device("cpu")
NANO_TOKENS = 16


def random_spec(name: str = "nano", layers: int | None = None, encoders: bool = False) -> ModelSpec:
    return ModelSpec(
        name=name + random_suffix(layers, encoders),
        path="",
        weights="random",
        layers=layers,
        text_encoders=encoders,
        weights_digest=random_digest(random_parts(name, layers), encoders),
        max_sequence_length=NANO_TOKENS,
    )


def make_backend(spec: ModelSpec, **options: Any) -> EagerBackend:
    backend = BackendSpec(name="eager", kind="eager", options=options)
    return EagerBackend(Load(model=spec, backend=backend, threads=1))


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("model", "part", "count"),
    [
        ("sd35-medium", "transformer", 2243),
        ("sd35-medium", "text_encoder", 124),
        ("sd35-medium", "text_encoder_2", 695),
        ("sd35-medium", "text_encoder_3", 4762),
        ("sd35-large", "transformer", 8057),
        ("sd35-large-turbo", "transformer", 8057),
    ],
)
def test_architecture_has_the_published_number_of_parameters(
    model: str, part: str, count: int
) -> None:
    assert round(millions(build_empty(read_architecture(model)[part]))) == count


def test_architecture_of_the_vae_has_the_published_decoder() -> None:
    vae: Any = build_empty(read_architecture("sd35-medium")["vae"])
    assert round(millions(vae.decoder), 1) == 49.5
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)


def test_architecture_names_are_those_with_shapes() -> None:
    assert architecture_names() == ["nano", "sd35-large", "sd35-large-turbo", "sd35-medium"]
    with pytest.raises(ConfigError, match="model=sana: its shapes are not packaged"):
        read_architecture("sana")


def test_random_parts_cut_the_layers_and_their_dual_attention() -> None:
    whole, cut = random_parts("sd35-medium", None), random_parts("sd35-medium", 3)
    assert whole["transformer"]["dual_attention_layers"] == list(range(13))
    assert cut["transformer"]["dual_attention_layers"] == [0, 1, 2]
    changed = {"num_layers": 3, "dual_attention_layers": [0, 1, 2]}
    assert cut["transformer"] == {**whole["transformer"], **changed}
    assert cut["vae"] == whole["vae"]


@pytest.mark.parametrize("layers", [0, 25, -1])
def test_random_parts_refuse_layers_that_the_model_has_not(layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.layers={layers}: sd35-medium has 24"):
        random_parts("sd35-medium", layers)


def test_random_digest_tells_every_random_model_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts("sd35-medium", None)
    digests = {
        random_digest(parts, False),
        random_digest(parts, True),
        random_digest(random_parts("sd35-medium", 8), False),
        random_digest(random_parts("sd35-large", None), False),
    }
    monkeypatch.setattr("sd35bench.architectures.FILLER_VERSION", 2)
    digests.add(random_digest(parts, False))
    monkeypatch.setattr("sd35bench.architectures.SEED", 1)
    digests.add(random_digest(parts, False))
    assert len(digests) == 6


def filled(module: nn.Module, dtype: torch.dtype = torch.float32, part: str = "x") -> nn.Module:
    fill(module, part, dtype, CPU)
    return module


def empty_linear(inputs: int = 64, outputs: int = 48) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Embedding(9, 99))


def test_fill_is_seeded_by_part_and_name() -> None:
    one, same, other = (
        filled(empty_linear()),
        filled(empty_linear()),
        filled(empty_linear(), part="y"),
    )
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    assert not torch.equal(one[0].weight.flatten()[:48], one[0].bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fill_draws_the_same_values_at_every_dtype(dtype: torch.dtype) -> None:
    exact, rounded = filled(empty_linear()).state_dict(), filled(empty_linear(), dtype).state_dict()
    assert all(torch.equal(value.to(dtype), rounded[name]) for name, value in exact.items())


def test_fill_scales_by_what_a_parameter_does() -> None:
    module = filled(empty_linear(400, 300))
    assert float(module[0].weight.detach().std()) == pytest.approx(400**-0.5, rel=0.02)
    assert float(module[0].bias.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert float(module[1].weight.detach().mean()) == pytest.approx(1, abs=0.02)
    assert float(module[2].weight.detach().std()) == pytest.approx(1, rel=0.1)
    assert all((p != 0).all() for p in module.parameters())


def test_fill_leaves_no_two_rows_of_a_large_matrix_alike() -> None:
    """A block of 2**20 values would repeat the rows of a power-of-two matrix, and lose its rank."""
    with torch.device("meta"):
        module = nn.Linear(1024, 2100, bias=False)
    weight = filled(module).weight
    assert weight.numel() > 2 * BLOCK
    assert len(torch.unique(weight[:, :4], dim=0)) == len(weight)
    assert all(BLOCK % n for n in range(2, int(BLOCK**0.5) + 1))


def test_restore_buffers_makes_diffusers_own_position_table() -> None:
    sizes = {"height": 24, "width": 24, "patch_size": 2, "embed_dim": 16, "pos_embed_max_size": 10}
    own = PatchEmbed(**sizes)
    with torch.device("meta"):
        module = PatchEmbed(**sizes)
    restore_buffers(module, torch.float32, CPU)
    assert torch.equal(module.pos_embed, own.pos_embed)
    assert list(module.state_dict()) == list(own.state_dict())


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],  # fp16 overflows first
    ids=str,
)
def test_transformer_of_true_width_stays_near_one(dtype: torch.dtype) -> None:
    """One layer of SD3.5-Medium's width; a small position table keeps the test small."""
    config = {**random_parts("sd35-medium", 1)["transformer"], "pos_embed_max_size": 8}
    model: Any = filled(build_empty(config), dtype, "transformer")
    text = NoiseText(random_parts("sd35-medium", 1), dtype)
    embeds, pooled = text.encode(["a", "b"], 16)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        output = model(
            latents,
            timestep=torch.tensor([500.0, 500.0]).to(dtype),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
    assert output.shape == latents.shape
    assert 0.1 < float(output.float().std()) < 10
    assert not torch.allclose(output[0], output[1], atol=1e-2)


def test_noise_text_is_shaped_and_seeded_by_the_prompt() -> None:
    text = NoiseText(random_parts("sd35-medium", None), torch.bfloat16)
    embeds, pooled = text.encode(["a cat", "a dog", "a cat"], 256)
    assert embeds.shape == (3, 77 + 256, 4096)
    assert pooled.shape == (3, 2048)
    assert embeds.dtype is pooled.dtype is torch.bfloat16
    assert torch.equal(embeds[0], embeds[2])
    assert torch.equal(pooled[0], pooled[2])
    assert not torch.equal(embeds[0], embeds[1])
    alone, _ = text.encode(["a dog"], 256)
    assert torch.equal(alone[0], embeds[1])
    clip, padding = embeds[0, :77, :2048], embeds[0, :77, 2048:]
    assert float(clip.float().std()) == pytest.approx(1, rel=0.05)
    assert not padding.any()  # as diffusers pads CLIP to T5's width
    assert float(embeds[0, 77:].float().std()) == pytest.approx(0.1, rel=0.05)


def test_encoded_text_embeds_ids_as_diffusers_does() -> None:
    pipe = build_tiny_sd3()
    prompts = ["red circle", "blue square"]
    with torch.no_grad():
        own, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=12
        )

    def ids(tokenizer: Any, length: int) -> torch.Tensor:
        settings = {"padding": "max_length", "max_length": length, "truncation": True}
        return tokenizer(prompts, return_tensors="pt", **settings).input_ids

    limit = pipe.tokenizer_max_length
    text = EncodedText([pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3])
    clip_ids = [ids(pipe.tokenizer, limit), ids(pipe.tokenizer_2, limit)]
    found, found_pooled = text.embed_ids(clip_ids, ids(pipe.tokenizer_3, 12))
    assert torch.equal(found, own)
    assert torch.equal(found_pooled, pooled)


@pytest.mark.parametrize("encoders", [False, True], ids=["embeddings", "encoders"])
def test_random_nano_makes_images_that_depend_on_prompt_and_seed(encoders: bool) -> None:
    backend = make_backend(random_spec(encoders=encoders))
    requests = [
        make_request(steps=2),
        make_request(steps=2, prompt="blue square"),
        make_request(steps=2, seed=1),
        make_request(steps=2),
    ]
    images = backend.generate(requests, [None] * 4).images
    assert not differs(images[:1], images[3:])
    assert differs(images[:1], images[1:2])
    assert differs(images[:1], images[2:3])
    proven = backend.in_force
    assert proven["weights"] == "random"
    assert proven["text"] == ("random encoders" if encoders else "random embeddings")
    assert ("text_encoder_3" in proven["component_dtypes"]) is encoders
    backend.close()


def test_random_nano_of_fewer_layers_is_another_model() -> None:
    images = []
    for layers in (None, 2):
        backend = make_backend(random_spec(layers=layers))
        images.append(backend.generate([make_request(steps=1)], [None]).images)
        assert backend.in_force["layers"] == (6 if layers is None else layers)
        backend.close()
    assert differs(*images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_random_model_is_what_was_asked_for(dtype: torch.dtype) -> None:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    pipe = load_model(random_spec(encoders=True), dtype)
    proven = prove_dtypes(pipe, names[dtype])
    kept = "fp16+fp32" if dtype is torch.float16 else names[dtype]
    assert proven["text_encoder_3"] == kept
    assert prove_device(pipe, CPU) == "cpu"
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder_3):
        held = sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
        assert size_bytes(module, dtype) == held


def test_random_model_that_cannot_fit_is_refused_before_it_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def free() -> Any:
        return type("Memory", (), {"available": 4_000_000_000})

    monkeypatch.setattr(psutil, "virtual_memory", free)
    monkeypatch.setattr(random_weights, "fill", lambda *_: pytest.fail("allocated"))
    with pytest.raises(OutOfMemory, match=r"needs 5\.\d GB .*backend\.dtype=bf16.*model\.layers=N"):
        load_model(random_spec("sd35-medium"), torch.bfloat16)


MEASURE = r"""
import re, torch
from pathlib import Path
from sd35bench.loading.sources import load_model
from tests.backends.test_random_weights import random_spec

def peak_bytes():
    # getrusage would give a child its parent's peak at the fork.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

load_model(random_spec(), torch.bfloat16)
before = peak_bytes()
pipe = load_model(random_spec("sd35-medium", 8), torch.bfloat16)
tensors = [t for m in (pipe.transformer, pipe.vae) for t in (*m.parameters(), *m.buffers())]
print((peak_bytes() - before) / sum(t.numel() * t.element_size() for t in tensors))
"""


@pytest.mark.slow
def test_random_model_is_made_without_a_second_copy() -> None:
    """8 layers of SD3.5-Medium's width in bf16 are 2 GB; fp32 on the way would be 4 more."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, check=True, text=True
    )
    assert 0.9 < float(done.stdout) < 1.1
