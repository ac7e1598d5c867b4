"""The pairs that lost most: what a person should look at when a gate fails."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.gate.dimensions import Distances
from sd35bench.gate.policy import Policy
from sd35bench.gate.sides import Side, match_pairs
from sd35bench.stats.verdicts import Direction

__all__ = ["SHOWN", "worst_pairs"]

SHOWN = 12


def worst_pairs(a: Side, b: Side, policy: Policy, distances: Distances) -> list[dict[str, Any]]:
    """Rank pairs with two images by what they lost, the worst first, at most 12.

    By drift where the policy judges it, else by its first metric that both sides have; pairs that
    lost nothing are not among them.

    Returns: ``{"by", "value", "baseline_image", "candidate_image"}`` each; `value` is the effect.
    """
    there = tuple(np.array([image is not None for image in s.images], bool) for s in (a, b))
    matched = match_pairs(a, b, (there[0], there[1]))
    found: tuple[str, NDArray[np.float64], NDArray[np.float64]] | None = None
    if len(matched.clusters):
        if "drift" in policy.dimensions:
            levels = distances(a, b, matched)
            found = None if isinstance(levels, str) else ("mean_abs", levels, levels)
        if found is None and "quality" in policy.dimensions:
            found = _by_metric(a, b, policy, matched.baseline, matched.candidate)
    if found is None:
        return []
    by, effect, harm = found
    lost = np.flatnonzero(np.nan_to_num(harm, nan=0.0) > 0.0)
    order = lost[np.argsort(-harm[lost], kind="stable")][:SHOWN]
    return [
        {
            "by": by,
            "value": float(effect[i]),
            "baseline_image": a.images[matched.baseline[i]],
            "candidate_image": b.images[matched.candidate[i]],
        }
        for i in order
    ]


def _by_metric(
    a: Side, b: Side, policy: Policy, mine: NDArray[np.int64], theirs: NDArray[np.int64]
) -> tuple[str, NDArray[np.float64], NDArray[np.float64]] | None:
    """The first metric of both sides: its name, effects and harms [n]."""
    wanted = policy.dimensions["quality"]
    for name in sorted(set(a.metrics) & set(b.metrics), reverse=True):
        margin = wanted.margin(name)
        if margin is not None:
            effect = b.metrics[name][theirs] - a.metrics[name][mine]
            harms = {Direction.LESS: -effect, Direction.MORE: effect}
            return name, effect, harms.get(margin.direction, np.abs(effect))
    return None
