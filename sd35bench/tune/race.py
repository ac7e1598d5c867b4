"""Who is out of the race: pure functions of what was seen on the same prompts.

While a race runs, images go where they may still matter. A setting is *out* when it cannot meet the
profile any more (its latency's interval lies over the limit, its memory does, or so many of its
images failed), or when another setting that surely is within the limits shows it, on the prompts
that both have: it is worse than one that is no slower and no dearer (*dominated*), or worse by more
than the profile's margin than any one (*out of reach*). "Shows" is the lower end of the paired 95 %
interval clustered by prompt (`stats.clustered`): 97.5 % for each such claim, uncorrected. That
decides where images go and is no statement about any setting; what is stated is in `final`.
Up to `SAME_COST` slower counts as no slower, as it does in `recommend`.

Speed spares nobody where the profile wants the best quality: there whatever is shown to be worse is
out. Where it holds settings against a named default, only that one puts others out of reach, and it
goes on getting images whatever is said of it.
Cost: S settings and k prompts are one [k, S²] product a look; 50 settings on 64 prompts, 5 ms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd35bench.recommend.profiles import Profile
from sd35bench.stats.clustered import mean_bounds, quantile_t
from sd35bench.stats.decision import SAME_COST
from sd35bench.stats.intervals import resampled_means
from sd35bench.tune.space import Point
from sd35bench.words import digits, gib, in_usd

OVER_LIMITS = ("too slow", "too large", "too dear")
"""Kinds of `Out` that are the profile's limits, not another setting's doing."""
_FEWEST = 4
"""Prompts that two settings must share before one may show anything about the other."""
_SPAN_TELLS = 6
"""Values whose least and greatest hold the median between them 97 times in 100: 1 - 2 / 2^6."""
_RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one setting: [P] by prompt, NaN where nothing was made.

    An image that failed has quality 0 and no latency; `failed` [P] is the share of a prompt's
    images that did (``None``: none). `usd` is what an image costs at a hosted service,
    `peak_bytes` what making them took at most, `work` an image's evaluations (``None``: unknown).
    """

    quality: Floats
    latency_s: Floats
    failed: Floats | None = None
    usd: float = 0.0
    peak_bytes: int | None = None
    work: float | None = None

    def first(self, prompts: int) -> "Evidence":
        """The same, as if only the first so many prompts had been made."""
        late = np.arange(len(self.quality)) >= prompts
        return replace(
            self,
            quality=np.where(late, np.nan, self.quality),
            latency_s=np.where(late, np.nan, self.latency_s),
            failed=None if self.failed is None else np.where(late, 0.0, self.failed),
        )

    @property
    def failed_share(self) -> float:
        """Failed images so far, as a share of all that the setting may get at most."""
        return 0.0 if self.failed is None else float(self.failed.mean())

    @property
    def p50_s(self) -> float:
        """Median latency in seconds; NaN where none was timed."""
        known = self.latency_s[~np.isnan(self.latency_s)]
        return float(np.median(known)) if len(known) else float("nan")

    @property
    def slowest_s(self) -> float:
        """Largest latency in seconds; NaN where none was timed."""
        known = self.latency_s[~np.isnan(self.latency_s)]
        return float(known.max()) if len(known) else float("nan")

    @property
    def p50_ends_s(self) -> tuple[float, float]:
        """Ends of the median's 95 % interval; infinite where fewer than 6 prompts were timed."""
        known = self.latency_s[~np.isnan(self.latency_s)]
        if len(known) < _SPAN_TELLS:
            return (-np.inf, np.inf)
        ends = quantile_t(known, np.arange(len(known)), 0.5).ci95
        return (known.min(), known.max()) if ends is None else (ends[0], ends[1])

    @property
    def mean(self) -> float:
        """Mean quality; NaN where every image failed."""
        known = self.quality[~np.isnan(self.quality)]
        return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Out:
    """Why a setting gets no more images: `kind`, and which setting showed it (where one did)."""

    kind: str
    why: str
    by: Point | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Settings side by side: `points` [S], what they cost [S], and paired quality differences.

    `low` and `high` [S, S] bound the quality of the row's setting minus the column's; infinite
    where too few prompts are shared. `p50_low` and `p50_high` [S] bound the median latency,
    `slowest_s` [S] is the largest; `peak_bytes` and `work` [S] are NaN where unknown; `failed` [S]
    is a share of all images to come too.
    """

    points: list[Point]
    mean: Floats
    p50_s: Floats
    p50_low: Floats
    p50_high: Floats
    slowest_s: Floats
    usd: Floats
    work: Floats
    peak_bytes: Floats
    failed: Floats
    low: Floats
    high: Floats


def look(seen: Mapping[Point, Evidence], bounds: tuple[float, float] | None) -> Look:
    """Put settings side by side; `bounds` are what quality can be at least and at most."""
    points = list(seen)
    quality = np.array([seen[p].quality for p in points])
    low, high = _differences(quality, bounds)
    ends = np.array([seen[p].p50_ends_s for p in points])
    peaks = [seen[p].peak_bytes for p in points]
    return Look(
        points=points,
        mean=np.array([seen[p].mean for p in points]),
        p50_s=np.array([seen[p].p50_s for p in points]),
        p50_low=ends[:, 0],
        p50_high=ends[:, 1],
        slowest_s=np.array([seen[p].slowest_s for p in points]),
        usd=np.array([seen[p].usd for p in points]),
        work=np.array([np.nan if (w := seen[p].work) is None else w for p in points]),
        peak_bytes=np.array([np.nan if peak is None else peak for peak in peaks]),
        failed=np.array([seen[p].failed_share for p in points]),
        low=low,
        high=high,
    )


def judge(
    found: Look, profile: Profile, margin: float, reference: Point | None = None
) -> dict[Point, Out]:
    """Tell which settings are out, and why.

    `reference` is the named default that the profile holds settings against, where it does.
    """
    out: dict[Point, Out] = {}
    sure: list[int] = []
    for i, point in enumerate(found.points):
        if np.isnan(found.mean[i]) or np.isnan(found.p50_s[i]):
            out[point] = Out(kind="failed", why="it gave no image that counts")
            continue
        over = _over(found, i, profile)
        if over is not None:
            out[point] = over
        elif _surely_within(found, i, profile):
            sure.append(i)
    ruler = None if reference is None else found.points.index(reference)
    for i, point in enumerate(found.points):
        if point not in out and i != ruler:
            verdict = _beaten(found, i, [j for j in sure if j != i], (profile, margin, ruler))
            if verdict is not None:
                out[point] = verdict
    return out


def promise(
    seen: Mapping[Point, Evidence],
    margin: float,
    seed: int = 0,
    *,
    objective: str = "fastest",
    reference: Evidence | None = None,
) -> dict[Point, float]:
    """How much each setting matters to the answer: its chance to be chosen, plus to be the best.

    Both are shares of resamples of the prompts, the same draw for every setting, where a setting
    within the margin by its mean counts as as good: of the best one's, or of `reference`'s, the
    named default's. Where the best quality is wanted, to be the best is all.
    """
    points = list(seen)
    rows = [seen[p] for p in points] + ([] if reference is None else [reference])
    quality = np.array([row.quality for row in rows]).T
    there = ~np.isnan(quality)
    means = resampled_means(
        np.where(there, quality, 0.0), there.astype(np.float64), resamples=_RESAMPLES, seed=seed
    )
    means = np.where(np.isnan(means), -np.inf, means)
    ruler = means[:, -1:] if reference is not None else None
    means = means[:, : len(points)]
    best = means.max(axis=1, keepdims=True)
    # Equal best settings share the honour, or the first of a plateau would take it all.
    top = means == best
    leads = (top / top.sum(axis=1, keepdims=True)).mean(axis=0)
    if objective == "best-quality":
        return dict(zip(points, leads.tolist(), strict=True))
    speed = np.array([seen[p].p50_s for p in points])
    good = means >= (best if ruler is None else ruler) - margin
    good |= top & ~good.any(axis=1, keepdims=True)  # none is as good: the best is taken
    reach = np.where(good, speed, np.inf)
    chosen = reach <= reach.min(axis=1, keepdims=True) * (1.0 + SAME_COST)
    chances = (chosen / chosen.sum(axis=1, keepdims=True)).mean(axis=0) + leads
    return dict(zip(points, chances.tolist(), strict=True))


def _over(found: Look, i: int, profile: Profile) -> Out | None:
    """Whether a setting is over one of the profile's limits, as far as that is sure."""
    most = profile.evaluations_limit
    if most is not None and found.work[i] > most:
        return Out(
            kind="too slow", why=f"{digits(found.work[i])} evaluations, limit {digits(most)}"
        )
    limit = profile.latency_limit_s
    if found.failed[i] > profile.failures_limit:
        most = f"{100 * profile.failures_limit:g} %"
        return Out(kind="failed", why=f"more than {most} of all its images, whatever comes")
    if limit is not None and found.p50_low[i] > limit:
        why = f"{digits(found.p50_s[i])} s an image, over the profile's {digits(limit)} s"
        return Out(kind="too slow", why=why)
    most = profile.memory_limit_bytes
    if most is not None and found.peak_bytes[i] > most:  # a peak only grows
        peak = f"{gib(found.peak_bytes[i])}, limit {gib(most)}"
        return Out(kind="too large", why=peak)
    price = _price(found, i, profile, float(found.p50_low[i]))
    if profile.cost_limit_usd is not None and price > profile.cost_limit_usd:
        why = f"{in_usd(price)} an image or more, limit {in_usd(profile.cost_limit_usd)}"
        return Out(kind="too dear", why=why)
    return None


