"""Calls over real sockets: what was not sent, refused, or lost."""

import asyncio
import json
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest

from sd35bench.errors import LostAnswer, RemoteError, UnsafeAddress
from sd35bench.remote.http import Network
from sd35bench.remote.providers.base import Call
from sd35bench.remote.transport import (
    NotSent,
    Refused,
    Reply,
    ServerFailed,
    Transport,
)
from tests.remote.loopback import Asked, Served, answering, http, serving
from tests.remote.sending import (
    CREATE,
    KEY,
    failure,
    send,
    told,
    transport,
)

# What is sent, and what a good answer becomes


def test_send_carries_the_call_and_returns_the_decoded_answer():
    call = Call(
        method="POST",
        path="/v1/prediction/",
        json={"a": 1.5},
        query={"model": "x y&z"},
        headers={"Prefer": "wait"},
    )
    answer = http(201, '{"id": "é"}', x_request_id="r-1", retry_after="7")
    reply, served = send(answering(answer), call)
    assert (reply.status, reply.body, reply.request_id) == (201, {"id": "é"}, "r-1")
    assert reply.retry_after_s == 7.0
    assert reply.sent_at < reply.received_at < reply.sent_at + 2
    (asked,) = served.asked
    assert asked.line in (
        "POST /v1/prediction/?model=x+y%26z HTTP/1.1",
        "POST /v1/prediction/?model=x%20y%26z HTTP/1.1",
    )
    assert json.loads(asked.body) == {"a": 1.5}
    assert asked.headers["x-api-key"] == KEY
    assert asked.headers["prefer"] == "wait"
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["accept-encoding"] == "identity"
    assert asked.headers["host"] == f"127.0.0.1:{served.port}"
    assert "cookie" not in asked.headers


def test_send_keeps_a_path_of_the_base_url():
    async def run() -> str:
        async with serving(answering(http(200, "{}"))) as served:
            await transport(served.url + "/api/").send(Call(method="GET", path="/v1/x"))
            return served.asked[0].line

    assert asyncio.run(run()) == "GET /api/v1/x HTTP/1.1"


def test_send_opens_a_connection_for_each_call_and_keeps_no_cookies():
    async def run() -> Served:
        answer = http(200, "{}", set_cookie="session=1; Path=/")
        async with serving(answering(answer)) as served:
            client = transport(served.url)
            for _ in range(3):
                await client.send(CREATE)
            return served

    served = asyncio.run(run())
    assert served.connections == 3
    assert all("cookie" not in asked.headers for asked in served.asked)


def test_send_returns_no_body_only_where_the_status_says_so():
    assert send(answering(http(204, content_length="")))[0].body is None
    assert isinstance(failure(answering(http(200, ""))), LostAnswer)


def test_send_ignores_the_environment_s_proxies(monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert send(answering(http(200, "[]")))[0].body == []


def test_send_asks_for_the_key_each_time():
    keys = iter(["first-key", "second-key"])

    async def run() -> list[str]:
        async with serving(answering(http(200, "{}"))) as served:
            client = transport(served.url, headers=lambda: {"X-API-Key": next(keys)})
            await client.send(CREATE)
            await client.send(CREATE)
            return [asked.headers["x-api-key"] for asked in served.asked]

    assert asyncio.run(run()) == ["first-key", "second-key"]


# Not sent


def test_base_url_is_vetted():
    with pytest.raises(UnsafeAddress, match="only https"):
        Transport("http://api.example.com", allow_loopback=True, headers=dict)
    with pytest.raises(UnsafeAddress, match="allow_loopback"):
        Transport("http://127.0.0.1:8000", allow_loopback=False, headers=dict)


def test_refused_connection_was_not_sent():
    async def run() -> None:
        async with serving(answering(b"")) as served:
            url = served.url
        await transport(url).send(CREATE)

    with pytest.raises(NotSent, match="could not be reached"):
        asyncio.run(run())


def not_sent_by(lookup) -> NotSent:
    client = transport("https://api.example.com", network=Network(lookup=lookup), timeout_s=0.2)
    with pytest.raises(NotSent) as caught:
        asyncio.run(client.send(CREATE))
    return caught.value


def test_failed_lookup_and_private_address_were_not_sent():
    async def fails(host: str, port: int) -> Sequence[str]:
        raise OSError("no such host")

    async def private(host: str, port: int) -> Sequence[str]:
        return ["10.0.0.1"]

    async def hangs(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(10)
        return []

    assert "no such host" in str(not_sent_by(fails))
    assert isinstance(not_sent_by(private).__cause__, UnsafeAddress)
    assert "0.2 s" in str(not_sent_by(hangs))


def test_tls_that_never_answers_was_not_sent():
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    async def run() -> None:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            await transport(f"https://127.0.0.1:{port}", timeout_s=0.2).send(CREATE)
        finally:
            server.close()

    with pytest.raises(NotSent, match=r"no complete answer in 0\.2 s"):
        asyncio.run(run())


@pytest.mark.parametrize("key", [f"{KEY}\nX: y", f"{KEY}\r", f"{KEY}\0", f"{KEY}é", f" {KEY} \n"])
def test_key_that_no_header_can_carry_was_not_sent_and_not_told(key: str):
    error = failure(answering(http()), headers=lambda: {"X-API-Key": key})
    assert isinstance(error, NotSent)
    assert KEY not in told(error)


@pytest.mark.parametrize("path", ["v1", "", "@evil.example.com/", "/a b", "/a\r\nX: y", "/\\b"])
def test_path_that_makes_no_url_was_not_sent(path: str):
    assert isinstance(failure(answering(http()), call=Call(method="GET", path=path)), NotSent)


# Refused, or open


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 409, 422, 429, 451, 301, 307, 308])
def test_status_that_refuses(status: int):
    answer = http(status, '{"error": "no\\nway"}', x_request_id="r", retry_after="3")
    error = failure(answering(answer))
    assert isinstance(error, Refused)
    assert not isinstance(error, LostAnswer)
    assert (error.status, error.retry_after_s, error.request_id) == (status, 3.0, "r")
    assert f"HTTP {status}: no way" in str(error)


