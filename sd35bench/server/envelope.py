"""What is around every request: an id, a log line, a bound on its body, and an answer in JSON.

Logs are one JSON object a line on stderr, for requests, predictions and the server. What must not
leak is not logged: no header, no query, no body, no prompt; and the names of files, which are
permissions, are cut off their paths.

One ASGI layer outside everything else, so that nothing leaves without an `X-Request-Id` and no
exception becomes anything but ``{"error": …}`` with status 500. The bodies of POSTs are read here,
whole and bounded in bytes and seconds, before anything parses them; an upload's by its own route.
"""

import asyncio
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd35bench.loopback import is_loopback
from sd35bench.server.settings import Refusal

MOST_BODY_BYTES = 2**20
MOST_BODIES_BYTES = 64 * 2**20
"""Of all requests that are being read or answered; an upload's are counted by its own route."""
MOST_LINES = 10
CLIENT_GONE = 499
"""What the log says where the client hung up before an answer; nothing is sent."""
BODY_S = 30.0
_LOGGER = logging.getLogger("sd35bench.server")
_SECRET_PATHS = ("/uploads/", "/outputs/")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def error_answer(refusal: Refusal) -> JSONResponse:
    """The answer that a refusal becomes."""
    return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)


class Envelope:
    """The outermost layer of the application."""

    def __init__(
        self, app: ASGIApp, *, only_loopback: bool, check_key: Callable[[Headers], object]
    ) -> None:
        """`only_loopback`: without keys, a name that leads here by DNS rebinding must not work.

        `check_key` raises Refusal for a head without a good key; it is asked before a body is read.
        """
        self._app, self._only_loopback, self._check_key = app, only_loopback, check_key
        self.bodies_bytes = 0
        self._second, self._lines, self._left_out = 0, 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await _Exchange(self, scope, send).answer(receive)

    def check_head(self, scope: Scope, headers: Headers) -> None:
        """Refuse what can be refused before the body. Raises: Refusal."""
        _check_host(headers.get("host", ""), self._only_loopback)
        if _has_body(scope):
            self._check_key(headers)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have the application answer."""
        await self._app(scope, receive, send)

    def hold(self, count: int) -> None:
        """Count bytes of bodies in memory. Raises: Refusal (503) where there are too many."""
        if count > 0 and self.bodies_bytes + count > MOST_BODIES_BYTES:
            raise Refusal(503, "too many bodies at once: try again", {"Retry-After": "1"})
        self.bodies_bytes += count

    def log(self, scope: Scope, **fields: Any) -> None:
        """Log a request; without a key only `MOST_LINES` a second, the next one counts the others.

        A stranger can send requests as fast as the disk fills.
        """
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._lines = second, 0
        if "caller" not in scope.get("state", {}):
            self._lines += 1
            if self._lines > MOST_LINES:
                self._left_out += 1
                return
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        log("request", **fields)


class _Exchange:
    """One request and its answer."""

    def __init__(self, envelope: Envelope, scope: Scope, send: Send) -> None:
        self._envelope, self._scope, self._send = envelope, scope, send
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._status: int | None = None
        self._held = 0

    async def answer(self, receive: Receive) -> None:
        started, path = time.perf_counter(), self._scope["path"]
        if path.startswith("/v1/") and path.endswith("/"):
            self._scope["path"] = path[:-1]  # the vendor's page has the slash, its documents not
        try:
            self._envelope.check_head(self._scope, self._headers)
            if _has_body(self._scope):
                receive = await self._whole_body(receive)
            await self._envelope.answer(self._scope, receive, self._send_named)
        except Refusal as exc:
            await self._end_with(exc, receive)
        except ClientDisconnect:
            self._status = CLIENT_GONE
        except asyncio.CancelledError:  # the server ends, and the client was not done
            await self._end_with(Refusal(503, "the server is shutting down"), receive)
        except Exception:
            log("request failed", level=logging.ERROR, failed=True, request_id=self._request_id)
            message = f"the server failed on this request; its log knows {self._request_id}"
            await self._end_with(Refusal(500, message), receive)
        finally:
            self._envelope.hold(-self._held)
            self._envelope.log(
                self._scope,
                request_id=self._request_id,
                method=self._scope["method"],
                path=shown_path(path),
                status=self._status,
                ms=round(1e3 * (time.perf_counter() - started), 3),
            )

    async def _end_with(self, refusal: Refusal, receive: Receive) -> None:
        """Answer before the body was read, or instead of reading it: the connection ends, too."""
        if self._status is None:
            answer = error_answer(refusal)
            answer.headers["Connection"] = "close"
            await answer(self._scope, receive, self._send_named)

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
                messages.append(await self._read(receive))
        except TimeoutError as exc:
            raise Refusal(408, f"the body did not arrive within {BODY_S:g} s") from exc

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return replay

    async def _read(self, receive: Receive) -> dict[str, Any]:
        """Join a body's parts into one message. Raises: ClientDisconnect, Refusal."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            part = message.get("body", b"")
            self._envelope.hold(len(part))
            self._held += len(part)
            body += part
            if len(body) > MOST_BODY_BYTES:
                raise _too_large()
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


def _has_body(scope: Scope) -> bool:
    """Whether a body is read here: the protocol's POSTs; uploads read their own."""
    return scope["method"] == "POST" and scope["path"].startswith("/v1/")


def _too_large() -> Refusal:
    return Refusal(413, f"the body is larger than {MOST_BODY_BYTES} bytes")


def _check_host(host: str, only_loopback: bool) -> None:
    """Refuse a Host that cannot be one, or, without keys, is not this machine's own."""
    found = _HOST.fullmatch(host)
    if found is None:
        raise Refusal(400, "the Host header is not HOST or HOST:PORT")
    if only_loopback and not is_loopback(found[1].strip("[]")):
        raise Refusal(403, "a server without keys answers to localhost and loopback addresses only")


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
    """Send our lines and uvicorn's to stderr, as JSON; of uvicorn's only errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("sd35bench.server", logging.INFO), ("uvicorn", logging.ERROR)):
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
