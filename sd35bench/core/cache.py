"""Steps that are predicted instead of evaluated: a fixed mask, and a straight line through time.

Between neighbouring steps the guided velocity changes little and smoothly. A predicted step costs
nothing but the line: ``v(s) = v1 + (v1 - v0) (s - s1) / (s1 - s0)`` through the last two evaluated
velocities (first-order Taylor). The mask depends on the steps alone, so it is known before the
loop, every image costs the same, and nothing looks at the latents.

Lossy: hold it against as many evaluations of a plain schedule (`sampler` at fewer steps), which is
what it competes with.

Source: Liu et al. 2025 (arXiv 2503.06923), TaylorSeer, its order 1, on the velocity.
"""

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
