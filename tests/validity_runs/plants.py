"""Defects inside a backend: what somebody could commit by mistake, behind unchanged requests.

A `Plant` sees every batch on its way in and every generation on its way out. The worker that the
harness starts picks the one that `SD35BENCH_PLANT` names (`site/sitecustomize.py`); a backend says
nothing of it in `in_force`.
"""

import io
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from sd35bench.backends.base import Generation
from sd35bench.backends.fake import FakeBackend
from sd35bench.types import Load, Request, Task

SLOWER = 0.1
LARGER = 0.2
EVERY = 20
"""One image of so many is black: 5 %."""
JPEG_QUALITY = 10
LAST_SIGMA = 0.02


class Plant:
    """No defect: the control, which shows that planting itself changes nothing."""

    def loaded(self, backend: Any) -> None:
        """Change the loaded backend once it has proven itself."""

    def asked(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Change what the backend makes instead of what was asked for."""
        return requests

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        """Change what was made in `elapsed_s`, or spend something on the way."""
        return generation


class Guidance(Plant):
    """`cond + s (cond - uncond)` for `uncond + s (cond - uncond)`: the same as a scale of s + 1."""

    def asked(self, requests: Sequence[Request]) -> Sequence[Request]:
        return [replace(r, cfg=r.cfg + 1.0 if r.cfg > 1 else r.cfg) for r in requests]


class StepLess(Plant):
    """A loop that ends before its last step."""

    def asked(self, requests: Sequence[Request]) -> Sequence[Request]:
        return [replace(r, steps=r.steps - 1) for r in requests]


class SeedsIgnored(Plant):
    """One generator seed for everybody."""

    def asked(self, requests: Sequence[Request]) -> Sequence[Request]:
        return [replace(r, seed=0) for r in requests]


class Shuffled(Plant):
    """Every second image is made for the prompt before its own: an off-by-one in a batch."""

    def __init__(self) -> None:
        self._before: str | None = None
        self._count = 0

    def asked(self, requests: Sequence[Request]) -> Sequence[Request]:
        changed = []
        for request in requests:
            self._count += 1
            wrong = self._before if self._count % 2 == 0 else None
            changed.append(request if wrong is None else replace(request, prompt=wrong))
            self._before = request.prompt
        return changed


class Jpeg(Plant):
    """Images that went through JPEG at quality 10 on their way to a PNG."""

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        return replace(generation, images=[_through_jpeg(image) for image in generation.images])


class Red(Plant):
    """Three levels more red: a colour profile that somebody applied, or left out."""

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        return replace(generation, images=[more_red(image) for image in generation.images])


class Gamma(Plant):
    """Gamma 1.02: another conversion between linear and stored values."""

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        return replace(generation, images=[with_gamma(image) for image in generation.images])


class Bfloat16(Plant):
    """What the transformer predicts, rounded to bf16: half of a precision that nobody asked for."""

    def loaded(self, backend: Any) -> None:
        transformer = backend.family.pipe.transformer
        plain = transformer.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            first, *rest = plain(*arguments, **named)
            return (first.bfloat16().float(), *rest)

        transformer.forward = forward


class LastSigma(Plant):
    """A schedule that ends at a sigma of 0.02: a fiftieth of the noise is never taken out."""

    def loaded(self, backend: Any) -> None:
        scheduler = type(backend.family.own_scheduler)
        plain = scheduler.set_timesteps

        def set_timesteps(own: Any, *arguments: Any, **named: Any) -> None:
            plain(own, *arguments, **named)
            own.sigmas[-1] = LAST_SIGMA

        scheduler.set_timesteps = set_timesteps


class Nearest(Plant):
    """Init images brought to size by their nearest pixels."""

    def loaded(self, backend: Any) -> None:
        processor = backend.family.pipes[Task.IMAGE_TO_IMAGE].image_processor
        processor.register_to_config(resample="nearest")


class Slower(Plant):
    """Every call takes a tenth longer."""

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        time.sleep(SLOWER * elapsed_s)
        return generation


class Larger(Plant):
    """A buffer that nobody frees: a fifth of what the process needs without it."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.uint8)

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wanted = int(LARGER * (peak - len(self._held)))
        if wanted > len(self._held):
            self._held = np.empty(0, np.uint8)  # the old one first, or both count
            self._held = np.ones(wanted, np.uint8)
        return generation


class Failures(Plant):
    """One image of 20 is black, as half precision makes them."""

    def __init__(self) -> None:
        self._count = 0

    def made(self, generation: Generation, elapsed_s: float) -> Generation:
        images = []
        for image in generation.images:
            self._count += 1
            images.append(np.zeros_like(image) if self._count % EVERY == 0 else image)
        return replace(generation, images=images)


PLANTS: dict[str, type[Plant]] = {
    "control": Plant,
    "guidance": Guidance,
    "step": StepLess,
    "seeds": SeedsIgnored,
    "shuffled": Shuffled,
    "jpeg": Jpeg,
    "slower": Slower,
    "memory": Larger,
    "failures": Failures,
    "red": Red,
    "gamma": Gamma,
    "bf16": Bfloat16,
    "sigma": LastSigma,
    "nearest": Nearest,
}


class Planted:
    """Mixed into a backend class, it puts the plant between the worker and the backend."""

    def __init__(self, load: Load) -> None:
        self._plant: Plant = Plant()  # calibration and proofs run without the defect
        super().__init__(load)  # type: ignore[call-arg]
        self._plant = PLANTS[os.environ["SD35BENCH_PLANT"]]()
        self._plant.loaded(self)

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        started = time.perf_counter()
        made = super().generate(self._plant.asked(requests), inits)  # type: ignore[misc]
        return self._plant.made(made, time.perf_counter() - started)


class PlantedFake(Planted, FakeBackend):
    """The backend without a model, with a defect in it."""


def more_red(image: np.ndarray) -> np.ndarray:
    """An image [h, w, 3] with 3 levels of 255 more red."""
    changed = image.copy()
    changed[..., 0] = np.minimum(changed[..., 0].astype(np.int16) + 3, 255)
    return changed


def with_gamma(image: np.ndarray) -> np.ndarray:
    """An image whose values, from 0 to 1, were raised to the power of 1.02."""
    return np.round(255.0 * (image / 255.0) ** 1.02).astype(np.uint8)


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer))
