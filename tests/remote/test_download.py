"""Files fetched over real sockets from hosts that may do anything."""

import asyncio
import base64
import hashlib
import time

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35bench.errors import LostAnswer, RemoteError, UnsafeAddress
from sd35bench.remote.download import Downloaded, download
from sd35bench.remote.http import Interrupted, Network
from tests.remote.loopback import Asked, Handler, Served, answering, http, serving

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPEG = b"\xff\xd8\xff\xe0" + bytes(100)
WEBP = b"RIFF\0\0\0\0WEBPVP8 " + bytes(100)


def fetch(handler: Handler, path: str = "/a", **options) -> tuple[Downloaded, Served]:
    async def run() -> tuple[Downloaded, Served]:
        async with serving(handler) as served:
            settled = {"hosts": None, "allow_loopback": True, "deadline_s": 30.0, **options}
            return await download(served.url + path, **settled), served

    return asyncio.run(run())


def failure(handler: Handler, **options) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        fetch(handler, **options)
    assert not isinstance(caught.value, LostAnswer)  # nothing is paid by a download
    return caught.value


def test_file_comes_with_its_digest_type_and_time():
    got, served = fetch(answering(http(200, PNG, content_type="image/png")), "/x/a.png?sig=%2F")
    assert got.data == PNG
    assert got.sha256 == hashlib.sha256(PNG).hexdigest()
    assert got.content_type == "image/png"
    assert 0 < got.seconds < 30
    (asked,) = served.asked
    assert asked.line == "GET /x/a.png?sig=%2F HTTP/1.1"
    assert set(asked.headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("image/png", PNG),
        ("image/jpeg", JPEG),
        ("Image/WEBP; q=1", WEBP),
        ("image/png", JPEG),
        ("application/octet-stream", PNG),
        ("binary/octet-stream", JPEG),
        ("", WEBP),
    ],
)
def test_types_that_are_taken(kind: str, data: bytes):
    assert fetch(answering(http(200, data, content_type=kind)))[0].data == data


@pytest.mark.parametrize(
    "kind", ["text/html", "image/svg+xml", "image/gif", "application/json", "image", "é\x1b"]
)
def test_types_that_are_refused(kind: str):
    text = str(failure(answering(http(200, PNG, content_type=kind))))
    assert "which is no PNG, JPEG or WEBP" in text or "illegal header" in text.lower()
    assert text.isprintable()


@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", ""])
def test_bytes_decide(kind: str):
    answer = http(200, "<html>not found</html>", content_type=kind)
    assert "no PNG, JPEG or WEBP file" in str(failure(answering(answer)))


@pytest.mark.parametrize("status", [201, 204, 206, 304, 404, 410, 429, 503])
def test_status_other_than_200_is_refused(status: int):
    body = b"" if status in (204, 304) else PNG
    error = failure(answering(http(status, body)))
    assert f"HTTP {status}" in str(error)
    assert isinstance(error, Interrupted) == (status in (429, 500, 503))  # later it may be there


# Limits


def test_announced_size_over_the_cap_is_refused_before_it_is_read():
    sent = 0

    async def pours(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(http(200, content_length=str(10**9)))
        for _ in range(1000):
            writer.write(bytes(65536))
            await writer.drain()
            sent += 65536

    assert "1,000,000 bytes" in str(failure(pours, max_bytes=1_000_000))
    assert sent < 20 * 2**20  # of 64 MiB: what socket buffers take


@pytest.mark.parametrize("chunked", [True, False])
def test_unannounced_size_is_cut_while_it_streams(chunked: bool):
    sent = 0

    async def pours(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        headers = {"transfer_encoding": "chunked"} if chunked else {}
        writer.write(http(200, content_length="", **headers))
        block = bytes(65536)
        for _ in range(1000):
            writer.write(b"10000\r\n" + block + b"\r\n" if chunked else block)
            await writer.drain()
            sent += len(block)

    assert "1,000,000 bytes" in str(failure(pours, max_bytes=1_000_000))
    assert sent < 20 * 2**20  # of 64 MiB: what socket buffers take


def test_cap_is_exact():
    assert fetch(answering(http(200, PNG)), max_bytes=len(PNG))[0].data == PNG
    failure(answering(http(200, PNG)), max_bytes=len(PNG) - 1)


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x"])
def test_compressed_file_is_refused(encoding: str):
    answer = http(200, PNG, content_encoding=encoding)
    assert "compressed" in str(failure(answering(answer)))


def test_identity_encoding_is_taken():
    assert fetch(answering(http(200, PNG, content_encoding="Identity")))[0].data == PNG


@pytest.mark.parametrize(
    "answer",
    [
        http(200, PNG, content_length="5000"),
        http(200, b"40\r\n" + PNG, transfer_encoding="chunked", content_length=""),
        b"",
        b"HTTP/1.1 200 OK\r\nConte",
    ],
    ids=["length", "chunk", "nothing", "head"],
)
def test_truncated_file_is_refused(answer: bytes):
    assert "broke off" in str(failure(answering(answer)))


async def drips(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(http(200, PNG, content_length="5000"))
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.02)


async def redirects_slowly(asked: Asked, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.12)
    writer.write(http(302, location="/again"))


@pytest.mark.parametrize("handler", [drips, redirects_slowly], ids=lambda h: h.__name__)
def test_deadline_holds_for_all_hops_together(handler: Handler):
    start = time.perf_counter()
    error = failure(handler, deadline_s=0.25)
    assert "no complete answer" in str(error)
    assert 0.2 < time.perf_counter() - start < 30


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_without_cookies(status: int):
    hop = http(status, b"ignored", location="/b?x=1", set_cookie="id=7")
    got, served = fetch(answering(hop, http(200, PNG)))
    assert got.data == PNG
    assert [asked.line for asked in served.asked] == ["GET /a HTTP/1.1", "GET /b?x=1 HTTP/1.1"]
    assert "cookie" not in served.asked[1].headers
    assert "referer" not in served.asked[1].headers


def test_three_redirects_are_followed_and_a_fourth_is_not():
    hops = [http(302, location=f"/{n}") for n in range(4)]
    assert fetch(answering(*hops[:3], http(200, PNG)))[0].data == PNG
    error = failure(answering(*hops, http(200, PNG)))
    assert isinstance(error, UnsafeAddress)
    assert "more than 3 redirects" in str(error)


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/",
        "https://10.0.0.1/",
        "//192.168.0.1/",
        "file:///etc/passwd",
        "http://example.com/",
        "data:image/png;base64,AAAA",
        "\\\\127.0.0.1\\",
        "http://[::ffff:127.0.0.1]/",
    ],
)
def test_redirect_to_what_must_not_be_fetched(location: str):
    assert isinstance(failure(answering(http(302, location=location))), UnsafeAddress)


