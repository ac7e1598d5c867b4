"""From prompts to pixels: text, conditions, the denoising loop, the decoder.

`generate` is read from top to bottom: that is the order in which it happens. The loop never waits
for the device: schedules and coefficients are Python numbers, modulations are rows of a table that
was computed before, and latents stay where they are until they are decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sd35bench.core.guidance import Guidance, guide, plan_calls
from sd35bench.core.model import Conditions, Config, Embedder, Executor
from sd35bench.core.samplers import SAMPLERS, See
from sd35bench.core.schedule import Schedule, schedule
from sd35bench.core.text import CachedText, Text
from sd35bench.core.vae import Vae


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One batch: images of one size and one setting, each with prompts and a seed of its own.

    `inits`: uint8 RGB [H, W, 3] for image-to-image, else empty; `strength` in (0, 1] then says
    which part of the steps runs. `tokens`: T5's.
    """

    prompts: Sequence[Text]
    negatives: Sequence[str]
    seeds: Sequence[int]
    height: int
    width: int
    steps: int
    guidance: Guidance
    sampler: str
    shift: float
    tokens: int
    inits: Sequence[np.ndarray] = ()
    strength: float = 1.0

    def schedule(self) -> Schedule:
        """Return the part of the schedule that runs.

        Source: diffusers `StableDiffusion3Img2ImgPipeline.get_timesteps`.
        """
        left_out = 0
        if self.inits:
            left_out = int(max(self.steps - min(self.steps * self.strength, self.steps), 0))
        return schedule(self.sampler, self.steps, self.shift, skip=left_out)


@dataclass(slots=True)
class Core:
    """The loaded parts; `device` and `dtype` are the denoiser's."""

    config: Config
    embedder: Embedder
    executor: Executor
    text: CachedText
    vae: Vae
    device: torch.device
    dtype: torch.dtype
    spatial: int
    """Pixels that a latent stands for along a side."""
    keep_prompts: bool = False
    """Whether a prompt that comes again is not encoded again; negative prompts never are."""
    evaluations: int = field(default=0, init=False)
    """Calls of the denoiser for the last batch."""


@torch.inference_mode()
def generate(
    core: Core, ask: Ask, see: See, stage: Callable[[str], None] = lambda _: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one batch: the final latents [B, C, h, w] and pixels [B, 3, H, W], about -1 to 1.

    `see` is told of every evaluation that ended, with the latents after it; `stage` of each stage
    that begins: "text", "start", "denoise", "decode", and "end".
    """
    stage("text")
    embeds, pooled = embed(core, ask)
    stage("start")
    plan = ask.schedule()
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in ask.seeds]
    latents = start(core, ask, plan, generators)
    stage("denoise")
    place: dict[str, Any] = {"device": core.device, "dtype": core.dtype}
    conditions = core.embedder.condition(
        embeds.to(**place),
        pooled.to(**place),
        torch.tensor(plan.timesteps, device=core.device),
        (latents.shape[-2], latents.shape[-1]),
    )
    core.evaluations = 0
    calls = plan_calls(ask.guidance, plan.steps, ask.steps)
    denoiser = _Denoiser(core, conditions, len(ask.seeds))
    velocity = guide(ask.guidance, calls, plan.timesteps, denoiser)
    latents = SAMPLERS[ask.sampler](velocity, latents, plan.sigmas, see)
    stage("decode")
    pixels = core.vae.decode(latents)
    stage("end")
    return latents, pixels


def embed(core: Core, ask: Ask) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed the batch's texts: with guidance the negative prompts, then the prompts."""
    prompted = core.text.encode(ask.prompts, ask.tokens, keep=core.keep_prompts)
    if not ask.guidance.guided:
        return prompted
    negative = core.text.encode(ask.negatives, ask.tokens, keep=True)
    return torch.cat([negative[0], prompted[0]]), torch.cat([negative[1], prompted[1]])


def start(
    core: Core, ask: Ask, plan: Schedule, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Return the latents [B, C, h, w] that the loop starts from: noise, or an image in noise.

    Each image's noise is drawn on the CPU in float32 from its own seed, so that a seed means one
    noise on every machine.
    """
    shape = (1, core.config.in_channels, ask.height // core.spatial, ask.width // core.spatial)
    clean = core.vae.encode(ask.inits, generators).float() if ask.inits else None
    noise = torch.cat([torch.randn(shape, generator=g) for g in generators])
    noise = noise.to(core.dtype).float().to(core.device)  # half-precision noise is rounded float32
    if clean is None:
        return noise
    sigma = plan.sigmas[0]
    return sigma * noise + (1.0 - sigma) * clean.to(core.device)


class _Denoiser:
    """The executor under a batch's conditions; with guidance the empty prompts come first."""

    def __init__(self, core: Core, conditions: Conditions, size: int) -> None:
        self._core, self._all, self._size = core, conditions, size

    @cached_property
    def _prompted(self) -> Conditions:
        """The conditions of the prompts alone; copied from the whole, so made where needed only."""
        of = self._all
        return of.rows(slice(self._size, None)) if of.context.shape[0] > self._size else of

    def both(self, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both prompts as one batch."""
        empty, text = self._run(self._all, torch.cat([x, x]), e).chunk(2)
        return empty, text

    def alone(self, x: torch.Tensor, e: int) -> torch.Tensor:
        """Run the prompt alone."""
        return self._run(self._prompted, x, e)

    def without(self, x: torch.Tensor, e: int, layers: tuple[int, ...]) -> torch.Tensor:
        """Run the prompt alone, without `layers`."""
        return self._run(self._prompted, x, e, layers)

    def _run(
        self, under: Conditions, x: torch.Tensor, e: int, skip: tuple[int, ...] = ()
    ) -> torch.Tensor:
        self._core.evaluations += 1
        step = self._core.executor.step
        return step(x, under.context, under.table[e], under.position, skip)
