"""Who is out of the race, and who has won: pure functions of what was seen on the same prompts.

A setting is *out* when one other setting shows it, on the prompts that both have: it is beaten by
one that is no slower and no dearer (*dominated*), or by any one by more than the profile's margin
(*out of reach*), so that the profile could never choose it. "Shows" is the lower end of the paired
95 % interval clustered by prompt (`analysis.clustered`): 97.5 % for each such claim, which leaves
room for the few looks that a race takes. A latency over the profile's limit ends a setting too.
Up to `SAME_SPEED` slower counts as no slower, as it does in `recommend`.

The winner is `recommend`'s: the fastest that is shown to be within the margin of the best.
Cost: S settings and k prompts are one [k, S²] product a look; 50 settings on 64 prompts, 5 ms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.clustered import mean_bounds
from sd35bench.analysis.intervals import resampled_means
from sd35bench.analysis.profiles import Profile
from sd35bench.tune.space import Point

__all__ = [
    "SAME_SPEED",
    "Evidence",
    "Look",
    "Out",
    "as_good",
    "decided",
    "judge",
    "look",
    "pick",
    "promise",
]

SAME_SPEED = 0.02
_FEWEST = 4
"""Prompts that two settings must share before one may show anything about the other."""
_RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one setting: [P] by prompt, NaN where nothing was made, or it failed."""

    quality: Floats
    latency_s: Floats
    usd: float = 0.0

    def first(self, prompts: int) -> "Evidence":
        """The same, as if only the first so many prompts had been made."""
        late = np.arange(len(self.quality)) >= prompts
        return replace(
            self,
            quality=np.where(late, np.nan, self.quality),
            latency_s=np.where(late, np.nan, self.latency_s),
        )

    @property
    def p50_s(self) -> float:
        """Median latency in seconds; NaN where none was timed."""
        known = self.latency_s[~np.isnan(self.latency_s)]
        return float(np.median(known)) if len(known) else float("nan")

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


@dataclass(frozen=True, slots=True)
class Look:
    """Settings side by side: `points` [S], `p50_s` and `usd` [S], and paired quality differences.

    `low` and `high` [S, S] bound the quality of the row's setting minus the column's; infinite
    where too few prompts are shared.
    """

    points: list[Point]
    mean: Floats
    p50_s: Floats
    usd: Floats
    low: Floats
    high: Floats


def look(seen: Mapping[Point, Evidence], bounds: tuple[float, float] | None) -> Look:
    """Put settings side by side; `bounds` are what quality can be at least and at most."""
    points = list(seen)
    quality = np.array([seen[p].quality for p in points])
    low, high = _differences(quality, bounds)
    return Look(
        points,
        np.array([seen[p].mean for p in points]),
        np.array([seen[p].p50_s for p in points]),
        np.array([seen[p].usd for p in points]),
        low,
        high,
    )


def judge(found: Look, profile: Profile, margin: float) -> dict[Point, Out]:
    """Tell which settings are out, and why."""
    out: dict[Point, Out] = {}
    limit = _limit(found, profile)
    for i, point in enumerate(found.points):
        if np.isnan(found.mean[i]) or np.isnan(found.p50_s[i]):
            out[point] = Out(kind="failed", why="it gave no image that counts")
        elif limit is not None and found.p50_s[i] > limit:
            why = f"{found.p50_s[i]:.3g} s an image, over the profile's {limit:.3g} s"
            out[point] = Out(kind="too slow", why=why)
    racing = [i for i, p in enumerate(found.points) if p not in out]
    for i in racing:
        verdict = _beaten(found, i, racing, margin)
        if verdict is not None:
            out[found.points[i]] = verdict
    return out


def as_good(found: Look, racing: Sequence[int], margin: float) -> tuple[int, list[int]]:
    """The best of those racing (index), and which are shown to be within the margin of it."""
    best = max(racing, key=lambda i: (found.mean[i], -found.p50_s[i]))
    return best, [i for i in racing if i == best or found.low[i, best] > -margin]


def pick(found: Look, racing: Sequence[int], margin: float) -> int:
    """Index of the winner: the fastest shown within the margin; of those no slower, the best."""
    _, good = as_good(found, racing, margin)
    fastest = min(found.p50_s[i] for i in good)
    tied = [i for i in good if found.p50_s[i] <= fastest * (1.0 + SAME_SPEED)]
    return max(tied, key=lambda i: (found.mean[i], -found.p50_s[i]))


def decided(found: Look, racing: Sequence[int], margin: float) -> bool:
    """Whether more images could not change the answer by more than the margin allows.

    That is: the winner is shown to be within the margin of every other, and none that is faster
    is still racing.
    """
    winner = pick(found, racing, margin)
    others = [i for i in racing if i != winner]
    within = all(found.low[winner, i] > -margin for i in others)
    faster = [i for i in others if found.p50_s[i] * (1.0 + SAME_SPEED) < found.p50_s[winner]]
    return within and not faster


def promise(seen: Mapping[Point, Evidence], margin: float, seed: int = 0) -> dict[Point, float]:
    """How much each setting matters to the answer: its chance to be chosen, plus to be the best.

    Both are shares of resamples of the prompts, the same draw for every setting, where a setting
    within the margin by its mean counts as as good.
    """
    points = list(seen)
    quality = np.array([seen[p].quality for p in points]).T
    there = ~np.isnan(quality)
    means = resampled_means(
        np.where(there, quality, 0.0), there.astype(np.float64), resamples=_RESAMPLES, seed=seed
    )
    means = np.where(np.isnan(means), -np.inf, means)
    best = means.max(axis=1, keepdims=True)
    # Equal best settings share the honour, or the first of a plateau would take it all.
    top = means == best
    leads = (top / top.sum(axis=1, keepdims=True)).mean(axis=0)
    speed = np.array([seen[p].p50_s for p in points])
    reach = np.where(means >= best - margin, speed, np.inf)
    chosen = reach <= reach.min(axis=1, keepdims=True) * (1.0 + SAME_SPEED)
    chances = (chosen / chosen.sum(axis=1, keepdims=True)).mean(axis=0) + leads
    return dict(zip(points, chances.tolist(), strict=True))


def _limit(found: Look, profile: Profile) -> float | None:
    """The profile's limit in seconds, the stricter one; a share is of the slowest one seen."""
    limits = [] if profile.latency_limit_s is None else [profile.latency_limit_s]
    known = found.p50_s[~np.isnan(found.p50_s)]
    if profile.latency_limit_frac is not None and len(known):
        limits.append(profile.latency_limit_frac * float(known.max()))
    return min(limits) if limits else None


def _beaten(found: Look, i: int, racing: Sequence[int], margin: float) -> Out | None:
    """Whether one of those racing shows that setting i is out."""
    rivals = [j for j in racing if j != i]
    if not rivals:
        return None
    lead = max(rivals, key=lambda j: found.low[j, i])
    if found.low[lead, i] > margin:
        why = f"worse by {found.low[lead, i]:.3g} or more, the margin is {margin:g}"
        return Out(kind="out of reach", why=why, by=found.points[lead])
    no_dearer = [
        j
        for j in rivals
        if found.p50_s[j] <= found.p50_s[i] * (1.0 + SAME_SPEED) and found.usd[j] <= found.usd[i]
    ]
    if not no_dearer:
        return None
    lead = max(no_dearer, key=lambda j: found.low[j, i])
    if found.low[lead, i] > 0.0:
        why = f"worse by {found.low[lead, i]:.3g} or more than one that is no slower"
        return Out(kind="dominated", why=why, by=found.points[lead])
    return None


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
