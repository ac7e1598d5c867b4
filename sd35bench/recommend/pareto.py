"""Which settings are worth their time: the front, and how sure it is.

A setting is *dominated* by another that is at least as good and at most as slow, and better in one
of the two; costs within 2 % are no difference. Whether it truly is depends on the prompts that were
drawn, so prompts are resampled jointly: one resample draws the same prompts for every setting. It
depends on the timed images, too, which are few and follow each other in process starts: each
resample draws every latency anew from Student's t around its median, with the error that
`sd35bench.stats.latency` gives it. What all settings share, a busy minute or a slow start, is taken
out where they were timed in turn. The share of resamples in which a setting is dominated, by
whichever other one, is its probability of being so. A tie in quality counts as no worse: where two
settings did equally well on every prompt, the slower one is dominated for sure, as far as was seen.

How often that comes true (`python -m tests.validity.pareto`: 200 studies of 4 x 4 steps and cfgs,
128 prompts; quality apart by chance by 0.1 / 0.4 in the logit): of settings with 95 % and more,
95.9 / 99.1 % were dominated in truth, with 5 % and less 1.7 / 0.8 %. It claims too much where
settings are nearly equal and prompts few (32 prompts and 0.1: 90.2 % of those with 95 % and more),
since the luckiest of many rivals looks better than it is. Without the 2 %, of two cfgs that cost
the same the worse one would look dominated in half of the resamples only.

What settings cost, in seconds, evaluations, bytes, dollars and failures, is held against a
profile's limits, none of which depends on what else the study has.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.grouping import cluster_labels
from sd35bench.analysis.hosted_calls import usd_per_image
from sd35bench.analysis.pairs import Candidate, Comparison
from sd35bench.analysis.speed import latency_summary, named_seconds
from sd35bench.fields import describe
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.clustered import quantile_t, student
from sd35bench.stats.decision import SAME_COST
from sd35bench.stats.intervals import weight_chunks
from sd35bench.stats.latency import centres, counted_starts
from sd35bench.study.columns import Floats, numbers, pick, seconds
from sd35bench.words import digits, gib, in_usd

LEAST_FOR_P95 = 20
"""Timed images below which one of them decides where the 95th percentile is."""
_P95 = 0.95
_NOTABLE = 0.1
"""Means and medians of undisturbed settings differ by 0.02 to 0.05: less is no contradiction."""


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

    `close` says of a candidate within all limits why that is not certain: the interval of its
    latency reaches beyond the limit, or is unknown.
    """

    latency: float | None
    broken: dict[int, str]
    close: dict[int, str]


@dataclass(frozen=True, slots=True)
class _Figure:
    """A latency in seconds beside its limit; `high` is its interval's upper end, if known."""

    name: str
    value: float
    high: float | None
    limit: float

    @property
    def broken(self) -> str | None:
        if self.value <= self.limit:
            return None
        return f"too slow: {self.name}{digits(self.value)} s, limit {digits(self.limit)} s"

    @property
    def close(self) -> str | None:
        if self.high is not None and self.high <= self.limit:
            return None
        name = self.name or "p50 "
        return (
            f"{name}{digits(self.value)} s is not surely within the limit of {digits(self.limit)} s"
        )


def speeds(comparison: Comparison) -> Speeds:
    """How fast each candidate is."""
    found = [latency_summary(c.row.timed) for c in comparison.candidates]
    middles = [f.p50 for f in found if f.p50 is not None]
    if len(middles) == len(found):
        highs = [None if f.ci95 is None else f.ci95[1] for f in found]
        return Speeds("latency_s", middles, highs)
    work = [c.work for c in comparison.candidates]
    return Speeds("evaluations", work, [None] * len(work))


