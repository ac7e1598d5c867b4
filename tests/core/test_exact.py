"""The core's exact tier: the eager backend's final latents to 1e-4, in all that eager can do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from sd35bench.backends.base import Backend
from sd35bench.backends.core import CoreBackend
from sd35bench.backends.eager import EagerBackend
from sd35bench.core import samplers
from sd35bench.errors import OptimizationNotApplied
from sd35bench.types import BackendSpec, Load, ModelSpec, Request, SkipLayerGuidance
from tests.backends.bare import I2I, SKIPPING, batch, make_inits
from tests.backends.conftest import NANO, make_load

EXACT = 1e-4
"""Largest absolute difference of the final latents, which are of the order of 1 to 5."""

CASES = {
    "batch-of-3": batch(3),
    "landscape": batch(1, width=64, height=32),
    "portrait": batch(2, width=32, height=80),
    "no-guidance": batch(2, cfg=1.0),
    "shift": batch(1, shift=1.5),
    "skip-layers": batch(2, skip_layer_guidance=SKIPPING),
    "one-step": batch(1, steps=1),
    "28-steps": batch(1, steps=28),
    "texts": batch(2, prompt_2="blue", prompt_3=""),
    "weights": batch(2, prompt_weights="red:1.6; star:0.5"),
    "image": batch(2, **I2I),
    "image-weak": batch(1, init_image="digest", prompt_strength=0.2),
    "image-whole": batch(1, init_image="digest", prompt_strength=1.0),
    **{
        f"{sampler}-{name}": batch(1, sampler=sampler, steps=6, **changes)
        for sampler in ("heun", "dpmpp_2m", "unipc")
        for name, changes in {
            "text": {},
            "image": I2I,
            "skip-layers": {"skip_layer_guidance": SKIPPING},
            "no-guidance": {"cfg": 1.0},
        }.items()
    },
}


@pytest.fixture(scope="module")
def pairs(tiny_path: Path) -> Iterator[Callable[[str], tuple[Backend, Backend]]]:
    """The core with an executor and its reference, on one checkpoint, loaded once."""

    @cache
    def load(executor: str) -> tuple[Backend, Backend]:
        core = CoreBackend(make_load(tiny_path, "core", executor=executor))
        core.keep_latents = eager.keep_latents = True
        loaded.append(core)
        return core, eager

    eager = EagerBackend(make_load(tiny_path))
    loaded: list[Backend] = [eager]
    yield load
    for backend in loaded:
        backend.close()


@pytest.fixture(params=["cpp", "torch"])
def pair(
    pairs: Callable[[str], tuple[Backend, Backend]], request: pytest.FixtureRequest
) -> tuple[Backend, Backend]:
    return pairs(request.param)


def apart(pair: Sequence[Backend], requests: Sequence[Request]) -> float:
    """The largest difference of final latents between two backends."""
    made = [backend.generate(requests, make_inits(requests)) for backend in pair]
    assert made[0].evaluations == made[1].evaluations
    assert made[0].effective_steps == made[1].effective_steps
    first, second = (m.latents_last for m in made)
    assert first is not None
    assert second is not None
    return float(np.abs(first - second).max())


# What the samplers do is not the executor's: on its second form the calls that differ in kind.
FEW = ("batch-of-3", "portrait", "no-guidance", "skip-layers", "one-step", "image", "heun-text")


@pytest.mark.parametrize(
    ("pair", "case"),
    [*(("cpp", case) for case in CASES), *(("torch", case) for case in FEW)],
    indirect=["pair"],
)
def test_latents_are_eagers(pair: tuple[Backend, Backend], case: str) -> None:
    assert apart(pair, CASES[case]) <= EXACT


def test_images_and_first_latents_are_eagers(pair: tuple[Backend, Backend]) -> None:
    requests = batch(2)
    core, eager = (backend.generate(requests, [None, None]) for backend in pair)
    assert core.latents_first is not None
    assert eager.latents_first is not None
    assert np.abs(core.latents_first - eager.latents_first).max() <= EXACT
    levels = [
        np.abs(a.astype(int) - b).max() for a, b in zip(core.images, eager.images, strict=True)
    ]
    assert max(levels) <= 1


def test_exact_catches_a_broken_sampler(
    pair: tuple[Backend, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: DPM-Solver++ that forgets its second order."""

    def first_order(v, x, sigmas, see):
        for i in range(len(sigmas) - 1):
            image = x - sigmas[i] * v(x, i)
            ratio = sigmas[i + 1] / sigmas[i]
            x = ratio * x + (1 - ratio) * image
            see(i, x)
        return x

    monkeypatch.setitem(samplers.SAMPLERS, "dpmpp_2m", first_order)
    assert apart(pair, CASES["dpmpp_2m-text"]) > 10 * EXACT


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 88, "height": 48, "steps": 6},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"width": 88, "height": 48}, marks=pytest.mark.slow),
    ],
    ids=["16:9-6-steps", "square", "16:9"],
)
def test_nano_is_eagers(changes: dict[str, int]) -> None:
    request = Request(
        prompt="a red circle",
        steps=28,
        cfg=4.0,
        seed=3,
        width=64,
        height=64,
        negative_prompt="dark",
    )
    backends = (
        CoreBackend(make_load(NANO, "core", 16)),
        EagerBackend(make_load(NANO, "eager", 16)),
    )
    for backend in backends:
        backend.keep_latents = True
    found = apart(backends, [replace(request, **changes)])
    for backend in backends:
        backend.close()
    print(f"nano {changes}: {found:.2e}")
    assert found <= EXACT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_is_eagers_and_a_second_start_does_not_compile(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor for GPUs, rehearsed: one graph a shape, none while an image is timed."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    options = {"device": "cpu", "executor": "compile", "vae": "compiled"}
    requests = batch(2)
    reference = EagerBackend(make_load(tiny_path))
    reference.keep_latents = True
    for start in range(2):
        core = CoreBackend(make_load(tiny_path, "core", **options))
        core.keep_latents, core.timed = True, False
        assert apart((core, reference), requests) <= EXACT
        core.settle()
        core.timed = True
        assert apart((core, reference), requests) <= EXACT
        counts = core.in_force["compile"]
        assert set(counts) == {"denoiser", "vae_decoder"}
        for part in counts.values():
            assert part["graphs"] == 1
            assert (part["cache_misses"] == 0) == (start == 1)
        with pytest.raises(OptimizationNotApplied, match="compiled while an image waited"):
            core.generate(batch(1), [None])
        core.close()
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_true_width_is_eagers(sampler: str) -> None:
    """Four layers of SD3.5-Medium in their true shapes, filled with noise."""
    model = ModelSpec(
        name="sd35-medium",
        path="",
        weights_digest="random",
        max_sequence_length=77,
        weights="random",
        layers=4,
        text_encoders=False,
    )
    skipping = SkipLayerGuidance(layers=(2,), scale=2.5, start=0.01, stop=0.6)
    request = Request(
        prompt="a red circle",
        steps=6,
        cfg=4.0,
        seed=3,
        width=256,
        height=192,
        sampler=sampler,
        skip_layer_guidance=skipping,
    )
    latents = []
    for kind in (CoreBackend, EagerBackend):
        name = "core" if kind is CoreBackend else "eager"
        backend = kind(Load(model=model, backend=BackendSpec(name=name, kind=name), threads=2))
        backend.keep_latents = True
        latents.append(backend.generate([request], [None]).latents_last)
        backend.close()
    found = float(np.abs(latents[0] - latents[1]).max())
    print(f"true width, {sampler}: {found:.2e} of {np.abs(latents[1]).max():.1f}")
    assert found <= EXACT
