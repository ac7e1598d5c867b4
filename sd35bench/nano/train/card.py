"""The model card's pictures: the transformer's training curve and a sheet of samples."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from PIL import Image

from sd35bench.nano.prompts import prompt_set
from sd35bench.nano.train.probe import sample

CARD = Path(__file__).parents[1] / "card"
SETTINGS = ((2, 4.0), (4, 4.0), (8, 4.0), (28, 4.0), (28, 1.0), (28, 12.0))
_WIDTH, _HEIGHT, _MARGIN = 560, 240, 40
_STEP_LINE = re.compile(r"^step (\d+) .*loss ([\d.]+)", re.MULTILINE)
_PROBE_LINE = re.compile(
    r"^probe (\d+) single ([\d.]+) .*?relation ([\d.]+) part:relation", re.MULTILINE
)


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
