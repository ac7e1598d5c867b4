"""Files that the server hands out and takes in: outputs, uploads, and the tickets for uploads.

A name is the permission: 128 random bits that only its owner knows, so that reading needs no
key and a link works in a browser. Uploading needs a ticket, made for one content type, good for
one image and fifteen minutes; its secret lies hashed on disk. Age is the file's modification time,
so a restart forgets nothing and extends nothing.

    outputs/<prediction>-<random>.webp      uploads/<random>.png      tickets/<random>.png.json

The routes of files are here too. What is served was checked when it came in, and is still served as
if it were hostile: with its own content type, never sniffed, and under a policy in which nothing
runs. An upload costs no memory beyond its cap: its ticket is read before its body, and a few bodies
are taken at a time.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from sd35bench.disk import disk_errors, write_atomic
from sd35bench.errors import SD35BenchError
from sd35bench.remote.images import BadImage, check_image
from sd35bench.server.schema import parse_json
from sd35bench.server.settings import Refusal

CONTENT_TYPES = {"image/jpeg": "jpg", "image/jpg": "jpg", "image/png": "png", "image/webp": "webp"}
"""What may be uploaded, and the suffix it is stored under; the second spelling is a common slip."""

TICKET_LIFETIME_S = 900.0
_MEDIA = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{20,120}\.(?:png|jpg|webp)", re.ASCII)
_PREDICTION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_TOKEN_BYTES = 16
_TORN_S = 3600.0
"""A temporary file older than this belongs to no write that still runs."""
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


class BadUpload(SD35BenchError):
    """What was uploaded is not the image that the ticket was made for."""


class TicketRefused(SD35BenchError):
    """A ticket is unknown, expired or used, or its secret is wrong; which one stays unsaid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Leave to upload one image: PUT its bytes to `put_path` with `headers`, then `public_path`.

    Both paths begin with a slash; `put_path` carries the secret. `expires_at` is in seconds since
    the epoch.
    """

    id: str
    put_path: str
    public_path: str
    expires_at: float
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file as it is served; `expires_in_s` is the time until it is removed."""

    name: str
    data: bytes
    content_type: str
    expires_in_s: float


