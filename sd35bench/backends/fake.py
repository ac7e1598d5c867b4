"""A backend that makes deterministic patterns without a model, for testing everything around one.

An image is a pure function of the request: noise from a hash of the prompt, seed and the other
fields, blended with the init image by the strength. Options: `delay_s` (wall seconds an image),
`fail_every` (every n-th prompt by hash raises), `load_delay_s`; `fault` (what of `FAULTS` befalls
the process), in `fault_phase`, for every n-th request by hash (`fault_every`); `unproven` (settling
finds that an optimisation is not in force).

Faults are ways in which a process really fails: nothing about them pretends.
"""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from threading import Event

import numpy as np
from PIL import Image

from sd35bench.backends.base import Backend, Generation
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.evaluations import evaluations
from sd35bench.fields import request_identity
from sd35bench.types import Load, Request, content_hash
from sd35bench.words import size_in

BLOCK_PX = 8
ALLOCATE_BYTES = 2 * 2**30
"""What `allocate` takes at most: without a limit it cannot take the machine down."""
STEP_BYTES = 16 * 2**20
STEP_S = 0.005
EXIT_CODE = 7
PHASES = ("load", "warm-up", "generate")


def _allocate() -> None:
    """Touch memory in small steps. Raises: MemoryError at `ALLOCATE_BYTES`."""
    held = []
    while len(held) * STEP_BYTES < ALLOCATE_BYTES:
        held.append(np.ones(STEP_BYTES, np.uint8))
        time.sleep(STEP_S)
    raise MemoryError(f"fault=allocate holds {size_in(ALLOCATE_BYTES, 'GB', 2)} and met no limit")


def _memory_error() -> None:
    raise MemoryError("fault=memory-error, by design")


def _segfault() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file in the user's folder
    ctypes.string_at(0)


FAULTS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "allocate": _allocate,
    "exit": lambda: os._exit(EXIT_CODE),
    "hang": lambda: Event().wait(),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "memory-error": _memory_error,
    "segfault": _segfault,
}
"""What each word of the option `fault` does to the process that calls it."""


class FakeBackend(Backend):
    """Deterministic patterns instead of a model."""

    def __init__(self, load: Load) -> None:
        """Wait `load_delay_s`, as loading would."""
        options = load.backend.options
        self._delay_s = float(options.get("delay_s", 0.0) or 0.0)
        self._fail_every = int(options.get("fail_every", 0) or 0)
        self._fault = FAULTS[str(options.get("fault", "none"))]
        self._fault_phase = str(options.get("fault_phase", "generate"))
        self._fault_every = int(options.get("fault_every", 1) or 0)
        self._unproven = bool(options.get("unproven", False))
        self._phase = PHASES[0]
        time.sleep(float(options.get("load_delay_s", 0.0) or 0.0))
        if self._fault_phase == self._phase:
            self._fault()
        self._phase = PHASES[1]
        self.in_force = {"fake": True, "delay_s": self._delay_s}

    def settle(self) -> None:
        """End the warm-up. Raises: OptimizationNotApplied with the option `unproven`."""
        if self._unproven:
            raise OptimizationNotApplied("unproven=true: the fake backend proves nothing by design")
        self.in_force = {**self.in_force, "settled": True}
        self._phase = PHASES[2]

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make one pattern per request; stages split the delay 1 : 8 : 1.

        Latents, where asked for, are the pattern's own blocks, [3, H/8, W/8] in [0, 1], and noise
        in place of them after the first step.
        """
        self._commit_fault(requests)
        images = [self._image(r, i) for r, i in zip(requests, inits, strict=True)]
        steps = requests[0].effective_steps
        delay_s = self._delay_s * len(requests)
        time.sleep(delay_s)
        last = np.stack([_blocks(r) for r in requests]).transpose(0, 3, 1, 2) / np.float32(255)
        noise = np.random.default_rng(_number(requests[0])).random(last.shape, np.float32)
        return Generation(
            images=images,
            evaluations=evaluations(requests[0]),
            effective_steps=steps,
            text_s=delay_s * 0.1,
            denoise_s=delay_s * 0.8,
            decode_s=delay_s * 0.1,
            step_s=tuple(delay_s * 0.8 / steps for _ in range(steps)),
            truncated_tokens=(0,) * len(requests),
            latents_first=noise if self.keep_latents else None,
            latents_last=last if self.keep_latents else None,
        )

    def _commit_fault(self, requests: Sequence[Request]) -> None:
        """Commit the fault if it is due in this phase for one of these requests."""
        if self._phase == self._fault_phase and any(
            self._fault_every and _number(r) % self._fault_every == 0 for r in requests
        ):
            self._fault()

    def _image(self, request: Request, init: np.ndarray | None) -> np.ndarray:
        if self._fail_every and _number(request) % self._fail_every == 0:
            digest = content_hash(request_identity(request))[:8]
            raise BackendError(f"fake backend fails on this request by design ({digest})")
        image = _blocks(request).repeat(BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)
        image = image[: request.height, : request.width]
        if init is None or request.prompt_strength is None:
            return np.ascontiguousarray(image)
        s = request.prompt_strength
        if init.shape != image.shape:
            init = np.asarray(Image.fromarray(init).resize((request.width, request.height)))
        return np.rint(s * image + (1 - s) * init).astype(np.uint8)


def _blocks(request: Request) -> np.ndarray:
    """The colours of a pattern's blocks, uint8 [H/8, W/8, 3]."""
    rng = np.random.default_rng(int(content_hash(request_identity(request))[:16], 16))
    rows, columns = -(-request.height // BLOCK_PX), -(-request.width // BLOCK_PX)
    return rng.integers(0, 256, size=(rows, columns, 3), dtype=np.uint8)


def _number(request: Request) -> int:
    """A number drawn by the request alone, for "every n-th"."""
    return int(content_hash(request_identity(request))[:8], 16)
