"""Looking at what was learned: sample held-out prompts and let the verifier judge them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from numpy.typing import NDArray
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd35bench.nano.networks import TEXT_TOKENS, assemble
from sd35bench.nano.prompts import NanoPrompt, prompt_set
from sd35bench.nano.train.flow import BROAD, FlowModel, Recipe, train_flow
from sd35bench.nano.train.loop import Run, describe_figures
from sd35bench.nano.train.vae import load_vae
from sd35bench.nano.verifier import verify

PROBE_PROMPTS, PROBE_STEPS, PROBE_CFG = 32, 12, 4.0


@torch.no_grad()
def sample(
    pipeline: StableDiffusion3Pipeline,
    items: Sequence[NanoPrompt],
    steps: int,
    cfg: float,
    seed: int = 0,
    batch: int = 32,
) -> list[NDArray[np.uint8]]:
    """One picture per item, in batches of items of one size; noise is drawn per item."""
    pipeline.set_progress_bar_config(disable=True)
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(items), batch):
        chunk = items[start : start + batch]
        generators = [
            torch.Generator().manual_seed(seed * 1000 + start + i) for i in range(len(chunk))
        ]
        made: Any = pipeline(
            [item.prompt for item in chunk],
            num_inference_steps=steps,
            guidance_scale=cfg,
            width=chunk[0].width,
            height=chunk[0].height,
            generator=generators,
            max_sequence_length=TEXT_TOKENS,
            output_type="np",
        )
        images += list((made.images * 255).round().astype(np.uint8))
    return images


def accuracy(items: Sequence[NanoPrompt], images: Sequence[NDArray[np.uint8]]) -> dict[str, float]:
    """The share of pictures with every part right, by level, and of each part over all levels."""
    verdicts = [verify(image, item.prompt) for item, image in zip(items, images, strict=True)]
    shares: dict[str, list[bool]] = {}
    for item, verdict in zip(items, verdicts, strict=True):
        shares.setdefault(item.level, []).append(verdict.all_right)
        for part, right in verdict.parts.items():
            shares.setdefault(f"part:{part}", []).append(right)
    return {name: float(np.mean(rights)) for name, rights in shares.items()}


def contact_sheet(images: Sequence[NDArray[np.uint8]], columns: int = 8) -> NDArray[np.uint8]:
    """Pictures of one size side by side, in rows."""
    blank = np.zeros_like(images[0])
    padded = [*images, *[blank] * (-len(images) % columns)]
    rows = [np.concatenate(padded[i : i + columns], 1) for i in range(0, len(padded), columns)]
    return np.concatenate(rows, 0)


def train_and_probe(
    run: Run, vae_folder: Path, renders: int, recipe: Recipe = BROAD, start: Path | None = None
) -> None:
    """Train the transformer, sampling held-out prompts of the tune split on the way."""
    vae = load_vae(vae_folder, run.device)
    items = prompt_set("tune", "t2i", PROBE_PROMPTS)

    def probe(average: FlowModel) -> str:
        pipeline = assemble(vae, average.transformer, average.text)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, 2))
        images = sample(pipeline, items, PROBE_STEPS, PROBE_CFG)
        torch.set_num_threads(threads)
        Image.fromarray(contact_sheet(images)).save(run.folder / "probe.png")
        return describe_figures(accuracy(items, images), ".2f")

    # The flash kernel's bf16 backward on a CPU takes half of a step; plain matmuls a tenth.
    with sdpa_kernel(SDPBackend.MATH):
        train_flow(run, vae, renders, probe, recipe, start)
