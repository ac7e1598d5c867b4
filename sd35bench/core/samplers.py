"""Samplers as pure functions over a velocity: euler, heun, dpmpp_2m, unipc.

Each takes a model ``v(x, e)`` (the velocity of `x` at evaluation `e`), the starting latents and the
sigmas, and returns the latents at sigma 0. Coefficients are Python numbers, computed from the
sigmas alone, so no step waits for the device. `see` is told of every evaluation that ended.

With ``x = (1 - s) image + s noise`` the image predicted at s is ``x - s v``; alpha = 1 - s, and
lambda = log(alpha / s) is half the log signal-to-noise ratio.
"""

import math
from collections.abc import Callable, Sequence

import torch

Model = Callable[[torch.Tensor, int], torch.Tensor]
See = Callable[[int, torch.Tensor], None]


def sample_euler(v: Model, x: torch.Tensor, sigmas: Sequence[float], see: See) -> torch.Tensor:
    """Follow the velocity straight from sigma to sigma: N evaluations."""
    for i in range(len(sigmas) - 1):
        x = x + (sigmas[i + 1] - sigmas[i]) * v(x, i)
        see(i, x)
    return x


def sample_heun(v: Model, x: torch.Tensor, sigmas: Sequence[float], see: See) -> torch.Tensor:
    """Average the velocities at both ends of a step: 2 N - 1 evaluations, the last step is Euler's.

    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1.
    """
    for i in range(len(sigmas) - 1):
        dt = sigmas[i + 1] - sigmas[i]
        first = v(x, 2 * i)
        end = x + dt * first
        see(2 * i, end)
        if i < len(sigmas) - 2:
            end = x + dt * (0.5 * (first + v(end, 2 * i + 1)))
            see(2 * i + 1, end)
        x = end
    return x


def sample_dpmpp_2m(v: Model, x: torch.Tensor, sigmas: Sequence[float], see: See) -> torch.Tensor:
    """DPM-Solver++ of order 2 on the predicted images: N evaluations, first and last of order 1.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """
    last = len(sigmas) - 2
    before: torch.Tensor | None = None
    for i in range(last + 1):
        now, then = sigmas[i], sigmas[i + 1]
        image = x - now * v(x, i)
        h = _lambda(then) - _lambda(now)
        weight = -(1 - then) * math.expm1(-h)
        step = weight * image
        if before is not None and i < last:
            ratio = (_lambda(now) - _lambda(sigmas[i - 1])) / h
            step = step + (0.5 * weight / ratio) * (image - before)
        x, before = (then / now) * x + step, image
        see(i, x)
    return x


def sample_unipc(v: Model, x: torch.Tensor, sigmas: Sequence[float], see: See) -> torch.Tensor:
    """UniPC of order 2, B2: each evaluation first corrects the step that led to it: N evaluations.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithm 5, with B(h) = e^h - 1.
    """
    last = len(sigmas) - 2
    images: list[torch.Tensor] = []
    start, order = x, 0  # of the step that led to x
    for i in range(last + 1):
        image = x - sigmas[i] * v(x, i)
        if images:
            x = _corrected(start, images, image, sigmas[: i + 1], order)
        images = [*images[-1:], image]
        start, order = x, min(2, last + 1 - i, len(images))
        x = _predicted(x, images, sigmas[: i + 2], order)
        see(i, x)
    return x


SAMPLERS: dict[str, Callable[[Model, torch.Tensor, Sequence[float], See], torch.Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "unipc": sample_unipc,
}


def _lambda(sigma: float) -> float:
    return math.inf if sigma == 0 else math.log1p(-sigma) - math.log(sigma)


def _predicted(
    x: torch.Tensor, images: Sequence[torch.Tensor], sigmas: Sequence[float], order: int
) -> torch.Tensor:
    """UniP: from `sigmas[-2]` to `sigmas[-1]` on the images predicted so far."""
    now, then = sigmas[-2], sigmas[-1]
    h = _lambda(then) - _lambda(now)
    weight = -(1 - then) * math.expm1(-h)
    ahead = (then / now) * x + weight * images[-1]
    if order == 2:
        r = (_lambda(sigmas[-3]) - _lambda(now)) / h
        ahead = ahead + (0.5 * weight / r) * (images[-2] - images[-1])
    return ahead


def _corrected(
    start: torch.Tensor,
    images: Sequence[torch.Tensor],
    image: torch.Tensor,
    sigmas: Sequence[float],
    order: int,
) -> torch.Tensor:
    """UniC: the step from `start` again, now that `image` at its end is known."""
    before, now = sigmas[-2], sigmas[-1]
    h = _lambda(now) - _lambda(before)
    weight = -(1 - now) * math.expm1(-h)
    again = (now / before) * start + weight * images[-1]
    if order == 1:
        return again + (0.5 * weight) * (image - images[-1])
    r = (_lambda(sigmas[-3]) - _lambda(before)) / h
    # rho solves [[1, 1], [r, 1]] rho = b, b_k = k! phi_(k+1)(-h) h / (e^-h - 1).
    phi = math.expm1(-h) / -h - 1
    first = phi / math.expm1(-h)
    second = 2 * (phi / -h - 0.5) / math.expm1(-h)
    rho = (first - second) / (1 - r)
    again = again + (weight * rho / r) * (images[-2] - images[-1])
    return again + (weight * (first - rho)) * (image - images[-1])
