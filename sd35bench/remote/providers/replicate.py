"""Replicate: the same model with the same input schema behind another wire.

`Prefer: wait` is never sent: a create that blocks until the image is there would make the submit's
round trip the whole latency, not comparable with a service that is polled. Costs are not reported,
so the listed price counts. Outputs are deleted after an hour, so a run that is resumed later finds
its predictions, and no images.

Source: replicate.com/docs/reference/http; the input schema is that of
stability-ai/stable-diffusion-3.5-medium, version 382c0389, which has no negative prompt.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import Call, Phase, Prediction, Provider
from sd35bench.remote.providers.wire import (
    MOST_SECONDS,
    fields_of,
    id_of,
    image_urls,
    listed_phase,
    measured,
    moment,
    phase_of,
    queue_seconds,
    refusal_of,
    schema_input,
    settled,
    shown,
    texts,
)
from sd35bench.types import Request

WORDS = {
    "starting": Phase.WAITING,
    "queued": Phase.WAITING,
    "processing": Phase.RUNNING,
    "succeeded": Phase.SUCCEEDED,
    "successful": Phase.SUCCEEDED,
    "failed": Phase.FAILED,
    "canceled": Phase.CANCELLED,
    "cancelled": Phase.CANCELLED,
    "aborted": Phase.CANCELLED,
}
RESET = re.compile(r"resets in ~?\s*(\d{1,6}(?:\.\d{1,6})?)\s*s")
MOST_CURSOR = 2048


class Replicate(Provider):
    """Replicate's HTTP API."""

    name = "replicate"
    base_url = "https://api.replicate.com"
    key_variable = "REPLICATE_API_TOKEN"
    output_hosts = ("replicate.delivery", ".replicate.delivery")
    # The size goes as an aspect ratio, and is looked for in the file that comes back.
    unsent = ("sampler", "shift", "max_sequence_length")

    def refusal(self, request: Request) -> str | None:
        """Say what the input schema has no field or no room for."""
        return refusal_of(request, self.settings.aspect_ratios)

    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every field of the input schema, typed; `prompt_strength` only acts with an image."""
        return schema_input(request, self.settings.aspect_ratios, image_url)

    def create(self, inputs: Mapping[str, Any]) -> Call:
        """The create of an official model, which takes no version."""
        path = f"/v1/models/{quote(self.settings.slug, safe='/')}/predictions"
        return Call(method="POST", path=path, json={"input": dict(inputs)})

    def read_created(self, body: Any) -> Prediction:
        """Find the id; whatever the status says, a poll says better.

        Raises: LostAnswer where there is none: something was created, perhaps.
        """
        try:
            answer = fields_of(body, "the create")
            return Prediction(id=id_of(answer, ("id",), "the create's answer"), phase=Phase.WAITING)
        except RemoteError as exc:
            raise LostAnswer(f"{exc}") from exc

    def poll(self, prediction_id: str) -> Call:
        """The prediction itself."""
        return Call(method="GET", path=f"/v1/predictions/{prediction_id}")

    def read_prediction(self, body: Any) -> Prediction:
        """Read a prediction; a success without an image is a failure, and may have cost as much."""
        answer = fields_of(body, "the poll")
        phase = phase_of(answer.get("status"), WORDS, "the prediction")
        output = answer.get("output")
        if answer.get("data_removed") is True and output is None:
            output = "outputs are removed after an hour"
        return settled(_prediction(answer, phase), output)

    def listing(self, since: datetime, until: datetime, page: str | None) -> Call:
        """The latest predictions of the account, 100 a page, of all models and times."""
        query = {} if page is None else {"cursor": page}
        return Call(method="GET", path="/v1/predictions", query=query)

    def read_listing(self, body: Any) -> tuple[list[Prediction], str | None]:
        """Read a page; a status that is not known counts as waiting, so that it gets polled."""
        answer = fields_of(body, "the listing")
        listed = answer.get("results")
        if not isinstance(listed, list):
            raise RemoteError("the listing has no list of results in it")
        following = answer.get("next")
        return [_listed(item) for item in listed], None if following is None else _cursor(following)

    def reset_s(self, reason: str) -> float | None:
        """Read "Your rate limit resets in ~30s.", which comes without a Retry-After header."""
        found = RESET.search(reason[:2000])
        return None if found is None else measured(found[1], MOST_SECONDS)


def _cursor(following: Any) -> str:
    """Take the cursor alone from the next page's URL, which is not to be followed."""
    try:
        found = parse_qs(urlsplit(following).query).get("cursor", [])
    except (AttributeError, TypeError, ValueError):
        found = []
    if len(found) != 1 or not 0 < len(found[0]) <= MOST_CURSOR:
        raise RemoteError(f"the listing's next page, {shown(following, 80)!r}, has no cursor")
    return found[0]


def _listed(item: Any) -> Prediction:
    entry = fields_of(item, "the listing's entry")
    return _prediction(entry, listed_phase(entry, WORDS))


def _prediction(answer: Mapping[str, Any], phase: Phase) -> Prediction:
    metrics = answer.get("metrics")
    predict_time = metrics.get("predict_time") if isinstance(metrics, Mapping) else None
    inputs = answer.get("input")
    return Prediction(
        id=id_of(answer, ("id",), "the prediction"),
        phase=phase,
        outputs=image_urls(answer.get("output")) if phase is Phase.SUCCEEDED else (),
        error=_reason(answer) if phase in (Phase.FAILED, Phase.CANCELLED) else None,
        predict_s=measured(predict_time, MOST_SECONDS),
        queue_s=queue_seconds(answer.get("created_at"), answer.get("started_at")),
        input=inputs if isinstance(inputs, Mapping) else None,
        created_at=moment(answer.get("created_at")),
    )


def _reason(answer: Mapping[str, Any]) -> str:
    found = (texts(answer.get(name)) for name in ("error", "logs"))
    return next((reason for reason in found if reason is not None), "it gave no reason")
