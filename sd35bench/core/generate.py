"""From prompts to pixels: text, conditions, the denoising loop, the decoder.

`generate` is read from top to bottom: that is the order in which it happens. The loop never waits
for the device: schedules and coefficients are Python numbers, modulations are rows of a table that
was computed before, and latents stay where they are until they are decoded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sd35bench.core.cache import evaluated_steps, predict_between
from sd35bench.core.guidance import acting_steps, guided_steps
from sd35bench.core.model import Conditions, Config, Embedder, Executor
from sd35bench.core.samplers import SAMPLERS, Model, See
from sd35bench.core.schedule import Schedule, schedule
from sd35bench.core.text import CachedText
from sd35bench.core.vae import Vae


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance: layers, strength, and fractions of the steps between which it acts."""

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One batch: images of one size and one setting, each with prompts and a seed of its own.

    `inits`: uint8 RGB [H, W, 3] for image-to-image, else empty; `strength` in (0, 1] then says
    which part of the steps runs. `tokens`: T5's.
    """

    prompts: Sequence[str]
    negatives: Sequence[str]
    seeds: Sequence[int]
    height: int
    width: int
    steps: int
    cfg: float
    sampler: str
    shift: float
    tokens: int
    inits: Sequence[np.ndarray] = ()
    strength: float = 1.0
    skip_layers: SkipLayers | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Fractions of the steps between which guidance acts; lossy unless (0, 1)."""
    step_cache: int = 1
    """Of so many steps one is evaluated, the others are predicted; lossy unless 1."""

    @property
    def guided(self) -> bool:
        """Whether the velocity without the prompt is needed; as in diffusers, above 1 only."""
        return self.cfg > 1

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
    sequences: int = field(default=0, init=False)
    """What these calls carried for each image: two with guidance, else one."""


def ignore(stage: str) -> None:
    """Listen to no stage."""


@torch.inference_mode()
def generate(
    core: Core, ask: Ask, see: See, stage: Callable[[str], None] = ignore
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
    core.evaluations = core.sequences = 0
    velocity = guided_velocity(core, ask, plan, conditions)
    if ask.step_cache > 1:
        velocity = predict_between(velocity, plan, evaluated_steps(plan, ask.step_cache))
    latents = SAMPLERS[ask.sampler](velocity, latents, plan.sigmas, see)
    stage("decode")
    pixels = core.vae.decode(latents)
    stage("end")
    return latents, pixels


def embed(core: Core, ask: Ask) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed the batch's texts: with guidance the negative prompts, then the prompts."""
    prompted = core.text.encode(ask.prompts, ask.tokens, keep=core.keep_prompts)
    if not ask.guided:
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


def guided_velocity(core: Core, ask: Ask, plan: Schedule, conditions: Conditions) -> Model:
    """Return the velocity that the sampler follows, guidance of both kinds applied.

    With guidance the batch is the images without their prompts, then the images with them.
    """
    size, run = len(ask.seeds), core.executor.step
    if not ask.guided:
        return _counted(core, conditions, 1)
    guided = guided_steps(ask.guidance_interval, ask.steps)
    skipping, acting = ask.skip_layers, frozenset[int]()
    if skipping is not None:
        acting = frozenset(acting_steps(skipping.start, skipping.stop, ask.steps)) & guided
    alone = acting or not guided.issuperset(plan.steps)
    prompted = conditions.rows(slice(size, None)) if alone else conditions
    both, text_alone = _counted(core, conditions, 2), _counted(core, prompted, 1)

    def velocity(x: torch.Tensor, e: int) -> torch.Tensor:
        step = plan.steps[e]
        if step not in guided:
            return text_alone(x, e)
        empty, text = both(torch.cat([x, x]), e).chunk(2)
        v = empty + ask.cfg * (text - empty)
        if skipping is None or step not in acting:
            return v
        core.evaluations += 1
        core.sequences += 1
        row = prompted.table[e]
        without = run(x, prompted.context, row, prompted.position, skipping.layers)
        return v + skipping.scale * (text - without)

    return velocity


def _counted(core: Core, conditions: Conditions, sequences: int) -> Model:
    """Return one counted call of the denoiser under `conditions`."""

    def velocity(x: torch.Tensor, e: int) -> torch.Tensor:
        core.evaluations += 1
        core.sequences += sequences
        row = conditions.table[e]
        return core.executor.step(x, conditions.context, row, conditions.position)

    return velocity
