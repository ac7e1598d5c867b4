"""When to ask how a prediction stands: near the moment it should be done, then less and less often.

A poll costs one request of the rate limit and is free otherwise, so few are better than many; but
the client's latency is only known up to the gap between the last poll that saw it unfinished and
the one that saw it finished. The first poll therefore comes when 60 % of earlier predictions of
the setting were done, the next ones after 5 % of that time, growing by half each time. With
growth, a prediction that takes a thousand times as long as expected costs 20 polls, not 20,000.

What is learnt of a finished prediction is the middle of the gap in which it finished: learning the
poll's own time instead would never come down from a first guess that was too long.
"""

import math
from collections import deque
from collections.abc import Iterator

__all__ = ["Latencies", "intervals", "shortest_gap_s"]

QUANTILE = 0.6
ENOUGH = 3
"""Predictions seen before the guess is replaced."""
WINDOW = 9
"""Only the latest count: a queue grows and shrinks, and a wrong first guess must be outvoted."""
FRACTION = 0.05
GROWTH = 1.5
SHORTEST_S = 0.02
LONGEST_S = 10.0
"""A gap is at most this, or the expected latency where that is longer."""


class Latencies:
    """How long predictions took, from the create's answer on, by setting; seconds."""

    def __init__(self, expected_s: float) -> None:
        """`expected_s` is the guess until `ENOUGH` have been seen."""
        self._guess_s = expected_s
        self._seen: dict[str, deque[float]] = {}

    def saw(self, setting: str, seen_s: float, bound_s: float) -> None:
        """Learn from one that was seen finished after `seen_s`, and unfinished `bound_s` before."""
        middle_s = max(0.0, seen_s - bound_s / 2)
        self._seen.setdefault(setting, deque(maxlen=WINDOW)).append(middle_s)

    def expected_s(self, setting: str) -> float:
        """When 60 % of the latest ones were done."""
        seen = sorted(self._seen.get(setting, ()))
        if len(seen) < ENOUGH:
            return self._guess_s
        return seen[math.ceil(QUANTILE * len(seen)) - 1]


def shortest_gap_s(in_flight: int, per_minute: int) -> float:
    """Seconds between polls that a rate limit leaves to each of those in flight; 0 to one alone."""
    return 60.0 * in_flight / per_minute if in_flight > 1 else 0.0


def intervals(expected_s: float) -> Iterator[float]:
    """Yield seconds to wait before each poll, the first counted from the create's answer."""
    first = max(expected_s, SHORTEST_S)
    yield first
    longest = max(first, LONGEST_S)
    gap = max(FRACTION * first, SHORTEST_S)
    while True:
        yield gap
        gap = min(gap * GROWTH, longest)
