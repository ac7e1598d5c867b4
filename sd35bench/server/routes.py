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

import httpx2
from fastapi import APIRouter, Request
from pydantic import BaseModel

from sd35bench.errors import RemoteError, SD35BenchError
from sd35bench.remote.download import download
from sd35bench.remote.images import decode_image
from sd35bench.server.auth import Caller
from sd35bench.server.file_store import FileStore
from sd35bench.server.predictions import Bounds, Phase, Prediction, Query
from sd35bench.server.schema import (
    CREATE_REFUSALS,
    Accepted,
    Ended,
    Execution,
    Failure,
    Health,
    Listing,
    Metrics,
    ModelView,
    PredictionView,
    Urls,
    body_schema,
    input_schema,
    parse_json,
    query_parameter,
    read_create,
    refusals,
    request_of,
)
from sd35bench.server.settings import Refusal
from sd35bench.server.state import ServerState
from sd35bench.workers.worker import encode_image

SYNC_WAIT_S = 300.0
_FETCH_S = 30.0
_DIGITS = re.compile(r"[0-9]{1,9}")
MOST_OFFSET = 10**9 - 1

Handler = Callable[..., Awaitable[BaseModel]]


def protocol_router(state: ServerState) -> APIRouter:
    """Everything that wants a key; the caller is in ``request.state.caller``."""
    routes = _Routes(state)
    router = APIRouter()

    def add(method: str, path: str, handler: Handler, statuses: tuple[int, ...], **more: Any):
        router.add_api_route(path, handler, methods=[method], responses=refusals(*statuses), **more)

    body = {"content": {"application/json": {"schema": body_schema(state.settings.model)}}}
    made = {"tags": ["predictions"], "openapi_extra": {"requestBody": {"required": True, **body}}}
    add(
        *("POST", "/v1/prediction", routes.create, CREATE_REFUSALS),
        summary="Ask for an image; the answer says only that it was accepted",
        **made,
    )
    add(
        *("POST", "/v1/prediction/run", routes.run, (*CREATE_REFUSALS, 504)),
        summary="Ask for an image and wait for it",
        **made,
    )
    add(
        *("GET", "/v1/prediction/{prediction_id}", routes.poll, (401, 404, 429)),
        summary="How a prediction stands",
        tags=["predictions"],
    )
    add(
        *("POST", "/v1/prediction/{prediction_id}/cancel", routes.cancel),
        (401, 404, 408, 409, 413, 429),
        summary="Cancel a prediction: at once while it waits, at its end while it is being made",
        tags=["predictions"],
    )
    add(
        *("GET", "/v1/executions", routes.listing, (400, 401, 429)),
        summary="The key's own predictions, the newest first",
        tags=["predictions"],
        openapi_extra={"parameters": _LISTING_QUERY},
    )
    slug = query_parameter("slug", "One of the model's names; its own if not given.", type="string")
    add(
        *("GET", "/v1/model", routes.schema, (401, 404, 429)),
        summary="The input's JSON Schema",
        tags=["model"],
        openapi_extra={"parameters": [slug]},
    )
    return router


_LISTING_QUERY = [
    query_parameter("model", "One of the model's names.", type="string"),
    query_parameter("status", "Only these.", enum=list(Phase)),
    query_parameter("from", "Created then or later.", type="string", format="date-time"),
    query_parameter("to", "Created then or before.", type="string", format="date-time"),
    query_parameter(
        "limit", "How many at most.", type="integer", minimum=1, maximum=100, default=100
    ),
    query_parameter(
        *("offset", "How many newer ones to leave out."),
        type="integer",
        minimum=0,
        maximum=MOST_OFFSET,
        default=0,
    ),
]


def health_router(state: ServerState) -> APIRouter:
    """GET /healthz: needs no key and tells no secret."""
    router = APIRouter(tags=["server"])

    @router.get(
        "/healthz", summary="Whether the server is ready, and how many predictions are open"
    )
    async def health() -> Health:
        settings = state.settings
        return Health(
            status=state.condition,
            model=settings.model.name,
            backend=settings.load.backend.name,
            auth=state.keys is not None,
            queue=await asyncio.to_thread(state.store.queue_length),
        )

    return router


