"""What every backend must do, whatever it is made of. Adding one is one line in `CONTESTANTS`."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sd35_kernels.w8a8.cpu import EXACT
from sd35bench.backends.base import Backend, Generation, load_backend
from sd35bench.backends.contract import (
    IMAGE_CHECKS,
    TEXT_CHECKS,
    Check,
    ContractBroken,
    Subject,
    check_batch_has_own_seeds,
    check_every_field_acts,
    check_negative_prompt_acts,
    check_same_request_same_bytes,
    check_steps_from_an_init_are_counted,
    check_strength_leads_away_from_the_init,
    distance,
)
from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.fake import FakeBackend
from sd35bench.backends.pipeline import generator
from sd35bench.evaluations import evaluations
from sd35bench.types import Request
from tests.backends.bare import IDENTICAL, bare_images, batch, make_inits
from tests.backends.conftest import make_load, make_request, untraced


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A backend under the contract.

    `batch_levels`: how far, in 8-bit levels, an image may move when it is made in a batch.
    `reference_levels`: how far, in 8-bit levels on average, images may be from bare diffusers'
    in fp32; ``None`` where no model makes them. `traced`: whether Dynamo captures the graphs, as in
    the slow tests.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    batch_levels: int = 0
    reference_levels: float | None = 0.1
    traced: bool = True


# Seen: bf16 moves images by 1.4 to 1.5 levels; the mildest mutant (shift 1) by 3.3.
BF16_LEVELS = 1.8
CONTESTANTS = [
    Contestant(name="fake", kind="fake", reference_levels=None),
    Contestant(name="eager", kind="eager", batch_levels=1, reference_levels=0),
    # Dynamo takes 6 s a shape; what it captures and its images are in test_compile.
    Contestant(
        name="compile",
        kind="compile",
        options={"compiler": "aot_eager", "vae": False},
        batch_levels=1,
        traced=False,
    ),
    Contestant(
        name="core-torch",
        kind="core",
        options={"device": "cpu", "executor": "torch"},
        batch_levels=1,
    ),
    Contestant(name="onnx", kind="onnx", options={"device": "cpu"}, batch_levels=1),
    # Activations share one scale per product, so whoever else is in the batch moves it (29 seen).
    Contestant(
        name="onnx-int8",
        kind="onnx",
        options={"device": "cpu", "quantisation": "int8"},
        batch_levels=64,
        reference_levels=3.0,
    ),
    Contestant(name="int8", kind="int8", batch_levels=1, reference_levels=1.8),
]
# Inductor runs g++ for a minute per contestant. bf16 is in test_eager.
SLOW_CONTESTANTS = [
    Contestant(
        name="eager-bf16",
        kind="eager",
        options={"dtype": "bf16"},
        batch_levels=4,
        reference_levels=BF16_LEVELS,
    ),
    Contestant(name="compile-inductor", kind="compile", options={"dynamic": True}, batch_levels=1),
    Contestant(
        name="compile-bf16",
        kind="compile",
        options={"compiler": "aot_eager", "dtype": "bf16"},
        batch_levels=4,
        reference_levels=BF16_LEVELS,
    ),
]
W8A8_CONTESTANTS = [
    # A product summed in another order tips a rounding over here and there.
    Contestant(
        name="int8-w8a8",
        kind="w8a8",
        options={"compiler": "aot_eager"},
        batch_levels=4,
        reference_levels=1.8,
        traced=False,
    ),
]
CORE_CONTESTANTS = [
    Contestant(name="core", kind="core", options={"device": "cpu"}, batch_levels=1),
    Contestant(
        name="core-int8",
        kind="core",
        options={"device": "cpu", "quantisation": "int8"},
        batch_levels=4,
        reference_levels=1.8,
    ),
]
NO_CPP = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for the core"
)
NO_VNNI = pytest.mark.skipif(not EXACT, reason="this CPU's int8 products saturate: no VNNI")
OPENVINO_CONTESTANTS = [
    Contestant(name="openvino", kind="openvino", options={"device": "cpu"}, batch_levels=1),
]
NO_OPENVINO = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra [openvino] is not installed"
)
INIT = np.random.default_rng(3).integers(0, 256, (4, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)


CHECKS = (*TEXT_CHECKS, *IMAGE_CHECKS)
ALL = [
    *CONTESTANTS,
    *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW_CONTESTANTS),
    *(pytest.param(c, marks=NO_VNNI) for c in W8A8_CONTESTANTS),
    *(
        pytest.param(replace(c, name=f"{c.name}-traced", traced=True), marks=marks)
        for c, marks in (
            *((c, [pytest.mark.slow]) for c in CONTESTANTS if not c.traced),
            *((c, [pytest.mark.slow, NO_VNNI]) for c in W8A8_CONTESTANTS),
        )
    ),
    *(
        pytest.param(c, marks=[NO_CPP, *([NO_VNNI] if "int8" in c.name else [])])
        for c in CORE_CONTESTANTS
    ),
    *(pytest.param(c, marks=NO_OPENVINO) for c in OPENVINO_CONTESTANTS),
]


@pytest.fixture(scope="module", params=ALL, ids=lambda c: c.name)
def contestant(request: pytest.FixtureRequest) -> Contestant:
    return request.param


@pytest.fixture(scope="module")
def backend(
    contestant: Contestant, tiny_path: Path, request: pytest.FixtureRequest
) -> Iterator[Backend]:
    """Shared by all checks; closing it a second time must do no harm."""
    if contestant.kind in ("onnx", "openvino"):
        request.getfixturevalue("tiny_graph")
    with nullcontext() if contestant.traced else untraced():
        loaded = load_backend(make_load(tiny_path, contestant.kind, **contestant.options))
    yield loaded
    loaded.synchronize()
    loaded.close()
    loaded.close()


def make(backend: Backend, *requests: Request) -> Generation:
    """One batch; requests with an init image start from `INIT`."""
    return backend.generate(requests, [None if r.init_image is None else INIT for r in requests])


def image(backend: Backend, **changes: Any) -> np.ndarray:
    return make(backend, make_request(**changes)).images[0]


# Batches of two, as in other checks: a compiled backend compiles for each new size of batch.
REFERENCE = {"text-batch-2": batch(2), "image-batch-2": IDENTICAL["image-batch-2"]}


@pytest.fixture(scope="session")
def references(tiny_path: Path) -> dict[str, list[np.ndarray]]:
    """Bare diffusers' images of `REFERENCE`."""
    return {kind: bare_images(tiny_path, requests) for kind, requests in REFERENCE.items()}


