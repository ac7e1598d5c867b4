"""The lossy tiers: what they leave out, how near they stay, and that each is off by default."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sd35bench.backends.core import CoreBackend
from sd35bench.core.cache import evaluated_steps, predict_between
from sd35bench.core.guidance import guided_steps
from sd35bench.core.schedule import schedule
from sd35bench.errors import BackendError
from tests.backends.bare import SKIPPING, batch
from tests.backends.conftest import make_load


def test_guidance_acts_inside_its_interval_only() -> None:
    assert guided_steps((0.0, 1.0), 4) == {0, 1, 2, 3}
    assert guided_steps((0.25, 0.75), 4) == {1, 2}
    assert guided_steps((0.0, 0.01), 28) == {0}


@pytest.mark.parametrize(
    ("steps", "every", "kept"),
    [
        (8, 1, {0, 1, 2, 3, 4, 5, 6, 7}),
        (8, 2, {0, 1, 3, 5, 7}),
        (8, 3, {0, 1, 4, 7}),
        (2, 4, {0, 1}),
        (1, 4, {0}),
    ],
)
def test_the_mask_is_known_beforehand(steps: int, every: int, kept: set[int]) -> None:
    assert evaluated_steps(schedule("euler", steps, 3.0), every) == kept


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_velocity_straight_in_time_is_predicted_exactly(sampler: str) -> None:
    plan = schedule(sampler, 8, 3.0)
    asked: list[int] = []

    def straight(x: torch.Tensor, e: int) -> torch.Tensor:
        asked.append(plan.steps[e])
        return torch.full_like(x, plan.timesteps[e])

    predicted = predict_between(straight, plan, evaluated_steps(plan, 3))
    x = torch.zeros(1)
    found = [float(predicted(x, e)) for e in range(len(plan.timesteps))]
    assert found == pytest.approx(plan.timesteps, rel=1e-5)
    assert set(asked) == {0, 1, 4, 7}


def latents(path: Path, requests, **options) -> tuple[np.ndarray, int]:
    backend = CoreBackend(make_load(path, "core", **options))
    backend.keep_latents = True
    made = backend.generate(requests, [None] * len(requests))
    facts = backend.in_force
    backend.close()
    assert facts["step_cache"] == options.get("step_cache", 1)
    assert made.latents_last is not None
    assert made.evaluations is not None
    return made.latents_last, made.evaluations


def test_each_tier_moves_the_latents_a_little_and_saves_work(tiny_path: Path) -> None:
    requests = batch(1, steps=16)
    exact, calls = latents(tiny_path, requests)
    assert calls == 16
    cached, fewer = latents(tiny_path, requests, step_cache=2)
    assert fewer == 9
    interval, same = latents(tiny_path, requests, guidance_interval="0.1-0.9")
    assert same == 16
    spread = exact.std()
    for lossy in (cached, interval):
        assert 1e-4 < np.abs(lossy - exact).mean() < 0.5 * spread


def test_outside_the_interval_nothing_is_guided(tiny_path: Path) -> None:
    """Guidance that never acts on a step that runs is no guidance at all."""
    unguided, _ = latents(tiny_path, batch(2, cfg=1.0, steps=1))
    outside, _ = latents(tiny_path, batch(2, steps=1), guidance_interval="0.5-1")
    assert np.abs(outside - unguided).max() <= 1e-4


def test_skip_layers_act_where_guidance_does(tiny_path: Path) -> None:
    requests = batch(1, steps=10, skip_layer_guidance=SKIPPING)
    _, all_of_them = latents(tiny_path, requests)
    _, some = latents(tiny_path, requests, guidance_interval="0-0.3")
    assert all_of_them == 10 + 5
    assert some == 10 + 2


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_interval": "0.5"},
        {"guidance_interval": "0.6-0.2"},
        {"guidance_interval": "a-b"},
        {"step_cache": 0},
        {"step_cache": "2"},
        {"executor": "magic"},
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(tiny_path: Path, options: dict) -> None:
    with pytest.raises(BackendError, match=f"backend.{next(iter(options))}="):
        CoreBackend(make_load(tiny_path, "core", **options))
