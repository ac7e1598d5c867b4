"""Numbers in words: where a measured figure, an interval or a share becomes text.

A value that was typed is repeated elsewhere too, as it was typed (`:g`); a test finds the rest.

A figure has as many digits as its interval supports, its unit, and never a 0 that was not measured.
An interval is written ``0.77 [0.60, 0.88]`` everywhere.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MISSING = "–"
_FINEST = 6
"""Decimals of a second beyond which no clock tells two ends apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval and its sample count; unknown parts are ``None``.

    `needs` is the sample count below which the figure is refused; `note` says why in words.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    needs: int | None = None
    note: str | None = None

    @property
    def has_interval(self) -> bool:
        """Both ends are known."""
        return self.low is not None and self.high is not None

    @property
    def without_interval(self) -> "Estimate":
        """The value alone, for a table that has no room."""
        return Estimate(value=self.value, n=self.n)


def read_estimate(raw: Mapping[str, Any] | float | None, value: str = "value") -> Estimate:
    """Read an entry of a document, ``{"value", "ci95", "n", "needs", "reason"}``, or a number.

    `value` is the key of the value where it is another.
    """
    if not isinstance(raw, Mapping):
        return Estimate(value=raw)
    low, high = raw.get("ci95") or (None, None)
    return Estimate(
        value=raw.get(value),
        low=low,
        high=high,
        n=raw.get("n"),
        needs=raw.get("needs"),
        note=raw.get("reason"),
    )


# Digits ---------------------------------------------------------------------------------------


def decimals_for(figure: Estimate) -> int:
    """Decimals that the interval's half-width supports; three digits where there is none.

    One digit of the half-width, two where it begins with 1; figures below 1 keep two decimals.
    """
    if figure.value is None:
        return 0
    half = 0.0
    if figure.low is not None and figure.high is not None:
        half = (figure.high - figure.low) / 2
    if half > 0:
        first = math.floor(math.log10(half))
        begins_with_1 = half / 10**first < 2
        least = 2 if abs(figure.value) <= 1 else 0
        return _clamp_decimals(max(least, -first + begins_with_1))
    if figure.value == 0:
        return 2
    return _clamp_decimals(2 - math.floor(math.log10(abs(figure.value))))


def _clamp_decimals(decimals: int) -> int:
    return max(0, min(4, decimals))


