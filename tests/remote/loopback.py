"""A server of raw sockets for tests: it reads requests properly and answers whatever it is told."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

__all__ = ["Asked", "Served", "answering", "http", "serving"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class Served:
    """A running server, and what it was asked."""

    host: str
    port: int
    scheme: str = "http"
    asked: list[Asked] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


Handler = Callable[[Asked, asyncio.StreamWriter], Awaitable[None]]


def http(status: int = 200, body: bytes | str = b"", **headers: str) -> bytes:
    """An answer; underscores in header names are hyphens, ``content_length=""`` leaves it out."""
    data = body.encode() if isinstance(body, str) else body
    lines = {"content_length": str(len(data)), **headers}
    head = "".join(f"{k.replace('_', '-')}: {v}\r\n" for k, v in lines.items() if v != "")
    return f"HTTP/1.1 {status} Word\r\n{head}\r\n".encode("latin-1") + data


def answering(*answers: bytes) -> Handler:
    """Answer requests in turn with these bytes, the last one again and again, and hang up."""
    left = list(answers)

    async def handle(asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    return handle


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None, port: int = 0
) -> AsyncIterator[Served]:
    """Serve on a free port until the block ends; connections still open are then cut."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        served.connections += 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            asked = await _read(reader)
            served.asked.append(asked)
            await handler(asked, writer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, host, port, ssl=tls)
    bound = server.sockets[0].getsockname()[1]
    served = Served(host, bound, "https" if tls else "http")
    try:
        yield served
    finally:
        server.close()
        for task in tasks:
            task.cancel()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *rest = head.strip().split("\r\n")
    headers = {k.lower(): v for k, v in (item.split(": ", 1) for item in rest if ": " in item)}
    return Asked(line, headers, await reader.readexactly(int(headers.get("content-length", 0))))
