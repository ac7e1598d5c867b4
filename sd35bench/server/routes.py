"""The protocol's routes: create, poll, cancel, synchronous run, list, schema, health.

A route reads its request, asks the predictions' file in a thread and answers in the vendor's
shapes; it waits for nothing that takes longer than a commit, but for an init image's download and,
in the synchronous run, for the image.
"""

import asyncio
import hashlib
import math
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from sd35bench.disk import write_atomic
from sd35bench.errors import RemoteError, SD35BenchError
from sd35bench.server.auth import Caller
from sd35bench.server.documents import DOCUMENTS, create_document
from sd35bench.server.init_images import init_image
from sd35bench.server.predictions import Bounds, Phase, Prediction, Query
from sd35bench.server.refusals import Refusal
from sd35bench.server.schema import input_schema, parse_json, read_create, to_request
from sd35bench.server.state import ServerState

__all__ = ["health_router", "protocol_router"]

SYNC_WAIT_S = 300.0
_DIGITS = re.compile(r"[0-9]{1,9}")
_RUN_WORDS = {Phase.ERROR: "failed"}

Handler = Callable[..., Awaitable[JSONResponse]]


def protocol_router(state: ServerState) -> APIRouter:
    """Everything that wants a key; the caller is in ``request.state.caller``."""
    routes = _Routes(state)
    router = APIRouter()

    def add(method: str, path: str, handler: Handler, document: dict[str, Any]) -> None:
        router.add_api_route(path, handler, methods=[method], **document)

    created = create_document(state.settings.model)
    add("POST", "/v1/prediction", routes.create, created["create"])
    add("POST", "/v1/prediction/run", routes.run, created["run"])
    add("GET", "/v1/prediction/{prediction_id}", routes.poll, DOCUMENTS["poll"])
    add("POST", "/v1/prediction/{prediction_id}/cancel", routes.cancel, DOCUMENTS["cancel"])
    add("GET", "/v1/executions", routes.listing, DOCUMENTS["list"])
    add("GET", "/v1/model", routes.schema, DOCUMENTS["model"])
    return router


def health_router(state: ServerState) -> APIRouter:
    """GET /healthz: needs no key and tells no secret."""
    router = APIRouter()

    async def health() -> JSONResponse:
        settings = state.settings
        return JSONResponse(
            {
                "status": state.condition,
                "model": settings.model.name,
                "backend": settings.load.backend.name,
                "auth": state.keys is not None,
                "queue": await asyncio.to_thread(state.store.queue_length),
            }
        )

    router.add_api_route("/healthz", health, methods=["GET"], **DOCUMENTS["health"])
    return router


class _Routes:
    """The handlers; what they share is the server's state."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.settings, self.store = state, state.settings, state.store

    async def create(self, request: Request) -> JSONResponse:
        prediction_id = await self._accept(request)
        return JSONResponse(
            {
                "status": "success",
                "message": "Prediction created successfully",
                "predictionID": prediction_id,
            }
        )

    async def run(self, request: Request) -> JSONResponse:
        prediction_id = await self._accept(request)
        try:
            async with asyncio.timeout(SYNC_WAIT_S):
                found = await self._ended(_caller(request), prediction_id)
        except TimeoutError as exc:
            raise Refusal(
                504,
                f"no image within {SYNC_WAIT_S:g} s; it is still being made:"
                f" poll GET /v1/prediction/{prediction_id}",
            ) from exc
        answer = _view(found, _base(request))
        answer["status"] = _RUN_WORDS.get(found.status, found.status.value)
        return JSONResponse({"predictionID": found.id, **answer})

    async def poll(self, request: Request, prediction_id: str) -> JSONResponse:
        found = await asyncio.to_thread(self.store.get, _caller(request).id, prediction_id)
        if found is None:
            raise Refusal(404, "Prediction not found")
        return JSONResponse(_view(found, _base(request)))

    async def cancel(self, request: Request, prediction_id: str) -> JSONResponse:
        found = await asyncio.to_thread(self.store.cancel, _caller(request).id, prediction_id)
        if found is None:
            raise Refusal(404, "Prediction not found")
        if found.status in (Phase.SUCCESS, Phase.ERROR):
            raise Refusal(409, f"Prediction is over already: {found.status}")
        message = "Prediction cancelled"
        if found.status is Phase.CANCELLED:
            await asyncio.to_thread(self.state.inits.path(found.id).unlink, missing_ok=True)
            self.state.ended.tell(found.id)
        else:
            message = "Prediction is being made; it will end as cancelled, without an image"
        return JSONResponse(
            {"status": "cancelled", "message": message, "predictionID": prediction_id}
        )

    async def listing(self, request: Request) -> JSONResponse:
        wanted, query = request.query_params, _query(request)
        model = wanted.get("model")
        base = _base(request)
        if model is not None and model not in self.settings.model.slugs:
            found, total = [], 0
        else:
            page = await asyncio.to_thread(self.store.listing, _caller(request).id, query)
            found, total = page.predictions, page.total
        return JSONResponse(
            {
                "executions": [_row(prediction, base) for prediction in found],
                "total_count": total,
                "offset": query.offset,
                "limit": query.limit,
            }
        )

    async def schema(self, request: Request) -> JSONResponse:
        model = self.settings.model
        slug = request.query_params.get("slug", model.slugs[0])
        if slug not in model.slugs:
            raise Refusal(404, f"Model not found; served here: {', '.join(model.slugs)}")
        return JSONResponse(
            {
                "title": model.name,
                "slug": slug,
                "version": "0.0.1",
                "request_schema": input_schema(model),
            }
        )

    async def _accept(self, request: Request) -> str:
        """Store what is asked for and return its id; from then on it will be made, or reported."""
        if self.state.is_stopping:
            raise Refusal(503, "the server is shutting down", {"Retry-After": "5"})
        asked = read_create(parse_json(await _json_body(request)), self.settings.model)
        caller, bounds = _caller(request), self._bounds()
        price = self.settings.usd_per_image
        prediction_id, digest = str(uuid.uuid4()), None
        if asked.image is not None:
            await asyncio.to_thread(self.store.check, caller.id, price, bounds)
            digest = await self._fetch(request, asked.image, prediction_id)
        prediction = Prediction(
            id=prediction_id,
            owner=caller.id,
            model=asked.slug,
            input=asked.input,
            status=Phase.CREATED,
            price=price,
            created_at=round(time.time(), 6),  # as it is told, so that a filter on it finds it
        )
        wanted = to_request(asked.input, self.settings.model, digest)
        try:
            await asyncio.to_thread(self.store.accept, prediction, wanted, bounds)
        except SD35BenchError:
            if digest is not None:
                self.state.inits.path(prediction_id).unlink(missing_ok=True)
            raise
        self.state.generator.wake()
        return prediction_id

    async def _fetch(self, request: Request, url: str, prediction_id: str) -> str:
        """Put an init image beside the predictions and return its SHA-256."""
        try:
            async with self.state.fetches:
                data = await init_image(
                    url,
                    store=self.state.files,
                    own_host=request.url.netloc,
                    allow_loopback=self.settings.allow_loopback,
                )
        except RemoteError as exc:
            raise Refusal(400, f"input.image: {exc}") from exc
        await asyncio.to_thread(write_atomic, self.state.inits.path(prediction_id), data)
        return hashlib.sha256(data).hexdigest()

    def _bounds(self) -> Bounds:
        expected_s = self.state.generator.expected_s
        return Bounds(
            concurrency=self.settings.concurrency,
            balance_usd=self.settings.balance_usd,
            retry_after_s=max(1, math.ceil(expected_s)),
        )

    async def _ended(self, caller: Caller, prediction_id: str) -> Prediction:
        """Wait until a prediction is over."""
        with self.state.ended.waiting(prediction_id) as told:
            while True:
                told.clear()
                found = await asyncio.to_thread(self.store.get, caller.id, prediction_id)
                if found is not None and found.status.is_over:
                    return found
                if self.state.is_stopping:
                    raise Refusal(
                        503,
                        "the server is shutting down; the prediction is kept:"
                        f" poll GET /v1/prediction/{prediction_id} later",
                        {"Retry-After": "5"},
                    )
                await told.wait()


async def _json_body(request: Request) -> bytes:
    """The body, which must say that it is JSON: a web page elsewhere cannot, unasked."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refusal(415, "Content-Type must be application/json")
    return await request.body()


