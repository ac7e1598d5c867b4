"""Find what became of a create whose answer was lost, in the service's own list of predictions.

Trials differ in their input, so a listed prediction with the input that was sent, which no intent
of the study has, is the one. What is listed without its input is polled for it: that is free.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sd35bench.remote.ledger import Intent
from sd35bench.remote.providers.base import Prediction
from sd35bench.remote.retry import Deadline, Line, ask
from sd35bench.remote.transport import Refused

__all__ = ["find_lost"]

CLOCK_SKEW = timedelta(minutes=2)
"""How far the service's clock may be off ours."""
SENDING = timedelta(minutes=10)
"""A create that was sent at all was received within this."""
PAGES = 50
LATEST = datetime.max.replace(tzinfo=UTC)


async def find_lost(line: Line, intent: Intent, deadline: Deadline) -> str | None:
    """The id of the earliest listed prediction that this intent can have made.

    Raises: Ended when the time is up, RemoteError where the list cannot be read.
    """
    candidates = await _listed(line, intent, deadline)
    line.ledger.catch_up()
    candidates.sort(key=lambda p: LATEST if p.created_at is None else p.created_at)
    for candidate in candidates:
        inputs = candidate.input
        if inputs is None and line.ledger.owner(candidate.id) is None:
            inputs = await _input_of(line, candidate.id, deadline)
        if inputs is None or not line.provider.same_input(inputs, intent.input):
            continue
        if line.ledger.owner(candidate.id) is None:  # still: the poll took its time
            return candidate.id
    return None


async def _listed(line: Line, intent: Intent, deadline: Deadline) -> list[Prediction]:
    """Everything listed around the time of the intent."""
    since = intent.at - CLOCK_SKEW
    until = min(datetime.now(UTC), intent.at + SENDING) + CLOCK_SKEW
    provider = line.provider
    found: list[Prediction] = []
    page: str | None = None
    seen: set[str | None] = set()
    while page not in seen and len(seen) < PAGES:
        seen.add(page)
        call = provider.listing(since, until, page)
        _, (listed, page) = await ask(line, call, provider.read_listing, deadline)
        found += listed
        times = [p.created_at for p in listed if p.created_at is not None]
        if page is None or (times and max(times) < since):  # all older than what is looked for
            break
    return [p for p in found if p.created_at is None or p.created_at >= since]


async def _input_of(line: Line, prediction_id: str, deadline: Deadline) -> Mapping[str, Any] | None:
    """A listed prediction's input, which only a poll tells; asked once in a run."""
    if prediction_id not in line.inputs:
        call = line.provider.poll(prediction_id)
        try:
            _, found = await ask(line, call, line.provider.read_prediction, deadline)
        except Refused:
            return None
        if found.input is None:
            return None
        line.inputs[prediction_id] = found.input
    return line.inputs[prediction_id]
