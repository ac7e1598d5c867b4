"""How often one caller may ask: so many requests in any 60 seconds, to the millisecond.

A refused request does not count, so that who waits as told gets through. Times are kept in memory
alone: a restart forgives. Cost: 8 bytes per request of the last minute.
"""

import time
from array import array
from bisect import bisect_right
from collections.abc import Callable

__all__ = ["RequestLimit"]

WINDOW_S = 60.0


class RequestLimit:
    """A sliding window per caller; used from the event loop alone."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`per_minute` ``None`` lets everything pass; `clock` gives seconds."""
        self._most, self._clock = per_minute, clock
        self._times: dict[str, array[float]] = {}

    def wait_s(self, caller_id: str) -> float:
        """Count one request, or refuse it: seconds until the next would pass, 0.0 if it passed."""
        if self._most is None:
            return 0.0
        now = self._clock()
        times = self._times.setdefault(caller_id, array("d"))
        del times[: bisect_right(times, now - WINDOW_S)]
        if len(times) < self._most:
            times.append(now)
            return 0.0
        return times[len(times) - self._most] + WINDOW_S - now
