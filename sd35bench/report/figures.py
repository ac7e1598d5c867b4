"""How figures are written: significant digits that the interval supports, units, never a fake 0."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "MISSING",
    "Estimate",
    "column_decimals",
    "decimals_for",
    "format_bytes",
    "format_estimate",
    "format_interval",
    "format_latency",
    "format_number",
    "format_plain",
    "format_seconds",
    "format_usd",
    "latency_decimals",
]

MISSING = "–"


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


def decimals_for(estimate: Estimate) -> int:
    """Decimals that the interval's half-width supports; three digits where there is none.

    One digit of the half-width, two where it begins with 1; figures below 1 keep two decimals.
    """
    if estimate.value is None:
        return 0
    half = 0.0
    if estimate.low is not None and estimate.high is not None:
        half = (estimate.high - estimate.low) / 2
    if half > 0:
        first = math.floor(math.log10(half))
        begins_with_1 = half / 10**first < 2
        least = 2 if abs(estimate.value) <= 1 else 0
        return _clamp_decimals(max(least, -first + begins_with_1))
    if estimate.value == 0:
        return 2
    return _clamp_decimals(2 - math.floor(math.log10(abs(estimate.value))))


def _clamp_decimals(decimals: int) -> int:
    return max(0, min(4, decimals))


def column_decimals(estimates: Iterable[Estimate | None]) -> int:
    """One number of decimals for a whole column (the median need), so that points line up."""
    needs = sorted(decimals_for(e) for e in estimates if e is not None and e.value is not None)
    return needs[len(needs) // 2] if needs else 2


def format_number(value: float | None, decimals: int) -> str:
    """`value` with fixed decimals; a dash where it is unknown."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:.{decimals}f}"


def format_plain(value: object) -> str:
    """A setting's value as a person types it: 4 not 4.0, a dash for ``None``."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def format_interval(estimate: Estimate, decimals: int) -> str:
    """``[low, high]``, empty where there is no interval."""
    if not estimate.has_interval:
        return ""
    return f"[{format_number(estimate.low, decimals)}, {format_number(estimate.high, decimals)}]"


def format_estimate(estimate: Estimate | None, decimals: int | None = None) -> str:
    """``value [low, high]``, or why there is none."""
    if estimate is None:
        return MISSING
    if estimate.value is None:
        return f"needs n ≥ {estimate.needs:,}" if estimate.needs is not None else MISSING
    digits = decimals_for(estimate) if decimals is None else decimals
    return f"{format_number(estimate.value, digits)} {format_interval(estimate, digits)}".strip()


def latency_decimals(estimate: Estimate) -> int:
    """Like `decimals_for`, but no finer than a millisecond for what takes 10 ms or more."""
    fine = estimate.value is not None and estimate.value < 0.01
    return decimals_for(estimate) if fine else min(3, decimals_for(estimate))


def format_latency(estimate: Estimate | None) -> str:
    """``0.113 [0.109, 0.115] s``, a dash where unknown."""
    if estimate is None or estimate.value is None:
        return MISSING
    return f"{format_estimate(estimate, latency_decimals(estimate))} s"


def format_seconds(seconds: float | None) -> str:
    """Seconds with three significant digits: ``0.112 s``, ``8.00 s``, ``134 s``."""
    if seconds is None:
        return MISSING
    if seconds == 0:
        return "0 s"
    decimals = _clamp_decimals(2 - math.floor(math.log10(abs(seconds))))
    return f"{seconds:.{decimals}f} s"


def format_bytes(count: int | float | None) -> str:
    """Bytes in MiB or GiB, a dash where unknown."""
    if count is None:
        return MISSING
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    if count >= 2**20:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**10:.0f} KiB"


def format_usd(dollars: float | None) -> str:
    """Dollars: ``$1,234.50``, below one with three significant digits, a dash where unknown."""
    if dollars is None:
        return MISSING
    if dollars == 0:
        return "$0"
    decimals = 2 if dollars >= 1 else 2 - math.floor(math.log10(dollars))
    return f"${dollars:,.{decimals}f}"
