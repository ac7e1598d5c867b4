"""Where requests may go."""

import asyncio
import socket

import httpx2
import pytest

import sd35bench.remote.http as exchange
from sd35bench.errors import UnsafeAddress
from sd35bench.remote.addresses import Unresolved, check_url, names_loopback, resolve
from sd35bench.remote.download import download
from sd35bench.remote.http import Network
from sd35bench.remote.transport import NotSent, Transport
from tests.remote.ssrf_corpus import (
    CORPUS,
    GOOD,
    PUBLIC,
    PUBLIC_V6,
    Entry,
    Wire,
    fetched,
    lookup_of,
    refused,
)


def resolved(host: str, *answers: str, allow_loopback: bool = False) -> str:
    lookup = lookup_of({host: [answers]}, [])
    return asyncio.run(resolve(host, 443, allow_loopback=allow_loopback, lookup=lookup))


def by_name(entry: Entry) -> str:
    return entry.name


def test_corpus_is_large_enough_and_names_are_unique():
    assert len(CORPUS) >= 60
    assert len(GOOD) >= 10
    assert len({entry.name for entry in (*CORPUS, *GOOD)}) == len(CORPUS) + len(GOOD)


def test_download_refuses_the_corpus():
    """One test for all entries, as all say one thing; those that got through are named."""
    assert [f"{e.name}: {fetched(e)}" for e in CORPUS if not refused(e)] == []


@pytest.mark.parametrize("entry", GOOD, ids=by_name)
def test_download_takes_what_is_good(entry: Entry):
    error, reached, asked = fetched(entry)
    assert error is None
    assert {address for address, _ in reached} <= {PUBLIC, PUBLIC_V6}
    assert len(asked) <= len(reached)  # one lookup a request, none for an address


def test_transport_refuses_the_corpus_as_base_url():
    entries = [e for e in CORPUS if not e.redirects and e.allowed is None]
    assert len(entries) > 100
    assert [e.name for e in entries if not transport_refuses(e)] == []


def transport_refuses(entry: Entry) -> bool:
    """Whether `put` to an entry's URL fails by our own refusal, before anything is reached."""
    wire = Wire({})
    network = Network(lookup=lookup_of(entry.hosts, []), open_transport=lambda: wire)

    async def call() -> None:
        transport = Transport(
            entry.url, allow_loopback=False, headers=lambda: {"X-API-Key": "k"}, network=network
        )
        await transport.put(entry.url, b"", {})

    try:
        asyncio.run(call())
    except (UnsafeAddress, NotSent):
        return wire.reached == []
    return False


class ResolvingWire(Wire):
    """As a client would that is given a name: it asks the name server once more."""

    def __init__(self, lookup) -> None:
        super().__init__({})
        self.lookup = lookup

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        host = request.url.raw_host.decode()
        if not host.replace(".", "").isdigit():
            request.url = request.url.copy_with(host=(await self.lookup(host, 443))[0])
        return await super().handle_async_request(request)


def rebound() -> list[tuple[str, str]]:
    lookup = lookup_of({"images.example.com": [[PUBLIC], ["127.0.0.1"]]}, [])
    wire = ResolvingWire(lookup)
    network = Network(lookup=lookup, open_transport=lambda: wire)
    asyncio.run(
        download("https://images.example.com/a", hosts=None, allow_loopback=False, network=network)
    )
    return wire.reached


def test_rebinding_cannot_move_a_connection_from_the_vetted_address():
    assert rebound() == [(PUBLIC, "images.example.com")]


def test_rebinding_would_work_if_the_name_was_connected_to(monkeypatch: pytest.MonkeyPatch):
    made = exchange._request
    named = lambda out, address, steps: made(out, out.url.host, steps)  # noqa: E731
    monkeypatch.setattr(exchange, "_request", named)
    assert rebound() == [("127.0.0.1", "images.example.com")]


@pytest.mark.parametrize(
    ("found", "address"),
    [
        (["1.1.1.1"], "1.1.1.1"),
        (["2606:4700::1111", "1.1.1.1"], "2606:4700::1111"),
        (["::ffff:8.8.8.8"], "::ffff:8.8.8.8"),
        (["64:ff9b::808:808"], "64:ff9b::808:808"),
    ],
    ids=["v4", "first-of-two", "mapped-public", "nat64-public"],
)
def test_resolve_returns_the_first_public_address(found: list[str], address: str):
    assert resolved("a.example.com", *found) == address


def test_resolve_refuses_a_public_name_of_loopback_even_where_loopback_is_allowed():
    with pytest.raises(UnsafeAddress, match="no public address"):
        resolved("a.example.com", "127.0.0.1", allow_loopback=True)


def test_resolve_refuses_localhost_that_is_elsewhere():
    with pytest.raises(UnsafeAddress, match="not on this machine"):
        resolved("localhost", "127.0.0.1", "8.8.8.8", allow_loopback=True)


def test_resolve_lets_loopback_through_where_allowed():
    assert resolved("localhost", "127.0.0.1", allow_loopback=True) == "127.0.0.1"
    assert resolved("::1", allow_loopback=True) == "::1"
    with pytest.raises(UnsafeAddress, match="allow_loopback"):
        resolved("localhost", "127.0.0.1")


def test_resolve_tells_a_failed_lookup_from_an_unsafe_address():
    async def fails(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(Unresolved, match="Name or service not known"):
        asyncio.run(resolve("a.example.com", 443, allow_loopback=False, lookup=fails))
    with pytest.raises(Unresolved, match="no address"):
        resolved("a.example.com")


def test_resolve_asks_the_system_by_default():
    assert asyncio.run(resolve("localhost", 80, allow_loopback=True)) in ("127.0.0.1", "::1")


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8000/v1", "http://localhost/", "https://[::1]:9/", "http://127.1.2.3:80"],
)
def test_check_url_takes_loopback_where_allowed(url: str):
    assert str(check_url(url, hosts=None, allow_loopback=True)) == str(httpx2.URL(url))
    with pytest.raises(UnsafeAddress, match="allow_loopback=true"):
        check_url(url, hosts=None, allow_loopback=False)


def test_check_url_keeps_http_from_other_hosts_where_loopback_is_allowed():
    with pytest.raises(UnsafeAddress, match="only https"):
        check_url("http://images.example.com/a", hosts=None, allow_loopback=True)


def test_check_url_shows_neither_queries_nor_control_characters():
    with pytest.raises(UnsafeAddress) as caught:
        check_url("ftp://a.example.com/\x1b[2J?signature=secret", hosts=None, allow_loopback=False)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost.example.com", False),
        ("notlocalhost", False),
        ("126.0.0.1", False),
    ],
)
def test_names_loopback(host: str, is_loopback: bool):
    assert names_loopback(host) is is_loopback
