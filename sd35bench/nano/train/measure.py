"""The model card's figures: accuracy of the shipped pipeline over steps and guidance scale."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
    StableDiffusion3Img2ImgPipeline,
)

from sd35bench.nano.networks import TEXT_TOKENS
from sd35bench.nano.prompts import NanoPrompt, init_image, level_set, prompt_set
from sd35bench.nano.train.loop import to_tensor
from sd35bench.nano.train.probe import accuracy, sample
from sd35bench.nano.verifier import verify_edit
from sd35bench.nano.world import Level

STEPS, CFGS = (2, 4, 8, 16, 28), (1.0, 2.0, 4.0, 7.0, 12.0)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Figure:
    """All parts right, at one setting, over `n` prompts of the heldout split."""

    level: str
    steps: int
    cfg: float
    n: int
    all_right: float


def of_level(level: Level, number: int) -> list[NanoPrompt]:
    """The first held-out prompts of one level."""
    if level == "overlap":
        return level_set("heldout", "overlap", number)
    return [item for item in prompt_set("heldout") if item.level == level][:number]


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a folder in float32."""
    return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)


def accuracy_at(
    pipeline: StableDiffusion3Pipeline, level: Level, steps: int, cfg: float, number: int = 64
) -> Figure:
    """Accuracy of one level at one setting."""
    items = of_level(level, number)
    shares = accuracy(items, sample(pipeline, items, steps, cfg, batch=64))
    return Figure(level, steps, cfg, len(items), shares[level])


@torch.no_grad()
def edits_at(
    pipeline: StableDiffusion3Pipeline, strength: float, steps: int, cfg: float, number: int = 48
) -> dict[str, float]:
    """How far edits of the heldout split were followed and how much they kept, at one strength."""
    items = prompt_set("heldout", "edit", number)
    edit: Any = StableDiffusion3Img2ImgPipeline(**pipeline.components)
    edit.set_progress_bar_config(disable=True)
    made = edit(
        [item.prompt for item in items],
        image=to_tensor([init_image(item) for item in items]),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=cfg,
        width=64,
        height=64,
        generator=[torch.Generator().manual_seed(index) for index in range(len(items))],
        max_sequence_length=TEXT_TOKENS,
        output_type="np",
    ).images
    verdicts = [
        verify_edit((image * 255).round().astype(np.uint8), init_image(item), item.prompt)
        for image, item in zip(made, items, strict=True)
    ]
    followed = float(np.mean([verdict.followed for verdict in verdicts]))
    kept = float(np.mean([verdict.kept for verdict in verdicts]))
    return {"strength": strength, "n": len(items), "followed": followed, "kept": kept}


def measure(folder: Path, steps: int = 28, cfg: float = 4.0) -> dict[str, Any]:
    """Curves over steps at one cfg, over cfg at one number of steps, and over strength."""
    pipeline = load_pipeline(folder)
    figures = [
        *(accuracy_at(pipeline, level, n, cfg) for level in ("single", "relation") for n in STEPS),
        *(accuracy_at(pipeline, level, 16, c) for level in ("single", "relation") for c in CFGS),
        *(accuracy_at(pipeline, level, steps, cfg, 32) for level in ("count", "several")),
    ]
    edits = [edits_at(pipeline, strength, 16, cfg) for strength in STRENGTHS]
    return {"accuracy": [asdict(figure) for figure in figures], "edits": edits}


def write_measurements(folder: Path, target: Path) -> None:
    """Measure and write the figures as JSON."""
    target.write_text(json.dumps(measure(folder), indent=2) + "\n")
