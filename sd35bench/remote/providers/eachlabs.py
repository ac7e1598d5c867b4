"""Eachlabs, and `sd35bench serve`, which speaks the same protocol.

Two descriptions of it exist and disagree in places: the vendor's model page, and its documentation
as of August 2026. `remote.auth` chooses which is spoken: `x-api-key` is the page's (a slash after
`/v1/prediction`), `bearer` the documentation's. What comes back is read in either, whoever said it.

There is no idempotency key, and a create's "success" only means that it was accepted.

Source: the vendor's documentation (eachlabs.ai, "API reference"), August 2026; the hosts that
outputs lie on as seen in its published examples.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.inputs import payload, refusal, unsent
from sd35bench.remote.providers.base import Call, Phase, Prediction, Provider, Upload
from sd35bench.remote.providers.wire import (
    MOST_COST_USD,
    MOST_SECONDS,
    checked_headers,
    fields_of,
    id_of,
    image_urls,
    listed_phase,
    measured,
    model_name,
    moment,
    phase_of,
    queue_seconds,
    refusal_of,
    schema_input,
    settled,
    texts,
    web_url,
)
from sd35bench.types import Request

PAGE = 100
MOST_LISTED = 1e9
VERSION = "0.0.1"
"""Asked for by the model page; the documentation accepts and ignores it."""
IDS = ("predictionID", "prediction_id", "id", "exec_id")
WORDS = {
    "created": Phase.WAITING,
    "queued": Phase.WAITING,
    "pending": Phase.WAITING,
    "starting": Phase.WAITING,
    "processing": Phase.RUNNING,
    "running": Phase.RUNNING,
    "success": Phase.SUCCEEDED,
    "succeeded": Phase.SUCCEEDED,
    "completed": Phase.SUCCEEDED,
    "error": Phase.FAILED,
    "failed": Phase.FAILED,
    "cancelled": Phase.CANCELLED,
    "canceled": Phase.CANCELLED,
    "aborted": Phase.CANCELLED,
}


class Eachlabs(Provider):
    """The protocol of Eachlabs, in both of its dialects."""

    name = "eachlabs"
    base_url = "https://api.eachlabs.ai"
    key_variable = "EACHLABS_API_KEY"
    output_hosts = (".eachlabs.ai", ".eachlabs.run", "storage.googleapis.com")
    # The size goes as an aspect ratio, and is looked for in the file that comes back.
    unsent = ("sampler", "shift", "max_sequence_length")

    def headers(self, key: str) -> dict[str, str]:
        """The header that `remote.auth` names."""
        if key == "" or self._is_bearer:  # a server on this machine may want none
            return super().headers(key)
        return {"X-API-Key": key}

    def refusal(self, request: Request) -> str | None:
        """Say what the input schema has no field or no room for."""
        if self.settings.inputs:
            return refusal(self.settings.inputs, request, self.settings.aspect_ratios)
        return refusal_of(request, self.settings.aspect_ratios)

    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every field of the input schema, typed; `prompt_strength` only acts with an image."""
        return self.input_with(request, image_url, {})

    def input_with(
        self, request: Request, image_url: str | None, images: Mapping[str, str]
    ) -> dict[str, Any]:
        """The model's own schema where it declares one, else Stable Diffusion 3.5's."""
        if self.settings.inputs:
            return payload(self.settings.inputs, request, self.settings.aspect_ratios, images)
        return schema_input(request, self.settings.aspect_ratios, image_url)

    def not_sent(self) -> tuple[str, ...]:
        """What the model has no input for."""
        return unsent(self.settings.inputs) if self.settings.inputs else self.unsent

    def create(self, inputs: Mapping[str, Any]) -> Call:
        """The create, in the chosen dialect."""
        path = "/v1/prediction" if self._is_bearer else "/v1/prediction/"
        body = {
            "model": self.settings.slug,
            "version": VERSION,
            "input": dict(inputs),
            "webhook_url": "",
        }
        return Call(method="POST", path=path, json=body)

    def read_created(self, body: Any) -> Prediction:
        """Find the id; whatever the status says, a poll says better.

        Raises: LostAnswer where there is none: something was created, perhaps.
        """
        try:
            answer = fields_of(body, "the create")
            return Prediction(id=id_of(answer, IDS, "the create's answer"), phase=Phase.WAITING)
        except RemoteError as exc:
            said = texts(body)
            raise LostAnswer(f"{exc}" + (f": {said}" if said else "")) from exc

    def poll(self, prediction_id: str) -> Call:
        """The prediction itself."""
        return Call(method="GET", path=f"/v1/prediction/{prediction_id}")

    def read_prediction(self, body: Any) -> Prediction:
        """Read a prediction; a success without an image is a failure, and may have cost as much."""
        answer = fields_of(body, "the poll")
        phase = phase_of(answer.get("status"), WORDS, "the prediction")
        return settled(_prediction(answer, phase), answer.get("output"))

    def listing(self, since: datetime, until: datetime, page: str | None) -> Call:
        """All executions of the window.

        Neither by model nor by status: under an alias of the slug, or under a status that came
        meanwhile, what is looked for would be hidden, and perhaps paid for twice.
        """
        query = {
            "from": _rfc3339(since),
            "to": _rfc3339(until),
            "limit": f"{PAGE}",
            "offset": "0" if page is None else page,
        }
        return Call(method="GET", path="/v1/executions", query=query)

    def read_listing(self, body: Any) -> tuple[list[Prediction], str | None]:
        """Read a page; a status that is not known counts as waiting, so that it gets polled."""
        answer = fields_of(body, "the listing")
        listed = answer.get("executions")
        if not isinstance(listed, list):
            raise RemoteError("the listing has no list of executions in it")
        found = [_listed(item) for item in listed]
        return found, _next_page(answer, len(found))

    def presign(self, content_type: str) -> Call | None:
        """Ask for a place to upload to."""
        # The route's words for it: image, video, audio or other.
        body = {"content_type": content_type, "file_type": "image"}
        return Call(method="POST", path="/v1/upload/presign", json=body)

    def read_presigned(self, body: Any) -> Upload:
        """Read where the bytes go, and with which headers."""
        answer = fields_of(body, "the upload's presign")
        return Upload(
            put_url=web_url(answer.get("presigned_url"), "presigned_url"),
            public_url=web_url(answer.get("public_url"), "public_url"),
            headers=checked_headers(answer.get("required_headers"), "required_headers"),
        )

    @property
    def _is_bearer(self) -> bool:
        return self.settings.auth == "bearer"


