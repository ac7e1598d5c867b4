"""A backend that makes deterministic patterns without a model, for testing everything around one.

An image is a pure function of the request: noise from a hash of the prompt, seed and the other
fields, blended with the init image by the strength. Options: `delay_s` (wall seconds an image),
`fail_every` (every n-th prompt by hash raises), `load_delay_s`.
"""

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sd35bench.backends.base import Backend, Generation
from sd35bench.errors import BackendError
from sd35bench.types import Load, Request, content_hash, to_json

__all__ = ["FakeBackend"]

BLOCK_PX = 8


class FakeBackend(Backend):
    """Deterministic patterns instead of a model."""

    def __init__(self, load: Load) -> None:
        """Wait `load_delay_s`, as loading would."""
        options = load.backend.options
        self._delay_s = float(options.get("delay_s", 0.0) or 0.0)
        self._fail_every = int(options.get("fail_every", 0) or 0)
        time.sleep(float(options.get("load_delay_s", 0.0) or 0.0))
        self.in_force = {"fake": True, "delay_s": self._delay_s}

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make one pattern per request; stages split the delay 1 : 8 : 1."""
        images = [self._image(r, i) for r, i in zip(requests, inits, strict=True)]
        steps = requests[0].effective_steps
        delay_s = self._delay_s * len(requests)
        time.sleep(delay_s)
        return Generation(
            images=images,
            evaluations=steps,
            effective_steps=steps,
            text_s=delay_s * 0.1,
            denoise_s=delay_s * 0.8,
            decode_s=delay_s * 0.1,
            step_s=tuple(delay_s * 0.8 / steps for _ in range(steps)),
            truncated_tokens=(0,) * len(requests),
        )

    def _image(self, request: Request, init: np.ndarray | None) -> np.ndarray:
        digest = content_hash(to_json(request))
        if self._fail_every and int(digest[:8], 16) % self._fail_every == 0:
            raise BackendError(f"fake backend fails on this request by design ({digest[:8]})")
        rng = np.random.default_rng(int(digest[:16], 16))
        rows, columns = -(-request.height // BLOCK_PX), -(-request.width // BLOCK_PX)
        blocks = rng.integers(0, 256, size=(rows, columns, 3), dtype=np.uint8)
        image = blocks.repeat(BLOCK_PX, axis=0).repeat(BLOCK_PX, axis=1)
        image = image[: request.height, : request.width]
        if init is None or request.prompt_strength is None:
            return np.ascontiguousarray(image)
        s = request.prompt_strength
        if init.shape != image.shape:
            init = np.asarray(Image.fromarray(init).resize((request.width, request.height)))
        return np.rint(s * image + (1 - s) * init).astype(np.uint8)
