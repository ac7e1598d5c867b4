"""DeepInfra: one synchronous call, answered with the image as a data URI, its time and its cost.

There is nothing to poll and no list of earlier calls: what was answered is put on disk at once, and
a create whose answer was lost may have been billed and cannot be found again.

Source: deepinfra.com/stabilityai/sd3.5-medium/api.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import Call, Phase, Prediction, Provider
from sd35bench.remote.providers.wire import (
    LARGEST_ANSWER,
    MOST_COST_USD,
    MOST_SECONDS,
    NINE_RATIOS,
    Offer,
    answered_images,
    fields_of,
    measured,
    named_input,
    refusal_of,
    request_id,
    seed_of,
    settled,
    shown,
)
from sd35bench.types import Request

OFFER = Offer(ratios=NINE_RATIOS, formats=("png",), takes=("negative_prompt",))
FAILED = ("failed", "error", "cancelled")


class DeepInfra(Provider):
    """DeepInfra's inference API."""

    name = "deepinfra"
    base_url = "https://api.deepinfra.com"
    key_variable = "DEEPINFRA_TOKEN"
    output_hosts = ()
    # PNG is what it makes, and is looked for in the bytes that come back, as the size is.
    unsent = ("sampler", "shift", "max_sequence_length", "output_format", "output_quality")
    most_seed = 2**64 - 1
    synchronous = True
    lists = False

    def refusal(self, request: Request) -> str | None:
        """Say what the input schema has no field or no room for."""
        return refusal_of(request, self.settings.aspect_ratios, OFFER)

    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every field of the input schema, typed."""
        ratio = self.settings.aspect_ratios[request.width, request.height]
        return named_input(request, image_url, {"aspect_ratio": ratio})

    def create(self, inputs: Mapping[str, Any]) -> Call:
        """The one call, which lasts until the image is there."""
        return Call(
            method="POST",
            path=f"/v1/inference/{quote(self.settings.slug, safe='/')}",
            json=dict(inputs),
            timeout_s=self.settings.timeout_s,
            max_body_bytes=LARGEST_ANSWER,
        )

    def read_created(self, body: Any) -> Prediction:
        """Read the image, what it took and what it cost.

        Raises: LostAnswer where neither an image nor a failure is in it.
        """
        try:
            answer = fields_of(body, "the create")
        except RemoteError as exc:
            raise LostAnswer(f"{exc}") from exc
        said = answer.get("inference_status")
        inference = said if isinstance(said, Mapping) else {}
        status = inference.get("status")
        if "images" not in answer and not inference:
            raise LostAnswer("the create's answer has neither images nor inference_status in it")
        runtime_ms = measured(inference.get("runtime_ms"), 1000 * MOST_SECONDS)
        failed = isinstance(status, str) and status.lower() in FAILED
        made = Prediction(
            id=request_id(answer.get("request_id")),
            phase=Phase.FAILED if failed else Phase.SUCCEEDED,
            outputs=() if failed else answered_images(answer.get("images")),
            error=f"inference_status is {shown(status, 80)!r}" if failed else None,
            predict_s=runtime_ms / 1000 if runtime_ms else None,
            cost_usd=measured(inference.get("cost"), MOST_COST_USD),
            seed=seed_of(answer.get("seed")),
        )
        return settled(made, answer.get("images"))
