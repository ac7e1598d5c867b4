"""Ask a service what is free to ask again: with retries, inside a budget of time, at its pace.

    Refused 401, 403     the key is wrong: the whole run ends (ConfigError)
    Refused 429, 5xx     wait as long as it says, or by exponential backoff with full jitter
    NotSent, LostAnswer  the same; a poll or a listing that is asked twice costs nothing
    malformed answers    three times, then it is an error
    other refusals       an error at once

Creates are no such question: see `prediction`.

A prediction is asked after near the moment it should be done, then less and less often.

A poll costs one request of the rate limit and is free otherwise, so few are better than many; but
the client's latency is only known up to the gap between the last poll that saw it unfinished and
the one that saw it finished. The first poll therefore comes when 60 % of earlier predictions of
the setting were done, the next ones after 5 % of that time, growing by half each time. With
growth, a prediction that takes a thousand times as long as expected costs 20 polls, not 20,000.

What is learnt of a finished prediction is the middle of the gap in which it finished: learning the
poll's own time instead would never come down from a first guess that was too long.

A create whose answer was lost is looked for in the service's own list of predictions: what is
listed with the input that was sent, and belongs to no intent of the study, is the one.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sd35bench.errors import ConfigError, LostAnswer, Paused, RemoteError, UnsafeAddress
from sd35bench.remote.ledger import Intent, Ledger
from sd35bench.remote.limiter import Limiter, WaitBounds
from sd35bench.remote.providers.base import Call, Prediction, Provider, RemoteSettings
from sd35bench.remote.transport import NotSent, Refused, Reply, ServerFailed, Transport
from sd35bench.types import Status

RETRY_AFTER_LIMIT_S = 120.0
TOO_MANY = 429
REQUEST_TIMEOUT = 408
QUANTILE = 0.6
ENOUGH = 3
"""Predictions seen before the guess is replaced."""
WINDOW = 9
"""Only the latest count: a queue grows and shrinks, and a wrong first guess must be outvoted. With
20 one that was 160 times too long had not come down in 60 predictions (docs/log.md)."""
FRACTION = 0.05
GROWTH = 1.5
SHORTEST_S = 0.02
LONGEST_S = 10.0
"""A gap is at most this, or the expected latency where that is longer."""
CLOCK_SKEW = timedelta(minutes=2)
"""How far the service's clock may be off ours."""
SENDING = timedelta(minutes=10)
"""A create that was sent at all was received within this."""
PAGES = 50
LATEST = datetime.max.replace(tzinfo=UTC)

_Read = TypeVar("_Read")