def reference_distance(
    backend: Backend, kind: str, references: dict[str, list[np.ndarray]]
) -> float:
    """How far the worst image of a batch is from bare diffusers'."""
    requests = REFERENCE[kind]
    made = backend.generate(requests, make_inits(requests)).images
    return max(distance(a, b) for a, b in zip(made, references[kind], strict=True))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_backend_keeps_the_contract(contestant: Contestant, backend: Backend, check: Check) -> None:
    check(Subject(backend, make_request(), contestant.batch_levels))


def test_batch_of_edits_equals_singles(contestant: Contestant, backend: Backend) -> None:
    changes = {"init_image": "digest", "prompt_strength": 0.6}
    requests = [
        make_request(prompt=prompt, seed=seed, **changes)
        for prompt, seed in (("red circle", 0), ("blue star", 5))
    ]
    singles = [make(backend, request).images[0] for request in requests]
    together = make(backend, *requests).images
    moved = [np.abs(a.astype(int) - b).max() for a, b in zip(singles, together, strict=True)]
    assert max(moved) <= contestant.batch_levels


@pytest.mark.parametrize("kind", REFERENCE)
def test_images_are_bare_diffusers(
    contestant: Contestant,
    backend: Backend,
    references: dict[str, list[np.ndarray]],
    kind: str,
) -> None:
    if contestant.reference_levels is None:
        pytest.skip("no model makes its images")
    apart = reference_distance(backend, kind, references)
    print(f"{contestant.name} {kind}: {apart:.3f} levels")
    assert apart <= contestant.reference_levels


