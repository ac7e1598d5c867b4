"""Fault servers that speak fal's, Stability's and DeepInfra's wires; see `fault_server`.

Predictions, faults and counters are those of `FaultServer`; only routes and bodies differ.
"""

import base64
from collections.abc import Mapping
from email import message_from_bytes
from typing import Any
from urllib.parse import urlsplit

from tests.remote.fault_server import TYPES, FaultServer, Made, Seen
from tests.remote.faults import Answer, picture

FAL = {"starting": "IN_QUEUE", "processing": "IN_PROGRESS"}


class FalServer(FaultServer):
    """A queue: POST /owner/model, its status, its result; outputs are fetched."""

    def route(self, method: str, path: str) -> str:
        if path.startswith("/outputs/"):
            return "image"
        if method == "POST":
            return "create"
        return "poll" if path.endswith("/status") else "result"

    def _good(self, seen: Seen) -> Answer:
        parts = urlsplit(seen.path).path.strip("/").split("/")
        if seen.route == "create":
            made = self.accept(seen.json)
            base = f"{self.url}/{'/'.join(parts[:2])}/requests/{made.id}"
            urls = {"status_url": f"{base}/status", "response_url": base}
            answer = {"request_id": made.id, **urls, "cancel_url": f"{base}/cancel"}
            return Answer.json(200, self._replied("create", answer))
        if seen.route == "image":
            made = self.made[parts[-1].rsplit(".", 1)[0]]
            size, file_format = made.input["image_size"], made.input["output_format"]
            pixels = (size["width"], size["height"])
            return _file(made, pixels, file_format)
        made = self.made.get(parts[parts.index("requests") + 1])
        if made is None:
            return Answer.json(404, {"detail": "Request not found"})
        status = self._status(made)
        if seen.route == "poll":
            body: dict[str, Any] = {"request_id": made.id}
            body["status"] = FAL.get(status, "COMPLETED")
            if status == "error":
                body["error"] = "the model failed"
            if status == "success":
                body["metrics"] = {"inference_time": self.seconds}
            return Answer.json(200, self._replied("poll", body))
        if status != "success":
            return Answer.json(400, {"detail": "Request is still in progress"})
        url = f"{self.url}/outputs/{made.id}.{made.input['output_format']}"
        body = {"images": [{"url": url}], "seed": made.input["seed"], "prompt": "as asked"}
        return Answer.json(200, self._replied("result", body))


class SynchronousServer(FaultServer):
    """Answers a create with what it made; a subclass reads the request and words the answer."""

    def route(self, method: str, path: str) -> str:
        return "create" if method == "POST" else "other"

    def _good(self, seen: Seen) -> Answer:
        if seen.route != "create":
            return Answer.json(404, {"detail": "Not found"})
        if self.keys is not None and seen.headers.get("authorization", "")[7:] not in self.keys:
            return Answer.json(401, {"errors": ["Unauthorized"]})
        made = self.accept(self.read(seen))
        return Answer.json(200, self._replied("create", self.answer(made)))

    def read(self, seen: Seen) -> dict[str, Any]:
        return seen.json

    def answer(self, made: Made) -> dict[str, Any]:
        raise NotImplementedError

    def image_of(self, made: Made) -> bytes:
        size = self.sizes[made.input.get("aspect_ratio", "1:1")]
        return _file(made, size, made.input.get("output_format", "png")).body


class StabilityServer(SynchronousServer):
    """Multipart in; base64 and a reason out."""

    def read(self, seen: Seen) -> dict[str, Any]:
        head = f"Content-Type: {seen.headers['content-type']}\r\n\r\n".encode()
        form = message_from_bytes(head + seen.body)
        assert not form.defects
        found: dict[str, Any] = {}
        parts: Any = form.get_payload()
        for part in parts:
            name = part.get_param("name", header="content-disposition")
            data = part.get_payload(decode=True)
            found[name] = data.decode() if part.get_filename() is None else data.hex()
        return found

    def created(self, inputs: Mapping[str, Any]) -> int:
        return super().created({name: f"{value}" for name, value in inputs.items()})

    def answer(self, made: Made) -> dict[str, Any]:
        image = base64.b64encode(self.image_of(made)).decode()
        reason = "CONTENT_FILTERED" if self.fails else "SUCCESS"
        return {"image": image, "finish_reason": reason, "seed": int(made.input["seed"])}


class DeepInfraServer(SynchronousServer):
    """JSON in; a data URI, times and a cost out."""

    def answer(self, made: Made) -> dict[str, Any]:
        image = f"data:image/png;base64,{base64.b64encode(self.image_of(made)).decode()}"
        status = "failed" if self.fails else "succeeded"
        inference = {"status": status, "runtime_ms": 1000 * self.seconds, "cost": self.cost_usd}
        return {
            "request_id": f"request-{made.id}",
            "images": [] if self.fails else [image],
            "nsfw_content_detected": [False],
            "seed": made.input["seed"],
            "inference_status": inference,
        }


SERVERS: dict[str, type[FaultServer]] = {
    "deepinfra": DeepInfraServer,
    "fal": FalServer,
    "stability": StabilityServer,
}
"""What speaks a provider's wire; `FaultServer` itself speaks the others'."""


def _file(made: Made, size: tuple[int, int], name: str) -> Answer:
    file_format = {"jpeg": "jpg"}.get(name, name)
    return Answer.of(picture(f"{made.input}", size, file_format), TYPES[file_format])
