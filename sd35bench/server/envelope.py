"""What is around every request: an id, a log line, a bound on its body, and an answer in JSON.

Logs are one JSON object a line on stderr, for requests, predictions and the server. What must not
leak is not logged: no header, no query, no body, no prompt; and the names of files, which are
permissions, are cut off their paths.

One ASGI layer outside everything else, so that nothing leaves without an `X-Request-Id` and no
exception becomes anything but ``{"error": …}`` with status 500. The bodies of POSTs are read here,
whole and bounded in bytes and seconds, before anything parses them; an upload's by its own route.
"""

import asyncio
import ipaddress
import json
import logging
import re
import sys
import time
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd35bench.server.settings import Refusal

MOST_BODY_BYTES = 2**20
BODY_S = 30.0
_LOGGER = logging.getLogger("sd35bench.server")
_SECRET_PATHS = ("/uploads/", "/outputs/")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def error_answer(refusal: Refusal) -> JSONResponse:
    """The answer that a refusal becomes."""
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


class Envelope:
    """The outermost layer of the application; `only_loopback` also refuses foreign Host names."""

    def __init__(self, app: ASGIApp, *, only_loopback: bool) -> None:
        """`only_loopback`: without keys, a name that leads here by DNS rebinding must not work."""
        self._app, self._only_loopback = app, only_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self._app, scope, send).answer(receive, self._only_loopback)


class _Exchange:
    """One request and its answer."""

    def __init__(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        self._app, self._scope, self._send = app, scope, send
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._status: int | None = None

    async def answer(self, receive: Receive, only_loopback: bool) -> None:
        started, path = time.perf_counter(), self._scope["path"]
        if path.startswith("/v1/") and path.endswith("/"):
            self._scope["path"] = path[:-1]  # the vendor's page has the slash, its documents not
        try:
            _check_host(self._headers.get("host", ""), only_loopback)
            if self._scope["method"] == "POST":
                receive = await self._whole_body(receive)
            await self._app(self._scope, receive, self._send_named)
        except Refusal as exc:
            await self._end_with(exc, receive)
        except Exception:
            log("request failed", level=logging.ERROR, failed=True, request_id=self._request_id)
            if self._status is None:
                message = f"the server failed on this request; its log knows {self._request_id}"
                await self._end_with(Refusal(500, message), receive)
        finally:
            log(
                "request",
                request_id=self._request_id,
                method=self._scope["method"],
                path=shown_path(path),
                status=self._status,
                ms=round(1e3 * (time.perf_counter() - started), 3),
            )

    async def _end_with(self, refusal: Refusal, receive: Receive) -> None:
        await error_answer(refusal)(self._scope, receive, self._send_named)

    async def _send_named(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            MutableHeaders(scope=message)["X-Request-Id"] = self._request_id
        await self._send(message)

    async def _whole_body(self, receive: Receive) -> Receive:
        """Read the body and return what hands it on. Raises: Refusal (408, 413)."""
        said = self._headers.get("content-length", "")
        if said.isdigit() and int(said) > MOST_BODY_BYTES:
            raise _too_large()
        messages: list[Message] = []
        try:
            async with asyncio.timeout(BODY_S):
                messages.append(await _read(receive))
        except TimeoutError as exc:
            raise Refusal(408, f"the body did not arrive within {BODY_S:g} s") from exc

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay


async def _read(receive: Receive) -> dict[str, Any]:
    """Join a body's parts into one message; a client that left is passed on."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return dict(message)
        body += message.get("body", b"")
        if len(body) > MOST_BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return {"type": "http.request", "body": bytes(body), "more_body": False}


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MOST_BODY_BYTES} bytes")


def _check_host(host: str, only_loopback: bool) -> None:
    """Refuse a Host that cannot be one, or, without keys, is not this machine's own."""
    found = _HOST.fullmatch(host)
    if found is None:
        raise Refusal(400, "the Host header is not HOST or HOST:PORT")
    if only_loopback and not _is_loopback(found[1].strip("[]")):
        raise Refusal(403, "a server without keys answers to localhost and loopback addresses only")


def _is_loopback(name: str) -> bool:
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class JsonFormatter(logging.Formatter):
    """Format a record, ours or another library's, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; `fields` of the record are merged in."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(entry, default=str)


def configure_logs() -> None:
    """Send our lines and uvicorn's to stderr, as JSON; uvicorn's only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("sd35bench.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log(event: str, *, level: int = logging.INFO, failed: bool = False, **fields: Any) -> None:
    """Write one line; with `failed` the exception being handled goes along."""
    _LOGGER.log(level, event, extra={"fields": fields}, exc_info=failed)


def shown_path(path: str) -> str:
    """A request's path without the names that would let a reader of logs fetch a file."""
    for head in _SECRET_PATHS:
        if path.startswith(head):
            return f"{head}…"
    return path[:200]
