"""The core's schedules and samplers against diffusers' schedulers, on a made-up velocity."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from sd35bench.backends.samplers import flow_scheduler
from sd35bench.core.samplers import SAMPLERS
from sd35bench.core.schedule import schedule
from sd35bench.evaluations import SAMPLERS as NAMES

OWN = FlowMatchEulerDiscreteScheduler(shift=3.0)
MIX = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
# diffusers' Heun divides by sigma: at 0.001, its last with shift 1, rounding grows to 6e-5.
NEAR = 1e-4


def field(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """A smooth velocity that depends on place and time."""
    return torch.tanh(torch.einsum("ij,bjhw->bihw", MIX, x)) * (0.3 + time / 1000)


def test_every_sampler_is_there() -> None:
    assert tuple(SAMPLERS) == NAMES


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("shift", [1.0, 6.0])
@pytest.mark.parametrize(("steps", "skip"), [(1, 0), (2, 1), (8, 3), (28, 0)])
@pytest.mark.parametrize("sampler", NAMES)
def test_latents_and_timesteps_are_diffusers(
    sampler: str, steps: int, shift: float, skip: int
) -> None:
    scheduler = flow_scheduler(OWN, sampler, shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(skip * scheduler.order)
    times = scheduler.timesteps[skip * scheduler.order :]
    plan = schedule(sampler, steps, shift, skip=skip)
    assert np.array_equal(np.array(plan.timesteps, np.float32), times.float().numpy())
    start = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    x = start.clone()
    for time in times:
        x = scheduler.step(field(x, time), time, x, return_dict=False)[0]
    seen: list[int] = []
    made = SAMPLERS[sampler](
        lambda y, e: field(y, torch.tensor(plan.timesteps[e])),
        start,
        plan.sigmas,
        lambda e, _: seen.append(e),
    )
    assert seen == list(range(len(times))) == list(range(len(plan.steps)))
    assert float((made - x).abs().max()) <= NEAR


def test_evaluations_know_their_step() -> None:
    assert schedule("heun", 4, 3.0).steps == (0, 0, 1, 1, 2, 2, 3)
    assert schedule("heun", 4, 3.0, skip=2).steps == (2, 2, 3)
    assert schedule("euler", 4, 3.0, skip=2).steps == (2, 3)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="known: euler, heun"):
        schedule("ddim", 4, 3.0)