def _caller(request: Request) -> Caller:
    return request.state.caller


def _base(request: Request) -> str:
    """The server's address as the client wrote it."""
    return f"{request.url.scheme}://{request.url.netloc}"


def _view(prediction: Prediction, base: str) -> dict[str, Any]:
    """What a poll answers."""
    p = prediction
    return {
        "id": p.id,
        "model": p.model,
        "input": p.input,
        "status": p.status.value,
        "output": _output(p, base),
        "logs": p.error,
        "metrics": {"predict_time": p.predict_s, "cost": p.cost_usd},
        "urls": {
            "get": f"{base}/v1/prediction/{p.id}",
            "cancel": f"{base}/v1/prediction/{p.id}/cancel",
        },
        "created_at": _time(p.created_at),
        "started_at": _time(p.started_at),
        "completed_at": _time(p.completed_at),
    }


def _row(prediction: Prediction, base: str) -> dict[str, Any]:
    """What a listing says of one prediction; the vendor's has no input."""
    p = prediction
    return {
        "id": p.id,
        "model": p.model,
        "input": p.input,
        "status": p.status.value,
        "execution_cost": p.cost_usd,
        "run_time": p.predict_s,
        "created_at": _time(p.created_at),
        "started_at": _time(p.started_at),
        "completed_at": _time(p.completed_at),
        "output": _output(p, base),
    }


def _output(prediction: Prediction, base: str) -> Any:
    """The image's URL, the reason of a failure, or nothing."""
    if prediction.status is Phase.ERROR:
        return {"error_code": prediction.error_code, "error_message": prediction.error}
    return None if prediction.output is None else f"{base}{prediction.output}"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")
    return text.replace("+00:00", "Z")


def _query(request: Request) -> Query:
    """Read a listing's filters. Raises: Refusal (400)."""
    given = request.query_params
    return Query(
        status=_phase(given.get("status")),
        since=_instant("from", given.get("from")),
        until=_instant("to", given.get("to")),
        limit=_integer("limit", given.get("limit", "100"), 1, 100),
        offset=_integer("offset", given.get("offset", "0"), 0, 10**9 - 1),
    )


def _phase(word: str | None) -> Phase | None:
    try:
        return None if word is None else Phase(word)
    except ValueError as exc:
        raise Refusal(400, f"status: must be one of {', '.join(Phase)}") from exc


def _integer(name: str, text: str, low: int, high: int) -> int:
    if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
        raise Refusal(400, f"{name}: must be an integer from {low} to {high}")
    return int(text)


def _instant(name: str, text: str | None) -> float | None:
    """Seconds since the epoch of an ISO 8601 time; one without a zone is UTC."""
    if text is None:
        return None
    try:
        # A plus sign in a query means a space, and is in a time zone.
        at = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError) as exc:
        raise Refusal(400, f"{name}: must be a time such as 2026-08-01T12:00:00Z") from exc
