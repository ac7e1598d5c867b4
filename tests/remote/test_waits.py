"""A hosted run's waits: they end with the run, within one timeout, and say what they wait for."""

import asyncio
import time
from pathlib import Path

import pytest

import sd35bench.remote.limiter as limiter
from sd35bench.errors import Paused
from sd35bench.remote.limiter import limiter_path
from tests.remote.hosted import PRICE_USD, hosted_plan, run

TIMEOUT_S = 0.5

pytestmark = pytest.mark.usefixtures("apart")


def test_a_service_that_never_finishes_ends_the_run_and_not_the_leases(server, study):
    """Slots of predictions that may go on are kept for 600 s, which the run waited for."""
    plan = hosted_plan(server.url, 8)
    changes = {"timeout_s": TIMEOUT_S, "concurrency": 2, "single_stream": 0}
    run(study, plan, server.url, max_cost_usd=2 * PRICE_USD, **changes)
    server.never_ends = True
    began = time.monotonic()
    summary = run(study, plan, server.url, **changes)
    assert time.monotonic() - began < limiter.LEASE_S / 10
    assert "no slot was free" in str(summary.paused)
    assert sum(server.creates.values()) <= 2 + 3


def test_a_service_that_never_finishes_its_first_image_sells_no_second(server, study):
    server.never_ends = True
    summary = run(study, hosted_plan(server.url, 8), server.url, timeout_s=TIMEOUT_S)
    assert "cannot be used" in str(summary.paused)
    assert sum(server.creates.values()) == 1


def limited(tmp_path: Path, turns: list[float]) -> limiter.Limiter:
    """A limiter whose turn never comes: each look says how long to wait."""
    found = limiter.Limiter(tmp_path / "limits", per_minute=1, in_flight=1, window_s=0.1)

    class Never:
        span_s, per_minute, in_flight = 0.1, 1, 1

        def take(self, _: object) -> float:
            turns.append(0.02)
            return 0.02

    found._count = Never()  # type: ignore[assignment]
    return found


def test_a_wait_for_the_rate_ends_within_two_windows_or_the_timeout_and_is_said(
    tmp_path, monkeypatch
):
    """Other processes can take every turn; the wait had no end."""
    monkeypatch.setattr(limiter, "SAY_S", 0.05)
    said: list[str] = []
    bounds = limiter.WaitBounds(limit_s=0.3, say=said.append)
    began = time.monotonic()
    with pytest.raises(Paused, match=r"remote\.requests_per_minute=1"):
        asyncio.run(limited(tmp_path, []).request(bounds))
    assert 0.3 <= time.monotonic() - began < 60
    assert len(said) == 1


def test_mutant_without_a_bound_waits_for_the_rate_for_ever(tmp_path):
    async def request() -> None:
        async with asyncio.timeout(0.5):  # twice the two windows of the bound
            await limited(tmp_path, []).request()

    with pytest.raises(TimeoutError):
        asyncio.run(request())


def test_a_broken_file_of_limits_is_said_and_ends_the_run(server, study, monkeypatch, capsys):
    monkeypatch.setattr(limiter, "SAY_S", 0.0)
    path = limiter_path(server.url, "")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage" * 1000)
    began = time.monotonic()
    # The new file has a row for each request of the rate.
    changes = {"timeout_s": TIMEOUT_S, "requests_per_minute": 1000}
    summary = run(study, hosted_plan(server.url, 2), server.url, **changes)
    assert time.monotonic() - began < limiter.LEASE_S / 10
    assert "no slot was free" in str(summary.paused)
    assert "no slot was free" in capsys.readouterr().err
    assert sum(server.creates.values()) == 0


def test_without_the_bounds_the_leases_would_be_awaited(server, study, monkeypatch):
    """The mutant: a wait that looks at nothing but its slot."""
    monkeypatch.setattr(limiter, "LEASE_S", 1.5)
    monkeypatch.setattr("sd35bench.remote.drive.LEASE_S", 1.5)
    monkeypatch.setattr("sd35bench.remote.drive.WaitBounds", lambda **_: limiter.WaitBounds())
    plan = hosted_plan(server.url, 4)
    changes = {"timeout_s": TIMEOUT_S, "concurrency": 1, "single_stream": 0}
    run(study, plan, server.url, max_cost_usd=PRICE_USD, **changes)
    server.never_ends = True
    summary = run(study, plan, server.url, **changes)
    assert summary.wall_s > 1.5
