"""How many predictions this run has open: now, and at most while each of them was."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Flights:
    """The open predictions of one run; `busy_s` is the time with at least one."""

    def __init__(self, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called whenever one opens or ends."""
        self._open: set[Flight] = set()
        self._changed = changed
        self._since = 0.0
        self.busy_s = 0.0

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def one(self) -> Iterator["Flight"]:
        """Have one open."""
        flight = Flight(self)
        if not self._open:
            self._since = time.perf_counter()
        self._open.add(flight)
        for each in self._open:
            each.most = max(each.most, len(self._open))
        self._changed()
        try:
            yield flight
        finally:
            self._open.remove(flight)
            if not self._open:
                self.busy_s += time.perf_counter() - self._since
            self._changed()


class Flight:
    """One open prediction; `most` is how many were open at once while it was, itself included."""

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self.most = 0

    @property
    def now(self) -> int:
        """How many are open now, itself included."""
        return len(self._flights)
