"""A create whose answer was lost, looked for in the service's own list of predictions.

What is listed with the input that was sent, and belongs to no intent of the study, is the one.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from sd35bench.remote.ledger import Intent
from sd35bench.remote.providers.base import Prediction
from sd35bench.remote.retry import Client, Deadline, ask
from sd35bench.remote.transport import Refused

CLOCK_SKEW = timedelta(minutes=2)
"""How far the service's clock may be off ours."""
SENDING = timedelta(minutes=10)
"""A create that was sent at all was received within this."""
PAGES = 50
LATEST = datetime.max.replace(tzinfo=UTC)


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
