"""Fine-tune nano by a LoRA: low-rank factors on the denoiser's attention, all else frozen.

    python -m sd35bench.nano.train.lora FILE.safetensors [--steps N] [--background black]

With a background, every training picture has that one, whatever its caption says: the house style
of somebody who wants it everywhere, and who may lose by it what captions say. Without, pictures are
what their captions say. The file is in diffusers' layout with a scale of 1.

Cost: 0.7 CPU seconds a step of 8 pictures on the machine of docs/log.md; the file is 0.6 MB.
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers.utils.logging as transformers_logging
from safetensors.torch import save_file
from torch import Tensor, nn

from sd35bench.nano import WEIGHTS
from sd35bench.nano.networks import TEXT_TOKENS
from sd35bench.nano.train.card import load_pipeline
from sd35bench.nano.train.flow import BROAD_LEVELS, CAPTION_DROPOUT
from sd35bench.nano.train.loop import batch_rng, draw_scenes, to_tensor, warmup_cosine
from sd35bench.nano.world import ASPECT_RATIOS, BACKGROUNDS, Background, caption, render

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
WARMUP_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """How a LoRA is trained; `background` is what every picture is drawn on, if any."""

    steps: int = 40
    batch: int = 8
    rank: int = 8
    lr: float = 3e-3
    seed: int = 0
    background: Background | None = None


class Adapted(nn.Module):
    """A linear layer with a low-rank product beside it; `up` starts at zero."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus the product's."""
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapt(transformer: nn.Module, rank: int) -> dict[str, Adapted]:
    """Freeze a denoiser and put factors beside its attentions' layers: layer's name -> factors."""
    transformer.requires_grad_(False)
    found: dict[str, Adapted] = {}
    layers = [(n, m) for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    for name, layer in layers:
        if name.startswith("transformer_blocks.") and name.endswith(TARGETS):
            parent, _, own = name.rpartition(".")
            found[name] = Adapted(layer, rank)
            transformer.get_submodule(parent).register_module(own, found[name])
    return found


def train(how: FineTune, path: Path) -> list[float]:
    """Train and write the file; returns the loss of each step.

    The loss is the mean squared error of the velocity, as nano itself was trained (`flow`).
    """
    torch.manual_seed(how.seed)
    pipe: Any = load_pipeline(WEIGHTS)
    factors = adapt(pipe.transformer, how.rank)
    trained = [p for each in factors.values() for p in (each.down, each.up)]
    optimizer = torch.optim.AdamW(trained, lr=how.lr, weight_decay=0.0)
    losses = []
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * warmup_cosine(step, how.steps, WARMUP_STEPS, 0.05)
        loss = _loss(pipe, *_batch(pipe, how, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {}
    for name, each in factors.items():
        weights[f"transformer.{name}.lora_A.weight"] = each.down.detach().contiguous()
        weights[f"transformer.{name}.lora_B.weight"] = each.up.detach().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
    return losses


@torch.no_grad()
def _batch(pipe: Any, how: FineTune, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled latents [N, 16, 8, 8] of fresh pictures, and the embeddings of their captions."""
    rng = batch_rng(how.seed, step)
    scenes = draw_scenes(rng, how.batch, ASPECT_RATIOS["1:1"], BROAD_LEVELS)
    dropped = rng.random(how.batch) < CAPTION_DROPOUT
    captions = ["" if drop else caption(s) for s, drop in zip(scenes, dropped, strict=True)]
    if how.background is not None:
        scenes = [replace(scene, background=how.background) for scene in scenes]
    mean = pipe.vae.encode(to_tensor([render(scene) for scene in scenes])).latent_dist.mode()
    latents = (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return latents, embeds, pooled


def _loss(pipe: Any, latents: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    sigma = torch.sigmoid(torch.randn(len(latents)))
    noise, mix = torch.randn_like(latents), sigma[:, None, None, None]
    velocity = pipe.transformer(
        hidden_states=(1 - mix) * latents + mix * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (velocity - (noise - latents)).square().mean()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m sd35bench.nano.train.lora")
    parser.add_argument("file", type=Path)
    parser.add_argument("--background", choices=[*BACKGROUNDS])
    for name in ("steps", "batch", "rank", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(FineTune(), name))
    args = parser.parse_args()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    names = ("steps", "batch", "rank", "seed", "background")
    how = FineTune(**{name: getattr(args, name) for name in names})
    losses = train(how, args.file)
    print(f"{args.file}: {how.steps} steps, loss {losses[0]:.3f}, at the end {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