def check_limits(comparison: Comparison, speed: Speeds, profile: Profile) -> Limits | str:
    """Hold every candidate against the profile's limits; a text says why that cannot be done."""
    timed = speed.basis == "latency_s"
    untimed = None if timed else _first_in_seconds(profile)
    if untimed is not None:
        return untimed
    broken: dict[int, str] = {}
    close: dict[int, str] = {}
    for i, candidate in enumerate(comparison.candidates):
        time_s = speed.values[i] if timed else None
        figures = _figures(candidate, speed, i, profile)
        found = [
            *(figure.broken for figure in figures),
            _unknown_tail(candidate, profile),
            _long(candidate, profile),
            _large(candidate, profile),
            _too_expensive(candidate, time_s, profile),
            _unreliable(candidate, profile),
        ]
        why = [text for text in found if text is not None]
        if why:
            broken[i] = "; ".join(why)
        elif unsure := [text for figure in figures if (text := figure.close) is not None]:
            close[i] = "; ".join(unsure)
    limit = profile.latency_limit_s if timed else profile.evaluations_limit
    return Limits(limit, broken, close)


def contradiction(comparison: Comparison, chosen: int, others: Iterable[int]) -> str | None:
    """Say by which latency a setting that is slower by p50 is faster than the chosen one, if any.

    A few calls that take 50 times as long move the mean and p95, and leave p50 where it is.
    """
    mine = tails(comparison.candidates[chosen])
    for name, value in mine.items():
        theirs = {i: tails(comparison.candidates[i]).get(name) for i in others}
        known = {i: v for i, v in theirs.items() if v is not None}
        best = min(known, key=lambda i: known[i], default=None)
        if best is not None and value > known[best] * (1.0 + _NOTABLE):
            settings = [comparison.candidates[i].row.setting for i in (best, chosen)]
            return (
                f"by {name} it is slower than {describe(settings[0], settings[1:])}:"
                f" {digits(value)} s against {digits(known[best])} s"
            )
    return None


def tails(candidate: Candidate) -> dict[str, float]:
    """Mean and 95th percentile of the latency in seconds; of few images the mean alone."""
    x = _seconds(candidate)
    found = {"the mean": float(np.mean(x))} if len(x) else {}
    return found | ({"p95": float(np.quantile(x, _P95))} if len(x) >= LEAST_FOR_P95 else {})


def _seconds(candidate: Candidate) -> Floats:
    found = seconds(candidate.row.timed)
    return found[~np.isnan(found)]


def peak_bytes(candidate: Candidate) -> int | None:
    """Peak memory of what made the images: the GPU's where there is one, else the process's."""
    records = candidate.row.here(candidate.row.records)
    for name in ("peak_vram_bytes", "peak_rss_bytes"):
        peaks = numbers(records, name)
        known = peaks[~np.isnan(peaks)]
        if len(known):
            return int(known.max())
    return None


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
    return f"{digits(value)} {'s' if speed.basis == 'latency_s' else 'evaluations'}"


def _first_in_seconds(profile: Profile) -> str | None:
    """Why a profile cannot be held against settings that were not timed; ``None`` where it can."""
    limits = (profile.latency_limit_s, profile.latency_mean_limit_s, profile.latency_p95_limit_s)
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    return (
        f"the profile limits latency to {known[0]:g} s and not every setting was timed; run with"
        " batch_size=1 or timed_limit=N"
    )


def _figures(candidate: Candidate, speed: Speeds, i: int, profile: Profile) -> list[_Figure]:
    """What of a candidate's latency the profile limits."""
    found = []
    if profile.latency_limit_s is not None:
        found.append(_Figure("", speed.values[i], speed.highs[i], profile.latency_limit_s))
    tail = tails(candidate)
    if profile.latency_mean_limit_s is not None and tail:
        ends = latency_summary(candidate.row.timed).mean_ci95
        high = None if ends is None else ends[1]
        found.append(_Figure("mean ", tail["the mean"], high, profile.latency_mean_limit_s))
    if profile.latency_p95_limit_s is not None and "p95" in tail:
        records = pick(candidate.row.timed, ~np.isnan(seconds(candidate.row.timed)))
        high = quantile_t(seconds(records), cluster_labels(records), _P95).high
        found.append(_Figure("p95 ", tail["p95"], high, profile.latency_p95_limit_s))
    return found


def _unknown_tail(candidate: Candidate, profile: Profile) -> str | None:
    n = len(candidate.row.timed)
    if profile.latency_p95_limit_s is None or n >= LEAST_FOR_P95:
        return None
    return (
        f"its p95 is unknown with {n} timed images, and the profile limits it; time"
        f" {LEAST_FOR_P95} or more (timed_limit={LEAST_FOR_P95})"
    )


