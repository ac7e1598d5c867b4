"""The axes that are searched, as grids: what is tried twice has one key, and is made once.

Continuous axes are rounded to a grid, so that two proposals that nobody could tell apart are the
same trial. The product of the grids is what an exhaustive search would try.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sd35bench import fields
from sd35bench.types import Scalar

Point = tuple[Scalar, ...]
"""One value per axis, in the space's order."""

GRIDS: Mapping[str, float] = {**fields.GRIDS, "skip_layer_scale": 0.5}
"""Distance of neighbouring values on a continuous axis, where the user states none."""

_DIGITS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A named axis and its values, each once; `ordered` says whether they lie on a line."""

    name: str
    values: tuple[Scalar, ...]
    ordered: bool


@dataclass(frozen=True, slots=True)
class Space:
    """The axes of a search, in a fixed order."""

    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        """Points of the full grid."""
        return math.prod(len(axis.values) for axis in self.axes)

    def value(self, point: Point, name: str) -> Scalar:
        """A point's value on an axis; ``None`` where there is no such axis."""
        for axis, value in zip(self.axes, point, strict=True):
            if axis.name == name:
                return value
        return None

    def named(self, point: Point) -> dict[str, Scalar]:
        """A point as axis names and values."""
        return {axis.name: value for axis, value in zip(self.axes, point, strict=True)}

    def nearest(self, wanted: Mapping[str, Scalar]) -> Point:
        """Return the grid's point nearest to `wanted`; a free axis gets its middle value."""
        return tuple(_nearest(axis, wanted.get(axis.name)) for axis in self.axes)

    def point(self, number: int) -> Point:
        """Return the `number`-th point of the full grid, the last axis running fastest."""
        picked: list[Scalar] = []
        for axis in reversed(self.axes):
            number, index = divmod(number, len(axis.values))
            picked.append(axis.values[index])
        return tuple(reversed(picked))


def spread(low: float, high: float, step: float) -> tuple[float, ...]:
    """Values from `low` to `high`, `step` apart; `high` is always the last.

    Raises: ValueError for `step` <= 0 or an empty range.
    """
    if not step > 0 or not low < high:
        raise ValueError(f"{low:g}:{high:g}:{step:g}: needs LOW < HIGH and a step above 0")
    count = math.floor((high - low) / step + 1e-9)
    values = [round(low + i * step, _DIGITS) for i in range(count + 1)]
    if high - values[-1] > 1e-9:
        values.append(high)
    return tuple(values)


def _nearest(axis: Axis, wanted: Scalar) -> Scalar:
    if wanted in axis.values:
        return wanted
    if not isinstance(wanted, int | float) or not axis.ordered:
        return axis.values[len(axis.values) // 2 if axis.ordered else 0]
    known = [v for v in axis.values if isinstance(v, int | float)]
    return min(known, key=lambda value: abs(value - wanted))
