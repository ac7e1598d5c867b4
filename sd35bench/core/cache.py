"""Steps that are predicted instead of evaluated: a fixed mask, and a straight line through time.

Between neighbouring steps the guided velocity changes little and smoothly. A predicted step costs
nothing but the line: ``v(s) = v1 + (v1 - v0) (s - s1) / (s1 - s0)`` through the last two evaluated
velocities (first-order Taylor). The mask depends on the steps alone, so it is known before the
loop, every image costs the same, and nothing looks at the latents.

Lossy: hold it against as many evaluations of a plain schedule (`sampler` at fewer steps), which is
what it competes with.

Source: Liu et al. 2025 (arXiv 2503.06923), TaylorSeer, its order 1, on the velocity.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FIRST_KEPT = 2
"""Steps evaluated at the beginning: a line needs two points, and the first steps set the layout."""


def evaluated_steps(steps: Sequence[int], cache: str) -> frozenset[int]:
    """Return which of the running `steps` are evaluated: the first two, and those of the mask.

    `cache`: "none" for all; "N" for every N-th from the second on, and the last; "A-B-C" for a mask
    found beforehand, the very steps of the whole schedule.
    """
    if cache == "none":
        return frozenset(steps)
    kept = steps[:FIRST_KEPT]
    if "-" in cache:
        return frozenset(kept) | (frozenset(map(int, cache.split("-"))) & frozenset(steps))
    return frozenset({*kept, *steps[FIRST_KEPT - 1 :: int(cache)], *steps[-1:]})


def predict_between(
    velocity: "Callable[[torch.Tensor, int], torch.Tensor]",
    times: Sequence[float],
    predicted: Collection[int],
    kinds: Sequence[Any],
) -> "Callable[[torch.Tensor, int], torch.Tensor]":
    """Wrap `velocity`, so that the evaluations `predicted` are.

    A line goes through evaluations of one of `kinds`; through the first of a kind it is level.
    """
    known: list[tuple[float, torch.Tensor]] = []
    last: list[Any] = []

    def found(x: "torch.Tensor", e: int) -> "torch.Tensor":
        if e not in predicted:
            made = velocity(x, e)
            # Heun looks twice at one time: the later look replaces the earlier.
            alike = [p for p in known if p[0] != times[e]][-1:] if last == [kinds[e]] else []
            known[:], last[:] = [*alike, (times[e], made)], [kinds[e]]
            return made
        if len(known) < FIRST_KEPT:
            return known[0][1]
        (before, v0), (after, v1) = known
        return v0.lerp(v1, (times[e] - before) / (after - before))

    return found


def best_mask(
    times: Sequence[float], velocities: "Sequence[torch.Tensor]", count: int
) -> tuple[int, ...]:
    """Find the `count` steps to evaluate whose predictions miss recorded velocities least.

    `times`, `velocities`: one for each step of a whole loop of order 1, of as many images as there
    are in a batch. What a prediction misses is weighed with the length of its step and added up,
    as if the latents stayed where they were; a shortest path over the last two evaluated steps, so
    N^3 predictions for N steps.

    Raises: ValueError for fewer than two, or more than there are steps.
    """
    steps = len(times)
    if not FIRST_KEPT <= count <= steps:
        raise ValueError(f"count={count}: must be from {FIRST_KEPT} to {steps}")
    lengths = [a - b for a, b in itertools.pairwise((*times, 0.0))]

    def missed(a: int, b: int, i: int) -> float:
        line = velocities[a].lerp(velocities[b], (times[i] - times[a]) / (times[b] - times[a]))
        return lengths[i] * float((line - velocities[i]).square().mean().sqrt())

    # The least error of evaluating `path`, by its last two steps; later steps are still open.
    found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0, 1))}
    for _ in range(count - FIRST_KEPT):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (a, b), (error, path) in found.items():
            for c in range(b + 1, steps):
                if (b, c) not in longer or error < longer[b, c][0]:
                    longer[b, c] = (error, (*path, c))
                error += missed(a, b, c)
        found = longer
    ends = []
    for (a, b), (error, path) in found.items():
        ends.append((error + math.fsum(missed(a, b, i) for i in range(b + 1, steps)), path))
    return min(ends)[1]
