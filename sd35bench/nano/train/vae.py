"""The autoencoder: 8x smaller, 16 channels, L1 with a weak Kullback-Leibler term.

The KL term's prior is N(LATENT_MEAN, LATENT_STD^2) instead of N(0, 1), so that the scaling and
shift factors that diffusers applies are far from 1 and 0, and code that forgets them fails
visibly. The term also keeps the latents smooth, which is what the transformer has to model.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from sd35bench.nano.train.loop import (
    Run,
    batch_rng,
    describe_figures,
    draw_scenes,
    draw_size,
    load_checkpoint,
    save_checkpoint,
    steps_with_progress,
    to_tensor,
    warmup_cosine,
)
from sd35bench.nano.world import ASPECT_RATIOS, Level, render

LATENT_CHANNELS = 16
LATENT_MEAN, LATENT_STD = 0.8, 2.0
FINAL_STD = 2.2
KL_WEIGHT = 5e-4
FINISHED = "finished.pt"
LEVEL_WEIGHTS: dict[Level, float] = {
    "single": 0.25,
    "relation": 0.3,
    "count": 0.15,
    "several": 0.15,
    "overlap": 0.15,
}


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder with SD3's conventions."""
    channels: Any = (16, 32, 64, 96)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * len(channels)),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * len(channels)),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1 / LATENT_STD,
        shift_factor=LATENT_MEAN,
    )
    with torch.no_grad():  # start near the prior's mean, with little noise
        bias = encoder_bias(vae)
        bias[:LATENT_CHANNELS] = LATENT_MEAN
        bias[LATENT_CHANNELS:] = -3.0
    return vae


def encoder_bias(vae: AutoencoderKL) -> Tensor:
    """The bias of the encoder's last layer: means, then logarithms of variances."""
    bias = vae.encoder.conv_out.bias
    assert bias is not None
    return bias


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, L1, KL per latent value) on pixels [N, 3, H, W] in [-1, 1]."""
    moments = vae.encoder(pixels).float()
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    l1 = (vae.decoder(latents).float() - pixels).abs().mean()
    centred, ratio = (mean - LATENT_MEAN) / LATENT_STD, log_variance - 2 * np.log(LATENT_STD)
    kl = 0.5 * (centred.square() + ratio.exp() - 1 - ratio).mean()
    return l1 + KL_WEIGHT * kl, l1, kl


def train_vae(run: Run) -> AutoencoderKL:
    """Train or resume; returns the autoencoder, which the checkpoint also holds."""
    torch.manual_seed(run.seed)
    vae = build_vae()
    nn.Module.to(vae, run.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.AdamW(vae.parameters(), run.lr, betas=(0.9, 0.98), weight_decay=1e-3)
    state = load_checkpoint(run.checkpoint, run.device)
    first = 0
    if state is not None:
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    figures: dict[str, float] = {}
    for step in steps_with_progress(run, first, lambda: describe_figures(figures)):
        pixels = _batch(run, step)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * warmup_cosine(step, run.steps, 100)
        with torch.autocast(run.device, torch.bfloat16, enabled=run.device != "cpu"):
            loss, l1, kl = vae_loss(vae, pixels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        for name, value in (("l1", l1), ("kl", kl), ("grad", norm)):
            figures[name] = 0.95 * figures.get(name, value.item()) + 0.05 * value.item()
        if (step + 1) % run.save_every == 0 or step + 1 == run.steps:
            held = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            save_checkpoint(run.checkpoint, held)
    finish_vae(vae, run.seed)
    _save_finished(vae, run.folder)
    return vae.eval()


@torch.no_grad()
def finish_vae(vae: AutoencoderKL, seed: int, renders: int = 512) -> AutoencoderKL:
    """Widen the latents to `FINAL_STD` and set scaling and shift factor from their statistics.

    The change of scale is folded into the layers on either side of the latents, exactly.
    """
    rng = batch_rng(seed, -1 % 2**31)
    scenes = draw_scenes(rng, renders, ASPECT_RATIOS["1:1"], LEVEL_WEIGHTS)
    images = [render(scene) for scene in scenes]
    device = str(next(vae.parameters()).device)
    parts = [vae.encoder(to_tensor(images[i : i + 64], device)) for i in range(0, renders, 64)]
    mean = torch.cat(parts)[:, :LATENT_CHANNELS]
    factor = FINAL_STD / mean.std().item()
    encoder_out, decoder_in = vae.encoder.conv_out, vae.decoder.conv_in
    encoder_out.weight[:LATENT_CHANNELS] *= factor
    encoder_bias(vae)[:LATENT_CHANNELS] *= factor
    encoder_bias(vae)[LATENT_CHANNELS:] += 2 * float(np.log(factor))
    decoder_in.weight /= factor
    shift = round(mean.mean().item() * factor, 4)
    vae.register_to_config(scaling_factor=round(1 / FINAL_STD, 4), shift_factor=shift)
    return vae


def load_vae(folder: Path, device: str = "cpu") -> AutoencoderKL:
    """The finished autoencoder of a training folder, frozen.

    Raises: FileNotFoundError where it was not trained to the end.
    """
    state = load_checkpoint(folder / FINISHED)
    if state is None:
        raise FileNotFoundError(f"no finished autoencoder in {folder}: run `train vae` to its end")
    vae = build_vae()
    vae.load_state_dict(state["vae"])
    vae.register_to_config(**state["factors"])
    nn.Module.to(vae, device)
    return vae.eval().requires_grad_(False)


def _save_finished(vae: AutoencoderKL, folder: Path) -> None:
    names = ("scaling_factor", "shift_factor")
    factors = {name: vae.config[name] for name in names}
    save_checkpoint(folder / FINISHED, {"vae": vae.state_dict(), "factors": factors})


def _batch(run: Run, step: int) -> Tensor:
    rng = batch_rng(run.seed, step)
    scenes = draw_scenes(rng, run.batch, draw_size(rng), LEVEL_WEIGHTS)
    pixels = to_tensor([render(scene) for scene in scenes], run.device)
    return pixels.contiguous(memory_format=torch.channels_last)
