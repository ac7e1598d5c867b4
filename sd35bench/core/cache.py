"""Steps that are predicted instead of evaluated: a fixed mask, and a straight line through time.

Between neighbouring steps the guided velocity changes little and smoothly. A predicted step costs
nothing but the line: ``v(s) = v1 + (v1 - v0) (s - s1) / (s1 - s0)`` through the last two evaluated
velocities (first-order Taylor). The mask depends on the number of steps alone, so it is known
before the loop, every image costs the same, and nothing looks at the latents.

Lossy: hold it against as many evaluations of a plain schedule (`sampler` at fewer steps), which is
what it competes with.

Source: Liu et al. 2025 (arXiv 2503.06923), TaylorSeer, its order 1, on the velocity.
"""

from collections.abc import Callable, Collection

import torch

from sd35bench.core.schedule import Schedule

FIRST_KEPT = 2
"""Steps evaluated at the beginning: a line needs two points, and the first steps set the layout."""


def evaluated_steps(plan: Schedule, every: int) -> frozenset[int]:
    """Return the steps that are evaluated: the first two, then every `every`-th, and the last."""
    first, last = plan.steps[0], plan.steps[-1]
    start = min(first + FIRST_KEPT - 1, last)
    return frozenset({first, last, *range(start, last + 1, every)})


def predict_between(
    velocity: Callable[[torch.Tensor, int], torch.Tensor],
    plan: Schedule,
    evaluated: Collection[int],
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Wrap `velocity`, so that evaluations of steps outside `evaluated` are predicted."""
    known: list[tuple[float, torch.Tensor]] = []

    def predicted(x: torch.Tensor, e: int) -> torch.Tensor:
        time = plan.timesteps[e]
        if plan.steps[e] in evaluated or len(known) < FIRST_KEPT:
            made = velocity(x, e)
            # Heun looks twice at one time: the later look replaces the earlier.
            kept = [pair for pair in known if pair[0] != time][-1:]
            known[:] = [*kept, (time, made)]
            return made
        (before, v0), (last, v1) = known
        return torch.lerp(v0, v1, (time - before) / (last - before))

    return predicted
