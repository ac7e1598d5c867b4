"""What a stranger may hold: heads, bodies, connections, and the log; spoken to byte by byte."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd35bench.server import app, connection, envelope, predictions, serving
from sd35bench.server.auth import KeyRing, make_key
from sd35bench.server.connection import ConnectionLimit
from tests.server.live import live, make_settings

pytestmark = pytest.mark.usefixtures("served_here")

MOST = 20
HALF_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
BOTH = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"
JSON_HEAD = b"POST /v1/prediction HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture
def small_door(monkeypatch):
    monkeypatch.setattr(serving, "ConnectionLimit", functools.partial(ConnectionLimit, MOST))


@pytest.fixture
def server(tmp_path):
    with live(make_settings(tmp_path), makes_images=False) as opened:
        yield opened


@pytest.fixture
def keyed(tmp_path):
    key = make_key("a", tmp_path / "keys.txt")
    settings = make_settings(tmp_path / "state", key_file=tmp_path / "keys.txt")
    with live(settings, makes_images=False) as opened:
        yield opened, key


def dial(opened) -> socket.socket:
    host = opened.client.base_url
    return socket.create_connection((host.host, host.port), timeout=30)


def answer_of(wire: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := wire.recv(65536):
            parts.append(part)
    return b"".join(parts)


def assert_fresh_health(opened) -> None:
    """/healthz answers on a connection of its own, within the 30 s of `dial`."""
    with dial(opened) as wire:
        wire.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer_of(wire).startswith(b"HTTP/1.1 200")


@pytest.fixture
def log_lines():
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(envelope.JsonFormatter().format(record))
    logger = logging.getLogger("sd35bench.server")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def requests_in(log_lines: list[str], count: int) -> list[str]:
    """The lines of requests, once there are so many: each is written after its answer is sent."""
    until = time.monotonic() + 60
    while True:
        found = [line for line in log_lines if '"event": "request"' in line]
        if len(found) >= count:
            return found
        assert time.monotonic() < until, log_lines
        time.sleep(0.01)


def hold_half_heads(opened, stack: contextlib.ExitStack, count: int) -> None:
    for _ in range(count):
        stack.enter_context(dial(opened)).sendall(HALF_HEAD)


def test_half_heads_do_not_keep_others_out(small_door, server, log_lines):
    with contextlib.ExitStack() as stack:
        hold_half_heads(server, stack, 5 * MOST)
        assert_fresh_health(server)
        until = time.monotonic() + 60
        while '"pushed out' not in "".join(log_lines):
            assert time.monotonic() < until
            time.sleep(0.05)
    assert len([line for line in log_lines if '"refused"' in line]) < 10  # one a second


def test_mutant_without_pushing_out_half_heads_keep_others_out(small_door, server, monkeypatch):
    monkeypatch.setattr(ConnectionLimit, "waits", lambda *_: None)
    with contextlib.ExitStack() as stack:
        hold_half_heads(server, stack, 5 * MOST)
        with dial(server) as wire:
            assert answer_of(wire).startswith(b"HTTP/1.1 503")


def test_a_head_that_does_not_end_is_given_up(server, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    with dial(server) as wire:
        wire.sendall(HALF_HEAD)
        assert answer_of(wire) == b""


def test_a_head_that_is_too_large_is_refused(server):
    with dial(server) as wire:
        wire.sendall(HALF_HEAD + b"x" * connection.MOST_HEAD_BYTES)
        assert answer_of(wire).startswith(b"HTTP/1.1 431")


def test_without_a_key_no_byte_of_a_body_is_awaited(keyed):
    with dial(keyed[0]) as wire:
        wire.sendall(JSON_HEAD + b"Content-Length: 1000000\r\n\r\n")
        found = answer_of(wire)  # while the body is still to come
    assert found.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in found.lower()


def test_without_a_key_no_byte_of_a_body_is_parsed(keyed, monkeypatch):
    parsed: list[int] = []
    real = connection.H11Protocol.data_received
    monkeypatch.setattr(
        connection.H11Protocol,
        "data_received",
        lambda self, data: (parsed.append(len(data)), real(self, data))[1],
    )
    chunks = b"1\r\n \r\n" * 100_000
    with dial(keyed[0]) as wire, contextlib.suppress(ConnectionError):
        wire.sendall(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert answer_of(wire).startswith(b"HTTP/1.1 401")
    assert max(parsed) < 1000  # the head


def test_chunks_of_one_byte_are_refused_and_hold_nobody_up(server):
    with dial(server) as wire:
        wire.sendall(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            wire.sendall(b"1\r\n \r\n" * 50_000)
        assert_fresh_health(server)
        assert answer_of(wire).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "lengths",
    [
        BOTH,
        b"Transfer-Encoding: chunked\r\ncontent-length : 5\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
    ],
)
def test_two_lengths_are_refused_and_the_connection_ends(server, lengths):
    with dial(server) as wire:
        wire.sendall(JSON_HEAD + lengths + b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\n\r\n")
        found = answer_of(wire)
    assert found.startswith(b"HTTP/1.1 400")
    assert found.count(b"HTTP/1.1") == 1


def test_requests_in_one_piece_are_answered_in_turn(server):
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with dial(server) as wire:
        wire.sendall(one + one + last)
        assert answer_of(wire).count(b"HTTP/1.1 200") == 3


def test_a_body_in_pieces_is_one_body(server):
    body = json.dumps({"model": "nano", "input": {"prompt": "a" * 9000}}).encode()
    with dial(server) as wire:
        wire.sendall(JSON_HEAD + b"Content-Length: %d\r\nConnection: close\r\n" % len(body))
        for part in (b"\r", b"\n", body[:10], body[10:5000], body[5000:]):
            wire.sendall(part)
            time.sleep(0.01)
        assert answer_of(wire).startswith(b"HTTP/1.1 200")


def test_a_client_that_asks_first_is_let_go_on_and_without_a_key_is_not(server, keyed):
    body = json.dumps({"model": "nano", "input": {"prompt": "a"}}).encode()
    head = JSON_HEAD + b"Expect: 100-continue\r\nConnection: close\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with dial(server) as wire:
        wire.sendall(head)
        assert wire.recv(100).startswith(b"HTTP/1.1 100")
        wire.sendall(body)
        assert answer_of(wire).startswith(b"HTTP/1.1 200")
    with dial(keyed[0]) as wire:
        wire.sendall(head)
        assert answer_of(wire).startswith(b"HTTP/1.1 401")


def test_an_upload_that_is_too_large_gets_its_answer(server):
    asked = server.client.post("/v1/upload/presign", json={"content_type": "image/png"}).json()
    large = b"\0" * (17 * 2**20)
    path = asked["presigned_url"].removeprefix(server.url)
    head = f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    with dial(server) as wire:  # a client that sends everything before it reads
        wire.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(large))
        wire.sendall(large)
        assert answer_of(wire).startswith(b"HTTP/1.1 413")


PNG = {"Content-Type": "image/png"}


def test_a_client_that_hangs_up_in_its_body_is_no_error(server, log_lines):
    with dial(server) as wire:
        wire.sendall(JSON_HEAD + b"Content-Length: 50\r\n\r\n{")
        time.sleep(0.2)
    (line,) = requests_in(log_lines, 1)
    assert '"status": 499' in line
    assert not any("Traceback" in line for line in log_lines)


def test_mutant_that_takes_a_hangup_for_an_error_says_so(server, log_lines, monkeypatch):
    monkeypatch.setattr(envelope, "CLIENT_GONE", 500)
    with pytest.raises(AssertionError):
        test_a_client_that_hangs_up_in_its_body_is_no_error(server, log_lines)


@pytest.fixture
def logged(keyed, log_lines, monkeypatch):
    """A server with keys, its log, and the log's clock, which stands still."""
    clock = SimpleNamespace(**vars(time), now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(envelope, "time", clock)
    return keyed[0], log_lines, clock


def test_strangers_fill_no_log(logged):
    opened, log_lines, clock = logged
    for _ in range(100):
        assert opened.client.get("/v1/model").status_code == 401
    most = envelope.MOST_LINES
    assert len(requests_in(log_lines, min(most, 10))) <= 10
    clock.now += 1.0
    opened.client.get("/v1/model")
    last = requests_in(log_lines, 11)[10]
    assert 80 < json.loads(last)["left_out"] <= 90


def test_a_key_that_is_taken_out_of_the_file_is_refused_at_once(tmp_path):
    path = tmp_path / "keys.txt"
    keys = {name: {"X-API-Key": make_key(name, path)} for name in ("a", "b")}
    with live(make_settings(tmp_path / "state", key_file=path), makes_images=False) as opened:
        assert opened.client.get("/v1/model", headers=keys["a"]).status_code == 200
        path.write_text(path.read_text().splitlines()[1] + "\n")
        assert opened.client.get("/v1/model", headers=keys["a"]).status_code == 401
        assert opened.client.get("/v1/model", headers=keys["b"]).status_code == 200
        path.write_text("half a li")  # while somebody edits it
        assert opened.client.get("/v1/model", headers=keys["b"]).status_code == 200


def test_everything_that_is_kept_is_for_this_user_alone(tmp_path):
    state = tmp_path / "state"
    before = os.umask(0)
    try:
        state.mkdir(mode=0o755)
        (state / "predictions.sqlite").touch(mode=0o644)  # of an older version
        with live(make_settings(state, allow_loopback=True)) as opened:
            png = opened.client.get(opened.ended(opened.create(output_format="png"))["output"])
            asked = opened.client.post("/v1/upload/presign", json={"content_type": "image/png"})
            there = asked.json()
            opened.client.put(there["presigned_url"], content=png.content, headers=PNG)
            opened.ended(opened.create(image=there["public_url"]))
            opened.state.inits.write("kept", b"x")
            found = {path: path.stat().st_mode & 0o777 for path in (state, *state.rglob("*"))}
    finally:
        os.umask(before)
    names = {path.relative_to(state).parts[0] for path in found if path != state}
    wanted = {"predictions.sqlite", "predictions.sqlite-wal", "predictions.sqlite-shm", "lock"}
    assert names >= wanted | {"inits", "outputs", "uploads", "tickets"}
    assert len([path for path in found if path.is_file()]) >= 7
    wrong = {p: oct(m) for p, m in found.items() if m != (0o700 if p.is_dir() else 0o600)}
    assert wrong == {}


MUTANTS: dict[str, tuple[object, str, object, Callable, str]] = {
    "the key after the body": (
        *(envelope.Envelope, "check_head", lambda *_: None),
        *(test_without_a_key_no_byte_of_a_body_is_awaited, "keyed"),
    ),
    "chunks of any size": (
        *(connection, "FREE_FRAMING_BYTES", 10**12),
        *(test_chunks_of_one_byte_are_refused_and_hold_nobody_up, "server"),
    ),
    "the first length": (
        *(connection, "_LENGTHS", re.compile(b"never")),
        *(functools.partial(test_two_lengths_are_refused_and_the_connection_ends, lengths=BOTH),),
        "server",
    ),
    "closed at once": (
        *(connection.Connection, "close", lambda self, transport: transport.close()),
        *(test_an_upload_that_is_too_large_gets_its_answer, "server"),
    ),
    "every line logged": (
        *(envelope, "MOST_LINES", 10**9),
        *(test_strangers_fill_no_log, "logged"),
    ),
    "keys read once": (
        *(KeyRing, "reload", lambda *_, **__: None),
        *(test_a_key_that_is_taken_out_of_the_file_is_refused_at_once, "tmp_path"),
    ),
    "modes left to the umask": (
        *(Path, "chmod", lambda *_: None),
        *(test_everything_that_is_kept_is_for_this_user_alone, "tmp_path"),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name, request, monkeypatch):
    place, attribute, mutant, test, fixture = MUTANTS[name]
    given = request.getfixturevalue(fixture)
    monkeypatch.setattr(envelope, "BODY_S", 0.5)
    monkeypatch.setattr(place, attribute, mutant)
    with pytest.raises((AssertionError, OSError)):
        test(given)


class Swept(Exception):
    """One round of the sweep is over."""


def test_keep_days_forgets_predictions_while_it_serves(tmp_path):
    with live(make_settings(tmp_path, keep_days=1e-9)) as opened:
        opened.ended(opened.create())
        prune = opened.state.store.prune

        def once(age_s: float) -> None:
            prune(age_s)
            raise Swept

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(opened.state.store, "prune", once)
            with pytest.raises(Swept):
                asyncio.run(app._sweep(opened.state))
        assert opened.client.get("/v1/executions").json()["executions"] == []


def sent_a_hangup(taken: Callable[[], None]) -> None:
    """What a server does on SIGHUP: it must not be what Python does, which is to die."""
    server = serving.Server.__new__(serving.Server)
    server._loop = SimpleNamespace(call_soon_threadsafe=lambda reload: reload())  # type: ignore
    server._state = SimpleNamespace(keys=SimpleNamespace(reload=taken))  # type: ignore
    with server.capture_signals():
        signal.raise_signal(signal.SIGHUP)


@pytest.fixture
def deaths():
    """How often SIGHUP came through to where Python would have died of it."""
    found: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda sig, _: found.append(sig))
    yield found
    signal.signal(signal.SIGHUP, before)


def test_sighup_is_taken_for_a_word_about_keys(deaths):
    read: list[bool] = []
    sent_a_hangup(lambda: read.append(True))
    assert (read, deaths) == ([True], [])


def test_mutants_without_a_hangup_s_handler_and_without_a_limit_of_days(
    deaths, tmp_path, monkeypatch
):
    monkeypatch.setattr(serving, "_handling", lambda _: contextlib.nullcontext())
    with pytest.raises(AssertionError):
        test_sighup_is_taken_for_a_word_about_keys(deaths)
    monkeypatch.setattr(predictions.PredictionStore, "prune", lambda *_: 0)
    with pytest.raises(AssertionError):
        test_keep_days_forgets_predictions_while_it_serves(tmp_path)
