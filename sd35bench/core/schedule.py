"""Noise schedules of the flow models: sigma from 1 to 0.

Latents are ``(1 - sigma) image + sigma noise``. The shift moves a uniform grid t to
``sigma = shift t / (1 + (shift - 1) t)`` (Esser et al. 2024, eq. 23).
Each sampler has its own grid, as diffusers' scheduler of that name has:

| sampler | grid of t for N steps | timestep told to the model |
| --- | --- | --- |
| euler, heun | N points from 1 to the training's last sigma, itself shifted | 1000 sigma |
| dpmpp_2m | N points from 0.999, even, 0 left out | 1000 sigma, cut to an integer |
| unipc | N points from 1 (less 1e-6), even, 0.001 left out | 1000 sigma, cut to an integer |

Everything is computed in double precision and rounded to float32 once, before the loop.
"""

from dataclasses import dataclass

import numpy as np

from sd35bench.core.guidance import EVALUATIONS_PER_STEP

TRAIN_STEPS = 1000
UNIPC_START = 1e-6
"""UniPC takes the logarithm of 1 - sigma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The part of a schedule that runs, all values float32.

    `sigmas`: one for each step that runs, and the closing 0. `timesteps`: one for each evaluation.
    `steps`: for each evaluation the step it belongs to, counted in the whole schedule.
    """

    sampler: str
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    steps: tuple[int, ...]


def schedule(sampler: str, steps: int, shift: float, *, skip: int = 0) -> Schedule:
    """Build the schedule of `steps` steps; the first `skip` are left out, as image-to-image does.

    Raises: ValueError for an unknown sampler.
    """
    sigmas, cut = _grid(sampler, steps, shift)
    single = sigmas.astype(np.float32)
    # The flow schedulers multiply in float32, the multistep ones in double precision.
    times = np.trunc(sigmas * TRAIN_STEPS) if cut else single * np.float32(TRAIN_STEPS)
    numbers = list(range(skip, steps))
    if sampler == "heun":
        evaluated = [skip, *(i for i in numbers[1:] for _ in range(2))]
        belongs = [*(i for i in numbers[:-1] for _ in range(2)), steps - 1]
    else:
        evaluated = belongs = numbers
    return Schedule(
        sampler=sampler,
        sigmas=(*map(float, single[skip:]), 0.0),
        timesteps=tuple(float(times[i]) for i in evaluated),
        steps=tuple(belongs),
    )


def _grid(sampler: str, steps: int, shift: float) -> tuple[np.ndarray, bool]:
    """Return N sigmas in double precision, and whether timesteps are cut to integers."""
    if sampler in ("euler", "heun"):
        last = float(np.float32(shifted(np.array(1 / TRAIN_STEPS), shift)))
        times = np.linspace(TRAIN_STEPS, last * TRAIN_STEPS, steps)
        return shifted(times / TRAIN_STEPS, shift), False
    if sampler == "dpmpp_2m":
        rising = 1.0 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1)
        return shifted(rising, shift)[::-1][:-1], True
    if sampler == "unipc":
        sigmas = shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
        sigmas[0] = min(sigmas[0], 1 - UNIPC_START)
        return sigmas, True
    raise ValueError(f"sampler={sampler!r} is unknown; known: {', '.join(EVALUATIONS_PER_STEP)}")


def shifted(t: np.ndarray, shift: float) -> np.ndarray:
    """Move a uniform grid by the shift."""
    return shift * t / (1 + (shift - 1) * t)