def _long(candidate: Candidate, profile: Profile) -> str | None:
    limit = profile.evaluations_limit
    if limit is None or candidate.work <= limit:
        return None
    return f"too slow: {digits(candidate.work)} evaluations, limit {digits(limit)}"


def _large(candidate: Candidate, profile: Profile) -> str | None:
    limit = profile.memory_limit_bytes
    if limit is None or candidate.row.hosted:
        return None
    peak = peak_bytes(candidate)
    if peak is None:
        return "its memory is unknown, and the profile limits it"
    return None if peak <= limit else f"too large: {gib(peak)}, limit {gib(limit)}"


def _too_expensive(candidate: Candidate, latency_s: float | None, profile: Profile) -> str | None:
    if profile.cost_limit_usd is None:
        return None
    price = usd(candidate, latency_s, profile)
    if price is None:
        return "its cost is unknown, and the profile limits it; give usd_per_hour for this machine"
    if price <= profile.cost_limit_usd:
        return None
    return f"too dear: {in_usd(price)} an image, limit {in_usd(profile.cost_limit_usd)}"


def _unreliable(candidate: Candidate, profile: Profile) -> str | None:
    """More failures than allowed; running the study again retries them."""
    failed, tried = len(candidate.failed), len(candidate.tried)
    if not failed or failed <= profile.failures_limit * tried:
        return None
    return f"failed {failed} of {tried} trials, limit {100 * profile.failures_limit:g} %"


RESAMPLES = 2000
_SEED = 20261123
_CHUNK_ELEMENTS = 4_000_000
_FARTHEST = 20.0
"""Of a drawn log cost; one degree of freedom draws numbers of any size."""


@dataclass(frozen=True, slots=True)
class CostErrors:
    """Standard errors of the costs' logs [S], and Student's degrees of freedom of each [S]."""

    error: Floats
    degrees: Floats


@dataclass(frozen=True, slots=True)
class Front:
    """Per setting [S]: on the front as seen, and with which probability dominated.

    `dominated` is ``None`` with one prompt, of which nothing can be resampled.
    """

    on_front: NDArray[np.bool_]
    dominated: Floats | None


def front_of(comparison: Comparison, speed: Speeds) -> Front:
    """Find the front of candidates in mean quality and in p50 latency (or evaluations)."""
    errors = None
    if speed.basis == "latency_s":
        errors = cost_errors([named_seconds(c.row.timed) for c in comparison.candidates])
    cost = np.array(speed.values)
    return resampled_front(comparison.quality, comparison.clusters, cost, errors)


def cost_errors(timed: Sequence[Mapping[str, Floats]]) -> CostErrors:
    """How sure the median latency of each setting is, from its seconds by process start.

    Settings that were timed equally often in the same starts took turns, and what they share at
    each turn cancels. A setting timed once has the largest error of the others.
    """
    logs = [{start: np.log(x) for start, x in found.items()} for found in timed]
    sizes = [{start: len(x) for start, x in found.items()} for found in logs]
    if len(logs) > 1 and all(size == sizes[0] for size in sizes):
        shared = {start: np.mean([found[start] for found in logs], axis=0) for start in sizes[0]}
        # Half of what two settings differ by is left of each; S settings leave (S - 1) / S of it.
        scale = np.sqrt(len(logs) / (len(logs) - 1))
        logs = [{s: scale * (x - shared[s]) for s, x in found.items()} for found in logs]
    found = [centres([x[:, None] for x in counted_starts(list(by.values()))]) for by in logs]
    degrees = np.array([float(c.degrees) for c in found])
    known = degrees > 0.0
    half = np.array([float(c.half[0]) for c in found])
    error = np.where(known, half / student(np.maximum(degrees, 1.0)), 0.0)
    return CostErrors(np.where(known, error, error.max()), np.maximum(degrees, 1.0))