class WrongGuidance(EagerBackend):
    """text + s (text - uncond) instead of uncond + s (text - uncond)."""

    def _arguments(self, *args: Any) -> dict[str, Any]:
        arguments = super()._arguments(*args)
        return {**arguments, "guidance_scale": arguments["guidance_scale"] + 1}


class OneSeed(EagerBackend):
    """The first request's seed for the whole batch."""

    def _arguments(self, requests: Sequence[Request], *args: Any) -> dict[str, Any]:
        same = [replace(r, seed=requests[0].seed) for r in requests]
        arguments = super()._arguments(requests, *args)
        return {**arguments, "generator": [generator(r.seed) for r in same]}


class ShiftOne(EagerBackend):
    """A scheduler that forgot the model's shift."""

    def prepare(self, pipe: Any) -> None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=1.0)


class NoScalingFactor(EagerBackend):
    """Latents that go into and out of the VAE unscaled."""

    def prepare(self, pipe: Any) -> None:
        pipe.vae.register_to_config(scaling_factor=1.0)


class SwappedTextEncoders(EagerBackend):
    """The two CLIP encoders in each other's place."""

    def prepare(self, pipe: Any) -> None:
        pipe.text_encoder, pipe.text_encoder_2 = pipe.text_encoder_2, pipe.text_encoder


MUTANTS = [WrongGuidance, OneSeed, ShiftOne, NoScalingFactor, SwappedTextEncoders]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_reference_catches_a_broken_backend(
    tiny_path: Path, references: dict[str, list[np.ndarray]], mutant: type[EagerBackend]
) -> None:
    backend = mutant(make_load(tiny_path))
    apart = {kind: reference_distance(backend, kind, references) for kind in REFERENCE}
    backend.close()
    print(f"{mutant.__name__}: {apart} levels")
    # Clear of every exact or half-precision contestant.
    assert min(apart.values()) > 1.5 * BF16_LEVELS


def test_guidance_and_step_cache_cost_what_is_planned(backend: Backend) -> None:
    asked = make_request(
        steps=4, guidance="apg", step_cache="0-1-3"
    )  # no shape but the plain one's
    made = backend.generate([asked], [None])
    assert made.evaluations == evaluations(asked) == 3
    plain = backend.generate([make_request(steps=4)], [None])
    assert not np.array_equal(made.images[0], plain.images[0])


def test_size_is_what_was_asked(contestant: Contestant, backend: Backend) -> None:
    # One more graph of Dynamo takes 6 s, and test_compile has another size.
    is_traced = contestant.kind == "compile" and contestant.traced
    width, height = (64, 32) if is_traced else (32, 80)
    made = image(backend, width=width, height=height)
    assert made.shape == (height, width, 3)
    assert made.dtype == np.uint8


def test_one_truncation_count_per_request(backend: Backend) -> None:
    assert make(backend, make_request(), make_request(seed=1)).truncated_tokens == (0, 0)


class Broken(FakeBackend):
    """A fake backend with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(make_load(Path("none"), "fake"))
        self._fault = fault
        self._calls = 0

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        self._calls += 1
        first = requests[0]
        faults: dict[str, dict[str, Any]] = {
            "unseeded": {"seed": self._calls},
            "one-seed": {"seed": first.seed},
            "no-cfg": {"cfg": 1.0},
            "no-negative": {"negative_prompt": ""},
        }
        changed = [replace(r, **faults.get(self._fault, {})) for r in requests]
        if self._fault == "no-strength" and first.prompt_strength is not None:
            changed = [replace(r, prompt_strength=0.5) for r in requests]
        made = super().generate(changed, inits)
        if self._fault == "no-count":
            return replace(made, evaluations=first.steps)
        return made


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("unseeded", check_same_request_same_bytes),
        ("no-cfg", check_every_field_acts),
        ("no-negative", check_negative_prompt_acts),
        ("one-seed", check_batch_has_own_seeds),
        ("no-strength", check_strength_leads_away_from_the_init),
        ("no-count", check_steps_from_an_init_are_counted),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contract_notices(fault: str, check: Check) -> None:
    with pytest.raises(ContractBroken):
        check(Subject(Broken(fault), make_request()))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_passes_without_a_fault(check: Check) -> None:
    check(Subject(Broken("none"), make_request()))