class FileStore:
    """Outputs and uploads of one server in one folder; one process writes it.

    Methods block on the disk: call them from a thread. Lifetimes are in seconds, `now` gives
    seconds since the epoch.
    """

    def __init__(
        self,
        folder: Path,
        *,
        output_lifetime_s: float,
        upload_lifetime_s: float,
        max_upload_bytes: int,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Use `folder`, made if need be for this user alone. Raises: DiskFull, StoreError."""
        self.max_upload_bytes = max_upload_bytes
        self._now = now
        self._lifetimes_s = {
            "outputs": output_lifetime_s,
            "uploads": upload_lifetime_s,
            # A ticket outlives no upload, or it could be used a second time.
            "tickets": min(TICKET_LIFETIME_S, upload_lifetime_s),
        }
        self._folder = folder
        self._commit = threading.Lock()
        with disk_errors(folder):
            for name in self._lifetimes_s:
                (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)

    def put_output(self, prediction_id: str, data: bytes, suffix: str) -> str:
        """Store a prediction's image and return its URL's path.

        `suffix` is "png", "jpg" or "webp", with or without its dot. The random part is new each
        time: who knows a prediction's id still cannot guess its image.

        Raises: DiskFull, StoreError; ValueError for an id or suffix that no prediction has.
        """
        bare = suffix.removeprefix(".")
        if bare not in _MEDIA or not _PREDICTION.fullmatch(prediction_id):
            raise ValueError(f"no output is named {prediction_id!r} with suffix {suffix!r}")
        name = f"{prediction_id}-{secrets.token_urlsafe(_TOKEN_BYTES)}.{bare}"
        self._write(self._folder / "outputs" / name, data)
        return f"/outputs/{name}"

    def presign(self, content_type: str) -> Ticket:
        """Make a ticket to upload one image of a content type (a key of `CONTENT_TYPES`).

        Raises: DiskFull, StoreError; ValueError for another content type.
        """
        if content_type not in CONTENT_TYPES:
            known = ", ".join(CONTENT_TYPES)
            raise ValueError(f"content_type {content_type!r} is not taken: use one of {known}")
        ticket_id = secrets.token_urlsafe(_TOKEN_BYTES)
        secret = secrets.token_urlsafe(_TOKEN_BYTES)
        name = f"{ticket_id}.{CONTENT_TYPES[content_type]}"
        expires_at = self._now() + self._lifetimes_s["tickets"]
        kept = {"content_type": content_type, "secret_sha256": _digest(secret.encode())}
        self._write(self._folder / "tickets" / f"{name}.json", json.dumps(kept).encode())
        return Ticket(
            id=ticket_id,
            put_path=f"/uploads/{name}?token={secret}",
            public_path=f"/uploads/{name}",
            expires_at=expires_at,
            headers={"Content-Type": content_type},
        )

    def ticket_content_type(self, name: str, secret: str) -> str:
        """Return the content type that a ticket was made for. Raises: TicketRefused."""
        refused = TicketRefused(
            "this upload address is unknown, expired or used: ask POST /v1/upload/presign for"
            " another"
        )
        path = self._alive("tickets", name, ".json")
        if path is None:
            raise refused
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):
            raise refused from None
        if not hmac.compare_digest(kept["secret_sha256"], _digest(secret.encode())):
            raise refused
        return kept["content_type"]

    def put_upload(self, name: str, secret: str, data: bytes) -> None:
        """Store what a ticket was made for; the same bytes again change nothing.

        So a client whose answer was lost may send once more, and nobody can replace an image that
        a prediction already names.

        Raises: TicketRefused, BadUpload (not one whole PNG, JPEG or WebP image, or not of the
        ticket's content type), DiskFull, StoreError.
        """
        suffix = CONTENT_TYPES[self.ticket_content_type(name, secret)]
        found = _format(data)
        if found != suffix:
            raise BadUpload(f"the upload is {found}, its content type says {suffix}: presign anew")
        path = self._folder / "uploads" / name
        with self._commit:
            if not path.exists():
                self._write(path, data)
            elif path.read_bytes() != data:
                raise TicketRefused("this upload address was used for another image: presign anew")

    def read(self, kind: str, name: str) -> StoredFile | None:
        """Return a file of "outputs" or "uploads"; ``None`` if it never was, or is too old."""
        path = self._alive(kind, name)
        if path is None:
            return None
        try:
            data, born = path.read_bytes(), path.stat().st_mtime
        except OSError:
            return None  # swept in between
        return StoredFile(
            name=name,
            data=data,
            content_type=_MEDIA[path.suffix.removeprefix(".")],
            expires_in_s=max(born + self._lifetimes_s[kind] - self._now(), 0.0),
        )

    def read_upload(self, path: str) -> bytes | None:
        """Return the image at an upload's or an output's URL path; ``None`` if there is none."""
        found = re.fullmatch(r"/(uploads|outputs)/([^/]+)", path)
        file = None if found is None else self.read(found[1], found[2])
        return None if file is None else file.data

    def sweep(self) -> int:
        """Remove expired files, and what a killed write left; returns how many."""
        return sum(1 for path in self._expired() if _unlink(path))

    def _expired(self) -> Iterator[Path]:
        now = self._now()
        for kind, lifetime_s in self._lifetimes_s.items():
            for path in (self._folder / kind).iterdir():
                limit_s = _TORN_S if path.suffix == ".tmp" else lifetime_s
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime + limit_s <= now:
                        yield path

    def _alive(self, kind: str, name: str, ending: str = "") -> Path | None:
        """The path of a file that exists and is young enough; names that escape have no file."""
        if kind not in self._lifetimes_s or not _NAME.fullmatch(name):
            return None
        path = self._folder / kind / f"{name}{ending}"
        try:
            status = path.lstat()
        except OSError:
            return None
        is_file = stat.S_ISREG(status.st_mode)
        return path if is_file and self._now() < status.st_mtime + self._lifetimes_s[kind] else None

    def _write(self, path: Path, data: bytes) -> None:
        write_atomic(path, data)
        now = self._now()
        with disk_errors(path):
            os.utime(path, (now, now))
            path.chmod(0o600)


def _format(data: bytes) -> str:
    try:
        return check_image(data).format
    except BadImage as exc:
        raise BadUpload(f"the upload is not taken: {exc}") from exc


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _unlink(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


# Routes -------------------------------------------------------------------------------------------


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
