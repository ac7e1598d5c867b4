"""What becomes of answers that are lost, late or hostile, and that the key is in none of it."""

import asyncio
import contextlib
import json
import time
from datetime import UTC, datetime
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35bench.errors import LostAnswer
from sd35bench.remote.transport import (
    MAX_RETRY_AFTER_S,
    Refused,
)
from tests.remote.loopback import Asked, Handler, answering, http
from tests.remote.sending import (
    KEY,
    failure,
    send,
    told,
)

# Lost


async def says_nothing(asked: Asked, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def drips(asked: Asked, writer: asyncio.StreamWriter) -> None:
    for byte in http(200, "{}", x_long="y" * 5000):
        writer.write(bytes([byte]))
        await asyncio.sleep(0.01)


async def drips_body(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(http(200, content_length="5000"))
    for _ in range(5000):
        writer.write(b" ")
        await asyncio.sleep(0.01)


async def informs_for_ever(asked: Asked, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


async def resets(asked: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(http(200, '{"id"', content_length="100"))
    await writer.drain()
    writer.transport.abort()


HANGS = [says_nothing, drips, drips_body, informs_for_ever]


@pytest.mark.parametrize("handler", HANGS, ids=lambda h: h.__name__)
def test_deadline_is_total(handler: Handler):
    start = time.perf_counter()
    error = failure(handler, timeout_s=0.25)
    assert 0.2 < time.perf_counter() - start < 30
    assert isinstance(error, LostAnswer)
    assert "no complete answer in 0.25 s" in str(error)


GZIP = bytes.fromhex("1f8b0800000000000003ab5653504a52b252a8050046b3a27f0b000000")
BAD = {
    "hung-up": b"",
    "no-http": b"hello\r\n\r\n",
    "half-a-head": b"HTTP/1.1 200 OK\r\nContent-",
    "huge-head": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000,
    "two-lengths": http(200, "{}", **{"Content-Length": "3"}),
    "negative-length": http(200, "{}", content_length="-1"),
    "truncated": http(200, '{"id": "1"}', content_length="50"),
    "truncated-4xx": http(400, '{"error": "1"}', content_length="50"),
    "truncated-chunk": http(200, b'5\r\n{"a', transfer_encoding="chunked", content_length=""),
    "bad-chunk": http(200, b"zz\r\n{}\r\n", transfer_encoding="chunked", content_length=""),
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "html": http(200, "<html>fine</html>", content_type="text/html"),
    "invalid-json": http(200, '{"id": '),
    "two-documents": http(200, "{} {}"),
    "byte-order-mark": http(200, b"\xef\xbb\xbf{}"),
    "invalid-utf8": http(200, b'{"id": "\xff"}'),
    "utf16": http(200, '{"id": 1}'.encode("utf-16")),
    "nan": http(200, '{"cost": NaN}'),
    "infinity": http(200, '{"cost": -Infinity}'),
    "large-float": http(200, '{"cost": 1e999}'),
    "large-int": http(200, '{"id": 18446744073709551616}'),
    "huge-int": http(200, '{"id": ' + "9" * 100_000 + "}"),
    "deep": http(200, "[" * 65 + "]" * 65),
    "bomb": http(200, "[" * 500_000),
    "deep-objects": http(200, '{"a":' * 100_000 + "1" + "}" * 100_000),
    "duplicates": http(200, '{"id": "1", "id": "2"}'),
    "duplicates-inside": http(200, '{"a": [{"id": "1", "id": "1"}]}'),
    "gzip": http(200, GZIP, content_encoding="gzip"),
    "unknown-encoding": http(200, "{}", content_encoding="rot13"),
    "announced-too-large": http(200, "{}", content_length="5000000"),
    "announced-absurd": http(200, "{}", content_length="9" * 30),
    "too-large": http(200, b" " * 5_000_000, content_length=""),
}


def test_answer_that_is_no_answer_is_lost():
    found = {name: failure(answering(answer)) for name, answer in BAD.items()}
    assert {name: e for name, e in found.items() if not isinstance(e, LostAnswer)} == {}


def test_reset_is_lost():
    assert isinstance(failure(resets), LostAnswer)


def test_body_over_the_cap_is_cut_while_it_streams():
    sent = 0

    async def pours(asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(http(200, content_length=""))
        for _ in range(1000):
            writer.write(b" " * 65536)
            sent += 65536
            await writer.drain()

    assert "100,000 bytes" in str(failure(pours, max_body_bytes=100_000))
    assert sent < 20 * 2**20  # of 64 MiB: what socket buffers take


def test_depth_at_the_limit_and_lone_surrogates_are_taken():
    deep = send(answering(http(200, "[" * 64 + "]" * 64)))[0].body
    assert json.dumps(deep) == "[" * 64 + "]" * 64
    body = send(answering(http(200, '{"logs": "a\\ud800b", "n": 18446744073709551615}')))[0].body
    assert body == {"logs": "a?b", "n": 2**64 - 1}


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda b: http(200, b))))
def test_any_bytes_become_a_reply_or_a_typed_error(answer: bytes):
    with contextlib.suppress(Refused, LostAnswer):
        send(answering(answer))


# The key


REFLECTING = {
    "error": http(401, json.dumps({"error": f"invalid key {KEY}"})),
    "html": http(403, f"<p>X-API-Key: {KEY}</p>"),
    "nested": http(400, json.dumps({"detail": [{"msg": f"Bearer {KEY}"}]})),
    "cut": http(500, json.dumps({"error": "x" * 290 + KEY})),
    "cut-text": http(500, "x" * 285 + KEY),
    "cut-blanks": http(500, " " * 3985 + KEY),
    "cut-invalid-json": http(200, " " * 1985 + KEY),
    "cut-location": http(307, location="https://evil.example.com/" + "x" * 160 + KEY),
    "location": http(307, location=f"https://evil.example.com/?k={KEY}"),
    "request-id": http(429, "{}", x_request_id=KEY),
    "invalid-json": http(200, f'{{"key": "{KEY}'),
    "status-line": f"HTTP/1.1 {KEY}\r\n\r\n".encode(),
    "header-line": f"HTTP/1.1 200 OK\r\n{KEY} {KEY}\r\n\r\n".encode(),
    "encoding": http(200, "{}", content_encoding=KEY),
    "chunk": http(200, f"{KEY}\r\n", transfer_encoding="chunked", content_length=""),
}


@pytest.mark.parametrize("answer", REFLECTING.values(), ids=REFLECTING)
def test_key_is_in_no_message_or_traceback(answer: bytes):
    for scheme in ("", "Bearer "):
        error = failure(answering(answer), headers=lambda s=scheme: {"Authorization": s + KEY})
        assert KEY not in told(error)
        assert KEY[:12] not in told(error)
        assert KEY not in repr(vars(error))


def test_key_is_blotted_out_of_bodies_and_request_ids():
    body = {"logs": [f"key {KEY}!"], f"x{KEY}": 1}
    reply, _ = send(answering(http(200, json.dumps(body), x_request_id=f"r{KEY}")))
    assert reply.body == {"logs": ["key [key]!"], "x[key]": 1}
    assert reply.request_id == "r[key]"


# Retry-After


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("99999999999", MAX_RETRY_AFTER_S),
        ("9" * 400, MAX_RETRY_AFTER_S),
        ("soon", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("1e3", None),
        ("Wed, 99 Foo 2026 00:00:00 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_S),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_bounded(value: str, seconds: float | None):
    error = failure(answering(http(429, "{}", retry_after=value or " ")))
    assert isinstance(error, Refused)
    assert error.retry_after_s == seconds


def test_retry_after_date_counts_from_the_service_s_clock():
    theirs = datetime(2031, 1, 1, tzinfo=UTC)
    until = format_datetime(theirs.replace(second=20), usegmt=True)
    answer = http(429, "{}", date=format_datetime(theirs, usegmt=True), retry_after=until)
    assert failure(answering(answer)).retry_after_s == 20.0  # type: ignore[attr-defined]


def test_retry_after_date_counts_from_our_clock_without_theirs():
    answer = http(429, "{}", retry_after=formatdate(time.time() + 30, usegmt=True))
    assert 27 < failure(answering(answer)).retry_after_s <= 30  # type: ignore[attr-defined]