def pareto_front(quality: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Tell which points are dominated by none; [..., S] each, more quality and less cost better."""
    return ~_dominated(quality, cost)


def resampled_front(
    quality: Floats,
    clusters: NDArray[np.int64],
    cost: Floats,
    errors: CostErrors | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = _SEED,
) -> Front:
    """Find the front of S settings from quality [S, n] of the same n pairs and cost [S].

    Args:
        quality: more is better.
        clusters: [n], each pair's prompt.
        cost: as seen.
        errors: of the costs' logs, S in all. ``None``: cost is known, as evaluations are.
        resamples: how many.
        seed: of them.

    Raises: ValueError where the shapes do not fit.
    """
    _require_shapes(quality, clusters, cost, errors)
    means = quality.mean(axis=1)
    seen = pareto_front(means, cost)
    k = 1 + int(clusters.max(initial=0))
    if k < 2:
        return Front(seen, None)
    counts = np.bincount(clusters, minlength=k).astype(np.float64)
    sums = np.stack([np.bincount(clusters, weights=row, minlength=k) for row in quality], axis=1)
    lost, drawn = np.zeros(len(quality)), 0
    rows = max(1, _CHUNK_ELEMENTS // max(len(quality) ** 2, len(clusters)))
    rng = np.random.default_rng(seed)
    for weights in weight_chunks(k, resamples, seed):
        for start in range(0, len(weights), rows):
            part = weights[start : start + rows]
            total = (part @ counts)[:, None]
            # A resample without a single pair says nothing; what was seen stands for it.
            drawn_quality = np.where(total > 0, (part @ sums) / np.maximum(total, 1.0), means)
            lost += _dominated(drawn_quality, _drawn_cost(rng, len(part), cost, errors)).sum(axis=0)
            drawn += len(part)
    return Front(seen, lost / drawn)


def _require_shapes(
    quality: Floats, clusters: NDArray[np.int64], cost: Floats, errors: CostErrors | None
) -> None:
    given = len(quality) if errors is None else len(errors.error)
    if quality.ndim != 2 or clusters.shape != quality.shape[1:] or cost.shape != (len(quality),):
        raise ValueError(
            f"front: quality {quality.shape}, clusters {clusters.shape}, cost {cost.shape};"
            " expected [S, n], [n] and [S]"
        )
    if given != len(quality):
        raise ValueError(f"front: {given} settings were timed, {len(quality)} have a quality")


def _drawn_cost(
    rng: np.random.Generator, rows: int, cost: Floats, errors: CostErrors | None
) -> Floats:
    """Costs [R, S], each drawn anew around what was seen."""
    if errors is None:
        return np.broadcast_to(cost, (rows, len(cost)))
    off = errors.error * rng.standard_t(errors.degrees, (rows, len(cost)))
    return cost * np.exp(np.clip(off, -_FARTHEST, _FARTHEST))


def _dominated(quality: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Whether some other point is no worse in both and better in one; [..., S].

    By sorting: holding each of 200 settings against all others in 2,000 resamples takes six times
    as long.
    """
    if not quality.size:
        return np.zeros(quality.shape, bool)
    size = quality.shape[-1]
    order = np.argsort(cost, axis=-1, kind="stable")
    q, c = (np.take_along_axis(x, order, -1) for x in (quality, np.broadcast_to(cost, order.shape)))
    # Of equal numbers costs come before limits: as many costs lie before a limit as are no higher,
    # and as many limits before a cost as are lower.
    merged = np.argsort(np.concatenate([c, c * (1.0 + SAME_COST)], -1), axis=-1, kind="stable")
    is_cost = merged < size
    before = np.empty(merged.shape, np.int64)
    costs = np.cumsum(is_cost, axis=-1)
    places = np.broadcast_to(np.arange(2 * size), merged.shape)
    np.put_along_axis(before, merged, np.where(is_cost, places + 1 - costs, costs), -1)
    cheaper, no_dearer = before[..., :size], before[..., size:]
    best = np.fmax.accumulate(q, axis=-1)
    # Sums in another order must not tell equal settings apart.
    near = 1e-12 * np.maximum(1.0, np.abs(q))
    better = np.take_along_axis(best, no_dearer - 1, -1) > q + near
    as_good = np.take_along_axis(best, np.maximum(cheaper - 1, 0), -1) >= q - near
    found = np.empty(order.shape, bool)
    np.put_along_axis(found, order, better | (as_good & (cheaper > 0)), -1)
    return found