def _next_page(answer: Mapping[str, Any], count: int) -> str | None:
    """Where the next page starts. Raises: RemoteError where a full page does not say."""
    total = measured(answer.get("total_count"), MOST_LISTED)
    offset = measured(answer.get("offset"), MOST_LISTED)
    if count == 0 or ((total is None or offset is None) and count < PAGE):
        return None
    if total is None or offset is None:
        raise RemoteError("the listing's page is full, and it does not say how many there are")
    return f"{int(offset) + count}" if offset + count < total else None


def _listed(item: Any) -> Prediction:
    entry = fields_of(item, "the listing's entry")
    return _prediction(entry, listed_phase(entry, WORDS))


def _prediction(answer: Mapping[str, Any], phase: Phase) -> Prediction:
    metrics = answer.get("metrics")
    metrics = metrics if isinstance(metrics, Mapping) else {}
    inputs = answer.get("input")
    return Prediction(
        id=id_of(answer, IDS[::-1], "the prediction"),
        phase=phase,
        outputs=image_urls(answer.get("output")) if phase is Phase.SUCCEEDED else (),
        error=_reason(answer) if phase in (Phase.FAILED, Phase.CANCELLED) else None,
        predict_s=measured(metrics.get("predict_time", answer.get("run_time")), MOST_SECONDS),
        cost_usd=measured(metrics.get("cost", answer.get("execution_cost")), MOST_COST_USD),
        queue_s=queue_seconds(answer.get("created_at"), answer.get("started_at")),
        input=inputs if isinstance(inputs, Mapping) else None,
        created_at=moment(answer.get("created_at")),
        made_by=model_name(answer.get("made_by")),
    )


def _reason(answer: Mapping[str, Any]) -> str:
    """Why it failed: in `output`, in `error`, or in `logs`."""
    found = (texts(answer.get(name)) for name in ("output", "error", "logs", "message"))
    return next((reason for reason in found if reason is not None), "it gave no reason")


def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
