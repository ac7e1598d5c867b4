"""Guidance rules, interval and step cache: diffusers' guiders, diffusers' loop, and the core's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance
from diffusers.guiders.classifier_free_zero_star_guidance import ClassifierFreeZeroStarGuidance
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)

from sd35bench.backends import guided
from sd35bench.backends.core import CoreBackend
from sd35bench.backends.eager import EagerBackend
from sd35bench.core import guidance as rules
from sd35bench.core.guidance import (
    EVALUATIONS_PER_STEP,
    Guidance,
    Kind,
    evaluation_steps,
    guide,
    plan_calls,
)
from sd35bench.core.schedule import schedule
from sd35bench.errors import UnsupportedRequest
from sd35bench.evaluations import evaluations, sequences, work
from sd35bench.fields import GUIDES
from sd35bench.types import Request, Task
from tests.backends.bare import I2I, SKIPPING, batch, make_inits
from tests.backends.conftest import make_load, make_request

KNOBS: dict[str, dict[str, Any]] = {
    "zero-star": {"guidance": "cfg-zero-star"},
    "zero-star-no-init": {"guidance": "cfg-zero-star", "zero_init_steps": 0},
    "apg": {"guidance": "apg"},
    "apg-all": {"guidance": "apg", "apg_eta": 0.3, "apg_norm": 2.0, "apg_momentum": -0.5},
    "interval": {"guidance_interval": "0.2-0.7"},
    "cache": {"step_cache": "2"},
    "mask": {"step_cache": "0-1-2-5"},
    "all": {"guidance": "apg", "guidance_interval": "0.2-0.9", "step_cache": "2"},
    "skipping": {"guidance": "cfg-zero-star", "skip_layer_guidance": SKIPPING},
}


# The pure functions ------------------------------------------------------------------------------


def test_every_evaluation_has_the_step_that_the_schedule_gives_it() -> None:
    for sampler in EVALUATIONS_PER_STEP:
        for skip in (0, 3):
            found = evaluation_steps(2 if sampler == "heun" else 1, skip, 8)
            assert found == schedule(sampler, 8, 3.0, skip=skip).steps


@pytest.fixture(scope="module")
def halves() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Velocities without and with the prompt, of three evaluations of two images."""
    made = torch.Generator().manual_seed(7)
    pairs = torch.randn(3, 2, 2, 4, 8, 8, generator=made)
    return [(empty, empty + 0.3 * text) for empty, text in pairs]


