"""Bootstrap intervals clustered by prompt.

Seeds of one prompt are not independent, so whole prompts are drawn with replacement, each with all
its images. A resample is a vector of counts per prompt; statistics that are ratios of sums then
are one matrix product over all resamples. Everything is seeded: the same numbers give the same
interval.

The percentiles are *expanded* (Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
section 5.3): the plain percentile interval is too narrow by sqrt((k-1)/k) and by using z for t with
k clusters, which matters below about 30 prompts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

CONFIDENCE = 0.95
RESAMPLES = 2000
_SEED = 20240917
_CACHED_ELEMENTS = 4_000_000
_CHUNK_ELEMENTS = 2_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A statistic with its 95 % interval; `low` and `high` are None with fewer than 2 clusters."""

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    @property
    def ci95(self) -> list[float] | None:
        """The interval as the documents show it."""
        return None if self.low is None or self.high is None else [self.low, self.high]

    def document(self) -> dict[str, Any]:
        """Value, interval, n and number of prompts, as the documents show them."""
        return {"value": self.value, "ci95": self.ci95, "n": self.n, "n_prompts": self.clusters}


def mean_interval(
    values: ArrayLike, clusters: ArrayLike, *, resamples: int = RESAMPLES, seed: int = _SEED
) -> Interval:
    """Return the mean over images with an interval over prompts; a point where prompts agree.

    Values with bounds have `clustered.mean_t`: near a bound this one covers too little.

    Args:
        values: [n] floats, at least one, no NaN.
        clusters: [n] integers, the prompt of each image.
        resamples: how many resamples, at least 1000.
        seed: of the resampling.
    """
    x = np.asarray(values, np.float64)
    sums, counts = _cluster_sums(x, np.asarray(clusters))
    value, k = float(x.mean()), len(sums)
    if k < 2:
        return Interval(value, None, None, len(x), k)
    means = sums / counts
    if np.ptp(means) <= 1e-12 * max(1.0, abs(value)):
        return Interval(value, value, value, len(x), k)
    draws = resampled_means(sums[:, None], counts, resamples=resamples, seed=seed)[:, 0]
    # Rounding in single precision must not put a proportion's end below 0.
    low, high = np.clip(percentile_bounds(draws, k), means.min(), means.max())
    return Interval(value, float(low), float(high), len(x), k)


def resampled_means(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    seed: int = _SEED,
) -> NDArray[np.float64]:
    """Means of resampled prompts: [resamples, m] from sums [k, m] and image counts [k] (or [k, m]).

    A column whose images were not drawn at all in a resample gives NaN there.
    """
    weight = counts if counts.ndim == 2 else counts[:, None]
    # Single precision halves the time; centred sums keep it harmless for the spread.
    centre = sums.sum(axis=0) / weight.sum(axis=0)
    stacked = np.concatenate([sums - centre * weight, weight], axis=1).astype(np.float32)
    m = sums.shape[1]
    parts = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for weights in weight_chunks(len(sums), resamples, seed):
            drawn = (weights @ stacked).astype(np.float64)
            parts.append(centre + drawn[:, :m] / drawn[:, m:])
    return np.concatenate(parts)


def percentile_bounds(draws: NDArray[np.float64], clusters: int) -> NDArray[np.float64]:
    """Lower and upper ends [2, ...] over axis 0 of resampled statistics of `clusters` prompts."""
    tail = expanded_tail(clusters)
    return np.nanquantile(draws, [tail, 1.0 - tail], axis=0)


def expanded_tail(clusters: int) -> float:
    """Return the percentile for a 95 % interval with so many clusters (2.5 % for very many)."""
    t = special.stdtrit(clusters - 1, 0.5 + CONFIDENCE / 2)
    return float(special.ndtr(-np.sqrt(clusters / (clusters - 1)) * t))


def weight_chunks(
    clusters: int, resamples: int, seed: int, width: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Resampling counts in pieces [rows, clusters] of bounded size; `width` is the caller's row."""
    rows = max(1, _CHUNK_ELEMENTS // max(clusters, width if width is not None else 0))
    if clusters * resamples <= _CACHED_ELEMENTS:
        table = _weight_table(clusters, resamples, seed)
        for start in range(0, resamples, rows):
            yield table[start : start + rows]
        return
    rng = np.random.default_rng([seed, clusters])
    for start in range(0, resamples, rows):
        yield _draw(rng, min(rows, resamples - start), clusters)


@lru_cache(maxsize=16)
def _weight_table(clusters: int, resamples: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, clusters])
    rows = max(1, _CHUNK_ELEMENTS // clusters)
    return np.concatenate(
        [_draw(rng, min(rows, resamples - start), clusters) for start in range(0, resamples, rows)]
    )


def _draw(rng: np.random.Generator, rows: int, clusters: int) -> NDArray[np.float32]:
    picks = rng.integers(clusters, size=(rows, clusters))
    picks += np.arange(rows)[:, None] * clusters
    counts = np.bincount(picks.ravel(), minlength=rows * clusters)
    return counts.reshape(rows, clusters).astype(np.float32)


def _cluster_sums(
    values: NDArray[np.float64], clusters: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _, labels = np.unique(clusters, return_inverse=True)
    sums = np.bincount(labels, weights=values).astype(np.float64)
    return sums, np.bincount(labels).astype(np.float64)