class _Routes:
    """The handlers; what they share is the server's state."""

    def __init__(self, state: ServerState) -> None:
        self.state, self.settings, self.store = state, state.settings, state.store

    async def create(self, request: Request) -> Accepted:
        prediction_id = await self._accept(request)
        message = "Prediction created successfully"
        return Accepted(status="success", message=message, predictionID=prediction_id)

    async def run(self, request: Request) -> Ended:
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
        word = "failed" if found.status is Phase.ERROR else found.status.value
        view = self._view(found, _base(request)).model_dump()
        return Ended.model_validate({**view, "predictionID": found.id, "status": word})

    async def poll(self, request: Request, prediction_id: str) -> PredictionView:
        found = await asyncio.to_thread(self.store.get, _caller(request).id, prediction_id)
        if found is None:
            raise Refusal(404, "Prediction not found")
        return self._view(found, _base(request))

    def _view(self, found: Prediction, base: str) -> PredictionView:
        ours = found.load == self.store.load_key  # the folder may hold another model's, too
        return _view(found, base, self.settings.model.name if ours else None)

    async def cancel(self, request: Request, prediction_id: str) -> Accepted:
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
        return Accepted(status="cancelled", message=message, predictionID=prediction_id)

    async def listing(self, request: Request) -> Listing:
        wanted, query = request.query_params, _query(request)
        model = wanted.get("model")
        base = _base(request)
        if model is not None and model not in self.settings.model.slugs:
            found, total = [], 0
        else:
            page = await asyncio.to_thread(self.store.listing, _caller(request).id, query)
            found, total = page.predictions, page.total
        rows = [_row(prediction, base) for prediction in found]
        return Listing(executions=rows, total_count=total, offset=query.offset, limit=query.limit)

    async def schema(self, request: Request) -> ModelView:
        model = self.settings.model
        usual = next(slug for slug in model.slugs if slug not in model.schemas)
        slug = request.query_params.get("slug", usual)
        if slug not in model.slugs:
            raise Refusal(404, f"Model not found; served here: {', '.join(model.slugs)}")
        schema = input_schema(model, slug)
        return ModelView(title=model.name, slug=slug, version="0.0.1", request_schema=schema)

    async def _accept(self, request: Request) -> str:
        """Store what is asked for and return its id; from then on it will be made, or reported."""
        if self.state.is_stopping:
            raise Refusal(503, "the server is shutting down", {"Retry-After": "5"})
        asked = read_create(parse_json(await _json_body(request)), self.settings.model)
        caller, bounds = _caller(request), self._bounds()
        price = self.settings.usd_per_image
        prediction_id, digest = str(uuid.uuid4()), None
        wanted = request_of(asked, self.settings.model, None)
        if asked.image is not None or asked.role_images:
            await asyncio.to_thread(self.store.check, caller.id, price, bounds)
        for name, url in asked.role_images.items():
            await self._read(request, name, url)  # the model that stands in has no use for it
        if asked.image is not None:
            digest = await self._fetch(request, asked.image, prediction_id)
            wanted = request_of(asked, self.settings.model, digest)
        prediction = Prediction(
            id=prediction_id,
            owner=caller.id,
            model=asked.slug,
            input=asked.input,
            status=Phase.CREATED,
            price=price,
            created_at=round(time.time(), 6),  # as it is shown, so that a filter on it finds it
        )
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
        data = await self._read(request, "image", url)
        await asyncio.to_thread(self.state.inits.write, prediction_id, data)
        return hashlib.sha256(data).hexdigest()

    async def _read(self, request: Request, name: str, url: str) -> bytes:
        """An input image as PNG. Raises: Refusal (400)."""
        try:
            async with self.state.fetches:
                return await init_image(
                    url,
                    store=self.state.files,
                    own_host=request.url.netloc,
                    allow_loopback=self.settings.allow_loopback,
                )
        except RemoteError as exc:
            raise Refusal(400, f"input.{name}: {exc}") from exc

    def _bounds(self) -> Bounds:
        expected_s = self.state.generator.expected_s
        return Bounds(
            concurrency=self.settings.concurrency,
            balance_usd=self.settings.balance_usd,
            retry_after_s=max(1, math.ceil(expected_s)),
        )

    async def _ended(self, caller: Caller, prediction_id: str) -> Prediction:
        """Wait until a prediction is over."""
        with self.state.ended.waiting(prediction_id) as changed:
            while True:
                changed.clear()
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
                await changed.wait()


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


