"""The lossy tiers: what they leave out, how near they stay, and that each is off by default."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sd35bench.backends.core import CoreBackend
from sd35bench.core.cache import evaluated_steps, predict_between
from sd35bench.core.guidance import guided_steps
from sd35bench.core.schedule import schedule
from sd35bench.errors import BackendError
from tests.backends.bare import batch
from tests.backends.conftest import make_load


def test_guidance_acts_inside_its_interval_only() -> None:
    assert guided_steps((0.0, 1.0), 4) == {0, 1, 2, 3}
    assert guided_steps((0.25, 0.75), 4) == {1, 2}
    assert guided_steps((0.0, 0.01), 28) == {0}


@pytest.mark.parametrize(
    ("steps", "cache", "kept"),
    [
        (8, "none", {0, 1, 2, 3, 4, 5, 6, 7}),
        (8, "1", {0, 1, 2, 3, 4, 5, 6, 7}),
        (8, "2", {0, 1, 3, 5, 7}),
        (8, "3", {0, 1, 4, 7}),
        (8, "0-3-6", {0, 1, 3, 6}),
        (2, "4", {0, 1}),
        (1, "4", {0}),
    ],
)
def test_the_mask_is_known_beforehand(steps: int, cache: str, kept: set[int]) -> None:
    assert evaluated_steps(range(steps), cache) == kept


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_velocity_straight_in_time_is_predicted_exactly(sampler: str) -> None:
    plan = schedule(sampler, 8, 3.0)
    kept = evaluated_steps(range(8), "3")
    predicted = frozenset(e for e, step in enumerate(plan.steps) if step not in kept)
    asked: list[int] = []

    def straight(x: torch.Tensor, e: int) -> torch.Tensor:
        asked.append(plan.steps[e])
        return torch.full_like(x, plan.timesteps[e])

    velocity = predict_between(straight, plan.timesteps, predicted, [0] * len(plan.steps))
    x = torch.zeros(1)
    found = [float(velocity(x, e)) for e in range(len(plan.timesteps))]
    assert found == pytest.approx(plan.timesteps, rel=1e-5)
    assert set(asked) == {0, 1, 4, 7}


def test_no_line_goes_through_velocities_of_two_kinds() -> None:
    """A mutant that forgets the kinds draws a line from 5 through 1: -3 at the third."""
    values, kinds = [5.0, 1.0, 9.0], ["guided", "alone", "alone"]
    velocity = predict_between(
        lambda x, e: torch.full_like(x, values[e]), (3.0, 2.0, 1.0), {2}, kinds
    )
    assert [float(velocity(torch.zeros(1), e)) for e in range(3)] == [5.0, 1.0, 1.0]


@pytest.fixture(scope="module")
def core(tiny_path: Path) -> Iterator[CoreBackend]:
    backend = CoreBackend(make_load(tiny_path, "core", executor="torch", device="cpu"))
    backend.keep_latents = True
    yield backend
    backend.close()


def latents(backend: CoreBackend, requests) -> tuple[np.ndarray, int]:
    made = backend.generate(requests, [None] * len(requests))
    assert made.latents_last is not None
    assert made.evaluations is not None
    return made.latents_last, made.evaluations


def test_each_tier_moves_the_latents_a_little_and_saves_work(core: CoreBackend) -> None:
    exact, calls = latents(core, batch(1, steps=16))
    assert calls == 16
    cached, fewer = latents(core, batch(1, steps=16, step_cache="2"))
    assert fewer == 9
    interval, same = latents(core, batch(1, steps=16, guidance_interval="0.1-0.9"))
    assert same == 16
    spread = exact.std()
    for lossy in (cached, interval):
        assert 1e-4 < np.abs(lossy - exact).mean() < 0.5 * spread


def test_outside_the_interval_nothing_is_guided(core: CoreBackend) -> None:
    """Guidance that never acts on a step that runs is no guidance at all."""
    unguided, _ = latents(core, batch(2, cfg=1.0, steps=1))
    outside, _ = latents(core, batch(2, steps=1, guidance_interval="0.5-1"))
    assert np.abs(outside - unguided).max() <= 1e-4


def test_a_wrong_option_is_refused(tiny_path: Path) -> None:
    with pytest.raises(BackendError, match=r"backend\.executor="):
        CoreBackend(make_load(tiny_path, "core", executor="magic"))
