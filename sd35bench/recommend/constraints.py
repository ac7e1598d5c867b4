"""What settings cost, in seconds, bytes, dollars and failures, held against a profile's limits."""

from dataclasses import dataclass

from sd35bench.analysis.pairs import Candidate, Comparison
from sd35bench.analysis.remote import usd_per_image
from sd35bench.analysis.summary import latency_summary
from sd35bench.recommend.profiles import Profile

__all__ = ["Limits", "Speeds", "amount", "check_limits", "peak_bytes", "speeds", "usd"]


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds (p50) per candidate, or denoiser evaluations where not all were timed.

    `basis` says which: "latency_s" or "evaluations". `highs` are the upper ends of the medians'
    95 % intervals, ``None`` where there is none.
    """

    basis: str
    values: list[float]
    highs: list[float | None]


@dataclass(frozen=True, slots=True)
class Limits:
    """Which candidates are out, and why; `latency` is the limit in the units of the speeds.

    `close` are those within all limits of which that is not sure: the interval of their latency
    reaches beyond it.
    """

    latency: float | None
    broken: dict[int, str]
    close: set[int]


def speeds(comparison: Comparison) -> Speeds:
    """How fast each candidate is."""
    found = [latency_summary(c.row.timed) for c in comparison.candidates]
    if all(f["p50"] is not None for f in found):
        highs = [None if f["ci95"] is None else f["ci95"][1] for f in found]
        return Speeds("latency_s", [f["p50"] for f in found], highs)
    work = [c.work for c in comparison.candidates]
    return Speeds("evaluations", work, [None] * len(work))


def check_limits(comparison: Comparison, speed: Speeds, profile: Profile) -> Limits | str:
    """Hold every candidate against the profile's limits; a text says why that cannot be done."""
    limit = _latency_limit(speed, profile)
    if isinstance(limit, str):
        return limit
    broken: dict[int, str] = {}
    for i, candidate in enumerate(comparison.candidates):
        time_s = speed.values[i] if speed.basis == "latency_s" else None
        found = [
            _slow(speed, i, limit),
            _large(candidate, profile),
            _dear(candidate, time_s, profile),
            _unreliable(candidate, profile),
        ]
        why = [text for text in found if text is not None]
        if why:
            broken[i] = "; ".join(why)
    close = {
        i
        for i, high in enumerate(speed.highs)
        if i not in broken and limit is not None and high is not None and high > limit
    }
    return Limits(limit, broken, close)


def peak_bytes(candidate: Candidate) -> int | None:
    """Peak memory of what made the images: the GPU's where there is one, else the process's."""
    if candidate.row.hosted:
        return None  # the service's memory is none of ours
    found = [r.memory for r in candidate.row.records if r.memory is not None]
    vram = [m.peak_vram_bytes for m in found if m.peak_vram_bytes is not None]
    return max(vram) if vram else max((m.peak_rss_bytes for m in found), default=None)


def usd(candidate: Candidate, latency_s: float | None, profile: Profile) -> float | None:
    """Dollars an image: what a service asks, or this machine's hours; ``None`` where unknown."""
    paid = usd_per_image(candidate.row)
    if paid is not None:
        return float(paid["value"])
    if profile.usd_per_hour is None or latency_s is None or candidate.row.hosted:
        return None
    return profile.usd_per_hour * latency_s / 3600.0


def amount(speed: Speeds, value: float | None) -> str:
    """A latency in words, in the units of the speeds."""
    if value is None:
        return "no limit"
    return f"{value:.3g} s" if speed.basis == "latency_s" else f"{value:.3g} evaluations"


def _latency_limit(speed: Speeds, profile: Profile) -> float | str | None:
    """The profile's limit in the units of `speed`; the stricter one if there are two."""
    limits = []
    if profile.latency_limit_frac is not None:
        limits.append(profile.latency_limit_frac * max(speed.values))
    if profile.latency_limit_s is not None:
        if speed.basis != "latency_s":
            return (
                f"the profile limits latency to {profile.latency_limit_s:g} s and not every"
                " setting was timed; run with batch_size=1 or timed_limit=N"
            )
        limits.append(profile.latency_limit_s)
    return min(limits) if limits else None


def _slow(speed: Speeds, i: int, limit: float | None) -> str | None:
    if limit is None or speed.values[i] <= limit:
        return None
    return f"too slow: {amount(speed, speed.values[i])}, limit {amount(speed, limit)}"


def _large(candidate: Candidate, profile: Profile) -> str | None:
    limit = profile.memory_limit_bytes
    if limit is None or candidate.row.hosted:
        return None
    peak = peak_bytes(candidate)
    if peak is None:
        return "its memory is unknown, and the profile limits it"
    return None if peak <= limit else f"too large: {_gib(peak)}, limit {_gib(limit)}"


def _dear(candidate: Candidate, latency_s: float | None, profile: Profile) -> str | None:
    if profile.cost_limit_usd is None:
        return None
    price = usd(candidate, latency_s, profile)
    if price is None:
        return "its cost is unknown, and the profile limits it; give usd_per_hour for this machine"
    if price <= profile.cost_limit_usd:
        return None
    return f"too dear: {price:.4g} USD an image, limit {profile.cost_limit_usd:.4g} USD"


def _unreliable(candidate: Candidate, profile: Profile) -> str | None:
    """More failures than allowed; running the study again retries them."""
    failed, tried = len(candidate.failed), len(candidate.tried)
    if not failed or failed <= profile.failures_limit * tried:
        return None
    return f"failed {failed} of {tried} trials, limit {100 * profile.failures_limit:g} %"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
