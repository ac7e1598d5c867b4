"""Stability: one synchronous call, a multipart form, answered with the image.

It has no input for the number of steps, and chooses it; requests that ask for another number than
the model's own are refused, and `steps` is recorded as not sent. Seed 0 means a random one there.
JSON is asked for, since it says whether the image was filtered; an image's bytes are read as well.
There is nothing to poll and no list of earlier calls: what was answered is put on disk at once, and
a create whose answer was lost may have been billed and cannot be found again. Costs are not
reported.

Source: platform.stability.ai/docs/api-reference, "Stable Diffusion 3.5".
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from sd35bench.errors import LostAnswer, RemoteError
from sd35bench.remote.providers.base import UNNAMED, Call, Phase, Prediction, Provider
from sd35bench.remote.providers.wire import (
    LARGEST_ANSWER,
    NINE_RATIOS,
    Offer,
    answered_images,
    check_image_url,
    data_of,
    fields_of,
    refusal_of,
    seed_of,
    settled,
    shown,
)
from sd35bench.types import Request

PATH = "/v2beta/stable-image/generate/sd3"
OFFER = Offer(
    ratios=NINE_RATIOS,
    formats=("jpg", "png"),
    steps=None,
    cfg=(1.0, 10.0),
    takes=("negative_prompt", "init_image"),
)


class Stability(Provider):
    """Stability's own API."""

    name = "stability"
    base_url = "https://api.stability.ai"
    key_variable = "STABILITY_API_KEY"
    output_hosts = ()
    unsent = ("steps", "sampler", "shift", "max_sequence_length", "output_quality")
    most_seed = 4294967294
    synchronous = True
    lists = False
    wrong_key = (401,)  # 403 is a prompt that was flagged
    data_uri_bytes = 10 * 2**20

    def refusal(self, request: Request) -> str | None:
        """Say what the form has no field or no room for."""
        if request.seed == 0:
            return "seed=0: the service takes it for a random one; use seed=1"
        if request.init_image is not None and self.settings.init_image_url is not None:
            return "remote.init_image_url: the service takes the file itself; leave it out"
        ratios, steps = self.settings.aspect_ratios, self.settings.default_steps
        return refusal_of(request, ratios, OFFER, steps)

    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every field of the form; with an image its size counts, and no aspect ratio is taken."""
        check_image_url(request, image_url)
        inputs = {
            "prompt": request.prompt,
            "model": self.settings.slug,
            "mode": "text-to-image" if image_url is None else "image-to-image",
            "cfg_scale": request.cfg,
            "seed": request.seed,
            "output_format": {"jpg": "jpeg"}.get(request.output_format, request.output_format),
        }
        if request.negative_prompt:
            inputs["negative_prompt"] = request.negative_prompt
        if image_url is None:
            ratio = self.settings.aspect_ratios[request.width, request.height]
            return {**inputs, "aspect_ratio": ratio}
        return {**inputs, "image": image_url, "strength": request.prompt_strength}

    def create(self, inputs: Mapping[str, Any]) -> Call:
        """The one call, which lasts until the image is there."""
        content, kind = form_of(inputs)
        return Call(
            method="POST",
            path=PATH,
            content=content,
            headers={"Content-Type": kind},
            timeout_s=self.settings.timeout_s,
            max_body_bytes=LARGEST_ANSWER,
        )

    def read_created(self, body: Any) -> Prediction:
        """Read the image, and whether it is what the model made.

        Raises: LostAnswer where neither an image nor a failure is in it.
        """
        try:
            answer = {"image": body} if isinstance(body, str) else fields_of(body, "the create")
        except RemoteError as exc:
            raise LostAnswer(f"{exc}") from exc
        image, reason = answer.get("image"), answer.get("finish_reason")
        if image is None and reason is None:
            raise LostAnswer("the create's answer has neither image nor finish_reason in it")
        failed = reason not in (None, "SUCCESS")
        made = Prediction(
            id=UNNAMED,
            phase=Phase.FAILED if failed else Phase.SUCCEEDED,
            outputs=() if failed else answered_images(image),
            error=f"finish_reason is {shown(reason, 80)!r}" if failed else None,
            seed=seed_of(answer.get("seed")),
        )
        return settled(made, image)


def form_of(fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """A multipart form and its media type; `image`, a data URI, goes as a file.

    The boundary is the content's SHA-256: it cannot stand in what it was made of.
    """
    parts = []
    for name, value in fields.items():
        file = data_of(value) if name == "image" else None  # a prompt may be any text
        head = f'Content-Disposition: form-data; name="{name}"'
        if file is not None:
            head += f'; filename="{name}"\r\nContent-Type: {file[0]}'
        data = f"{value}".encode() if file is None else file[1]
        parts.append(head.encode() + b"\r\n\r\n" + data + b"\r\n")
    boundary = hashlib.sha256(b"".join(parts)).hexdigest()
    line = f"--{boundary}".encode()
    content = b"".join(line + b"\r\n" + part for part in parts) + line + b"--\r\n"
    return content, f"multipart/form-data; boundary={boundary}"
