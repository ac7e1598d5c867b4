"""The routes of files: outputs and uploads are read by name, uploads written by ticket.

What is served was checked when it came in, and is still served as if it were hostile: with its own
content type, never sniffed, and under a policy in which nothing runs. An upload costs no memory
beyond its cap: its ticket is read before its body, and a few bodies are taken at a time.
"""

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from sd35bench.server.file_store import CONTENT_TYPES, BadUpload, FileStore, TicketRefused
from sd35bench.server.schema import parse_json
from sd35bench.server.settings import Refusal

_RECEIVE_S = 60.0
_AT_ONCE = 4
"""Each is held in memory, then decoded in a process that may take a gigabyte."""
_PRESIGN_REFUSALS = {
    400: "Not a body as described",
    413: "The body is too large",
    415: "The body does not say that it is JSON",
    503: "The server cannot write its files",
}
_UPLOAD_REFUSALS = {
    400: "Not one whole PNG, JPEG or WebP image",
    403: "The ticket is unknown, expired, or used for another image",
    408: "The body did not come in time",
    413: "The image is larger than this server takes",
    415: "Not the content type that the ticket was made for",
    503: "Too many uploads at once, or the server cannot write its files",
}
_NO_CONTENT_RUNS = "default-src 'none'; sandbox"


_LONGEST_PRESIGN_BYTES = 4096


class _Error(BaseModel):
    error: str


class _PresignRequest(BaseModel):
    """For the schema only: bodies are read as strictly as those of a create."""

    model_config = ConfigDict(extra="forbid")

    content_type: Literal["image/jpeg", "image/jpg", "image/png", "image/webp"]
    file_type: str | None = Field(None, description="Accepted; not used.")


class _Presigned(BaseModel):
    id: str
    presigned_url: str
    public_url: str
    expires_at: datetime
    required_headers: dict[str, str]


def presign_router(store: FileStore) -> APIRouter:
    """POST /v1/upload/presign: where to PUT an init image, and the URL that it then has.

    The application turns `Refusal` and `StoreError` into answers, here and in `files_router`.
    """
    router = APIRouter(tags=["files"])
    schema = _PresignRequest.model_json_schema()

    @router.post(
        "/v1/upload/presign",
        summary="Get an address to upload an init image to",
        responses=_refusals(_PRESIGN_REFUSALS),
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
    )
    async def presign(request: Request) -> _Presigned:
        if _content_type(request) != "application/json":
            raise Refusal(415, "Content-Type must be application/json")
        content_type = _read_presign(parse_json(await _body(request, _LONGEST_PRESIGN_BYTES)))
        ticket = await asyncio.to_thread(store.presign, content_type)
        base = f"{request.url.scheme}://{request.url.netloc}"
        return _Presigned(
            id=ticket.id,
            presigned_url=base + ticket.put_path,
            public_url=base + ticket.public_path,
            expires_at=datetime.fromtimestamp(ticket.expires_at, UTC),
            required_headers=dict(ticket.headers),
        )

    return router


def _read_presign(body: Any) -> str:
    try:
        return _PresignRequest.model_validate(body, strict=True).content_type
    except ValidationError as exc:
        known = ", ".join(CONTENT_TYPES)
        first = exc.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refusal(
            400,
            f"{where or 'body'}: {first['msg']}; send content_type (one of {known}) and, if you"
            " like, file_type",
        ) from exc


def files_router(store: FileStore) -> APIRouter:
    """GET /outputs/{name}, GET and PUT /uploads/{name}; none of them needs a key."""
    router = APIRouter(tags=["files"])
    for kind, title in (("outputs", "a prediction's image"), ("uploads", "an uploaded image")):
        _add_reading(router, store, kind, title)
    _add_uploading(router, store)
    return router


def _add_reading(router: APIRouter, store: FileStore, kind: str, title: str) -> None:
    async def read(name: str) -> Response:
        file = await asyncio.to_thread(store.read, kind, name)
        if file is None:
            raise Refusal(404, f"there is no {title} at this address: unknown, or expired")
        return Response(
            file.data,
            media_type=file.content_type,
            headers={
                "Cache-Control": f"private, max-age={int(file.expires_in_s)}, immutable",
                "Content-Disposition": f'inline; filename="{file.name}"',
                "Content-Security-Policy": _NO_CONTENT_RUNS,
                "X-Content-Type-Options": "nosniff",
            },
        )

    images: dict[str, Any] = {kind: {} for kind in ("image/png", "image/jpeg", "image/webp")}
    router.add_api_route(
        f"/{kind}/{{name}}",
        read,
        methods=["GET"],
        name=f"read_{kind}",
        summary=f"Read {title}",
        response_class=Response,
        responses={
            200: {"content": images, "description": "The image"},
            **_refusals({404: "Unknown or expired"}),
        },
    )
    router.add_api_route(
        f"/{kind}/{{name}}", read, methods=["HEAD"], name=f"head_{kind}", include_in_schema=False
    )


def _add_uploading(router: APIRouter, store: FileStore) -> None:
    places = asyncio.Semaphore(_AT_ONCE)
    binary: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

    @router.put(
        "/uploads/{name}",
        summary="Upload an image to a presigned address",
        response_class=Response,
        responses=_refusals(_UPLOAD_REFUSALS),
        openapi_extra={
            "requestBody": {"required": True, "content": dict.fromkeys(CONTENT_TYPES, binary)}
        },
    )
    async def upload(request: Request, name: str, token: str = "") -> Response:
        if places.locked():
            raise Refusal(503, "too many uploads at once: try again", {"Retry-After": "1"})
        async with places:
            await _take_upload(store, request, name, token)
        return Response(status_code=200)


async def _take_upload(store: FileStore, request: Request, name: str, secret: str) -> None:
    try:
        expected = await asyncio.to_thread(store.ticket_content_type, name, secret)
        content_type = _content_type(request)
        if content_type != expected:
            raise Refusal(415, f"Content-Type is {content_type!r}: send {expected!r}, as presigned")
        async with asyncio.timeout(_RECEIVE_S):
            data = await _body(request, store.max_upload_bytes)
        await asyncio.to_thread(store.put_upload, name, secret, data)
    except TicketRefused as exc:
        raise Refusal(403, str(exc)) from exc
    except BadUpload as exc:
        raise Refusal(400, str(exc)) from exc
    except TimeoutError as exc:
        raise Refusal(408, f"the upload did not arrive within {_RECEIVE_S:g} s") from exc
    except ClientDisconnect as exc:
        raise Refusal(400, "the upload broke off") from exc


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _body(request: Request, limit_bytes: int) -> bytes:
    """Read a body, never more than the limit, whatever its headers say. Raises: Refusal (413)."""
    too_large = Refusal(413, f"the body is larger than {limit_bytes} bytes: send a smaller one")
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


def _refusals(statuses: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """Describe refusals for the schema."""
    return {status: {"model": _Error, "description": text} for status, text in statuses.items()}