class PredictionFailed(Exception):
    """A prediction ended without an image; `status` and the text go on record.

    `image_lost`: it was made and paid for, and its image cannot be had any more.
    `blames_service`: it says more about the service than about this request.
    """

    def __init__(
        self, status: Status, text: str, *, image_lost: bool = False, blames_service: bool = False
    ) -> None:
        super().__init__(text)
        self.status, self.image_lost, self.blames_service = status, image_lost, blames_service


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long and how often: seconds between tries, and tries before giving up.

    `listing_waits_s` are the waits before each look for a lost create in the service's listing: it
    may take a moment to show there.
    """

    backoff_s: float = 0.5
    backoff_limit_s: float = 30.0
    listing_waits_s: tuple[float, ...] = (0.5, 3.0, 10.0)
    unsent: int = 5
    malformed: int = 3
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
        """Sleep, at most to the end. Raises: PredictionFailed where it has come."""
        self.start()
        if self.left_s <= 0:
            raise PredictionFailed(
                Status.TIMED_OUT,
                f"not done after remote.timeout_s={self.seconds:g}: {why}",
                blames_service=True,
            )
        await asyncio.sleep(min(seconds, self.left_s))


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


@dataclass(slots=True, kw_only=True)
class Client:
    """What all predictions of a run share: the way to the service and what is known of it.

    `reached`: whether it has ever answered. `inputs` keeps what listed predictions were made with.
    `checks` has threads of its own for decoding: the common ones let requests go, which would wait.
    """

    provider: Provider
    transport: Transport
    limiter: Limiter
    ledger: Ledger
    settings: RemoteSettings
    latencies: Latencies
    checks: Executor
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    paused: Callable[[], Paused | None] = lambda: None
    bounds: WaitBounds = field(default_factory=WaitBounds)
    reached: bool = False
    inputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)


async def ask(
    client: Client,
    call: Call,
    read: Callable[[Any], _Read],
    deadline: Deadline,
    server_failures: float = math.inf,
) -> tuple[Reply, _Read]:
    """Send `call` until its answer can be read; at most so many times where the server fails.

    Raises: PredictionFailed when the time is up, RemoteError (Refused: also 404; ServerFailed),
    ConfigError for the key.
    """
    failures = malformed = 0
    while True:
        await client.limiter.request(client.bounds)
        deadline.start()
        retry_after_s = None
        try:
            reply = await send(client, call)
            return reply, read(reply.body)
        except UnsafeAddress:
            raise
        except Refused as exc:
            refuse_key(client, exc)
            if exc.status not in (REQUEST_TIMEOUT, TOO_MANY):
                raise
            problem, retry_after_s = exc, retry_after(client, exc)
        except ServerFailed as exc:
            server_failures -= 1
            if server_failures <= 0:
                raise
            problem, retry_after_s = exc, exc.retry_after_s
        except (NotSent, LostAnswer) as exc:
            problem = exc
        except RemoteError as exc:
            malformed += 1
            if malformed >= client.policy.malformed:
                raise
            problem = exc
        await deadline.wait(client.policy.wait_s(failures, retry_after_s), str(problem))
        failures += 1


async def send(client: Client, call: Call) -> Reply:
    """Send one call, once; what goes wrong leaves no frame behind whose variables hold the key.

    Raises: NotSent, Refused, LostAnswer.
    """
    try:
        reply = await client.transport.send(call)
    except RemoteError as exc:
        client.reached = client.reached or isinstance(exc, Refused | ServerFailed)
        forget_frames(exc)
        raise
    client.reached = True
    return reply


def forget_frames(exc: BaseException) -> None:
    """Drop the tracebacks of an exception and of all that it came from."""
    cause: BaseException | None = exc
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__ if cause.__cause__ is None else cause.__cause__


def retry_after(client: Client, exc: Refused) -> float | None:
    """Seconds that a refusal asks to wait, in its header or in its text."""
    return client.provider.reset_s(str(exc)) if exc.retry_after_s is None else exc.retry_after_s


def refuse_key(client: Client, exc: Refused) -> None:
    """End the run where the service does not take the key.

    Raises: ConfigError naming where the key comes from.
    """
    if exc.status in client.provider.wrong_key:
        file = client.settings.key_file
        source = client.provider.key_variable if file is None else f"remote.key_file={file}"
        raise ConfigError(
            f"{client.settings.base_url} does not take the key from {source} ({exc}); correct it"
            " and run the same command again"
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


async def find_lost(client: Client, intent: Intent, deadline: Deadline) -> str | None:
    """The id of the earliest listed prediction that this intent can have made.

    Raises: PredictionFailed when the time is up, RemoteError where the list cannot be read.
    """
    candidates = await _listed(client, intent, deadline)
    client.ledger.catch_up()
    candidates.sort(key=lambda p: LATEST if p.created_at is None else p.created_at)
    for candidate in candidates:
        inputs = candidate.input
        if inputs is None and client.ledger.owner(candidate.id) is None:
            inputs = await _input_of(client, candidate.id, deadline)
        if inputs is None or not client.provider.same_input(inputs, intent.input):
            continue
        if client.ledger.owner(candidate.id) is None:  # still: the poll took its time
            return candidate.id
    return None


async def _listed(client: Client, intent: Intent, deadline: Deadline) -> list[Prediction]:
    """Everything listed around the time of the intent."""
    since = intent.at - CLOCK_SKEW
    until = min(datetime.now(UTC), intent.at + SENDING) + CLOCK_SKEW
    provider = client.provider
    found: list[Prediction] = []
    page: str | None = None
    seen: set[str | None] = set()
    while page not in seen and len(seen) < PAGES:
        seen.add(page)
        call = provider.listing(since, until, page)
        _, (listed, page) = await ask(client, call, provider.read_listing, deadline)
        found += listed
        times = [p.created_at for p in listed if p.created_at is not None]
        if page is None or (times and max(times) < since):  # all older than what is looked for
            break
    return [p for p in found if p.created_at is None or p.created_at >= since]


async def _input_of(
    client: Client, prediction_id: str, deadline: Deadline
) -> Mapping[str, Any] | None:
    """A listed prediction's input, which only a poll tells; asked once in a run."""
    if prediction_id not in client.inputs:
        call = client.provider.poll(prediction_id)
        try:
            _, found = await ask(client, call, client.provider.read_prediction, deadline)
        except Refused:
            return None
        if found.input is None:
            return None
        client.inputs[prediction_id] = found.input
    return client.inputs[prediction_id]
