"""What the OpenAPI document says of each route; the routes themselves check their input.

Written by hand where FastAPI would have guessed: the body's schema comes from the same table as
its checks, and every status that a route can answer with is listed.
"""

from typing import Any

from sd35bench.server.predictions import Phase
from sd35bench.server.schema import body_schema
from sd35bench.server.settings import ServedModel

__all__ = ["DOCUMENTS", "create_document", "error_response"]

_TEXT = {"type": "string"}
_NULL_TEXT = {"type": ["string", "null"]}
_NULL_NUMBER = {"type": ["number", "null"]}
_NULL_TIME = {"type": ["string", "null"], "format": "date-time"}

_TIMES = {
    "created_at": {"type": "string", "format": "date-time"},
    "started_at": _NULL_TIME,
    "completed_at": _NULL_TIME,
}
_OUTPUT = {
    "description": "The image's URL; after a failure its code and message; else null.",
    "anyOf": [
        {"type": "string", "format": "uri"},
        {"type": "null"},
        {
            "type": "object",
            "properties": {"error_code": _TEXT, "error_message": _TEXT},
            "required": ["error_code", "error_message"],
        },
    ],
}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _prediction(statuses: list[str], **more: Any) -> dict[str, Any]:
    return _object(
        {
            **more,
            "id": _TEXT,
            "model": _TEXT,
            "input": {"type": "object", "description": "Every field, with its seed drawn."},
            "status": {"type": "string", "enum": statuses},
            "output": _OUTPUT,
            "logs": _NULL_TEXT,
            "metrics": _object({"predict_time": _NULL_NUMBER, "cost": _NULL_NUMBER}),
            "urls": _object({"get": _TEXT, "cancel": _TEXT}),
            **_TIMES,
        }
    )


_EXECUTION = _object(
    {
        "id": _TEXT,
        "model": _TEXT,
        "input": {"type": "object"},
        "status": {"type": "string", "enum": [phase.value for phase in Phase]},
        "execution_cost": _NULL_NUMBER,
        "run_time": _NULL_NUMBER,
        **_TIMES,
        "output": _OUTPUT,
    }
)
_LISTING = _object(
    {
        "executions": {"type": "array", "items": _EXECUTION},
        "total_count": {"type": "integer", "minimum": 0},
        "offset": {"type": "integer", "minimum": 0},
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
    }
)
_ERROR = {"type": "object", "properties": {"error": _TEXT}, "required": ["error"]}
_REASONS = {
    400: "The request is wrong; the error names the field, its value and what is allowed",
    401: "No key, or an unknown one",
    402: "The balance does not cover what is in flight",
    403: "Not from this address",
    404: "No such prediction, model or page",
    408: "The body did not come in time",
    409: "The prediction is over already",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "Too many requests, or too many predictions in flight; nothing was created",
    500: "The server failed; its log knows the request id",
    503: "The server is shutting down",
    504: "The image is still being made: poll for it",
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait"}}


def error_response(status: int) -> dict[str, Any]:
    """What a refusal with this status looks like."""
    found: dict[str, Any] = {
        "description": _REASONS[status],
        "content": {"application/json": {"schema": _ERROR}},
    }
    if status in (429, 503):
        found["headers"] = _RETRY_AFTER
    return found


def _document(
    summary: str, schema: dict[str, Any], refusals: tuple[int, ...], **more: Any
) -> dict[str, Any]:
    """The arguments of `add_api_route` that describe a route."""
    content = {"application/json": {"schema": schema}}
    ok = {"description": "Done", "content": content}
    return {
        "summary": summary,
        "response_model": None,
        "responses": {200: ok, **{status: error_response(status) for status in refusals}},
        **more,
    }


def _query(name: str, schema: dict[str, Any], means: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": means}


def create_document(model: ServedModel) -> dict[str, dict[str, Any]]:
    """Describe the two routes that make a prediction."""
    body = {"required": True, "content": {"application/json": {"schema": body_schema(model)}}}
    refusals = (400, 401, 402, 404, 408, 413, 415, 429, 503)
    accepted = _object({"status": {"const": "success"}, "message": _TEXT, "predictionID": _TEXT})
    ended = _prediction(["success", "failed", "cancelled"], predictionID=_TEXT)
    return {
        "create": _document(
            "Ask for an image; the answer says only that it was accepted",
            accepted,
            refusals,
            openapi_extra={"requestBody": body},
            tags=["predictions"],
        ),
        "run": _document(
            "Ask for an image and wait for it",
            ended,
            (*refusals, 504),
            openapi_extra={"requestBody": body},
            tags=["predictions"],
        ),
    }


DOCUMENTS: dict[str, dict[str, Any]] = {
    "poll": _document(
        "How a prediction stands",
        _prediction([phase.value for phase in Phase]),
        (401, 404, 429),
        tags=["predictions"],
    ),
    "cancel": _document(
        "Cancel a prediction: at once while it waits, at its end while it is being made",
        _object({"status": {"const": "cancelled"}, "message": _TEXT, "predictionID": _TEXT}),
        (401, 404, 408, 409, 413, 429),
        tags=["predictions"],
    ),
    "list": _document(
        "The key's own predictions, the newest first",
        _LISTING,
        (400, 401, 429),
        tags=["predictions"],
        openapi_extra={
            "parameters": [
                _query("model", _TEXT, "One of the model's names."),
                _query("status", {"enum": [phase.value for phase in Phase]}, "Only these."),
                _query("from", {"type": "string", "format": "date-time"}, "Created then or later."),
                _query("to", {"type": "string", "format": "date-time"}, "Created then or before."),
                _query(
                    "limit",
                    {"type": "integer", "minimum": 1, "maximum": 100, "default": 100},
                    "How many at most.",
                ),
                _query(
                    "offset",
                    {"type": "integer", "minimum": 0, "maximum": 10**9 - 1, "default": 0},
                    "How many newer ones to leave out.",
                ),
            ]
        },
    ),
    "model": _document(
        "The input's JSON Schema",
        _object(
            {"title": _TEXT, "slug": _TEXT, "version": _TEXT, "request_schema": {"type": "object"}}
        ),
        (401, 404, 429),
        tags=["model"],
        openapi_extra={
            "parameters": [_query("slug", _TEXT, "One of the model's names; its own if not given.")]
        },
    ),
    "health": _document(
        "Whether the server is ready, and how many predictions are open",
        _object(
            {
                "status": {"type": "string", "enum": ["ready", "no worker", "stopping"]},
                "model": _TEXT,
                "backend": _TEXT,
                "auth": {"type": "boolean"},
                "queue": {"type": "integer", "minimum": 0},
            }
        ),
        (),
        tags=["server"],
    ),
}
