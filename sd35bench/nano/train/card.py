"""The model card: the transformer's training curve, a sheet of samples, and figures.

Figures are the shipped pipeline's accuracy over steps and guidance scale.
"""

import json
import re
from collections.abc import Sequence
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
from PIL import Image

from sd35bench.nano.networks import TEXT_TOKENS
from sd35bench.nano.prompts import NanoPrompt, init_image, level_set, prompt_set
from sd35bench.nano.train.loop import to_tensor
from sd35bench.nano.train.probe import accuracy, sample
from sd35bench.nano.verifier import verify_edit
from sd35bench.nano.world import Level

CARD = Path(__file__).parents[1] / "card"
SETTINGS = ((2, 4.0), (4, 4.0), (8, 4.0), (28, 4.0), (28, 1.0), (28, 12.0))
_WIDTH, _HEIGHT, _MARGIN = 560, 240, 40
_STEP_LINE = re.compile(r"^step (\d+) .*loss ([\d.]+)", re.MULTILINE)
_PROBE_LINE = re.compile(
    r"^probe (\d+) single ([\d.]+) .*?relation ([\d.]+) part:relation", re.MULTILINE
)
STEPS, CFGS = (2, 4, 8, 16, 28), (1.0, 2.0, 4.0, 7.0, 12.0)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def draw_curves(log: str) -> str:
    """An SVG of loss (grey), single (blue) and relation accuracy (orange) over steps."""
    losses = [(int(step), float(loss)) for step, loss in _STEP_LINE.findall(log)]
    probes = [tuple(float(cell) for cell in row) for row in _PROBE_LINE.findall(log)]
    last = max(step for step, _ in losses)
    lines = [
        _polyline(losses, last, "#999999"),
        _polyline([(step, single) for step, single, _ in probes], last, "#1f77b4"),
        _polyline([(step, relation) for step, _, relation in probes], last, "#ff7f0e"),
    ]
    texts = [
        _text(_MARGIN, 16, "loss (grey), tune accuracy: single (blue), relation (orange)"),
        _text(6, _y(0.0), "0"),
        _text(6, _y(1.0), "1"),
        _text(_WIDTH - 90, _HEIGHT - 12, f"{last} steps"),
    ]
    body = "\n".join([*lines, *texts])
    size = f'width="{_WIDTH}" height="{_HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n'
        f'<rect {size} fill="white"/>\n{body}\n</svg>\n'
    )


def _y(value: float) -> float:
    return _HEIGHT - _MARGIN - min(1.2, value) / 1.2 * (_HEIGHT - 2 * _MARGIN)


def _polyline(points: Sequence[tuple[float, float]], last: float, colour: str) -> str:
    across = _WIDTH - 2 * _MARGIN
    path = " ".join(f"{_MARGIN + x / last * across:.1f},{_y(y):.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-family="sans-serif" font-size="11">{text}</text>'


def draw_samples(pipeline: StableDiffusion3Pipeline) -> Image.Image:
    """Twelve held-out prompts across, the settings of `SETTINGS` down, the same noise in each."""
    items = prompt_set("heldout", limit=12)
    rows = [np.concatenate(sample(pipeline, items, *setting), 1) for setting in SETTINGS]
    return Image.fromarray(np.concatenate(rows, 0))


def write_card(pipeline: StableDiffusion3Pipeline, log: Path) -> None:
    """Write both pictures into the package."""
    CARD.mkdir(exist_ok=True)
    (CARD / "curves.svg").write_text(draw_curves(log.read_text()))
    draw_samples(pipeline).save(CARD / "samples.png", optimize=True)


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
    pipeline: StableDiffusion3Pipeline, strength: float, steps: int, cfg: float
) -> dict[str, float]:
    """How far edits of the heldout split were followed and how much they kept, at one strength."""
    items = prompt_set("heldout", "edit", 48)
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