def _surely_within(found: Look, i: int, profile: Profile) -> bool:
    """Whether nothing about a setting may turn out to be over a limit, as far as is known."""
    limits = (profile.latency_mean_limit_s, profile.latency_p95_limit_s)
    if any(limit is not None and found.slowest_s[i] > limit for limit in limits):
        return False
    limit = profile.latency_limit_s
    price = _price(found, i, profile, float(found.p50_high[i]))
    dear = profile.cost_limit_usd is not None and price > profile.cost_limit_usd
    return not dear and (limit is None or bool(found.p50_high[i] <= limit))


def _price(found: Look, i: int, profile: Profile, latency_s: float) -> float:
    """USD an image: what a service asks, or this machine's time; 0 where neither is known."""
    if found.usd[i] > 0.0 or profile.usd_per_hour is None:
        return float(found.usd[i])
    return profile.usd_per_hour * latency_s / 3600.0


def _beaten(
    found: Look, i: int, rivals: Sequence[int], rule: tuple[Profile, float, int | None]
) -> Out | None:
    """Whether one of the rivals, which are within the limits, shows that setting i is out."""
    profile, margin, ruler = rule
    if profile.objective == "best-quality":
        return _out_of_reach(found, i, rivals, 0.0, "the best quality is wanted")
    if ruler is not None and ruler not in rivals and found.low[ruler, i] > margin:
        # The default cannot be chosen itself: where none is as good, the best within limits is.
        return _out_of_reach(found, i, rivals, 0.0, "and it is not as good as the default either")
    against = rivals if ruler is None else [j for j in rivals if j == ruler]
    verdict = _out_of_reach(found, i, against, margin, f"the margin is {margin:g}")
    if verdict is not None:
        return verdict
    slowest = np.inf if ruler is None else found.p50_high[ruler] * (1.0 + SAME_COST)
    if ruler is not None and ruler in rivals and found.p50_low[i] > slowest:
        why = "slower than the default, which is as good as itself"
        return Out(kind="dominated", why=why, by=found.points[ruler])
    no_dearer = [
        j
        for j in rivals
        if found.p50_s[j] <= found.p50_s[i] * (1.0 + SAME_COST) and found.usd[j] <= found.usd[i]
    ]
    if not no_dearer:
        return None
    lead = max(no_dearer, key=lambda j: found.low[j, i])
    if found.low[lead, i] > 0.0:
        why = f"worse by {digits(found.low[lead, i])} or more than one that is no slower"
        return Out(kind="dominated", why=why, by=found.points[lead])
    return None


