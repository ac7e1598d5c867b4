"""Four loads of somebody without a key: what do they take from those who have one?

The server is `sd35bench serve` with a key file, a process of its own. Each load is held for some
seconds by connections of another process, which opens a new one wherever one is closed. Meanwhile a
client in a process of its own asks /healthz, and reads the server's memory.
"""

import asyncio
import contextlib
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from sd35bench.server.auth import make_key
from tests.reliability.experiment import Experiment, Figure
from tests.reliability.load import serving

CONNECTIONS = 1200
CHUNKED = 50
SPAN_S = 20.0
MOST_HEALTH_S = 1.0
MOST_MB = 200.0
MOST_LOG_MB = 1.0
MB = 1e6
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CREATE = b"POST /v1/prediction HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TWO_LENGTHS = CREATE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"

Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def half_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Half a head, held as long as the server lets it."""
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    await reader.read()


async def body_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Almost the largest body that is taken, without a key, and never its last byte."""
    writer.write(CREATE + b"Content-Length: 1048576\r\n\r\n" + b" " * 1048575)
    await reader.read()


async def one_byte_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As many chunks of one byte as go down the line."""
    writer.write(CREATE + b"Transfer-Encoding: chunked\r\n\r\n")
    for _ in range(100):
        writer.write(b"1\r\n \r\n" * 2000)
        await writer.drain()
    await reader.read()


async def two_lengths(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Both lengths, which is a request hidden in another."""
    writer.write(TWO_LENGTHS)
    await reader.read()


LOADS: dict[str, tuple[Attack, int]] = {
    "half-sent heads": (half_head, CONNECTIONS),
    "bodies before the key": (body_first, CONNECTIONS // 2),
    "one-byte chunks": (one_byte_chunks, CHUNKED),
    "both lengths": (two_lengths, CHUNKED),
}


@dataclass(slots=True, kw_only=True)
class Seen:
    """What one load did to the others."""

    health_s: list[float] = field(default_factory=list)
    refused: int = 0
    opened: int = 0
    most_bytes: int = 0
    cpu_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Hold each load for a while, one after the other, against one server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CONNECTIONS), hard))
    make_key("a", folder / "keys.txt")
    overrides = ["backend=fake", "port=0", "threads=1", f"key_file={folder / 'keys.txt'}"]
    overrides += [f"state_dir={folder / 'state'}"]
    figures: list[Figure] = []
    failures: list[str] = []
    with serving(folder, overrides) as (url, pid):
        server = psutil.Process(pid)
        before = server.memory_info().rss
        for name, (attack, count) in LOADS.items():
            seen = asyncio.run(_hold(url, attack, max(2, round(count * scale)), scale, server))
            figures += _figures(name, seen)
            failures += [f"{name}: {text}" for text in seen.failures]
        after = server.memory_info().rss
        log_bytes = (folder / "log").stat().st_size
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return [
        *figures,
        Figure(name="resident set before (MB)", value=round(before / MB, 1)),
        Figure(name="resident set at the end (MB)", value=round(after / MB, 1), most=MOST_MB),
        Figure(name="log (MB)", value=round(log_bytes / MB, 3), most=MOST_LOG_MB),
    ], failures


def _figures(name: str, seen: Seen) -> list[Figure]:
    slowest = round(max(seen.health_s, default=float("nan")), 3)
    opened = max(1, seen.opened)
    peak = round(seen.most_bytes / MB, 1)
    return [
        Figure(name=f"{name}: connections opened", value=seen.opened),
        Figure(name=f"{name}: of them refused", value=seen.refused),
        Figure(name=f"{name}: CPU a connection (ms)", value=round(1e3 * seen.cpu_s / opened, 2)),
        Figure(name=f"{name}: slowest /healthz (s)", value=slowest, most=MOST_HEALTH_S),
        Figure(name=f"{name}: /healthz without an answer", value=len(seen.failures), most=0),
        Figure(name=f"{name}: largest resident set (MB)", value=peak, most=MOST_MB),
    ]


async def _hold(url: str, attack: Attack, count: int, scale: float, server: psutil.Process) -> Seen:
    parts = urlsplit(url)
    host, port, seen = f"{parts.hostname}", parts.port or 80, Seen()
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    pool.submit(os.getpid).result()  # it is there before the load begins
    until = time.monotonic() + max(3.0, SPAN_S * scale)

    async def stranger() -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, port)
                seen.opened += 1
                try:
                    async with asyncio.timeout(until - time.monotonic()):
                        await attack(reader, writer)
                except (TimeoutError, OSError):
                    pass
                else:
                    seen.refused += 1
                finally:
                    writer.close()
            await asyncio.sleep(0.1)

    before = server.cpu_times()
    with pool:
        asked = pool.submit(ask_health, host, port, server.pid, until)
        await asyncio.gather(*(stranger() for _ in range(count)))
        seen.health_s, seen.failures, seen.most_bytes = await asyncio.wrap_future(asked)
    after = server.cpu_times()
    seen.cpu_s = after.user + after.system - before.user - before.system
    return seen


def ask_health(host: str, port: int, pid: int, until: float) -> tuple[list[float], list[str], int]:
    """Ask /healthz on fresh connections, in a process that has nothing else to do."""
    took: list[float] = []
    failures: list[str] = []
    most_bytes, server = 0, psutil.Process(pid)
    while time.monotonic() < until:
        started = time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=30) as wire:
                wire.sendall(HEALTH)
                answer = b"".join(iter(lambda: wire.recv(65536), b""))
        except OSError as exc:
            failures.append(f"{type(exc).__name__}: {exc}")
        else:
            took.append(time.monotonic() - started)
            if not answer.startswith(b"HTTP/1.1 200"):
                failures.append(answer[:60].decode("latin-1"))
        most_bytes = max(most_bytes, server.memory_info().rss)
        time.sleep(0.2)
    return took, failures, most_bytes


STRANGERS = Experiment(
    name="strangers",
    title="Somebody without a key",
    did=(
        f"`sd35bench serve backend=fake key_file=...`, a process of its own, under four loads one"
        f" after the other, {SPAN_S:g} s each: {CONNECTIONS} half-sent heads, {CONNECTIONS // 2}"
        " bodies of 1 MiB that lack their last byte, one-byte chunks and requests with both"
        f" lengths on {CHUNKED} connections each. A connection that ends is opened again. A client"
        " asks /healthz five times a second on a connection of its own."
    ),
    fails_if=(
        f"/healthz takes more than {MOST_HEALTH_S:g} s or is not answered 200, the server's"
        f" resident set passes {MOST_MB:g} MB, or its log {MOST_LOG_MB:g} MB in all."
    ),
    shows_not=(
        "Loads that fill the network or the cores: a proxy in front has to bound these. The client"
        " shares the machine's cores with the load, so its times are rather too long."
    ),
    run=run,
    parallel=False,
)
