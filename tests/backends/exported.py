"""What the tests of the exporting backends share: requests, and PyTorch's answers."""

from typing import Any

import numpy as np

from sd35bench.backends.base import Backend, Generation
from sd35bench.loading.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.types import BackendSpec, Load, ModelSpec, Request, SkipLayerGuidance

RATIOS = {"1:1": (64, 64), "16:9": (80, 48), "9:16": (48, 80)}
SKIPPING = SkipLayerGuidance(layers=(1, 2), scale=2.8, start=0.0, stop=0.6)
PARITY = 1e-4
INIT = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def nano_load(kind: str, threads: int = 1, **options: Any) -> Load:
    """The embedded model, for the slow tests: exporting it takes 25 s."""
    model = ModelSpec(
        name="nano",
        path=str(NANO_WEIGHTS),
        weights_digest=weights_digest(NANO_WEIGHTS),
        max_sequence_length=16,
    )
    return Load(
        model=model, backend=BackendSpec(name=kind, kind=kind, options=options), threads=threads
    )


def small_request(**changes: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": "a small red circle on a white background",
        "steps": 4,
        "cfg": 4.0,
        "seed": 0,
        "width": 64,
        "height": 64,
    }
    return Request(**{**fields, **changes})


CASES: dict[str, list[Request]] = {
    **{name: [small_request(width=w, height=h)] for name, (w, h) in RATIOS.items()},
    "batch": [
        small_request(seed=1, prompt="two blue squares on black", negative_prompt="a red star"),
        small_request(seed=2),
        small_request(seed=3, prompt="a green cross"),
    ],
    "unguided": [small_request(cfg=1.0)],
    "text-length": [small_request(max_sequence_length=9)],
    "image-to-image": [small_request(init_image="digest", prompt_strength=0.8)],
    "skip-layers": [small_request(skip_layer_guidance=SKIPPING)],
    **{
        sampler: [small_request(sampler=sampler, width=80, height=48)]
        for sampler in ("heun", "dpmpp_2m", "unipc")
    },
}


def make(backend: Backend, requests: list[Request]) -> Generation:
    """One batch with its latents kept."""
    backend.keep_latents = True
    return backend.generate(requests, [None if r.init_image is None else INIT for r in requests])


def latents_error(found: Generation, wanted: Generation) -> float:
    """Largest difference of the last latents over their largest value."""
    assert found.latents_last is not None
    assert wanted.latents_last is not None
    difference = np.abs(found.latents_last - wanted.latents_last).max()
    return float(difference / np.abs(wanted.latents_last).max())
