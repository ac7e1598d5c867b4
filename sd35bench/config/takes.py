"""What a field of the command line takes: a number in a range, a word, a switch, a text."""

import math
import re
from dataclasses import dataclass
from typing import Any

from sd35bench.types import Scalar

__all__ = ["Choice", "Field", "Number", "Switch", "Text", "integer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """An integer or a finite real in a range; `above` makes the lower end exclusive."""

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False

    @property
    def allowed(self) -> str:
        """The range in words."""
        word = "an integer" if self.kind is int else "a number"
        if math.isinf(self.high):
            return f"{word} of at least {self.low:g}"
        if self.above:
            return f"{word} in ({self.low:g}, {self.high:g}]"
        return f"{word} from {self.low:.15g} to {self.high:.15g}"

    def check(self, value: Any) -> Scalar | None:
        """Return the value as its type, or None if it is not allowed."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.kind is int and not isinstance(value, int):
            return None
        if not math.isfinite(value):
            return None
        inside = self.low < value <= self.high if self.above else self.low <= value <= self.high
        return self.kind(value) + 0 if inside else None  # + 0 turns -0.0 into 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a few words; `why` is said when another is asked for."""

    words: tuple[str, ...]
    why: str = ""

    @property
    def allowed(self) -> str:
        """The words."""
        words = ", ".join(self.words)
        return (words if len(self.words) == 1 else f"one of {words}") + self.why

    def check(self, value: Any) -> Scalar | None:
        """Return the value, or None if it is not allowed."""
        return value if isinstance(value, str) and value in self.words else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Any text, or what `pattern` matches; empty only if that means something."""

    allowed: str = "a text"
    pattern: re.Pattern[str] | None = None
    empty: bool = False

    def check(self, value: Any) -> Scalar | None:
        """Return the value, or None if it is not allowed."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value}"  # a study may be called 2026
        if not isinstance(value, str) or "\0" in value or not (value or self.empty):
            return None
        if self.pattern is not None and (
            self.pattern.fullmatch(value) is None or value.endswith((".", ".tmp"))
        ):
            return None
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """True or false."""

    allowed: str = "true or false"

    def check(self, value: Any) -> Scalar | None:
        """Return the value, or None if it is not allowed."""
        return value if isinstance(value, bool) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """An override name: what it takes, what it means, its default in words."""

    name: str
    takes: Number | Choice | Switch | Text
    means: str
    default: str
    axis: bool = False
    nullable: bool = False


def integer(low: float, high: float) -> Number:
    """What takes an integer from `low` to `high`."""
    return Number(kind=int, low=low, high=high)
