"""One HTTP request to one vetted address, read with a byte cap and a deadline.

What the transport and downloads share. Every request opens a connection of its own, to the address
that was vetted, and closes it. That costs a TCP and a TLS handshake (three round trips instead of
one, at 60 requests a minute at most) and buys certainty: no request can meet a kept connection
that the server closed meanwhile, which is the one case where nobody can say whether it was read;
no left-over bytes of one answer can be taken for the next; and no TLS session of one host serves
another that shares its address. There is no client above it, hence no cookies, no redirects, no
credentials from a netrc, no proxies from the environment.

`Interrupted.sent` answers the question that money hangs on. httpcore2 reports each step of a
request; as long as all it reported belongs to the connection (TCP, TLS), nothing of the request
has left. If it reported nothing, or anything else, some of it may have.
"""

import asyncio
import functools
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx2

from sd35bench import words
from sd35bench.errors import RemoteError
from sd35bench.remote.addresses import Lookup, resolve, system_lookup

_NEVER_LEFT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.UnsupportedProtocol,
)
_BROKEN = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError, ValueError)


class Interrupted(RemoteError):
    """A request got no complete answer; `sent` says whether any of it may have left."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


def _system_transport() -> httpx2.AsyncBaseTransport:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncHTTPTransport(verify=_trust(), trust_env=False, limits=limits)


@functools.cache
def _trust() -> ssl.SSLContext:
    """The system's certificates; read once, as that takes 50 ms."""
    return httpx2.create_ssl_context(trust_env=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How names become addresses, and what opens connections; tests put their own here."""

    lookup: Lookup = system_lookup
    open_transport: Callable[[], httpx2.AsyncBaseTransport] = _system_transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A request to send; `url` has passed `check_url`."""

    method: str
    url: httpx2.URL
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An answer's status and headers."""

    status: int
    headers: httpx2.Headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer; times are `time.perf_counter`'s, from before the lookup of the host."""

    head: Head
    body: bytes
    sent_at: float
    received_at: float


class _Steps:
    """What httpcore2 said it did, to tell whether any of the request may have left."""

    def __init__(self) -> None:
        self.handed_over = False
        self._names: set[str] = set()

    async def trace(self, name: str, _info: object) -> None:
        self._names.add(name)

    @property
    def may_have_left(self) -> bool:
        connecting = bool(self._names) and all(n.startswith("connection.") for n in self._names)
        return self.handed_over and not connecting


async def exchange(
    outgoing: Outgoing,
    *,
    allow_loopback: bool,
    timeout_s: float,
    max_bytes: int,
    network: Network,
    wants_body: Callable[[Head], bool] = lambda _: True,
) -> Answer:
    """Send one request and read its answer, all within `timeout_s`.

    `wants_body` sees the head before the body is read: it may raise, or decline the body.

    Raises: UnsafeAddress, Unresolved before anything is sent; Interrupted after; what `wants_body`
    raises.
    """
    sent_at = time.perf_counter()
    steps = _Steps()
    try:
        async with asyncio.timeout(timeout_s):
            address = await resolve(
                _host(outgoing.url),
                _port(outgoing.url),
                allow_loopback=allow_loopback,
                lookup=network.lookup,
            )
            request = _request(outgoing, address, steps)
            async with network.open_transport() as transport:
                head, body = await _converse(transport, request, steps, max_bytes, wants_body)
    except TimeoutError as exc:
        raise Interrupted(
            f"{_place(outgoing)} gave no complete answer in {words.digits(timeout_s, 4)} s",
            sent=steps.may_have_left,
        ) from exc
    except httpx2.LocalProtocolError:
        # Its text quotes the header, which may be the one with the key.
        raise Interrupted(
            f"{_place(outgoing)} was not sent: a header has a value that HTTP cannot carry (a line"
            " break in the key, perhaps)",
            sent=False,
        ) from None
    except _BROKEN as exc:
        sent = steps.may_have_left and not isinstance(exc, _NEVER_LEFT)
        done = "broke off" if sent else "could not be reached"
        raise Interrupted(
            f"{_place(outgoing)} {done}: {type(exc).__name__}: {exc}", sent=sent
        ) from exc
    return Answer(head=head, body=body, sent_at=sent_at, received_at=time.perf_counter())


def _request(outgoing: Outgoing, address: str, steps: _Steps) -> httpx2.Request:
    """The request with the vetted address in its URL, and the host where the server looks."""
    headers = {
        "Host": outgoing.url.netloc.decode("ascii"),
        "User-Agent": "sd35bench",
        "Accept-Encoding": "identity",
        "Connection": "close",
        **outgoing.headers,
    }
    return httpx2.Request(
        outgoing.method,
        outgoing.url.copy_with(host=address),
        headers=headers,
        content=outgoing.content,
        extensions={"sni_hostname": _host(outgoing.url), "trace": steps.trace},
    )


async def _converse(
    transport: httpx2.AsyncBaseTransport,
    request: httpx2.Request,
    steps: _Steps,
    max_bytes: int,
    wants_body: Callable[[Head], bool],
) -> tuple[Head, bytes]:
    steps.handed_over = True
    response = await transport.handle_async_request(request)
    try:
        head = Head(status=response.status_code, headers=response.headers)
        body = b""
        if wants_body(head):
            _refuse_head(head, max_bytes)
            body = await _read(response, max_bytes)
        return head, body
    finally:
        await response.aclose()


def _refuse_head(head: Head, max_bytes: int) -> None:
    """Raise Interrupted for a body that is compressed, or announces too many bytes."""
    encoding = head.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise Interrupted(f"an answer came compressed ({encoding[:40]!a}), unasked", sent=True)
    length = head.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        raise Interrupted(_too_large(max_bytes), sent=True)


async def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    """The body as it was sent, up to the cap."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > max_bytes:
            raise Interrupted(_too_large(max_bytes), sent=True)
        parts.append(part)
    return b"".join(parts)


def _too_large(max_bytes: int) -> str:
    return f"an answer has more than the {words.count(max_bytes)} bytes allowed"


def _host(url: httpx2.URL) -> str:
    return url.raw_host.decode("ascii")


def _port(url: httpx2.URL) -> int:
    return url.port if url.port is not None else {"http": 80}.get(url.scheme, 443)


def _place(outgoing: Outgoing) -> str:
    """What a message names: never the query, which may hold a signature."""
    return f"{outgoing.method} {_host(outgoing.url)}{outgoing.url.path[:100]!a}".replace("'", "")