def of_guider(guider: Any, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    found = []
    for step, (empty, text) in enumerate(halves):
        guider.set_state(step=step, num_inference_steps=len(halves), timestep=torch.tensor(0.0))
        guider.prepare_inputs({})
        found.append(guider.forward(text, empty).pred)
    return found


class Halves:
    """A denoiser that knows its answers."""

    def __init__(self, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._halves = halves

    def both(self, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._halves[e]

    def alone(self, x: torch.Tensor, e: int) -> torch.Tensor:
        return self._halves[e][1]

    def without(self, x: torch.Tensor, e: int, layers: tuple[int, ...]) -> torch.Tensor:
        raise AssertionError("no layers are left out here")


def ours(how: Guidance, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    steps = range(len(halves))
    velocity = guide(how, plan_calls(how, steps, len(halves)), list(steps), Halves(halves))
    return [velocity(empty, e) for e, (empty, _) in enumerate(halves)]


GUIDERS: dict[str, tuple[Guidance, Any]] = {
    "zero-star": (
        Guidance(scale=4.0, rule="cfg-zero-star"),
        lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0),
    ),
    "zero-star-2": (
        Guidance(scale=4.0, rule="cfg-zero-star", zero_init_steps=2),
        lambda: ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=2),
    ),
    "apg": (
        Guidance(scale=4.0, rule="apg", eta=0.25, norm=3.0, momentum=-0.5),
        lambda: AdaptiveProjectedGuidance(
            guidance_scale=4.0,
            adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_rescale=3.0,
            eta=0.25,
        ),
    ),
    "apg-projection": (
        Guidance(scale=4.0, rule="apg"),
        lambda: AdaptiveProjectedGuidance(
            guidance_scale=4.0, adaptive_projected_guidance_rescale=0.0, eta=0.0
        ),
    ),
}


def gap(name: str, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    how, guider = GUIDERS[name]
    pairs = zip(ours(how, halves), of_guider(guider(), halves), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", GUIDERS)
def test_rules_are_those_of_diffusers_guiders(name: str, halves) -> None:
    assert gap(name, halves) <= 1e-5  # float32 sums of 256 values in another order


@pytest.mark.parametrize(
    ("name", "function", "mutant"),
    [
        ("zero-star", "zero_star", lambda empty, text, scale: empty + scale * (text - empty)),
        ("apg", "project", lambda d, text, eta, norm: d),
        ("apg-projection", "project", lambda d, text, eta, norm: eta * d),
    ],
    ids=["no-fit", "no-projection", "nothing-across"],
)
def test_mutants_of_a_rule_differ_from_the_guiders(name, function, mutant, halves, monkeypatch):
    monkeypatch.setattr(rules, function, mutant)
    assert gap(name, halves) > 1e-3


def test_each_image_of_a_batch_is_guided_alone(halves) -> None:
    for how, _ in GUIDERS.values():
        whole = ours(how, halves)
        first = ours(how, [(empty[:1], text[:1]) for empty, text in halves])
        assert max(float((a[:1] - b).abs().max()) for a, b in zip(whole, first, strict=True)) < 1e-6


# What is evaluated --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "calls"),
    [
        ({}, (10, 0, 0)),
        ({"cfg": 1.0}, (0, 10, 0)),
        ({"guidance": "apg"}, (10, 0, 0)),
        ({"guidance": "cfg-zero-star"}, (9, 0, 0)),
        ({"guidance": "cfg-zero-star", "zero_init_steps": 0}, (10, 0, 0)),
        ({"guidance": "cfg-zero-star", "zero_init_steps": 2, "sampler": "heun"}, (15, 0, 0)),
        ({"guidance_interval": "0.2-0.7"}, (5, 5, 0)),
        ({"guidance_interval": "0.2-0.7", "sampler": "heun"}, (10, 9, 0)),
        ({"step_cache": "2"}, (6, 0, 0)),
        ({"step_cache": "0-1-4-8"}, (4, 0, 0)),
        # Steps 2 and 7 are evaluated since guidance begins and ends there.
        ({"step_cache": "9", "guidance_interval": "0.2-0.7"}, (1, 4, 0)),
        ({"skip_layer_guidance": SKIPPING}, (10, 0, 5)),
        ({"skip_layer_guidance": SKIPPING, "guidance_interval": "0-0.3"}, (3, 7, 2)),
        ({"skip_layer_guidance": SKIPPING, "guidance": "apg"}, (10, 0, 5)),
        ({"guidance_interval": "0-0.6", **I2I}, (2, 4, 0)),
    ],
    ids=str,
)
def test_the_cost_is_known_from_the_request_alone(given: dict, calls: tuple) -> None:
    found = work(make_request(steps=10, **given))
    assert found == calls
    assert found.sequences == 2 * calls[0] + calls[1] + calls[2]


@pytest.mark.parametrize(
    ("given", "seen", "carried"),
    [
        ({}, 10, 20),
        ({}, None, 20),
        ({"guidance_interval": "0.2-0.7"}, 10, 15),
        ({"skip_layer_guidance": SKIPPING}, 15, 25),
        ({"step_cache": "2"}, 6, 12),
        ({"cfg": 1.0}, 10, 10),
        ({}, 7, 14),  # not what was planned: all count alike
    ],
    ids=str,
)
def test_calls_that_were_seen_are_counted_by_what_they_carry(given, seen, carried) -> None:
    assert sequences(make_request(steps=10, **given), seen) == carried


# The diffusers backends and the core -------------------------------------------------------------


@pytest.fixture(scope="module")
def core(tiny_path: Path) -> Iterator[CoreBackend]:
    backend = CoreBackend(make_load(tiny_path, "core", executor="torch", device="cpu"))
    backend.keep_latents = True
    yield backend
    backend.close()


def latents(backend: EagerBackend | CoreBackend, requests: list[Request]) -> np.ndarray:
    backend.keep_latents = True
    made = backend.generate(requests, make_inits(requests))
    assert made.evaluations == evaluations(requests[0])
    assert len(made.step_s) == made.effective_steps
    assert min(made.step_s) >= 0
    assert made.latents_last is not None
    return made.latents_last


@pytest.mark.parametrize(
    ("name", "sampler"),
    [*((name, "euler") for name in KNOBS), ("all", "heun"), ("skipping", "heun"), ("all", "unipc")],
)
def test_core_and_eager_make_the_same_latents(eager, core, name: str, sampler: str) -> None:
    requests = batch(2, steps=6, sampler=sampler, **KNOBS[name])
    assert np.abs(latents(eager, requests) - latents(core, requests)).max() <= 1e-4


def test_core_and_eager_agree_in_image_to_image(eager, core) -> None:
    requests = batch(2, steps=8, **KNOBS["all"], **I2I)
    assert np.abs(latents(eager, requests) - latents(core, requests)).max() <= 1e-4


def test_every_knob_moves_the_image(core: CoreBackend) -> None:
    images = [
        core.generate([make_request(steps=6, **given)], [None]).images[0].tobytes()
        for given in ({}, *KNOBS.values())
    ]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("given", [{}, {"skip_layer_guidance": SKIPPING}, I2I], ids=str)
def test_the_neutral_case_through_the_wrapper_is_todays_to_the_bit(
    eager: EagerBackend, monkeypatch: pytest.MonkeyPatch, given: dict
) -> None:
    """Today's path has no wrapper at all; put around it, it changes no bit."""
    requests = batch(2, steps=6, **given)
    plain = latents(eager, requests)
    for module in ("pipeline", "families"):
        monkeypatch.setattr(f"sd35bench.backends.{module}.is_plain", lambda _: False)
    entered = []
    monkeypatch.setattr(guided._Forward, "_times", lambda self: entered.append(1) or [0.0] * 99)
    assert np.array_equal(latents(eager, requests), plain)
    assert entered


def test_the_pipeline_has_its_own_forward_back_after_a_failure(eager, monkeypatch) -> None:
    pipe = eager._pipes[Task.TEXT_TO_IMAGE]
    before = pipe.transformer.__dict__["forward"]

    def fail(*_: Any) -> Any:
        raise RuntimeError("no such rule")

    monkeypatch.setattr(guided, "guide", fail)
    with pytest.raises(Exception, match="no such rule"):
        eager.generate([make_request(guidance="apg")], [None])
    assert pipe.transformer.__dict__["forward"] is before


def test_a_family_whose_pipeline_guides_otherwise_refuses_by_name(eager, monkeypatch) -> None:
    monkeypatch.setattr(type(eager.family), "guides", False)
    with pytest.raises(UnsupportedRequest, match=r"guidance_interval=0-0\.5: only SD3"):
        eager.generate([make_request(guidance_interval="0-0.5")], [None])
    eager.generate([make_request(steps=1)], [None])


def test_a_guided_step_of_the_wrapper_calls_the_denoiser_as_planned(eager, monkeypatch) -> None:
    transformer = eager._pipes[Task.TEXT_TO_IMAGE].transformer
    inner, seen = transformer.forward, []

    def forward(**given: Any) -> Any:
        seen.append((len(given["hidden_states"]), "skip_layers" in given))
        return inner(**given)

    monkeypatch.setattr(transformer, "forward", forward)
    request = make_request(steps=5, guidance_interval="0.2-0.6", skip_layer_guidance=SKIPPING)
    eager.generate([request], [None])
    assert seen == [
        (1, False),
        (2, False),
        (1, True),
        (2, False),
        (1, True),
        (1, False),
        (1, False),
    ]


def test_diffusers_schedulers_tell_the_times_that_the_core_predicts_along() -> None:
    own: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_timesteps(8)
    assert own.timesteps.tolist() == pytest.approx(schedule("euler", 8, 3.0).timesteps, rel=1e-6)


def test_all_fields_of_guidance_are_neutral_in_a_plain_request() -> None:
    assert guided.is_plain(make_request())
    assert {k: getattr(make_request(), k) for k in GUIDES} == GUIDES
    assert Kind.PREDICTED not in {c.kind for c in plan_calls(Guidance(scale=4.0), range(4), 4)}
