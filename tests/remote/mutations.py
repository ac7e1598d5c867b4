"""Damaged replies for hypothesis: valid ones of every route, changed as JSON or as bytes."""

import base64
import json
from typing import Any

from hypothesis import strategies as st

from tests.remote.contract import SCALARS
from tests.remote.faults import Answer, picture

__all__ = ["BODIES", "damaged"]

IMAGE = picture("mutations", (64, 64), "png")
IMAGE64 = base64.b64encode(IMAGE).decode()
ENTRY = {
    "id": "p-1",
    "status": "success",
    "output": "https://cdn.eachlabs.ai/a.png",
    "logs": "",
    "input": {"prompt": "x", "steps": "4"},
    "metrics": {"predict_time": 8.1, "cost": "0.035"},
    "created_at": "2026-08-01T10:00:00Z",
    "started_at": "2026-08-01T10:00:01Z",
}
BODIES: dict[tuple[str, str], Any] = {
    ("create", "eachlabs"): {"status": "success", "message": "created", "predictionID": "p-1"},
    ("create", "deepinfra"): {
        "request_id": "r-1",
        "images": [f"data:image/png;base64,{IMAGE64}"],
        "seed": 7,
        "inference_status": {"status": "succeeded", "runtime_ms": 900, "cost": 0.03},
    },
    ("create", "fal"): {"request_id": "r-1", "status_url": "https://x.y/status"},
    ("create", "stability"): {"image": IMAGE64, "finish_reason": "SUCCESS", "seed": 7},
    ("poll", "fal"): {"request_id": "r-1", "status": "COMPLETED", "metrics": {"inference_time": 1}},
    ("create", "replicate"): {**ENTRY, "status": "starting"},
    ("poll", "eachlabs"): ENTRY,
    ("poll", "replicate"): {**ENTRY, "status": "succeeded", "error": None},
    ("list", "eachlabs"): {"executions": [ENTRY, ENTRY], "total_count": 2, "offset": 0},
    ("list", "replicate"): {"next": "https://x.y/z?cursor=abc", "results": [ENTRY, ENTRY]},
}
PRESIGN = {
    "presigned_url": "https://storage.example/u?s=1",
    "public_url": "https://cdn.eachlabs.ai/u.png",
    "required_headers": {"Content-Type": "image/png"},
}


@st.composite
def damaged(draw: st.DrawFn, route: str, provider: str) -> tuple[bytes, bool]:
    """The bytes of one reply, and whether the server then holds the connection open in silence."""
    edits = draw(st.integers(0, 3))
    if route == "image":
        good = answer = Answer.of(IMAGE, "image/png")
    else:
        body = PRESIGN if route == "presign" else BODIES[route, provider]
        good = answer = Answer.json(200, body)
        if draw(st.booleans()):
            status = draw(st.sampled_from([200, 200, 200, 201, 204, 302, 404, 500]))
            answer = Answer.json(status, draw(_edited(body)))
    raw = answer.bytes()
    for _ in range(edits):
        raw = draw(_edited_bytes(raw))
    if raw == good.bytes():
        raw = raw[: draw(st.integers(0, len(raw) - 1))]
    return raw, draw(st.sampled_from([False] * 49 + [True]))


@st.composite
def _edited(draw: st.DrawFn, body: Any) -> Any:
    """One value somewhere in the document replaced, removed or wrapped."""
    path, parent, found = [], None, body
    while isinstance(found, dict | list) and len(found) > 0 and draw(st.integers(0, 4)) > 0:
        parent = found
        keys = list(found) if isinstance(found, dict) else list(range(len(found)))
        path.append(draw(st.sampled_from(keys)))
        found = found[path[-1]]
    if parent is None:
        return draw(SCALARS | st.just([body]) | st.just({"data": body}))
    copy = json.loads(json.dumps(body))
    target = copy
    for key in path[:-1]:
        target = target[key]
    match draw(st.sampled_from(["replace", "remove", "wrap", "long"])):
        case "replace":
            target[path[-1]] = draw(SCALARS)
        case "remove":
            del target[path[-1]]
        case "wrap":
            target[path[-1]] = [target[path[-1]]]
        case _:
            target[path[-1]] = "9" * 20_000
    return copy


@st.composite
def _edited_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """A cut, a flip, an insertion or a repetition somewhere in head or body."""
    at = draw(st.integers(0, len(raw)))
    match draw(st.sampled_from(["cut", "flip", "insert", "repeat", "drop"])):
        case "cut":
            return raw[:at]
        case "flip":
            return (
                raw[:at]
                + bytes(b ^ (1 << draw(st.integers(0, 7))) for b in raw[at : at + 1])
                + raw[at + 1 :]
            )
        case "insert":
            return raw[:at] + draw(st.binary(min_size=1, max_size=20)) + raw[at:]
        case "repeat":
            return raw[:at] + raw[at : at + 50] * draw(st.integers(2, 40)) + raw[at + 50 :]
        case _:
            return raw[:at] + raw[at + draw(st.integers(1, 20)) :]