def _view(prediction: Prediction, base: str, made_by: str | None = None) -> PredictionView:
    """What a poll answers."""
    p = prediction
    own = f"{base}/v1/prediction/{p.id}"
    return PredictionView(
        id=p.id,
        model=p.model,
        made_by=made_by,
        input=p.input,
        status=p.status,
        output=_output(p, base),
        logs=p.error,
        metrics=Metrics(predict_time=p.predict_s, cost=p.cost_usd),
        urls=Urls(get=own, cancel=f"{own}/cancel"),
        created_at=_time(p.created_at),
        started_at=None if p.started_at is None else _time(p.started_at),
        completed_at=None if p.completed_at is None else _time(p.completed_at),
    )


def _row(prediction: Prediction, base: str) -> Execution:
    """What a listing says of one prediction."""
    view = _view(prediction, base)
    return Execution(
        **view.model_dump(exclude={"output", "logs", "metrics", "urls", "made_by"}),
        output=view.output,
        execution_cost=view.metrics.cost,
        run_time=view.metrics.predict_time,
    )


def _output(prediction: Prediction, base: str) -> str | Failure | None:
    """The image's URL, the reason of a failure, or nothing."""
    if prediction.status is Phase.ERROR:
        return Failure(error_code=prediction.error_code, error_message=prediction.error)
    return None if prediction.output is None else f"{base}{prediction.output}"


def _time(seconds: float) -> str:
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
        offset=_integer("offset", given.get("offset", "0"), 0, MOST_OFFSET),
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


async def init_image(value: str, *, store: FileStore, own_host: str, allow_loopback: bool) -> bytes:
    """Return an init image as PNG bytes of 8-bit RGB.

    A client names an address and the server goes there, so every fetch is vetted
    (`remote.download`). Addresses of this server are read from the store, never over HTTP: a Host
    header that lies reaches files of ours and nothing else. The pixels are encoded anew, so that no
    byte that a stranger chose reaches the backend's decoder.

    `value` is an http(s) URL, or a `data:` URI of an image. `own_host` is this server's host, with
    the port where it is not the scheme's, as the client addressed it.

    Raises: UnsafeAddress for an address that nothing may be fetched from; RemoteError where
    fetching fails, an own address has no image, or the bytes are no image within the limits.
    """
    data = await _own(value, store, own_host)
    if data is None:
        fetched = await download(
            value,
            hosts=None,
            allow_loopback=allow_loopback,
            max_bytes=store.max_upload_bytes,
            deadline_s=_FETCH_S,
        )
        data = fetched.data
    return await asyncio.to_thread(lambda: encode_image(decode_image(data), "png", 0))


async def _own(value: str, store: FileStore, own_host: str) -> bytes | None:
    """The image behind an address of this server; ``None`` for other addresses."""
    if value[:5].lower() == "data:" or not _is_own(value, own_host):
        return None
    data = await asyncio.to_thread(store.read_upload, httpx2.URL(value).path)
    if data is None:
        raise RemoteError(f"image {value[:200]!r} is unknown here or expired: upload it again")
    return data


def _is_own(value: str, own_host: str) -> bool:
    """Whether a URL is on this server; one that cannot be read is left to the vetting."""
    try:
        url = httpx2.URL(value)
        own = httpx2.URL(f"{url.scheme}://{own_host}")
    except httpx2.InvalidURL:
        return False
    known = url.scheme in ("http", "https") and url.host != ""
    return known and (url.host, url.port) == (own.host, own.port)
