"""Ask a service what is free to ask again: with patience, inside a budget of time, at its pace.

    Refused 401, 403     the key is wrong: the whole run ends (ConfigError)
    Refused 429, 5xx     wait as long as it says, or by exponential backoff with full jitter
    NotSent, LostAnswer  the same; a poll or a listing that is asked twice costs nothing
    nonsense             three times, then it is an error
    other refusals       an error at once

Creates are no such question: see `prediction`.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sd35bench.errors import ConfigError, LostAnswer, RemoteError, UnsafeAddress
from sd35bench.remote.ledger import Ledger
from sd35bench.remote.poll import Latencies
from sd35bench.remote.providers.base import Call, Provider
from sd35bench.remote.settings import RemoteSettings
from sd35bench.remote.transport import NotSent, Refused, Reply, ServerFailed, Transport
from sd35bench.types import Status

__all__ = [
    "Deadline",
    "Ended",
    "Line",
    "Patience",
    "Turns",
    "ask",
    "refuse_key",
    "retry_after",
    "send",
]

RETRY_AFTER_LIMIT_S = 120.0
TOO_MANY = 429
WRONG_KEY = (401, 403)
REQUEST_TIMEOUT = 408

_Read = TypeVar("_Read")


class Turns(Protocol):
    """What is needed of a limiter here: wait until one more request may leave."""

    async def request(self) -> None:
        """Wait for a turn, and take it."""
        ...


class Ended(Exception):
    """A prediction's life is over without an image; `status` and the text go on record.

    `gone`: it was made and paid for, and its image cannot be had any more. `blames_service`: it
    says more about the service than about this request.
    """

    def __init__(
        self, status: Status, text: str, *, gone: bool = False, blames_service: bool = False
    ) -> None:
        super().__init__(text)
        self.status, self.gone, self.blames_service = status, gone, blames_service


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how often: seconds between tries, and tries before giving up.

    `looks_s` are the waits before each look for a lost create in the service's listing: it may
    take a moment to show there.
    """

    backoff_s: float = 0.5
    backoff_limit_s: float = 30.0
    looks_s: tuple[float, ...] = (0.5, 3.0, 10.0)
    unsent: int = 5
    nonsense: int = 3
    missing: int = 3
    downloads: int = 3

    def wait_s(self, failures: int, retry_after_s: float | None) -> float:
        """Seconds before the next try: what the service says, and never less than the jitter."""
        ceiling = min(self.backoff_limit_s, self.backoff_s * 2.0 ** min(failures, 30))
        jitter = random.uniform(0.0, ceiling)
        if retry_after_s is None:
            return jitter
        return max(min(retry_after_s, RETRY_AFTER_LIMIT_S), jitter)


class Deadline:
    """A prediction's budget of time; it starts with its first request's turn."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end: float | None = None

    def start(self) -> None:
        """Start it unless it runs."""
        if self._end is None:
            self._end = time.perf_counter() + self.seconds

    @property
    def left_s(self) -> float:
        """Seconds left."""
        return self.seconds if self._end is None else self._end - time.perf_counter()

    async def wait(self, seconds: float, why: str) -> None:
        """Sleep, at most to the end. Raises: Ended where it has come."""
        self.start()
        if self.left_s <= 0:
            raise Ended(
                Status.TIMED_OUT,
                f"not done after remote.timeout_s={self.seconds:g}: {why}",
                blames_service=True,
            )
        await asyncio.sleep(min(seconds, self.left_s))


@dataclass(slots=True, kw_only=True)
class Line:
    """What all predictions of a run share: the way to the service and what is known of it.

    `heard`: whether it has ever answered. `inputs` keeps what listed predictions were made with.
    `checks` has threads of its own for decoding: the common ones let requests go, which would wait.
    """

    provider: Provider
    transport: Transport
    turns: Turns
    ledger: Ledger
    settings: RemoteSettings
    latencies: Latencies
    checks: Executor
    patience: Patience = field(default_factory=Patience)
    heard: bool = False
    inputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)


async def ask(
    line: Line, call: Call, read: Callable[[Any], _Read], deadline: Deadline
) -> tuple[Reply, _Read]:
    """Send `call` until its answer can be read.

    Raises: Ended when the time is up, RemoteError (Refused: also 404), ConfigError for the key.
    """
    failures = nonsense = 0
    while True:
        await line.turns.request()
        deadline.start()
        retry_after_s = None
        try:
            reply = await send(line, call)
            return reply, read(reply.body)
        except UnsafeAddress:
            raise
        except Refused as exc:
            refuse_key(line, exc)
            if exc.status not in (REQUEST_TIMEOUT, TOO_MANY):
                raise
            problem, retry_after_s = exc, retry_after(line, exc)
        except ServerFailed as exc:
            problem, retry_after_s = exc, exc.retry_after_s
        except (NotSent, LostAnswer) as exc:
            problem = exc
        except RemoteError as exc:
            nonsense += 1
            if nonsense >= line.patience.nonsense:
                raise
            problem = exc
        await deadline.wait(line.patience.wait_s(failures, retry_after_s), str(problem))
        failures += 1


async def send(line: Line, call: Call) -> Reply:
    """Send one call, once; what goes wrong leaves no frame behind whose variables hold the key.

    Raises: NotSent, Refused, LostAnswer.
    """
    try:
        reply = await line.transport.send(call)
    except RemoteError as exc:
        line.heard = line.heard or isinstance(exc, Refused | ServerFailed)
        forget_frames(exc)
        raise
    line.heard = True
    return reply


def forget_frames(exc: BaseException) -> None:
    """Drop the tracebacks of an exception and of all that it came from."""
    cause: BaseException | None = exc
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__ if cause.__cause__ is None else cause.__cause__


def retry_after(line: Line, exc: Refused) -> float | None:
    """Seconds that a refusal asks to wait, in its header or in its text."""
    return line.provider.reset_s(str(exc)) if exc.retry_after_s is None else exc.retry_after_s


def refuse_key(line: Line, exc: Refused) -> None:
    """End the run where the service does not take the key.

    Raises: ConfigError naming where the key comes from.
    """
    if exc.status in WRONG_KEY:
        file = line.settings.key_file
        source = line.provider.key_variable if file is None else f"remote.key_file={file}"
        raise ConfigError(
            f"{line.settings.base_url} does not take the key from {source} ({exc}); correct it and"
            " run the same command again"
        ) from exc


async def despite_cancel(sending: Any) -> Any:
    """Finish what a Ctrl-C would leave half known: a create on its way has its answer awaited."""
    task = asyncio.ensure_future(sending)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: the next run goes on from the journal
        raise
