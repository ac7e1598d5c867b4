"""Precision and recall of a set of images by nearest neighbours among features.

A set's manifold is the union of balls around its features, each reaching to its k-th nearest
neighbour in the set. Precision is the share of images inside the reference's manifold (does it
look real?), recall the share of the reference inside the images' (is everything there?). Both
depend on how many there are on each side, so the reference is cut to a seeded subset of as many
rows as there are images, as in the paper; values compare between sets of equal n only.

Precision is a mean over images, the reference as it is: its interval is that of any mean over
prompts. Recall's manifold is made of the images themselves. Drawing prompts with replacement would
put copies at distance 0 beside their originals and shrink the balls, so half of the prompts are
drawn *without* replacement; for a smooth statistic the spread of half-samples is that of the whole
sample. They are centred, because recall at half the images is lower.

Cost: n² distances a side; at most `MOST` rows.

Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2, with k = 3.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval, percentile_bounds

NEIGHBOURS = 3
MOST = 5000
_HALVES = 400
_SEED = 20240917


@dataclass(frozen=True, slots=True)
class _Pool:
    """Squared distances between images [n, n] and from images to the reference [n, m]."""

    within: NDArray[np.float32]
    across: NDArray[np.float32]


def covered(points: NDArray, manifold: NDArray, k: int = NEIGHBOURS) -> NDArray[np.bool_]:
    """Which points [n, d] lie in the manifold of the features [m, d], m > k: [n]."""
    radii = _radii(_squared(manifold, manifold), k)
    return np.any(_squared(points, manifold) <= radii[None, :], axis=1)


def precision_interval(
    features: NDArray, clusters: NDArray, reference: NDArray, k: int = NEIGHBOURS
) -> Interval:
    """Share of images [n, d] inside the reference's manifold, with an interval over prompts."""
    x, labels = _most(features, clusters)
    inside = covered(x, _cut(reference, len(x)), k)
    return mean_t(inside.astype(np.float64), labels, bounds=(0.0, 1.0))


def recall_interval(
    features: NDArray,
    clusters: NDArray,
    reference: NDArray,
    k: int = NEIGHBOURS,
    *,
    halves: int = _HALVES,
) -> Interval:
    """Share of the reference inside the manifold of the images [n, d], interval over prompts."""
    x, labels = _most(features, clusters)
    _, labels = np.unique(labels, return_inverse=True)
    prompts, y = int(labels.max()) + 1, _cut(reference, len(x))
    pool = _Pool(_squared(x, x), _squared(x, y))
    value = _recall(pool, np.arange(len(x)), k)
    if prompts < 2 or len(x) < 4 * (k + 1):
        return Interval(value, None, None, len(x), prompts)
    half = prompts // 2
    rng = np.random.default_rng([_SEED, prompts])
    draws = np.empty(halves)
    for i in range(halves):
        chosen = np.isin(labels, rng.choice(prompts, half, replace=False))
        draws[i] = _recall(pool, np.flatnonzero(chosen), k)
    if np.ptp(draws) == 0.0 and value in (0.0, 1.0):  # "never seen in so many prompts"
        exact = mean_t(np.full(prompts, value), np.arange(prompts), bounds=(0.0, 1.0))
        return Interval(value, exact.low, exact.high, len(x), prompts)
    spread = (draws - draws.mean()) * np.sqrt(half / (prompts - half))
    low, high = np.clip(percentile_bounds(value + spread, prompts), 0.0, 1.0)
    return Interval(value, float(low), float(high), len(x), prompts)


def _recall(pool: _Pool, rows: NDArray, k: int) -> float:
    radii = _radii(pool.within[np.ix_(rows, rows)], k)
    return float((pool.across[rows] <= radii[:, None]).any(axis=0).mean())


def _radii(squared: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Squared distance of each row to its k-th nearest other row; the 0th is itself."""
    return np.partition(squared, k, axis=1)[:, k]


def _squared(a: NDArray, b: NDArray) -> NDArray[np.float32]:
    """Squared distances [n, m], exactly 0 between a row and itself."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2.0 * (a @ b.T)
    np.maximum(found, 0.0, out=found)
    if a is b:
        np.fill_diagonal(found, 0.0)
    return found.astype(np.float32)


def _cut(rows: NDArray, size: int) -> NDArray:
    """At most `size` rows: a subset that depends on the counts only."""
    if len(rows) <= size:
        return rows
    return rows[np.sort(np.random.default_rng(_SEED).choice(len(rows), size, replace=False))]


def _most(features: NDArray, clusters: NDArray) -> tuple[NDArray, NDArray]:
    kept = _cut(np.arange(len(features)), MOST)
    return np.asarray(features)[kept], np.asarray(clusters)[kept]
