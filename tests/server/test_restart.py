"""A server that is killed, stopped, or started twice: nothing that was accepted is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from sd35bench.cli import main

pytestmark = pytest.mark.model  # many processes
ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
FORKED = pytest.mark.usefixtures("forked_python")
"""The last server of this file starts from nothing: 3 s of CPU."""


class Served:
    """`sd35bench serve` in a process of its own."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.errors = folder / f"stderr-{time.monotonic_ns()}"
        command = [sys.executable, "-m", "sd35bench", "serve", "--json", "port=0"]
        command += ["backend=fake", f"state_dir={folder / 'state'}", *overrides]
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, env=environment()
            )

    def ready(self) -> "Served":
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        self.said = json.loads(line)
        self.client = httpx2.Client(base_url=self.said["url"], timeout=WAIT_S, trust_env=False)
        return self

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 80

    def create(self, number: int) -> str:
        body = {"model": "nano", "input": {"prompt": f"secret prompt {number}", "seed": number}}
        answer = self.client.post("/v1/prediction", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["predictionID"]

    def ended(self, prediction_id: str) -> dict:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            found = self.client.get(f"/v1/prediction/{prediction_id}").json()
            if found["status"] in ("success", "error", "cancelled"):
                return found
            time.sleep(0.02)
        raise AssertionError(f"{prediction_id} is not over")

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def served(folder: Path, *overrides: str) -> Iterator[Served]:
    server = Served(folder, *overrides)
    try:
        yield server.ready()
    finally:
        server.process.kill()
        server.process.wait()
        if server.process.stdout is not None:
            server.process.stdout.close()


FREE = ("no_auth=true", "requests_per_minute=null", "backend.delay_s=0.15")


def wait_until(state: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not state():
        assert time.monotonic() < until
        time.sleep(0.01)


def begun(server: Served, prediction_id: str) -> bool:
    return server.client.get(f"/v1/prediction/{prediction_id}").json()["status"] != "created"


@FORKED
def test_killed_or_stopped_in_the_middle_everything_is_made_once(tmp_path):
    with served(tmp_path, *FREE) as first:
        ids = [first.create(number) for number in range(4)]
        wait_until(lambda: begun(first, ids[1]))
        one = first.ended(ids[0])
        first.process.kill()
    with served(tmp_path, *FREE) as second:
        found = [second.ended(made) for made in ids]
        assert [row["status"] for row in found] == ["success"] * 4
        assert [row["input"]["seed"] for row in found] == [0, 1, 2, 3]
        assert found[0]["completed_at"] == one["completed_at"]  # it was not made twice
        for row in found:
            assert second.client.get(row["output"]).content.startswith(b"RIFF")
        ended = [row["completed_at"] for row in found]
        assert ended == sorted(ended)
        more = [second.create(number) for number in range(4, 14)]
        wait_until(lambda: begun(second, more[0]))
        assert second.end(signal.SIGTERM) == 0
        log = [json.loads(line) for line in second.errors.read_text().splitlines()]
    logged = [e["prediction"] for e in log if e["event"] == "prediction made"]
    made = [each for each in logged if each in more]
    assert made == more[: len(made)]
    assert 1 <= len(made) < len(more)  # the first alone, where the signal did not have to wait
    requests = [entry for entry in log if entry["event"] == "request"]
    assert {"time", "request_id", "method", "path", "status", "ms"} <= set(requests[0])
    assert "secret prompt" not in json.dumps(log)
    with served(tmp_path, *FREE) as third:
        assert [third.ended(made)["status"] for made in more] == ["success"] * 10
        assert third.end(signal.SIGINT) == 0


def test_sigterm_while_loading_ends_it_quietly(tmp_path):
    server = Served(tmp_path, "no_auth=true", "backend.load_delay_s=60")
    wait_until(lambda: "loading" in server.errors.read_text())
    assert server.end(signal.SIGTERM) == 0
    assert "Traceback" not in server.errors.read_text()
    server.process.stdout.close()


def has_taken(server: Served, wire: socket.socket) -> bool:
    """Whether the server holds its end of a connection."""
    ours = psutil.Process(server.process.pid).net_connections("tcp")
    return any(each.raddr == wire.getsockname() for each in ours)


def is_deaf(address: tuple[str, int]) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(address).close()
    except ConnectionError:
        return True
    return False


@FORKED
def test_a_second_server_is_refused_and_a_second_ctrl_c_ends_at_once_in_silence(tmp_path):
    with (
        served(tmp_path, "no_auth=true") as server,
        socket.create_connection(server.address) as wire,
    ):
        other = Served(tmp_path, "no_auth=true")
        assert other.process.communicate(timeout=WAIT_S)[0].count(b"another server uses it") == 1
        assert other.process.returncode == 2
        body = json.dumps({"model": "nano", "input": {"prompt": "x"}}).encode()
        head = "POST /v1/prediction/run HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
        wire.sendall(head.encode() + body)  # one byte is missing: the request is never whole
        wait_until(lambda: has_taken(server, wire))
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: is_deaf(server.address))
        assert server.end(signal.SIGINT) == 0
        said = server.errors.read_text()
    assert "CancelledError" not in said
    assert "Traceback" not in said


@FORKED
def test_sighup_reads_the_keys_again_and_they_are_in_no_log_and_no_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--json", "make_key=a", "key_file=k.txt"]) == 0
    key = json.loads(capsys.readouterr().out)["key"]
    with served(tmp_path, "key_file=k.txt") as server:
        assert server.client.get("/v1/model", headers={"X-API-Key": key}).status_code == 200
        wrong = {"Authorization": "Bearer canary-key"}
        assert server.client.get("/v1/model", headers=wrong).status_code == 401
        (tmp_path / "k.txt").write_text("# nobody\n")
        server.process.send_signal(signal.SIGHUP)
        answer = server.client.get("/v1/model", headers={"X-API-Key": key})
        assert answer.status_code == 401
        assert server.end(signal.SIGTERM) == 0
        text = server.errors.read_text()
    assert "key file read again" in text
    assert key not in text
    assert "canary-key" not in text
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert key.encode() not in kept
