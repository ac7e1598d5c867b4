"""What a fault server can do to an answer: a catalogue, by name.

A `Fault` turns a good answer into a bad one, and says whether the service did what was asked
(`refuses=False`: a create whose answer is lost has created) or refused before doing anything.
"""

import asyncio
import gzip
import hashlib
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["FAULTS", "Answer", "Fault", "picture"]

REASONS = {200: "OK", 201: "Created", 302: "Found", 402: "Payment Required", 429: "Too Many"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP answer and how it is delivered.

    `declared`: the Content-Length, if it is not the true one. `cut`: reset the connection after so
    many bytes (head included); `drip_s`: seconds between single bytes, from byte `drip_from` on;
    `hang`: never say anything more after the last byte, and never close.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    declared: int | None = None
    cut: int | None = None
    drip_s: float = 0.0
    drip_from: int = 0
    delay_s: float = 0.0
    hang: bool = False
    raw: bytes | None = None

    @classmethod
    def json(cls, status: int, body: Any, **headers: str) -> "Answer":
        data = json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status=status, headers={"Content-Type": "application/json", **named}, body=data)

    @classmethod
    def of(cls, data: bytes, content_type: str) -> "Answer":
        return cls(status=200, headers={"Content-Type": content_type}, body=data)

    @property
    def decoded(self) -> Any:
        return json.loads(self.body)

    def bytes(self) -> bytes:
        """The whole answer as it goes over the wire."""
        if self.raw is not None:
            return self.raw
        length = len(self.body) if self.declared is None else self.declared
        lines = [f"HTTP/1.1 {self.status} {REASONS.get(self.status, 'Status')}"]
        headers = {"Content-Length": f"{length}", "X-Request-Id": "request-1", **self.headers}
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Connection: close", "", ""]
        return "\r\n".join(lines).encode() + self.body

    async def send(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.delay_s)
        data = self.bytes()[: self.cut]
        at_once = len(data) if self.drip_s == 0 else self.drip_from
        writer.write(data[:at_once])
        await writer.drain()
        for byte in data[at_once:]:
            await asyncio.sleep(self.drip_s)
            writer.write(bytes([byte]))
            await writer.drain()
        if self.hang:
            await asyncio.sleep(3600)
        if self.cut is not None:
            _reset(writer)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to a good answer; `refuses`: instead of doing what was asked."""

    change: Callable[[Answer], Answer]
    refuses: bool = False


def picture(seed: str, size: tuple[int, int], file_format: str) -> bytes:
    """A valid image file of (width, height) px, noise that only depends on `seed`."""
    digest = hashlib.sha256(seed.encode()).digest()
    noise = np.random.default_rng(list(digest)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    image = Image.fromarray(noise)
    if file_format == "png":
        image.save(out, "PNG")
    else:
        image.save(out, {"jpg": "JPEG", "webp": "WEBP"}[file_format], quality=90)
    return out.getvalue()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End with RST instead of FIN: the other side sees a broken connection, not a short answer."""
    found = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _refusal(status: int, body: Any, **headers: str) -> Fault:
    return Fault(lambda _: Answer.json(status, body, **headers), refuses=True)


def _edited(edit: Callable[[dict[str, Any]], Any]) -> Fault:
    """Change the decoded JSON."""

    def change(answer: Answer) -> Answer:
        body = answer.decoded
        return replace(
            answer, body=json.dumps(edit(body) if isinstance(body, dict) else body).encode()
        )

    return Fault(change)


def _png_bomb(width: int, height: int) -> bytes:
    """A few kB that claim to be an image of `width` x `height`, and decode to that."""
    rows = zlib.compressobj(9)
    row = b"\0" * (1 + width * 3)
    data = b"".join(rows.compress(row) for _ in range(min(height, 64))) + rows.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _gzip_bomb(answer: Answer) -> Answer:
    headers = {**answer.headers, "Content-Encoding": "gzip"}
    return replace(answer, headers=headers, body=gzip.compress(b" " * 50_000_000, 9))


def _redirected(location: str) -> Fault:
    return Fault(lambda _: Answer(status=302, headers={"Location": location}, body=b""))


_THROTTLED = {"error": "rate limit exceeded"}
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
_WRONG = [None, 7, [], {}, "x", True, -1.5]


def _wrong_types(body: dict[str, Any]) -> dict[str, Any]:
    return {name: _WRONG[i % len(_WRONG)] for i, name in enumerate(body)}


