"""Which settings are worth their time: the front, and how sure it is.

A setting is *dominated* by another that is at least as good and at most as slow, and better in one
of the two; costs within 2 % are no difference. Whether it truly is depends on the prompts that were
drawn, so prompts are resampled jointly: one resample draws the same prompts for every setting, in
quality and in latency alike. The share of resamples in which a setting is dominated, by whichever
other one, is its probability of being so. A tie in quality counts as no worse: where two settings
did equally well on every prompt, the slower one is dominated for sure, as far as was seen.

How often that comes true (`python -m tests.validity.pareto`: 200 studies of 4 x 4 steps and cfgs,
128 prompts; quality apart by chance by 0.1 / 0.4 in the logit): of settings with 95 % and more,
95.9 / 99.1 % were dominated in truth, with 5 % and less 1.7 / 0.8 %. It claims too much where
settings are nearly equal and prompts few (32 prompts and 0.1: 90.2 % of those with 95 % and more),
since the luckiest of many rivals looks better than it is. Without the 2 %, of two cfgs that cost
the same the worse one would look dominated in half of the resamples only.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.pairs import Comparison
from sd35bench.analysis.settings import cluster_key
from sd35bench.recommend.constraints import Speeds
from sd35bench.stats.intervals import weight_chunks
from sd35bench.types import Record

__all__ = [
    "RESAMPLES",
    "SAME_COST",
    "Front",
    "Timed",
    "front_of",
    "pareto_front",
    "resampled_front",
]

RESAMPLES = 2000
SAME_COST = 0.02
"""Costs this close, as a share, are no difference: medians of one setting differ by as much."""
_SEED = 20261123
_CHUNK_ELEMENTS = 4_000_000

Floats = NDArray[np.float64]
Timed = tuple[Floats, NDArray[np.int64]]
"""One setting's costs [m], and the prompt of each [m]."""


@dataclass(frozen=True, slots=True)
class Front:
    """Per setting [S]: on the front as seen, and with which probability dominated.

    `dominated` is ``None`` with one prompt, of which nothing can be resampled.
    """

    on_front: NDArray[np.bool_]
    dominated: Floats | None


def front_of(comparison: Comparison, speed: Speeds) -> Front:
    """Find the front of candidates in mean quality and in p50 latency (or evaluations)."""
    numbers: dict[Hashable, int] = {}
    keys = [(key[0], key[5]) for key in comparison.keys]
    clusters = _numbered(keys, numbers)
    timed = None
    if speed.basis == "latency_s":
        timed = [_timed(c.row.timed, numbers) for c in comparison.candidates]
    return resampled_front(comparison.quality, clusters, np.array(speed.values), timed)


def pareto_front(quality: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Tell which points are dominated by none; [..., S] each, more quality and less cost better."""
    return ~_dominated(quality, cost)


def resampled_front(
    quality: Floats,
    clusters: NDArray[np.int64],
    cost: Floats,
    timed: Sequence[Timed] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = _SEED,
) -> Front:
    """Find the front of S settings from quality [S, n] of the same n pairs and cost [S].

    Args:
        quality: more is better.
        clusters: [n], each pair's prompt.
        cost: as seen, the medians of `timed` where that is given.
        timed: what `cost` is the median of, S in all, prompts numbered as in `clusters`; further
            numbers are prompts that were timed only. ``None``: cost is known, as evaluations are.
        resamples: how many.
        seed: of them.

    Raises: ValueError where the shapes do not fit.
    """
    _require_shapes(quality, clusters, cost, timed)
    means = quality.mean(axis=1)
    seen = pareto_front(means, cost)
    labels = [clusters] if timed is None else [clusters, *(prompts for _, prompts in timed)]
    k = 1 + max(int(x.max(initial=0)) for x in labels)
    if k < 2:
        return Front(seen, None)
    counts = np.bincount(clusters, minlength=k).astype(np.float64)
    sums = np.stack([np.bincount(clusters, weights=row, minlength=k) for row in quality], axis=1)
    lost, drawn = np.zeros(len(quality)), 0
    widest = max(len(quality) ** 2, *(len(x) for x in labels))
    rows = max(1, _CHUNK_ELEMENTS // widest)
    for weights in weight_chunks(k, resamples, seed):
        for start in range(0, len(weights), rows):
            part = weights[start : start + rows]
            total = (part @ counts)[:, None]
            # A resample without a single pair says nothing; what was seen stands for it.
            drawn_quality = np.where(total > 0, (part @ sums) / np.maximum(total, 1.0), means)
            lost += _dominated(drawn_quality, _resampled_cost(part, cost, timed)).sum(axis=0)
            drawn += len(part)
    return Front(seen, lost / drawn)


def _require_shapes(
    quality: Floats, clusters: NDArray[np.int64], cost: Floats, timed: Sequence[Timed] | None
) -> None:
    given = len(quality) if timed is None else len(timed)
    if quality.ndim != 2 or clusters.shape != quality.shape[1:] or cost.shape != (len(quality),):
        raise ValueError(
            f"front: quality {quality.shape}, clusters {clusters.shape}, cost {cost.shape};"
            " expected [S, n], [n] and [S]"
        )
    if given != len(quality):
        raise ValueError(f"front: {given} settings were timed, {len(quality)} have a quality")


def _numbered(keys: Sequence[Hashable], numbers: dict[Hashable, int]) -> NDArray[np.int64]:
    """Number prompts in order of first sight; `numbers` is added to."""
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _timed(records: Sequence[Record], numbers: dict[Hashable, int]) -> Timed:
    known = [(r.timings.latency_s, cluster_key(r.trial)) for r in records if r.timings is not None]
    labels = _numbered([key for _, key in known], numbers)
    return np.array([latency for latency, _ in known]), labels


def _resampled_cost(
    weights: NDArray[np.float32], cost: Floats, timed: Sequence[Timed] | None
) -> Floats:
    """Median costs [R, S] under resampling counts [R, k]; as seen where nothing timed was drawn."""
    if timed is None:
        return np.broadcast_to(cost, (len(weights), len(cost)))
    found = np.empty((len(weights), len(cost)))
    for i, (values, labels) in enumerate(timed):
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        mass = np.cumsum(weights[:, labels[order]], axis=1)  # of whole numbers: exact
        half = 0.5 * mass[:, -1:]
        # As in `quantile_interval`: where the half falls on a step, the mean of its two ends.
        below = ordered[np.argmax(mass >= half - 1e-9, axis=1)]
        above = ordered[np.argmax(mass > half + 1e-9, axis=1)]
        found[:, i] = np.where(mass[:, -1] > 0, (below + above) / 2, cost[i])
    return found


def _dominated(quality: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Whether some other point is no worse in both and better in one; [..., S]."""
    # Sums in another order must not tell equal settings apart.
    q, c = quality[..., :, None], cost[..., :, None]
    other_q, other_c = quality[..., None, :], cost[..., None, :]
    near = 1e-12 * np.maximum(1.0, np.abs(q))
    no_worse = (other_q >= q - near) & (other_c <= c * (1.0 + SAME_COST))
    better = (other_q > q + near) | (other_c * (1.0 + SAME_COST) < c)
    return np.asarray(np.any(no_worse & better, axis=-1))
