"""What the int8 graph of OpenVINO is calibrated on: a few images' denoising steps.

Activation ranges are read from real inputs of the denoiser, made by the model itself. The captions
are in nano's closed vocabulary and mean something to any other model.
"""

from dataclasses import dataclass
from typing import Any

MAX_LATENT_SIDE = 32
"""Longer sides would take minutes per image for a full model on a CPU."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Captions, steps and guidance of the images whose steps are recorded."""

    prompts: tuple[str, ...]
    steps: int
    cfg: float


CALIBRATION = Calibration(
    prompts=(
        "a small red circle on a white background",
        "a large blue square on a black background",
        "a green triangle and a yellow circle on a white background",
        "a red square behind a blue circle on a black background",
    ),
    steps=8,
    cfg=4.0,
)


def calibration_side_px(config: Any, scale: int) -> int:
    """Side of the square images, in px: the model's own, or `MAX_LATENT_SIDE` latents.

    `scale`: pixels per latent.
    """
    side = min(int(config.sample_size), MAX_LATENT_SIDE, int(config.pos_embed_max_size))
    return side // config.patch_size * config.patch_size * scale