def _out_of_reach(
    found: Look, i: int, rivals: Sequence[int], margin: float, wanted: str
) -> Out | None:
    """Whether a rival shows that setting i is worse by more than the margin."""
    if not rivals:
        return None
    lead = max(rivals, key=lambda j: found.low[j, i])
    if not found.low[lead, i] > margin:
        return None
    why = f"worse by {digits(found.low[lead, i])} or more, {wanted}"
    return Out(kind="out of reach", why=why, by=found.points[lead])


def _differences(quality: Floats, bounds: tuple[float, float] | None) -> tuple[Floats, Floats]:
    """Ends [S, S] of the mean paired difference, row minus column, of quality [S, P]."""
    settings = len(quality)
    low = np.full((settings, settings), -np.inf)
    high = np.full((settings, settings), np.inf)
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    there = ~np.isnan(quality)
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(there):
        groups.setdefault(row.tobytes(), []).append(i)
    names = list(groups)
    for a, first in enumerate(names):
        for second in names[a:]:
            both = there[groups[first][0]] & there[groups[second][0]]
            k = int(both.sum())
            if k < _FEWEST:
                continue
            rows, columns = groups[first], groups[second]
            pairs = quality[rows][:, None, both] - quality[columns][None, :, both]
            found = mean_bounds(pairs.reshape(-1, k).T.astype(np.float64), np.ones(k), bounds=span)
            shape = (len(rows), len(columns))
            low[np.ix_(rows, columns)] = found.low.reshape(shape)
            high[np.ix_(rows, columns)] = found.high.reshape(shape)
            low[np.ix_(columns, rows)] = -found.high.reshape(shape).T
            high[np.ix_(columns, rows)] = -found.low.reshape(shape).T
    return low, high
