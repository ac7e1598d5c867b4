"""A hosted run's waits: they end with the run, within one timeout, and say what they wait for."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sd35bench.remote.limiter as limiter
import sd35bench.remote.prediction as prediction
from sd35bench.remote.limiter import limiter_path
from sd35bench.store import Study, decode_rgb
from tests.remote.fault_server import FaultServer, serving
from tests.remote.hosted import hosted_plan, run

TIMEOUT_S = 0.5


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("EACHLABS_API_KEY", raising=False)
    monkeypatch.setattr(prediction, "decode_image", decode_rgb)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving() as found:
        yield found


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.open(tmp_path, "study", create=True)


def test_a_service_that_never_finishes_ends_the_run_and_not_the_leases(server, study):
    """Slots of predictions that may go on are kept for 600 s, which the run waited for."""
    server.never_ends = True
    began = time.monotonic()
    plan = hosted_plan(server.url, 8)
    summary = run(study, plan, server.url, timeout_s=TIMEOUT_S, concurrency=2, single_stream=0)
    assert time.monotonic() - began < limiter.LEASE_S / 10
    assert "no slot was free" in str(summary.paused)
    assert sum(server.creates.values()) <= 3


def test_a_broken_file_of_limits_is_said_and_ends_the_run(server, study, monkeypatch, capsys):
    monkeypatch.setattr(limiter, "SAY_S", 0.0)
    path = limiter_path(server.url, "")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage" * 1000)
    began = time.monotonic()
    summary = run(study, hosted_plan(server.url, 2), server.url, timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < limiter.LEASE_S / 10
    assert "no slot was free" in str(summary.paused)
    assert "no slot was free" in capsys.readouterr().err
    assert sum(server.creates.values()) == 0


def test_without_the_bounds_the_leases_would_be_awaited(server, study, monkeypatch):
    """The mutant: a wait that looks at nothing but its slot."""
    monkeypatch.setattr(limiter, "LEASE_S", 3.0)
    monkeypatch.setattr("sd35bench.remote.drive.LEASE_S", 3.0)
    monkeypatch.setattr("sd35bench.remote.drive.WaitBounds", lambda **_: limiter.WaitBounds())
    server.never_ends = True
    plan = hosted_plan(server.url, 3)
    summary = run(study, plan, server.url, timeout_s=TIMEOUT_S, concurrency=1, single_stream=0)
    assert summary.wall_s > 3.0