def test_redirect_to_nowhere_is_refused():
    assert "to nowhere" in str(failure(answering(http(302))))


def test_redirect_to_a_host_that_is_not_allowed():
    answer = http(302, location="http://localhost:9/")
    error = failure(answering(answer), hosts=["127.0.0.1"])
    assert isinstance(error, UnsafeAddress)
    assert "none of the allowed hosts" in str(error)


class PublicThenLoopback(httpx2.AsyncBaseTransport):
    """A public host that redirects to loopback, where a file is waiting."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "127.0.0.1":
            return httpx2.Response(200, stream=httpx2.ByteStream(PNG))
        location = {"Location": "http://127.0.0.1:8000/a.png"}
        return httpx2.Response(302, headers=location, stream=httpx2.ByteStream(b""))


def test_public_host_cannot_redirect_to_loopback_even_where_loopback_is_allowed():
    async def lookup(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    network = Network(lookup=lookup, open_transport=PublicThenLoopback)
    run = download("https://a.example.com/", hosts=None, allow_loopback=True, network=network)
    with pytest.raises(UnsafeAddress, match="on this machine"):
        asyncio.run(run)


def test_the_vetted_address_is_the_one_connected_to():
    """Two servers on one port of two loopback addresses; the name moves between the lookups."""

    async def run() -> tuple[Downloaded, int, int]:
        async with serving(answering(http(200, PNG))) as first:
            answer = answering(http(200, JPEG))
            async with serving(answer, host="127.0.0.2", port=first.port) as second:
                answers = iter([["127.0.0.1"], ["127.0.0.2"]])

                async def lookup(host: str, port: int) -> list[str]:
                    return next(answers)

                got = await download(
                    f"http://localhost:{first.port}/a",
                    hosts=["localhost"],
                    allow_loopback=True,
                    network=Network(lookup=lookup),
                )
                assert first.asked[0].headers["host"] == f"localhost:{first.port}"
                return got, first.connections, second.connections

    got, first, second = asyncio.run(run())
    assert (got.data, first, second) == (PNG, 1, 0)


def test_loopback_is_closed_by_default():
    with pytest.raises(UnsafeAddress, match="allow_loopback"):
        asyncio.run(download("http://127.0.0.1:1/", hosts=None, allow_loopback=False))


# data: URIs


def inline(uri: str, **options) -> Downloaded:
    return asyncio.run(download(uri, hosts=[], allow_loopback=False, **options))


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "IMAGE/PNG"])
def test_data_uri_of_an_image_is_taken(kind: str):
    got = inline(f"data:{kind};base64,{base64.b64encode(PNG).decode()}")
    assert (got.data, got.content_type) == (PNG, kind.lower())


@pytest.mark.parametrize(
    "uri",
    ["data:", "data:,x", "data:text/html;base64,AAAA", "data:image/png,AAAA", "DATA:image/x;"],
)
def test_data_uri_of_something_else_is_unsafe(uri: str):
    with pytest.raises(UnsafeAddress, match="data URI"):
        inline(uri)


@pytest.mark.parametrize("text", ["!!!!", "AAA", "AA AA", "AAAA%41", "é"])
def test_data_uri_with_invalid_base64_is_refused(text: str):
    with pytest.raises(RemoteError, match="base64"):
        inline(f"data:image/png;base64,{text}")


def test_data_uri_is_under_the_cap():
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert inline(uri, max_bytes=len(PNG)).data == PNG
    for max_bytes in (len(PNG) - 1, 10):
        with pytest.raises(RemoteError, match=f"more than the {max_bytes} bytes"):
            inline(uri, max_bytes=max_bytes)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: http(200, b))))
def test_any_bytes_become_a_file_or_a_typed_error(answer: bytes):
    try:
        got, _ = fetch(answering(answer))
    except RemoteError:
        return
    assert got.data[:2] in (b"\x89P", b"\xff\xd8", b"RI")


@settings(max_examples=120, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["", "https://", "http://", "data:", "https://a.b/"]))
def test_any_text_as_url_is_a_typed_error(text: str, start: str):
    async def nowhere(host: str, port: int) -> list[str]:
        raise OSError("no network in tests")

    network = Network(
        lookup=nowhere,
        open_transport=lambda: httpx2.MockTransport(lambda request: httpx2.Response(404)),
    )
    run = download(start + text, hosts=None, allow_loopback=False, network=network)
    with pytest.raises(RemoteError) as caught:
        asyncio.run(run)
    assert str(caught.value).isprintable()
