"""Guidance: when each kind acts, how velocities are combined, and what of it is evaluated.

Three rules combine the velocity without the prompt, `empty`, with the one with it, `text`, both
made as one batch of two; none costs a further evaluation:

- cfg: ``empty + scale (text - empty)``;
- cfg-zero-star: ``s empty`` in place of ``empty``, `s` the projection of `text` on it, and zero at
  the first steps;
- apg: ``empty + scale d``, where `d` is ``text - empty`` with momentum, at most a norm, and with
  only `eta` of its part along `text`.

Skip-layer guidance runs the denoiser once more with some layers left out and moves away from that
worse prediction: ``guided + scale (text - text without the layers)``.

A step costs two sequences where guidance acts, one outside its interval, one more with layers left
out, and none where it is zero or predicted (`cache`). `plan_calls` says which before the loop, from
numbers alone: counting and running cannot disagree. Only tensors' own methods are used, so that
counting loads no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sd35bench.core.cache import evaluated_steps, predict_between

if TYPE_CHECKING:
    import torch

RULES = ("cfg", "cfg-zero-star", "apg")
EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2, "dpmpp_2m": 1, "unipc": 1}
"""By sampler: each has a schedule (`schedule`) and a solver (`samplers`) of its own."""
EPS = 1e-8
"""Added to the squared norm that is divided by, as diffusers does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayers:
    """Skip-layer guidance: layers, strength, and fractions of the steps between which it acts."""

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How velocities are guided; as in diffusers, only with a scale above 1.

    `zero_init_steps`: cfg-zero-star's first steps, at which nothing moves. `eta`, `norm`,
    `momentum`: apg's share of the parallel part, largest norm of the difference (0: any) and
    momentum (0: none). `interval`: fractions of the steps between which guidance acts; lossy
    unless (0, 1). `step_cache`: see `cache.evaluated_steps`; lossy unless "none".
    """

    scale: float
    rule: str = "cfg"
    zero_init_steps: int = 1
    eta: float = 0.0
    norm: float = 0.0
    momentum: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    skip_layers: SkipLayers | None = None
    step_cache: str = "none"

    @property
    def guided(self) -> bool:
        """Whether the velocity without the prompt is ever needed."""
        return self.scale > 1


class Kind(StrEnum):
    """What an evaluation of the sampler asks of the denoiser."""

    GUIDED = "both prompts, a batch of two"
    ALONE = "the prompt alone"
    ZERO = "nothing: the velocity is zero"
    PREDICTED = "nothing: the velocity is predicted"


class Call(NamedTuple):
    """One evaluation of the sampler; `skips`: the denoiser runs once more without some layers."""

    kind: Kind
    skips: bool = False


class Denoiser(Protocol):
    """The denoiser at evaluation `e`; every latent [B, C, h, w] is one image's."""

    def both(self, x: "torch.Tensor", e: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Return the velocities without and with the prompt."""
        ...

    def alone(self, x: "torch.Tensor", e: int) -> "torch.Tensor":
        """Return the velocity with the prompt, a batch of one."""
        ...

    def without(self, x: "torch.Tensor", e: int, layers: tuple[int, ...]) -> "torch.Tensor":
        """Return the velocity with the prompt, `layers` left out."""
        ...


Velocity = Callable[["torch.Tensor", int], "torch.Tensor"]


# When ---------------------------------------------------------------------------------------------


def acting_steps(start: float, stop: float, steps: int) -> tuple[int, ...]:
    """Return the steps, from 0, that skip-layer guidance acts on from `start` until `stop`.

    Both are fractions of the steps. It never acts on the first, and often on none of very few.

    Source: diffusers `StableDiffusion3Pipeline.__call__`, ``should_skip_layers``.
    """
    return tuple(i for i in range(steps) if steps * start < i < steps * stop)


def guided_steps(interval: tuple[float, float], steps: int) -> frozenset[int]:
    """Return the steps, from 0, that classifier-free guidance acts on; the others run batch one.

    `interval`: from and until which fraction of the steps; (0, 1) is always.

    Source: Kynkaanniemi et al. 2024 (arXiv 2404.07724), with steps in place of noise levels.
    """
    low, high = interval
    return frozenset(i for i in range(steps) if low * steps <= i < high * steps)


def evaluation_steps(order: int, skip: int, steps: int) -> tuple[int, ...]:
    """Return, for each evaluation, its step; image-to-image leaves the first `skip` steps out.

    A solver of order 2 (Heun) looks twice a step, and once at the last.
    """
    last = steps - 1
    return tuple(i for i in range(skip, steps) for _ in range(order if i < last else 1))


def plan_calls(guidance: Guidance, steps: Sequence[int], of: int) -> tuple[Call, ...]:
    """Return what each evaluation asks for; `steps`: its step, of `of` steps in all.

    The first steps that run are zero with cfg-zero-star. A step is predicted only from steps with
    the same kind of guidance: a velocity jumps where guidance begins or ends.
    """
    running = tuple(dict.fromkeys(steps))
    guided = guided_steps(guidance.interval, of) if guidance.guided else frozenset[int]()
    skipping, acting = guidance.skip_layers, frozenset[int]()
    if skipping is not None:
        acting = frozenset(acting_steps(skipping.start, skipping.stop, of)) & guided
    is_zero_star = guidance.guided and guidance.rule == "cfg-zero-star"
    zero = running[: guidance.zero_init_steps] if is_zero_star else ()
    moving = running[len(zero) :]
    kept = evaluated_steps(moving, guidance.step_cache)
    found = dict.fromkeys(zero, Call(Kind.ZERO))
    before: Call | None = None
    for step in moving:
        call = Call(Kind.GUIDED if step in guided else Kind.ALONE, step in acting)
        found[step] = call if step in kept or call != before else Call(Kind.PREDICTED)
        before = call
    return tuple(found[step] for step in steps)


# How ----------------------------------------------------------------------------------------------


def guide(
    guidance: Guidance, calls: Sequence[Call], times: Sequence[float], denoiser: Denoiser
) -> Velocity:
    """Return the velocity that the sampler follows, for one loop; it keeps the momentum.

    `times`: the time of each evaluation, along which velocities are predicted.
    """
    combine = _rule(guidance)
    skipping = guidance.skip_layers

    def velocity(x: "torch.Tensor", e: int) -> "torch.Tensor":
        call = calls[e]
        if call.kind is Kind.ZERO:
            return x.new_zeros(x.shape)
        if call.kind is Kind.ALONE:
            return denoiser.alone(x, e)
        empty, text = denoiser.both(x, e)
        v = combine(empty, text)
        if skipping is None or not call.skips:
            return v
        return v + skipping.scale * (text - denoiser.without(x, e, skipping.layers))

    if guidance.step_cache == "none":
        return velocity
    predicted = frozenset(e for e, call in enumerate(calls) if call.kind is Kind.PREDICTED)
    return predict_between(velocity, times, predicted, calls)


def _rule(guidance: Guidance) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    """Return what combines two velocities, new for each loop."""
    scale = guidance.scale
    if guidance.rule == "cfg-zero-star":
        return lambda empty, text: zero_star(empty, text, scale)
    if guidance.rule == "apg":
        average: list[torch.Tensor] = []

        def projected(empty: "torch.Tensor", text: "torch.Tensor") -> "torch.Tensor":
            difference = text - empty
            if guidance.momentum != 0 and average:
                difference = difference + guidance.momentum * average[0]
            average[:] = [difference]
            return empty + scale * project(difference, text, guidance.eta, guidance.norm)

        return projected
    return lambda empty, text: empty + scale * (text - empty)


def zero_star(empty: "torch.Tensor", text: "torch.Tensor", scale: float) -> "torch.Tensor":
    """Guide from `empty` scaled to fit `text` best in the least-squares sense, for each image.

    Source: Fan et al. 2025 (arXiv 2503.18886); diffusers `ClassifierFreeZeroStarGuidance`.
    """
    a, b = text.flatten(1).float(), empty.flatten(1).float()
    fit = (a * b).sum(1) / (b.square().sum(1) + EPS)
    scaled = empty * fit.to(empty.dtype).view(-1, *(1,) * (empty.ndim - 1))
    return scaled + scale * (text - scaled)


def project(
    difference: "torch.Tensor", text: "torch.Tensor", eta: float, norm: float
) -> "torch.Tensor":
    """Cut `difference` to a norm (0: any) and keep `eta` of its part along `text`, for each image.

    Projected are velocities, as in diffusers, where the paper projects predicted images.

    Source: Sadat et al. 2024 (arXiv 2410.02416), algorithm 1; diffusers `normalized_guidance`.
    """
    over = tuple(range(1, difference.ndim))
    if norm > 0:
        length = difference.norm(p=2, dim=over, keepdim=True)
        difference = difference * (norm / length).clamp(max=1)
    d, along = difference.double(), text.double()
    along = along / along.norm(p=2, dim=over, keepdim=True).clamp(min=1e-12)
    parallel = (d * along).sum(over, keepdim=True) * along
    across = (d - parallel).to(difference.dtype)
    return across + eta * parallel.to(difference.dtype)
