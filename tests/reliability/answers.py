"""What the fake backend must answer to a request: computed here, not asked of the server."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sd35bench.backends.fake import FakeBackend
from sd35bench.server.schema import read_create, to_request
from sd35bench.server.settings import ServedModel
from sd35bench.study.store import decode_rgb
from tests.studies.fakes import fake_load

__all__ = ["body_of", "is_own_image"]

_FAKE = FakeBackend(fake_load())


def body_of(prompt: str, seed: int) -> dict[str, Any]:
    """A create that is like no other: its image depends on prompt and seed. PNG, so exact."""
    wanted = {"prompt": prompt, "seed": seed, "steps": 4, "cfg": 5.0, "output_format": "png"}
    return {"model": "nano", "input": wanted}


def is_own_image(data: bytes, body: Mapping[str, Any], model: ServedModel) -> bool:
    """Whether a file shows, pixel by pixel, what was asked for with `body`."""
    request = to_request(read_create(body, model).input, model, None)
    own = _FAKE.generate([request], [None]).images[0]
    try:
        return np.array_equal(decode_rgb(data), own)
    except (OSError, ValueError):
        return False
