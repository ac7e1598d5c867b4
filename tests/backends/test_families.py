"""Sana and PixArt through the same backend, bit-identical to bare diffusers, and their refusals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.families import FAMILIES, family_of
from sd35bench.errors import BackendError, UnsupportedRequest
from sd35bench.loading.sources import DTYPES
from sd35bench.types import Load, Request, SkipLayerGuidance, Task
from tests.backends.bare import I2I, SKIPPING, bare_other_images, batch, differs, make_inits
from tests.backends.conftest import make_load, make_request
from tests.studies.tiny import TOKENS
from tests.studies.tiny_families import write_tiny

OTHERS = ("sana", "pixart")


@pytest.fixture(scope="module", params=OTHERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


def other_load(path: Path, **options: Any) -> Load:
    load = make_load(path, **options)
    return replace(load, model=replace(load.model, family=path.name))


@pytest.fixture(scope="module")
def backend(path: Path) -> Iterator[EagerBackend]:
    loaded = EagerBackend(other_load(path))
    yield loaded
    loaded.close()


def others(size: int, **changes: Any) -> list[Request]:
    return batch(size, **{"sampler": "dpmpp_2m", **changes})


@pytest.mark.parametrize(
    "requests",
    [others(1), others(3), others(2, width=32, height=96), others(2, cfg=1.0)],
    ids=["batch-1", "batch-3", "portrait", "cfg-1"],
)
def test_others_are_bit_identical_to_bare_diffusers(
    backend: EagerBackend, path: Path, requests: list[Request]
) -> None:
    made = backend.generate(requests, make_inits(requests))
    assert not differs(made.images, bare_other_images(path, requests))
    assert made.evaluations == made.effective_steps == len(made.step_s) == requests[0].steps
    assert made.images[0].shape == (requests[0].height, requests[0].width, 3)


def test_others_are_bit_identical_in_bf16(path: Path) -> None:
    requests = others(2)
    loaded = EagerBackend(other_load(path, dtype="bf16"))
    images = loaded.generate(requests, make_inits(requests)).images
    loaded.close()
    assert not differs(images, bare_other_images(path, requests, dtype=DTYPES["bf16"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 5.0},
        {"generator": torch.Generator().manual_seed(7)},
        {"max_sequence_length": 8},
        {"negative_prompt": ["", ""]},
        {"num_inference_steps": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_call_is_another_image(
    backend: EagerBackend, path: Path, changes: dict[str, Any]
) -> None:
    requests = others(2)
    made = backend.generate(requests, make_inits(requests)).images
    assert differs(made, bare_other_images(path, requests, **changes))


def test_others_say_what_is_in_force(backend: EagerBackend, path: Path) -> None:
    assert backend.in_force["scheduler"] == "DPMSolverMultistepScheduler"
    assert backend.in_force["shift"] == (3.0 if path.name == "sana" else None)
    assert backend.flops(make_request(), 4) is None


def test_others_count_tokens_that_did_not_fit(backend: EagerBackend) -> None:
    prompts = ("short", "x" * (TOKENS + 5))
    requests = [make_request(prompt=p, sampler="dpmpp_2m", steps=2) for p in prompts]
    short, long = backend.generate(requests, [None, None]).truncated_tokens
    assert short == 0
    assert long >= 5
    cut = make_request(prompt="x" * (TOKENS + 5 + 30), sampler="dpmpp_2m", steps=2)
    assert backend.generate([cut], [None]).truncated_tokens == (long + 30,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (I2I, "text-to-image only"),
        ({"skip_layer_guidance": SKIPPING}, "leaves none out"),
        ({"width": 36}, "width=36: this model makes multiples of"),
    ],
    ids=["image", "skip-layers", "width"],
)
def test_others_refuse_what_they_cannot_do(
    backend: EagerBackend, changes: dict[str, Any], message: str
) -> None:
    requests = [make_request(**{"sampler": "dpmpp_2m", **changes})]
    with pytest.raises(UnsupportedRequest, match=message):
        backend.generate(requests, make_inits(requests))


def test_samplers_by_family(backend: EagerBackend, path: Path) -> None:
    for sampler in ("euler", "heun", "unipc"):
        request = make_request(sampler=sampler)
        if path.name == "pixart":
            with pytest.raises(UnsupportedRequest, match="this model has dpmpp_2m"):
                backend.generate([request], [None])
        else:
            made = backend.generate([request], [None])
            assert made.evaluations == (7 if sampler == "heun" else 4)
            assert own_shift_of(backend, sampler) == 3.0


def own_shift_of(backend: EagerBackend, sampler: str) -> float:
    config = backend._schedulers[sampler, None].config
    return config.flow_shift if "flow_shift" in config else config.shift


def test_pixart_refuses_a_shift_and_one_step(tmp_path: Path) -> None:
    backend = EagerBackend(other_load(write_tiny("pixart", tmp_path / "pixart")))
    for changes, message in (({"shift": 2.0}, "only flow models"), ({"steps": 1}, "2 or more")):
        with pytest.raises(UnsupportedRequest, match=message):
            backend.generate([make_request(sampler="dpmpp_2m", **changes)], [None])
    pipe = backend._pipes[Task.TEXT_TO_IMAGE]
    backend.close()
    pipe.register_to_config(scheduler=None)
    pipe.scheduler = object()
    with pytest.raises(BackendError, match="its scheduler is a object, dpmpp_2m needs"):
        family_of("pixart", pipe)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(BackendError, match=r"model\.family='flux' is unknown; known: sd3, sana"):
        family_of("flux", object())
    assert set(FAMILIES) == {"sd3", *OTHERS}


class Narrow(EagerBackend):
    """A backend that can do less than its model."""

    samplers = ("euler",)
    tasks = (Task.TEXT_TO_IMAGE,)
    skip_layers = False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "heun"}, "sampler='heun': backend eager has euler"),
        (I2I, "backend eager does text-to-image only"),
        ({"skip_layer_guidance": SKIPPING}, "backend eager leaves no layers out"),
    ],
    ids=["sampler", "image", "skip-layers"],
)
def test_a_narrower_backend_refuses_first(
    tiny_path: Path, changes: dict[str, Any], message: str
) -> None:
    backend = Narrow(make_load(tiny_path))
    requests = [make_request(**changes)]
    with pytest.raises(UnsupportedRequest, match=message):
        backend.generate(requests, make_inits(requests))
    backend.close()


class Embeddings:
    """What stands in for text encoders without weights: embeddings from the prompt's letters."""

    def __init__(self, width: int, pooled: int) -> None:
        self._shape = (width, pooled)
        self.asked: list[tuple[list[str], int]] = []

    def encode(self, prompts: list[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((prompts, tokens))
        seeds = [torch.Generator().manual_seed(sum(p.encode())) for p in prompts]
        width, pooled = self._shape
        embeds = torch.stack([torch.randn(tokens, width, generator=g) for g in seeds])
        return embeds, torch.stack([torch.randn(pooled, generator=g) for g in seeds])


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("changes", [{}, I2I, {"sampler": "heun"}], ids=["text", "image", "heun"])
def test_random_embeddings_take_the_prompts_place(
    tiny_path: Path, changes: dict[str, Any], cfg: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sd35bench.backends import eager as module

    def load(*arguments: Any) -> Any:
        pipe = whole(*arguments)
        config = pipe.transformer.config
        pipe.random_text = Embeddings(config.joint_attention_dim, config.pooled_projection_dim)
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            setattr(pipe, part, None)
            setattr(pipe, part.replace("text_encoder", "tokenizer"), None)
        return pipe

    whole = module.load_model
    monkeypatch.setattr(module, "load_model", load)
    backend = EagerBackend(make_load(tiny_path))
    text = backend._pipes[Task.TEXT_TO_IMAGE].random_text
    requests = batch(2, cfg=cfg, **changes)
    made = backend.generate(requests, make_inits(requests))
    asked = [
        ([r.prompt for r in requests], TOKENS),
        ([r.negative_prompt for r in requests], TOKENS),
    ]
    assert text.asked == asked[: 2 if cfg > 1 else 1]
    assert made.truncated_tokens == (0, 0)
    assert made.text_s is not None
    assert made.text_s > 0
    other = [replace(r, prompt="another") for r in requests]
    assert differs(made.images, backend.generate(other, make_inits(other)).images)
    backend.close()
    assert "encode" not in vars(text)


def test_keep_latents_after_the_first_and_the_last_step(eager: EagerBackend) -> None:
    requests = batch(2)
    assert eager.generate(requests, make_inits(requests)).latents_last is None
    seen: list[np.ndarray] = []
    pipe = eager._pipes[Task.TEXT_TO_IMAGE]
    for sampler, firsts in (("euler", 1), ("heun", 2), ("unipc", 1)):
        asked = [replace(r, sampler=sampler) for r in requests]
        eager.keep_latents = True
        made = eager.generate(asked, make_inits(asked))
        eager.keep_latents = False
        seen.clear()
        scheduler = pipe.scheduler
        step = scheduler.step
        scheduler.step = lambda *a, _step=step, **k: _noted(seen, _step(*a, **k))
        again = eager.generate(asked, make_inits(asked))
        del scheduler.step
        assert made.latents_first is not None
        assert made.latents_first.shape == (2, 16, 4, 8)
        assert made.latents_first.dtype == np.float32
        assert np.array_equal(made.latents_first, seen[firsts - 1])
        assert made.latents_last is not None
        assert np.array_equal(made.latents_last, seen[-1])
        assert not differs(made.images, again.images)


def _noted(seen: list[np.ndarray], result: Any) -> Any:
    seen.append(result[0].numpy().copy())
    return result


def test_a_single_steps_latents_are_first_and_last(eager: EagerBackend) -> None:
    eager.keep_latents = True
    made = eager.generate([make_request(steps=1, sampler="heun")], [None])
    eager.keep_latents = False
    assert made.latents_first is not None
    assert made.latents_last is not None
    assert np.array_equal(made.latents_first, made.latents_last)


def test_flops_follow_the_request(eager: EagerBackend) -> None:
    small = eager.flops(make_request(), 4)
    unguided = eager.flops(make_request(cfg=1.0), 4)
    twice = eager.flops(make_request(steps=8), 8)
    assert small is not None
    assert unguided is not None
    assert twice is not None
    assert small.denoise == pytest.approx(2 * unguided.denoise)
    assert twice.denoise == pytest.approx(2 * small.denoise)
    assert eager.flops(make_request(), None) == small
    skipping = SkipLayerGuidance(layers=(1,), scale=2.0, start=0.0, stop=1.0)
    more = eager.flops(make_request(skip_layer_guidance=skipping), 7)
    assert more is not None
    assert more.denoise > small.denoise
