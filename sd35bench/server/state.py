"""What the routes of one running server share."""

import asyncio
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from sd35bench.server.auth import KeyRing
from sd35bench.server.file_store import FileStore
from sd35bench.server.generation import Generator, InitFiles
from sd35bench.server.predictions import PredictionStore
from sd35bench.server.settings import ServerSettings

WINDOW_S = 60.0
FETCHES_AT_ONCE = 4
"""Init images that are fetched and decoded at the same time: each takes tens of megabytes."""


class RequestLimit:
    """How often one caller may ask: so many requests in any 60 s; used from the event loop alone.

    A refused request does not count, so that a client that waits as asked gets through. Times are
    kept in memory alone: a restart forgets them. Cost: 8 bytes per request of the last minute.
    """

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
        # The sum that a refusal waits for, so that no rounding lets one pass without counting it.
        del times[: bisect_right(times, now, key=lambda at: at + WINDOW_S)]
        if len(times) < self._most:
            times.append(now)
            return 0.0
        return times[len(times) - self._most] + WINDOW_S - now


class Waiters:
    """Tells who waits for a prediction that it is over; lives in the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = {}

    @contextmanager
    def waiting(self, prediction_id: str) -> Iterator[asyncio.Event]:
        """An event that is set when the prediction may be over."""
        event = asyncio.Event()
        self._waiting.setdefault(prediction_id, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[prediction_id].discard(event)
            if not self._waiting[prediction_id]:
                del self._waiting[prediction_id]

    def tell(self, prediction_id: str) -> None:
        """Wake those who wait for one prediction."""
        for event in self._waiting.get(prediction_id, ()):
            event.set()

    def tell_all(self) -> None:
        """Wake everybody who waits: the server is stopping."""
        for prediction_id in list(self._waiting):
            self.tell(prediction_id)

    def teller(self, loop: asyncio.AbstractEventLoop) -> Callable[[str], None]:
        """What another thread calls; the loop may be gone already."""

        def call(prediction_id: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.tell, prediction_id)

        return call


@dataclass(slots=True, kw_only=True)
class ServerState:
    """One server: its settings, what it keeps, who makes the images. `keys` ``None``: no auth."""

    settings: ServerSettings
    keys: KeyRing | None
    store: PredictionStore
    files: FileStore
    inits: InitFiles
    generator: Generator
    requests: RequestLimit
    ended: Waiters = field(default_factory=Waiters)
    fetches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FETCHES_AT_ONCE))
    is_stopping: bool = False

    @property
    def condition(self) -> Literal["ready", "no worker", "stopping"]:
        """One word for how the server is."""
        if self.is_stopping:
            return "stopping"
        return "ready" if self.generator.is_warm else "no worker"
