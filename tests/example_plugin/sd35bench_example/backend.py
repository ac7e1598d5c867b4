"""A backend without a model: coloured squares, drawn from all that a request says."""

import hashlib

import numpy as np

from sd35bench.backends.base import Backend, Generation


class Squares(Backend):
    """Squares of `side_px`; an init image shines through as much as prompt_strength leaves."""

    def __init__(self, load):
        self._side_px = int(load.backend.options.get("side_px", 8))
        self.in_force = {"device": "cpu", "side_px": self._side_px}

    def generate(self, requests, inits):
        images = [self._image(r, i) for r, i in zip(requests, inits, strict=True)]
        steps = requests[0].effective_steps
        return Generation(
            images=images, evaluations=steps, effective_steps=steps, step_s=(0.0,) * steps
        )

    def _image(self, request, init):
        asked = (request.prompt, request.negative_prompt, request.seed, request.steps, request.cfg)
        rng = np.random.default_rng(list(hashlib.sha256(repr(asked).encode()).digest()))
        rows, columns = -(-request.height // self._side_px), -(-request.width // self._side_px)
        colours = rng.integers(0, 256, (rows, columns, 3), np.uint8)
        image = colours.repeat(self._side_px, 0).repeat(self._side_px, 1)
        image = image[: request.height, : request.width]
        if init is None:
            return image
        share = request.prompt_strength
        return np.rint(share * image + (1 - share) * init).astype(np.uint8)
