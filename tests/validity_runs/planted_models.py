"""The backends that hold a real model, with a defect in them, and the defect of their weights."""

from typing import Any

import torch

from sd35bench.backends.eager import EagerBackend
from sd35bench.backends.int8 import Int8Backend
from tests.validity_runs.plants import PLANTS, Plant, Planted

__all__ = ["Int4", "PlantedEager", "PlantedInt8", "to_four_bits"]


class Int4(Plant):
    """Weights stored as int8 that hold 15 levels, planted after the backend's own proof."""

    def loaded(self, backend: Any) -> None:
        from optimum.quanto import QLinear

        for layer in backend.family.pipe.transformer.modules():
            if isinstance(layer, QLinear):
                to_four_bits(layer.weight._data)


def to_four_bits(levels: torch.Tensor) -> None:
    """Round int8 levels [out, in], in place, to the 15 that symmetric int4 has per output."""
    with torch.no_grad():
        largest = levels.abs().amax(dim=1, keepdim=True).clamp(min=1).float()
        step = largest / 7
        levels.copy_(((levels.float() / step).round() * step).round().to(levels.dtype))


class PlantedEager(Planted, EagerBackend):
    """The reference backend with a defect in it."""


class PlantedInt8(Planted, Int8Backend):
    """The int8 backend with a defect in it."""


PLANTS["int4"] = Int4
