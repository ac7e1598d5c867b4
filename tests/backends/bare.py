"""The reference of the reference: images from bare diffusers calls, written as a person would."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from sd35bench.types import Request, SkipLayerGuidance, Task
from tests.backends.conftest import make_request
from tests.studies.tiny import TOKENS

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


@lru_cache(maxsize=2)
def _loaded(path: Path, dtype: torch.dtype, parts: tuple[tuple[str, Any], ...]) -> Any:
    """The pipeline; its weights are only read, so many calls share it."""
    return StableDiffusion3Pipeline.from_pretrained(path, dtype=dtype, **dict(parts))


def _own_scheduler(path: Path) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")


def bare_images(
    path: Path, requests: Sequence[Request], dtype: torch.dtype = torch.float32, **parts: Any
) -> list[np.ndarray]:
    """What a person would write with diffusers alone.

    The dtype is said: without it transformers 5 keeps the file's and diffusers takes float32.
    """
    return list(_bare_images(path, tuple(requests), dtype, tuple(parts.items())))


@lru_cache(maxsize=64)
def _bare_images(
    path: Path,
    requests: tuple[Request, ...],
    dtype: torch.dtype,
    parts: tuple[tuple[str, Any], ...],
) -> list[np.ndarray]:
    first = requests[0]
    pipe: Any = _loaded(path, dtype, parts)
    pipe.scheduler = bare_scheduler(_own_scheduler(path), first)
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
    if first.prompt_3 is not None:
        extra["prompt_2"] = [r.prompt_2 for r in requests]
        extra["prompt_3"] = [r.prompt_3 for r in requests]
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


def bare_scheduler(own: Any, request: Request) -> Any:
    """The sampler as diffusers' documentation builds it, from SD3's own scheduler."""
    shift = own.config.shift if request.shift is None else request.shift
    if request.sampler == "euler":
        return type(own).from_config(own.config, shift=shift)
    if request.sampler == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    kinds = {"dpmpp_2m": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
    scheduler: Any = kinds[request.sampler].from_config(own.config, **flow)

    def scale_noise(sample: Any, timestep: Any, noise: Any) -> Any:
        sigma = scheduler.sigmas[(scheduler.timesteps == timestep[0]).nonzero()[0].item()]
        # In this order, as `FlowMatchEulerDiscreteScheduler` has it: the first operand's strides
        # become the result's, and the VAE rounds another memory layout another way.
        return sigma * noise + (1 - sigma) * sample

    scheduler.scale_noise = scale_noise
    return scheduler


@lru_cache(maxsize=2)
def _other_loaded(path: Path, dtype: torch.dtype) -> Any:
    return DiffusionPipeline.from_pretrained(path, dtype=dtype)


def bare_other_images(
    path: Path, requests: Sequence[Request], dtype: torch.dtype = torch.float32, **changes: Any
) -> list[np.ndarray]:
    """Sana's or PixArt's, from a diffusers call with its own scheduler."""
    first = requests[0]
    pipe = _other_loaded(path, dtype)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "negative_prompt": [r.negative_prompt for r in requests],
        "num_inference_steps": first.steps,
        "guidance_scale": first.cfg,
        "height": first.height,
        "width": first.width,
        "max_sequence_length": TOKENS,
        "generator": [torch.Generator().manual_seed(r.seed) for r in requests],
        "use_resolution_binning": False,
        "clean_caption": False,
        **changes,
    }
    return [np.asarray(image) for image in pipe([r.prompt for r in requests], **arguments).images]


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
    **{
        f"{task}-{sampler}": batch(2, sampler=sampler, **changes)
        for sampler in ("heun", "dpmpp_2m", "unipc")
        for task, changes in {"text": {}, "image": I2I, "text-shift": {"shift": 1.5}}.items()
    },
}
