"""fal: a queue. A create is answered with a request's id, a status is polled, a result fetched.

The addresses that an answer names are not followed: those of a request are the model's owner and
name with the id, at the host that was asked. `x-fal-no-retry` is always sent, or a latency could be
that of several attempts. Nothing lists earlier requests by their input, so a create whose answer
was lost cannot be found again. Costs are not reported.

Source: fal.ai/docs, "Asynchronous inference" and "Request errors"; the input schema is that of
fal-ai/stable-diffusion-v35-medium, which has no init image.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import Call, Phase, Prediction, Provider
from sd35bench.remote.providers.wire import (
    MOST_SECONDS,
    Offer,
    fields_of,
    id_of,
    image_urls,
    measured,
    named_input,
    phase_of,
    refusal_of,
    seed_of,
    settled,
    texts,
)
from sd35bench.types import Request

OFFER = Offer(ratios=None, formats=("jpg", "png"), takes=("negative_prompt",))
WORDS = {"in_queue": Phase.WAITING, "in_progress": Phase.RUNNING, "completed": Phase.READY}


class Fal(Provider):
    """fal's queue API."""

    name = "fal"
    base_url = "https://queue.fal.run"
    key_variable = "FAL_KEY"
    output_hosts = ("fal.media", ".fal.media")
    unsent = ("sampler", "shift", "max_sequence_length", "output_quality")
    lists = False
    takes_px = True

    def headers(self, key: str) -> dict[str, str]:
        """The key, which is no bearer token here."""
        return {} if key == "" else {"Authorization": f"Key {key}"}

    def refusal(self, request: Request) -> str | None:
        """Say what the input schema has no field or no room for."""
        return refusal_of(request, self.settings.aspect_ratios, OFFER)

    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every field of the input schema that says what to make; the size in px."""
        size = {"width": request.width, "height": request.height}
        word = {"jpg": "jpeg"}.get(request.output_format, request.output_format)
        return {**named_input(request, image_url, {"image_size": size}), "output_format": word}

    def create(self, inputs: Mapping[str, Any]) -> Call:
        """Put it into the queue, to be tried once."""
        path = f"/{quote(self.settings.slug, safe='/')}"
        return Call(method="POST", path=path, json=dict(inputs), headers={"x-fal-no-retry": "1"})

    def read_created(self, body: Any) -> Prediction:
        """Find the id. Raises: LostAnswer where there is none: something was created, perhaps."""
        try:
            answer = fields_of(body, "the create")
            id_ = id_of(answer, ("request_id",), "the create's answer")
            return Prediction(id=id_, phase=Phase.WAITING)
        except RemoteError as exc:
            raise LostAnswer(f"{exc}") from exc

    def poll(self, prediction_id: str) -> Call:
        """The request's status."""
        return Call(method="GET", path=f"{self._request(prediction_id)}/status")

    def read_prediction(self, body: Any) -> Prediction:
        """Read a status: one that ended with an error failed, any other that ended has a result."""
        answer = fields_of(body, "the status")
        phase = phase_of(answer.get("status"), WORDS, "the request")
        error = None
        if phase is Phase.READY and answer.get("error") is not None:
            phase, error = Phase.FAILED, texts(answer["error"]) or "it gave no reason"
        metrics = answer.get("metrics")
        inference = metrics.get("inference_time") if isinstance(metrics, Mapping) else None
        return Prediction(
            id=id_of(answer, ("request_id",), "the status"),
            phase=phase,
            error=error,
            predict_s=measured(inference, MOST_SECONDS),
        )

    def result(self, prediction_id: str) -> Call:
        """What came of it."""
        return Call(method="GET", path=self._request(prediction_id))

    def read_result(self, body: Any, polled: Prediction) -> Prediction:
        """Read the result of a request that ended."""
        answer = fields_of(body, "the result")
        timings = answer.get("timings")
        inference = timings.get("inference") if isinstance(timings, Mapping) else None
        predict_s = measured(inference, MOST_SECONDS)
        ended = Prediction(
            id=polled.id,
            phase=Phase.SUCCEEDED,
            outputs=image_urls(answer.get("images")),
            predict_s=polled.predict_s if predict_s is None else predict_s,
            seed=seed_of(answer.get("seed")),
        )
        return settled(ended, answer.get("images"))

    def _request(self, prediction_id: str) -> str:
        """The path of a request: a model's further segments are left out."""
        owner_and_name = "/".join(self.settings.slug.split("/")[:2])
        return f"/{quote(owner_and_name, safe='/')}/requests/{prediction_id}"
