"""The reference of the reference: images from bare diffusers calls, written as a person would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from PIL import Image

from sd35bench.types import Request, SkipLayerGuidance, Task
from tests.backends.conftest import make_request
from tests.tiny import TOKENS

SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.01, stop=0.6)
I2I = {"init_image": "digest", "prompt_strength": 0.6}


def make_init(seed: int, width: int = 64, height: int = 32) -> np.ndarray:
    """Smooth random colours, uint8 [H, W, 3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def make_inits(requests: Sequence[Request]) -> list[np.ndarray | None]:
    return [
        None if r.init_image is None else make_init(r.seed, r.width, r.height) for r in requests
    ]


def bare_images(
    path: Path, requests: Sequence[Request], dtype: torch.dtype = torch.float32, **parts: Any
) -> list[np.ndarray]:
    """What a person would write with diffusers alone.

    The dtype is said: without it transformers 5 keeps the file's and diffusers takes float32.
    """
    first = requests[0]
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **parts)
    if first.shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=first.shift)
    extra: dict[str, Any] = {}
    if first.task is Task.IMAGE_TO_IMAGE:
        pipe = StableDiffusion3Img2ImgPipeline(**pipe.components)
        extra["image"] = [Image.fromarray(i) for i in make_inits(requests) if i is not None]
        extra["strength"] = first.prompt_strength
    if first.skip_layer_guidance is not None:
        extra["skip_guidance_layers"] = list(SKIPPING.layers)
        extra["skip_layer_guidance_scale"] = SKIPPING.scale
        extra["skip_layer_guidance_start"] = SKIPPING.start
        extra["skip_layer_guidance_stop"] = SKIPPING.stop
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        [r.prompt for r in requests],
        negative_prompt=[r.negative_prompt for r in requests],
        num_inference_steps=first.steps,
        guidance_scale=first.cfg,
        height=first.height,
        width=first.width,
        max_sequence_length=first.max_sequence_length,
        generator=[torch.Generator().manual_seed(r.seed) for r in requests],
        **extra,
    ).images
    return [np.asarray(image) for image in images]


def batch(size: int, **changes: Any) -> list[Request]:
    """Requests of one setting, each with its own prompt, negative prompt and seed."""
    prompts = ("red circle", "blue star", "two squares")
    negatives = ("", "ugly", "dark")
    return [
        make_request(
            prompt=prompts[i],
            negative_prompt=negatives[i],
            seed=7 + i,
            max_sequence_length=TOKENS,
            **changes,
        )
        for i in range(size)
    ]


def differs(images: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return any(not np.array_equal(a, b) for a, b in zip(images, others, strict=True))


IDENTICAL = {
    "text-batch-1": batch(1),
    "text-batch-3": batch(3),
    "text-portrait": batch(2, width=32, height=80),
    "text-cfg-1": batch(2, cfg=1.0),
    "text-shift": batch(2, shift=1.5),
    "text-skip-layers": batch(2, skip_layer_guidance=SKIPPING),
    "image-batch-1": batch(1, **I2I),
    "image-batch-2": batch(2, **I2I),
    "image-weak": batch(1, init_image="digest", prompt_strength=0.2),
    "image-shift": batch(2, shift=1.5, **I2I),
}
