"""The eager backend against bare diffusers calls, with mutants that must not match."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sd35bench.backends import pipeline
from sd35bench.backends.eager import EagerBackend
from sd35bench.loading.sources import DTYPES
from sd35bench.nano.prompts import init_image, prompt_set
from sd35bench.nano.world import ASPECT_RATIOS
from sd35bench.types import Request, Task
from tests.backends.bare import (
    I2I,
    IDENTICAL,
    bare_images,
    differs,
    make_inits,
)
from tests.backends.conftest import NANO, make_load, make_request


@pytest.mark.parametrize("requests", IDENTICAL.values(), ids=IDENTICAL.keys())
def test_eager_is_bit_identical_to_bare_diffusers(
    eager: EagerBackend, tiny_path: Path, requests: list[Request]
) -> None:
    images = eager.generate(requests, make_inits(requests)).images
    assert not differs(images, bare_images(tiny_path, requests))


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("bf16", "text-batch-3"),
        ("fp16", "image-batch-2"),
        pytest.param("fp16", "text-batch-3", marks=pytest.mark.slow),
        pytest.param("bf16", "image-batch-2", marks=pytest.mark.slow),
    ],
)
def test_eager_is_bit_identical_in_half_precision(tiny_path: Path, dtype: str, kind: str) -> None:
    requests = IDENTICAL[kind]
    backend = EagerBackend(make_load(tiny_path, dtype=dtype))
    images = backend.generate(requests, make_inits(requests)).images
    backend.close()
    wanted = bare_images(tiny_path, requests, dtype=DTYPES[dtype])
    assert not differs(images, wanted)


@pytest.mark.skipif(not (NANO / "model_index.json").exists(), reason="nano's weights are not here")
@pytest.mark.parametrize("changes", [{}, I2I], ids=["text", "image"])
def test_eager_is_bit_identical_on_nano(nano: EagerBackend, changes: dict[str, Any]) -> None:
    requests = [
        make_request(seed=s, steps=3, height=64, max_sequence_length=16, **changes)
        for s in range(2)
    ]
    images = nano.generate(requests, make_inits(requests)).images
    assert not differs(images, bare_images(NANO, requests))


def nano_is_trained() -> bool:
    """Whether the denoiser has left its start at zero."""
    (weights_path,) = (NANO / "transformer").glob("*.safetensors")
    with safe_open(weights_path, "pt") as weights:
        return bool(weights.get_tensor("proj_out.weight").any())


def test_nano_keeps_the_init_image_at_low_strength(nano: EagerBackend) -> None:
    if not nano_is_trained():
        pytest.skip("nano is not trained yet: its denoiser is still at zero")
    item = prompt_set("heldout", "edit", limit=1)[0]
    init = init_image(item)
    kept = []
    for strength in (0.2, 0.6, 1.0):
        request = make_request(
            prompt=item.prompt,
            width=item.width,
            height=item.height,
            steps=5,
            init_image="digest",
            prompt_strength=strength,
        )
        made = nano.generate([request], [init]).images[0]
        kept.append(np.abs(made.astype(int) - init).mean())
    assert kept == sorted(kept)
    assert kept[0] < 16  # 8-bit levels, the autoencoder's own error included


@pytest.fixture(scope="module")
def nano() -> Iterator[EagerBackend]:
    backend = EagerBackend(make_load(NANO, tokens=16))
    yield backend
    backend.close()


@pytest.mark.parametrize("changes", [{}, I2I], ids=["text", "image"])
def test_nano_makes_every_documented_aspect_ratio(
    nano: EagerBackend, changes: dict[str, Any]
) -> None:
    sizes = list(ASPECT_RATIOS.values())
    for width, height in sizes[::5] if changes else sizes:  # the image's own part is its encoding
        size = {"width": width, "height": height}
        request = make_request(**size, steps=1, cfg=1.0, **changes)
        made = nano.generate([request], make_inits([request]))
        assert made.images[0].shape == (height, width, 3)
        assert made.images[0].std() > 1, size


def one_seed_for_the_batch(backend: EagerBackend, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "generator", lambda _: torch.Generator().manual_seed(7))


def guidance_from_the_wrong_end(backend: EagerBackend, patch: pytest.MonkeyPatch) -> None:
    # text + s (text - uncond) is uncond + (s + 1)(text - uncond).
    for pipe in backend._pipes.values():
        patch.setattr(type(pipe), "guidance_scale", property(lambda self: self._guidance_scale + 1))


def shift_one(backend: EagerBackend, patch: pytest.MonkeyPatch) -> None:
    own = backend.family.own_scheduler
    backend._schedulers["euler", None] = type(own).from_config(own.config, shift=1.0)


def no_scaling_factor(backend: EagerBackend, patch: pytest.MonkeyPatch) -> None:
    backend._pipes[Task.TEXT_TO_IMAGE].vae.register_to_config(scaling_factor=1.0)


def swapped_text_encoders(backend: EagerBackend, patch: pytest.MonkeyPatch) -> None:
    for pipe in backend._pipes.values():
        pipe.text_encoder, pipe.text_encoder_2 = pipe.text_encoder_2, pipe.text_encoder


MUTANTS = [
    one_seed_for_the_batch,
    guidance_from_the_wrong_end,
    shift_one,
    no_scaling_factor,
    swapped_text_encoders,
]


@pytest.mark.parametrize("kind", ["text-batch-3", "image-batch-2"])
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_eager_mutants_are_not_identical(
    fresh: EagerBackend,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[EagerBackend, pytest.MonkeyPatch], None],
    kind: str,
) -> None:
    requests = IDENTICAL[kind]
    wanted = bare_images(tiny_path, requests)
    mutate(fresh, monkeypatch)
    assert differs(fresh.generate(requests, make_inits(requests)).images, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 2, 3), (1, 16, 128, 96)], ids=str)
def test_torch_draws_half_noise_as_rounded_float32(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    half = torch.randn(shape, generator=pipeline.generator(5), dtype=dtype)
    full = torch.randn(shape, generator=pipeline.generator(5))
    assert torch.equal(half, full.to(dtype))


def test_eager_uses_the_models_sequence_length_by_default(
    tiny_path: Path, eager: EagerBackend
) -> None:
    short = EagerBackend(make_load(tiny_path, tokens=8))
    request = make_request()
    default = short.generate([request], [None]).images
    short.close()
    asked = eager.generate([make_request(max_sequence_length=8)], [None]).images
    assert not differs(default, asked)
    assert differs(default, eager.generate([request], [None]).images)


def test_a_shift_does_not_outlast_its_request(eager: EagerBackend) -> None:
    before = eager.generate([make_request()], [None]).images
    shifted = eager.generate([make_request(shift=1.0)], [None]).images
    assert differs(before, shifted)
    assert not differs(before, eager.generate([make_request()], [None]).images)


@pytest.mark.gpu
def test_eager_on_cuda_starts_from_the_cpus_noise(tiny_path: Path, eager: EagerBackend) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    backend = EagerBackend(make_load(tiny_path, device="cuda"))
    backend.synchronize()
    start_s = time.perf_counter()
    made = backend.generate([make_request()], [None])
    backend.synchronize()
    total_s = time.perf_counter() - start_s
    assert made.text_s is not None
    assert made.denoise_s is not None
    assert made.decode_s is not None
    assert 0 < made.text_s + made.denoise_s + made.decode_s <= total_s
    assert backend.in_force["device"] == "cuda:0"
    on_cpu = EagerBackend(make_load(tiny_path, device="cpu")).generate([make_request()], [None])
    distance = np.abs(made.images[0].astype(int) - on_cpu.images[0]).mean()
    assert distance < 2  # another noise would be tens of levels away
    backend.close()