FAULTS: dict[str, Fault] = {
    "truncated-json": Fault(lambda a: replace(a, body=a.body[: len(a.body) // 2])),
    "invalid-json": Fault(lambda a: replace(a, body=b"{'status': success,}")),
    "nan-json": Fault(lambda a: replace(a, body=a.body.replace(b'"', b"NaN", 1))),
    "deep-json": Fault(lambda a: replace(a, body=b"[" * 100_000 + b"]" * 100_000)),
    "not-utf8": Fault(lambda a: replace(a, body=b"\xff\xfe{}" + a.body)),
    "empty-body": Fault(lambda a: replace(a, body=b"")),
    "html-502": Fault(
        lambda a: replace(a, status=502, headers={"Content-Type": "text/html"}, body=_HTML)
    ),
    "html-200": Fault(lambda a: replace(a, headers={"Content-Type": "text/html"}, body=_HTML)),
    "wrong-types": _edited(_wrong_types),
    "missing-fields": _edited(lambda body: {}),
    "a-list": _edited(lambda body: [body]),
    "null": Fault(lambda a: replace(a, body=b"null")),
    "unknown-status": _edited(lambda body: {**body, "status": "reticulating"}),
    "empty-output": _edited(lambda body: {**body, "status": "success", "output": ""}),
    "slow-headers": Fault(lambda a: replace(a, drip_s=0.05)),
    "slow-body": Fault(lambda a: replace(a, drip_s=0.05, drip_from=len(a.bytes()) - len(a.body))),
    "silence": Fault(lambda a: replace(a, raw=b"", hang=True)),
    "lost-answer": Fault(lambda a: replace(a, cut=0)),
    "reset-mid-head": Fault(lambda a: replace(a, cut=20)),
    "reset-mid-body": Fault(lambda a: replace(a, cut=len(a.bytes()) - len(a.body) // 2 - 1)),
    "short-body": Fault(lambda a: replace(a, declared=len(a.body) + 1000)),
    "no-http": Fault(lambda a: replace(a, raw=b"SSH-2.0-OpenSSH_9.6\r\n")),
    "endless-head": Fault(
        lambda a: replace(a, raw=b"HTTP/1.1 200 OK\r\n" + b"X-Y: z\r\n" * 200_000)
    ),
    "huge-body": Fault(lambda a: replace(a, body=b'"' + b"x" * 80_000_000 + b'"')),
    "gzip-bomb": Fault(_gzip_bomb),
    "redirect-loop": Fault(
        lambda a: replace(a, status=302, headers={"Location": "?again"}, body=b"")
    ),
    "redirect-private": _redirected("http://169.254.169.254/latest/meta-data/"),
    "redirect-file": _redirected("file:///etc/passwd"),
    "image-bomb": Fault(lambda a: Answer.of(_png_bomb(60_000, 60_000), "image/png")),
    "image-truncated": Fault(lambda a: replace(a, body=a.body[: len(a.body) // 2])),
    "image-wrong-size": Fault(lambda a: Answer.of(picture("wrong", (8, 8), "png"), "image/png")),
    "image-black": Fault(lambda a: Answer.of(_black(a.body), "image/png")),
    "wrong-content-type": Fault(lambda a: replace(a, headers={"Content-Type": "text/plain"})),
    "402": _refusal(402, {"error": "insufficient balance"}),
    "401": _refusal(401, {"error": "invalid api key"}),
    "400": _refusal(400, {"error": "steps must be at most 50"}),
    "404": _refusal(404, {"error": "Prediction not found"}),
    "429": _refusal(429, _THROTTLED),
    "429-soon": _refusal(429, _THROTTLED, Retry_After="0"),
    "429-negative": _refusal(429, _THROTTLED, Retry_After="-5"),
    "429-nonsense": _refusal(429, _THROTTLED, Retry_After="soon"),
    "429-absurd": _refusal(429, _THROTTLED, Retry_After="9" * 30),
    "429-skewed": _refusal(429, _THROTTLED, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"),
    "429-far-date": _refusal(429, _THROTTLED, Retry_After="Fri, 31 Dec 9999 23:59:59 GMT"),
    "500": _refusal(500, {"error": "internal error"}),
    "503": _refusal(503, {"error": "try again"}, Retry_After="0"),
}


def _black(like: bytes) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", Image.open(io.BytesIO(like)).size).save(out, "PNG")
    return out.getvalue()
