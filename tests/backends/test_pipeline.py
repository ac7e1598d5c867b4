"""What every diffusers-based backend shares: refusals, typed errors, stages and counts."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import (
    BackendError,
    InvalidImage,
    OutOfMemory,
    UnsupportedRequest,
)
from sd35bench.types import Request, SkipLayerGuidance, Task
from tests.backends.bare import (
    I2I,
    SKIPPING,
    make_init,
    make_inits,
)
from tests.backends.conftest import make_load, make_request
from tests.studies.tiny import LAYERS, TOKENS

LONG_PROMPT = "much longer than the tokens allow"  # 29 letters and the two ends: 7 too many


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ddim"}, "sampler='ddim': backend eager has euler, heun, dpmpp_2m, unipc"),
        ({"width": 40}, "width=40: this model makes multiples of 16 up to 128 px"),
        ({"height": 144}, "height=144"),
        ({"skip_layer_guidance": SKIPPING, **I2I}, "only in text-to-image"),
        ({"skip_layer_guidance": SKIPPING, "cfg": 1.0}, "acts only with cfg > 1"),
        (
            {"skip_layer_guidance": SkipLayerGuidance(layers=(3,), scale=1.0, start=0.0, stop=1.0)},
            f"this model has 0 to {LAYERS - 1}",
        ),
        ({"init_image": "digest"}, "needs prompt_strength"),
        ({"max_sequence_length": 600}, "diffusers refused.*max_sequence_length"),
    ],
    ids=["sampler", "width", "height", "skip-image", "skip-cfg", "skip-layer", "strength", "t5"],
)
def test_eager_refuses_what_it_cannot_do(
    eager: EagerBackend, changes: dict[str, Any], message: str
) -> None:
    requests = [make_request(**changes)]
    with pytest.raises(UnsupportedRequest, match=message):
        eager.generate(requests, make_inits(requests))


@pytest.mark.parametrize(
    ("requests", "inits"),
    [
        ([make_request(), make_request(cfg=3.0)], [None, None]),
        ([make_request(**I2I)], [None]),
        ([make_request()], [make_init(0)]),
    ],
    ids=["two-settings", "no-pixels", "stray-pixels"],
)
def test_eager_refuses_a_malformed_batch(
    eager: EagerBackend, requests: list[Request], inits: list[np.ndarray | None]
) -> None:
    with pytest.raises(UnsupportedRequest):
        eager.generate(requests, inits)


def poison_denoiser(pipe: Any, value: float) -> None:
    torch.nn.init.constant_(pipe.transformer.proj_out.bias, value)


def poison_decoder(pipe: Any, value: float) -> None:
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    ("poison", "message"),
    [(poison_denoiser, "latents after the last step"), (poison_decoder, "decoded pixels")],
    ids=["denoiser", "decoder"],
)
def test_eager_sees_numbers_that_uint8_would_hide(
    fresh: EagerBackend, poison: Callable[[Any, float], None], message: str, value: float
) -> None:
    poison(fresh._pipes[Task.TEXT_TO_IMAGE], value)
    with pytest.raises(InvalidImage, match=message):
        fresh.generate([make_request()], [None])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (MemoryError(), OutOfMemory),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), BackendError),
        (AttributeError("a bug"), AttributeError),
    ],
    ids=["cuda", "cpu", "python", "torch", "bug"],
)
def test_eager_types_foreign_errors(
    fresh: EagerBackend,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[Exception],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fresh._pipes[Task.TEXT_TO_IMAGE].vae, "decode", fail)
    with pytest.raises(expected) as caught:
        fresh.generate([make_request()], [None])
    assert type(caught.value) is expected


@pytest.mark.parametrize("changes", [{}, I2I], ids=["text", "image"])
def test_stages_account_for_the_call(eager: EagerBackend, changes: dict[str, Any]) -> None:
    requests = [make_request(steps=10, **changes)]
    shares = []
    for _ in range(3):  # the best of three: another process may take the core meanwhile
        start_s = time.perf_counter()
        made = eager.generate(requests, make_inits(requests))
        total_s = time.perf_counter() - start_s
        assert made.text_s is not None
        assert made.denoise_s is not None
        assert made.decode_s is not None
        assert min(made.text_s, made.decode_s, *made.step_s) > 0
        assert made.denoise_s == pytest.approx(sum(made.step_s))
        shares.append((made.text_s + made.denoise_s + made.decode_s) / total_s)
        assert shares[-1] <= 1
    assert max(shares) >= 0.7  # 0.9 seen on this toy; encoding the init image is in no stage


@pytest.mark.parametrize(
    ("changes", "steps", "evaluations"),
    [
        ({}, 10, 10),
        ({"cfg": 1.0}, 10, 10),
        ({"skip_layer_guidance": SKIPPING}, 10, 15),  # steps 1 to 5 are called twice
        (I2I, 6, 6),
    ],
    ids=["guided", "unguided", "skip-layers", "image"],
)
def test_evaluations_count_every_denoiser_call(
    eager: EagerBackend, changes: dict[str, Any], steps: int, evaluations: int
) -> None:
    requests = [make_request(steps=10, **changes)]
    made = eager.generate(requests, make_inits(requests))
    assert (made.effective_steps, made.evaluations) == (steps, evaluations)


def test_truncated_tokens_are_counted_and_the_warnings_dropped(
    eager: EagerBackend, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.WARNING):
        made = eager.generate(
            [make_request(prompt=LONG_PROMPT), make_request(prompt="short")], [None, None]
        )
    letters = len(LONG_PROMPT.replace(" ", ""))
    t5 = len(eager.family.pipe.tokenizer_3(LONG_PROMPT).input_ids)
    assert made.truncated_tokens == (max(letters + 2, t5) - TOKENS, 0)
    assert not [r for r in caplog.records if "truncated" in r.getMessage()]


def test_tokens_that_t5_alone_cuts_are_counted(eager: EagerBackend) -> None:
    """Mutant: CLIP's tokenizers alone, which read all of it."""
    prompt = "a b c d e"
    made = eager.generate([make_request(prompt=prompt, max_sequence_length=4)], [None])
    pipe = eager.family.pipe
    read = [len(t(prompt).input_ids) for t in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3)]
    assert max(read[:2]) <= TOKENS
    assert made.truncated_tokens == (read[2] - 4,)
    assert read[2] > 4


def test_closed_backend_refuses_and_gives_the_modules_back(tiny_path: Path) -> None:
    backend = EagerBackend(make_load(tiny_path))
    pipe = backend._pipes[Task.TEXT_TO_IMAGE]
    assert "forward" in vars(pipe.transformer)
    backend.close()
    assert "forward" not in vars(pipe.transformer)
    with pytest.raises(BackendError, match="closed"):
        backend.generate([make_request()], [None])
