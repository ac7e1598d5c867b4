"""Did the candidate make what the baseline made? What is missing is in no figure of a comparison.

Every figure compares pairs that both sides have, so a candidate that died after its first images
would be judged by those alone. A trial that was recorded counts as there, however it ended, since
the failures dimension judges how it ended; under a policy without that dimension nothing else
would, and then only what was made counts. What ran in another environment is missing: figures from
unlike environments are never pooled.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.gate.policy import Policy
from sd35bench.gate.sides import Side
from sd35bench.stats.verdicts import Verdict

__all__ = ["count_covered", "judge_coverage"]

_ROUNDING = 1e-9
"""A share such as 7/10 is below the 0.7 of a policy in the last digit."""


def count_covered(baseline: Side, candidate: Side, policy: Policy) -> tuple[int, int]:
    """How many of the baseline's pairs the candidate has, and how many there are to have."""
    pairs, made = (_recorded(side, policy) for side in (baseline, candidate))
    asked = np.union1d(pairs, baseline.elsewhere)
    return len(np.intersect1d(asked, made)), len(asked)


def judge_coverage(
    matches: Sequence[tuple[Side, Side]], alone: Sequence[Side], policy: Policy
) -> dict[str, Any]:
    """Hold each setting's share of pairs, and the share of settings, against the policy's.

    Args:
        matches: settings of the baseline and of the candidate that belong together.
        alone: settings of the baseline for which the candidate has none.
        policy: says which share must be there.

    Returns: ``{"verdict", "reason", "share", "required"}``; `share` is the least one.
    """
    settings = len({id(a) for a, _ in matches})
    counts = [(b.title, *count_covered(a, b, policy)) for a, b in matches]
    shares = [n / total if total else 1.0 for _, n, total in counts]
    shares.append(settings / (settings + len(alone)))
    least = min(shares)
    lacks = [
        f"{title}: {n} of {total} pairs"
        for (title, n, total), share in zip(counts, shares, strict=False)
        if share < 1.0
    ]
    lacks += [f"{side.title}: no such setting" for side in alone]
    passes = least >= policy.coverage - _ROUNDING
    reason = "everything that the baseline recorded is there"
    if lacks:
        kept = "recorded" if "failures" in policy.dimensions else "made"
        reason = f"of the baseline's, the candidate {kept} {'; '.join(lacks)}"
    if not passes:
        reason += (
            f" (coverage {least:.3g}, the policy asks for {policy.coverage:g}): run the candidate"
            " on the baseline's settings, prompts and seeds, to its end and in one environment,"
            " or set the policy's coverage where fewer are meant"
        )
    return {
        "verdict": Verdict.PASS if passes else Verdict.FAIL,
        "reason": reason,
        "share": least,
        "required": policy.coverage,
    }


def _recorded(side: Side, policy: Policy) -> NDArray[np.uint64]:
    """Pairs that count as there; one that failed at any batch size has failed."""
    if "failures" in policy.dimensions:
        return np.unique(side.pairs)
    return np.setdiff1d(side.pairs, side.pairs[side.failed])