def column_decimals(estimates: Iterable[Estimate | None]) -> int:
    """One number of decimals for a whole column (the median need), so that points line up."""
    needs = sorted(decimals_for(e) for e in estimates if e is not None and e.value is not None)
    return needs[len(needs) // 2] if needs else 2


def latency_decimals(figure: Estimate, column: int | None = None) -> int:
    """Like `decimals_for`, or what a column has; no finer than 1 ms for what takes 10 ms or more.

    At least two digits of the value, however wide its interval, and enough that the ends differ.
    """
    fine = figure.value is not None and figure.value < 0.01
    found = decimals_for(figure) if column is None else column
    found = found if fine else min(3, found)
    if figure.value:
        found = max(found, 1 - math.floor(math.log10(abs(figure.value))))
    low, high = figure.low, figure.high
    if low is not None and high is not None and low < high:
        while found < _FINEST and number(low, found) == number(high, found):
            found += 1
    return found


# Figures --------------------------------------------------------------------------------------


def number(value: float | None, decimals: int, sign: str = "") -> str:
    """`value` with fixed decimals; a dash where it is unknown; `sign` "+" shows a plus."""
    if value is None or math.isnan(value):
        return MISSING
    return format(value, f"{sign}.{decimals}f")


def interval(figure: Estimate, decimals: int, sign: str = "") -> str:
    """``[low, high]``, empty where there is no interval."""
    if not figure.has_interval:
        return ""
    ends = (number(end, decimals, sign) for end in (figure.low, figure.high))
    return bracketed(*ends)


def bracketed(low: str, high: str) -> str:
    """The two ends of an interval, which have their units and signs already."""
    return f"[{low}, {high}]"


def estimate(figure: Estimate | None, decimals: int | None = None, sign: str = "") -> str:
    """``value [low, high]``, or why there is none."""
    if figure is None:
        return MISSING
    if figure.value is None:
        return MISSING if figure.needs is None else f"needs n ≥ {count(figure.needs)}"
    digits = decimals_for(figure) if decimals is None else decimals
    value = number(figure.value, digits, sign)
    return f"{value} {interval(figure, digits, sign)}".strip()


def significant(value: float) -> str:
    """Three significant digits, never in exponents."""
    return number(value, decimals_for(Estimate(value=value)))


def count(value: float) -> str:
    """A whole number with commas between thousands."""
    return f"{value:,.0f}"


def plural(n: int, noun: str) -> str:
    """A number with its noun: ``1 setting``, ``2,400 images``."""
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


def digits(value: float, digits: int = 3, sign: str = "") -> str:
    """Significant digits, with an exponent where that is shorter."""
    return format(value, f"{sign}.{digits}g")


def scientific(value: float) -> str:
    """Two digits and an exponent, for what decimals would show as 0."""
    return f"{value:.1e}"


def plain(value: object) -> str:
    """A setting's value as a person types it: 4 not 4.0, a dash for ``None``."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def latency(figure: Estimate | None) -> str:
    """``0.113 [0.109, 0.115] s``, a dash where unknown."""
    if figure is None or figure.value is None:
        return MISSING
    return f"{estimate(figure, latency_decimals(figure))} s"


def seconds(seconds: float | None) -> str:
    """Seconds with three significant digits: ``0.112 s``, ``8.00 s``, ``134 s``."""
    if seconds is None:
        return MISSING
    if seconds == 0:
        return "0 s"
    return f"{significant(seconds)} s"


def size(count: int | float | None) -> str:
    """Bytes in MiB or GiB, a dash where unknown."""
    if count is None:
        return MISSING
    unit = next((unit for unit in ("GiB", "MiB") if count >= _UNITS[unit]), "KiB")
    return size_in(count, unit, 2 if unit == "GiB" else 0)


_UNITS = {"MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size_in(count: float, unit: str, decimals: int = 1) -> str:
    """Bytes in one unit whatever their size, for sizes that are held against each other."""
    return f"{number(count / _UNITS[unit], decimals)} {unit}"


def gib(count: float) -> str:
    """Memory beside its limit: ``1.25 GiB``."""
    return size_in(count, "GiB", 2)


def in_usd(dollars: float) -> str:
    """A price as messages name it, ``0.0375 USD``: four digits."""
    return f"{digits(dollars, 4)} USD"


def bill(dollars: float) -> str:
    """A sum that somebody pays, ``12.30 USD``."""
    return f"{number(dollars, 2)} USD"


def usd(dollars: float | None) -> str:
    """Dollars: ``$1,234.50``, below one with three significant digits, a dash where unknown."""
    if dollars is None:
        return MISSING
    if dollars == 0:
        return "$0"
    decimals = 2 if dollars >= 1 else 2 - math.floor(math.log10(dollars))
    return f"${dollars:,.{decimals}f}"


# Shares and probabilities ---------------------------------------------------------------------


def percent(share: float | None) -> str:
    """A share as a whole number of percent, a dash where unknown."""
    return MISSING if share is None else f"{100 * share:.0f} %"


def share(share: float | None) -> str:
    """A share of resamples in percent; never 0 or 100, which no number of them shows."""
    if share is None:
        return MISSING
    if share < 0.001:
        return "< 0.1 %"
    if share > 0.999:
        return "> 99.9 %"
    return f"{100 * share:.{0 if 0.01 <= share <= 0.99 else 1}f} %"


def p_value(p: float) -> str:
    """A p-value with three decimals, never 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def ratio(ratio: float | None, decimals: int = 2) -> str:
    """``1.53×``, a dash where unknown."""
    return MISSING if ratio is None else f"{ratio:.{decimals}f}×"


# Sentences ------------------------------------------------------------------------------------


def first_upper(text: str) -> str:
    """A sentence's beginning; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def as_sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    text = text.strip()
    return first_upper(text) + ("" if text.endswith(".") else ".")