@pytest.mark.parametrize("status", [300, 302, 303, 304, 500, 501, 502, 503, 504, 599])
def test_status_that_leaves_open_what_happened(status: int):
    error = failure(answering(http(status, "" if status == 304 else "<html>bad gateway</html>")))
    assert isinstance(error, ServerFailed)
    assert isinstance(error, LostAnswer)
    assert error.status == status


def test_redirect_is_not_followed():
    async def run() -> tuple[Served, RemoteError]:
        async with serving(answering(http(200, "{}"))) as other:
            location = f"{other.url}/v1"
            async with serving(answering(http(307, location=location))) as served:
                with pytest.raises(Refused, match="not followed") as caught:
                    await transport(served.url).send(CREATE)
            return other, caught.value

    other, error = asyncio.run(run())
    assert other.connections == 0
    assert other.url in str(error)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"error": "Prediction not found"}', "Prediction not found"),
        ('{"error": {"message": "bad cfg", "code": 3}}', "bad cfg"),
        ('{"status": "error", "error": "e", "details": "d"}', "e; d"),
        ('{"title": "Too many", "detail": "resets in 5s"}', "Too many; resets in 5s"),
        ('{"detail": [{"loc": ["body"], "msg": "field required"}]}', "field required"),
        ("<html><style>b{}</style><h1>502</h1> Bad\x1b[2J gateway</html>", "502 Bad [2J gateway"),
        ('"plain"', "plain"),
        ("", ""),
    ],
)
def test_reason_is_the_service_s_own(body: str, reason: str):
    text = str(failure(answering(http(400, body))))
    assert text == "the service refused: HTTP 400" + (f": {reason}" if reason else "")


def test_reason_is_bounded():
    assert len(str(failure(answering(http(400, json.dumps({"error": "x" * 100_000})))))) < 400
    assert len(str(failure(answering(http(502, "<style" * 100_000))))) < 400


# TLS: certificates are checked against the host, though an address is connected to


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    both = folder / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    name = ["-subj", "/CN=api.localhost", "-addext", "subjectAltName=DNS:api.localhost"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    try:
        subprocess.run([*command.split(), *name, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    both.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return both


def over_tls(certificate: Path, host: str, *, trusted: bool) -> tuple[Reply, str | None]:
    """Call a TLS server by a name; the answer, and the name that it was asked for."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate)
    names: list[str | None] = []
    server_side.sni_callback = lambda _socket, name, _context: names.append(name)
    ours = ssl.create_default_context(cafile=str(certificate) if trusted else None)

    async def lookup(name: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    def connect() -> httpx2.AsyncBaseTransport:
        return httpx2.AsyncHTTPTransport(verify=ours, trust_env=False)

    async def run() -> Reply:
        async with serving(answering(http(200, "{}")), tls=server_side) as served:
            network = Network(lookup=lookup, open_transport=connect)
            client = transport(f"https://{host}:{served.port}", network=network)
            return await client.send(CREATE)

    return asyncio.run(run()), names[0]


def test_tls_asks_for_and_checks_the_host_not_the_address(certificate: Path):
    reply, name = over_tls(certificate, "api.localhost", trusted=True)
    assert (reply.status, name) == (200, "api.localhost")


@pytest.mark.parametrize(("host", "trusted"), [("other.localhost", True), ("api.localhost", False)])
def test_tls_of_another_or_an_unknown_host_was_not_sent(
    certificate: Path, host: str, trusted: bool
):
    with pytest.raises(NotSent, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
        over_tls(certificate, host, trusted=trusted)


# Uploads


def put(url: str, headers: dict[str, str], client: Transport) -> None:
    asyncio.run(client.put(url, b"PNG", headers))


def test_put_sends_exactly_the_bytes_and_headers_and_no_key():
    async def run() -> Asked:
        async with serving(answering(http(200, "<xml/>"))) as served:
            url = f"{served.url}/bucket/x?X-Signature=a%2Fb%3D"
            await transport(served.url).put(url, b"\x89PNG", {"Content-Type": "image/png"})
            return served.asked[0]

    asked = asyncio.run(run())
    assert asked.line == "PUT /bucket/x?X-Signature=a%2Fb%3D HTTP/1.1"
    assert asked.body == b"\x89PNG"
    assert asked.headers["content-type"] == "image/png"
    assert KEY not in str(asked)


def test_put_vets_the_url_and_refuses_headers_that_reframe_the_request():
    client = transport("https://api.example.com")
    with pytest.raises(UnsafeAddress):
        put("https://10.0.0.1/x", {}, client)
    with pytest.raises(UnsafeAddress):
        put("file:///etc/x", {}, client)
    for name in ("Host", "transfer-encoding", "Content-Length"):
        with pytest.raises(NotSent, match=name.lower()):
            put("https://bucket.example.com/x", {name: "x"}, client)


def test_put_that_is_refused_says_so_without_the_signature():
    signature = "s3" + "cret"  # the traceback quotes this test's lines

    async def run() -> None:
        async with serving(answering(http(403, "<Code>AccessDenied</Code>"))) as served:
            await transport(served.url).put(f"{served.url}/x?sig={signature}", b"", {})

    with pytest.raises(Refused, match="HTTP 403: AccessDenied") as caught:
        asyncio.run(run())
    assert signature not in told(caught.value)
