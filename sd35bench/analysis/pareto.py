"""Which settings are worth their time: the front, and how sure it is.

A setting is *dominated* by another that is at least as good and at most as slow, and better in one
of the two. Whether it truly is depends on the prompts that were drawn, so prompts are resampled
jointly: one resample draws the same prompts for every setting, in quality and in latency alike.
The share of resamples in which a setting is dominated is its probability of being so.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.intervals import weight_chunks

__all__ = ["Front", "pareto_front", "resampled_front"]

_RESAMPLES = 2000
_SEED = 20261123
_CHUNK_ELEMENTS = 4_000_000


@dataclass(frozen=True, slots=True)
class Front:
    """Per setting [S]: on the front as seen, and with which probability dominated."""

    on_front: NDArray[np.bool_]
    dominated: NDArray[np.float64]


def pareto_front(quality: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which points are dominated by none; [..., S] each, more quality and less cost better."""
    return ~_dominated(quality, cost)


def resampled_front(
    quality: NDArray[np.float64],
    cost: NDArray[np.float64],
    clusters: NDArray[np.int64],
    *,
    resamples: int = _RESAMPLES,
    seed: int = _SEED,
) -> Front:
    """Find the front of S settings from quality [S, n] and cost [S, n] of the same n pairs.

    `clusters` [n] is each pair's prompt. A cost that does not vary by pair may be given as [S].

    Raises: ValueError where the shapes do not fit.
    """
    if quality.ndim != 2 or clusters.shape != quality.shape[1:] or len(cost) != len(quality):
        raise ValueError(
            f"front: quality {quality.shape}, cost {cost.shape}, clusters {clusters.shape};"
            " expected [S, n], [S, n] or [S], [n]"
        )
    spread = cost if cost.ndim == 2 else np.repeat(cost[:, None], quality.shape[1], axis=1)
    seen = pareto_front(quality.mean(axis=1), spread.mean(axis=1))
    labels = np.unique(clusters, return_inverse=True)[1]
    counts = np.bincount(labels).astype(np.float64)
    sums = [_by_prompt(x, labels, len(counts)) for x in (quality, spread)]
    settings, lost, drawn = len(quality), np.zeros(len(quality)), 0
    rows = max(1, _CHUNK_ELEMENTS // settings**2)
    for weights in weight_chunks(len(counts), resamples, seed):
        for start in range(0, len(weights), rows):
            part = weights[start : start + rows].astype(np.float64)
            total = (part @ counts)[:, None]
            lost += _dominated(*((part @ s) / total for s in sums)).sum(axis=0)
            drawn += len(part)
    return Front(seen, lost / drawn)


def _by_prompt(x: NDArray[np.float64], labels: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Sums per prompt [k, S] of x [S, n]."""
    rows = [np.bincount(labels, weights=row, minlength=k) for row in x]
    return np.stack(rows, axis=1).astype(np.float64)


def _dominated(quality: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether some other point is no worse in both and better in one; [..., S]."""
    # Sums in another order must not tell equal settings apart.
    tolerance = 1e-12
    q, c = quality[..., :, None], cost[..., :, None]
    other_q, other_c = quality[..., None, :], cost[..., None, :]
    near_q, near_c = (tolerance * np.maximum(1.0, np.abs(x)) for x in (q, c))
    no_worse = (other_q >= q - near_q) & (other_c <= c + near_c)
    better = (other_q > q + near_q) | (other_c < c - near_c)
    return np.any(no_worse & better, axis=-1, keepdims=True)[..., 0]
