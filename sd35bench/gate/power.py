"""What a policy can see at which n: the smallest harm that would fail, before a gate is relied on.

From a comparison that was made (a pilot), by its paired spread between prompts; of one side alone
what is not known is assumed, and said. A harm is seen where a figure would fail with 80 % power as
one of all figures of the policy, as in `stats.verdicts.prompts_needed`. Shares have at least the
spread of a loss that goes one way only, ``sqrt(L (1 - L))``, however still the pilot was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, log, sqrt
from typing import Any

import numpy as np
from scipy import special

from sd35bench.gate.dimensions import Distances, figures
from sd35bench.gate.figure import Figure
from sd35bench.gate.policy import Dimension, Policy
from sd35bench.gate.set_figures import LEAST_PROMPTS, SET_UNIT
from sd35bench.gate.sides import Side
from sd35bench.stats.verdicts import POWER, TAIL, Direction, prompts_needed, spread

PROMPTS = (16, 32, 64, 128, 256, 512)
COUPLES = (1, 3, 5, 10)
ASSUMED_LEVELS = {"mean_abs": 0.2, "shift": 0.12}
"""Spread between prompts, levels of 255, where no two sides were compared: the median of the
systematic defects of docs/validity.md."""
_STEPS = 60


@dataclass(frozen=True, slots=True)
class _Known:
    """A figure's spread in its unit, whether it was assumed, and whether it is a share."""

    sd: float
    assumed: bool
    share: bool


def plan_document(
    baseline: Side, candidate: Side | None, policies: Sequence[Policy], distances: Distances
) -> dict[str, Any]:
    """Say what each policy sees; the candidate is a pilot, ``None`` where there is none.

    Returns: ``{"baseline", "candidate", "power", "policies": {name: {"figures": n, "rows": [{
    "dimension", "name", "unit", "kind", "margin", "assumed", "counts", "sees": [[n, harm], …],
    "passes_from", "note"}]}}}``. `counts` is what n counts: "prompts", or "couples of starts"; a
    harm is in the figure's unit (a ratio for kind "ratio"), ``None`` where none would be seen.
    `passes_from` is the n from which a candidate without any harm passes. Images that are the same
    on both sides pass at any n.
    """
    return {
        "baseline": baseline.study,
        "candidate": None if candidate is None else candidate.study,
        "power": POWER,
        "policies": {p.name: _policy(p, baseline, candidate, distances) for p in policies},
    }


def _policy(
    policy: Policy, baseline: Side, candidate: Side | None, distances: Distances
) -> dict[str, Any]:
    found = [
        (name, wanted, figure)
        for name, wanted in policy.dimensions.items()
        for figure in figures(
            name, wanted, baseline, baseline if candidate is None else candidate, distances
        )
    ]
    able = [each for each in found if each[2].effect is not None or each[0] == "drift"]
    tested = [each for each in able if not _is_proof(each[2])]
    size = max(1, len(tested))
    rows = [_row(*each, size, baseline, candidate is not None) for each in able]
    return {"figures": len(able), "rows": rows}


def _tests(figure: Figure) -> int:
    return 2 if figure.margin.direction is Direction.BOTH else 1


def _is_proof(figure: Figure) -> bool:
    """Whether one changed image is proof, so that nothing is tested."""
    return figure.name == "changed" and figure.allowed == 0.0


def _row(
    dimension: str, wanted: Dimension, figure: Figure, size: int, baseline: Side, pilot: bool
) -> dict[str, Any]:
    known = _known(figure, wanted, baseline, pilot)
    back: Callable[[float], float] = exp if figure.kind == "ratio" else float
    least = _least(figure, baseline)
    counts, at = ("couples of starts", COUPLES) if figure.kind == "ratio" else ("prompts", PROMPTS)
    sees: list[list[float | None]] = []
    for n in at:
        harm = None if n < least else _seen(figure, known, n, size)
        sees.append([n, None if harm is None else back(harm)])
    clear = _clear(figure, known)
    return {
        "dimension": dimension,
        "name": figure.name,
        "unit": figure.unit,
        "kind": figure.kind,
        "margin": figure.margin.margin,
        "assumed": known.assumed,
        "counts": counts,
        "sees": sees,
        "passes_from": None if clear is None else max(clear, least),
        "note": "one changed image fails" if _is_proof(figure) else None,
    }


def _known(figure: Figure, wanted: Dimension, baseline: Side, pilot: bool) -> _Known:
    share = figure.span is not None
    if figure.kind == "ratio":
        between = log(wanted.noise) / 2 if wanted.noise is not None else 0.0
        return _Known(wanted.spread.sd if wanted.spread is not None else between, True, False)
    seen = None if figure.effect is None else spread(figure.effect)
    if pilot and seen is not None and (seen > 0.0 or share):
        return _Known(seen, False, share)
    if share:
        return _Known(0.0, False, True)
    levels = next((v for n, v in ASSUMED_LEVELS.items() if figure.name.startswith(n)), None)
    if levels is not None:
        return _Known(levels, True, False)
    # Of two sides that correlate by 1/2 the difference has the spread of either.
    column = baseline.metrics.get(figure.name)
    return _Known(0.0 if column is None else float(np.nanstd(column)), True, False)


def _least(figure: Figure, baseline: Side) -> int:
    """Fewest n for which there is an interval."""
    if figure.unit != SET_UNIT:
        return 1 if figure.kind == "ratio" or _is_proof(figure) else 2
    return LEAST_PROMPTS.get(baseline.sets[figure.name].statistic, 2)


def _seen(figure: Figure, known: _Known, n: int, size: int) -> float | None:
    """The smallest harm that fails at n with 80 % power; ``None`` where none does."""
    if _is_proof(figure):
        return 1.0 - (1.0 - POWER) ** (1.0 / n)
    degrees = n - 1 if n > 1 else 10_000
    tail = special.stdtrit(degrees, 1.0 - TAIL / size / _tests(figure))
    power = special.stdtrit(degrees, POWER)

    def shown(harm: float) -> bool:
        # A share's interval has the spread of its end, which has to pass the margin.
        needed = tail * _spread_at(known, figure.allowed) + power * _spread_at(known, harm)
        return (harm - figure.allowed) * sqrt(n) >= needed

    largest = figure.allowed + 2.0 * (tail + power) * known.sd / sqrt(n) + 1e-12
    largest = 1.0 if known.share else largest
    low, high = figure.allowed, largest
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high if high < 1.0 or not known.share else None


def _spread_at(known: _Known, harm: float) -> float:
    one_way = sqrt(max(harm * (1.0 - harm), 0.0)) if known.share else 0.0
    return max(known.sd, one_way)


def _clear(figure: Figure, known: _Known) -> int | None:
    """From which n on a candidate without harm passes, with 80 % power; ``None`` beyond 10^6."""
    if _is_proof(figure):
        return 1
    if figure.allowed <= 0.0:
        return None
    never = ceil(log(TAIL) / log(1.0 - figure.allowed)) if known.share else 2
    if known.sd <= 0.0:
        return never
    needed = prompts_needed(known.sd, figure.allowed)
    return None if needed is None else max(needed, never)
