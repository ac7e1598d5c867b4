"""What a run really leaves behind is what the analysis of hosted calls expects."""

import asyncio
from datetime import datetime
from pathlib import Path

import pytest

import sd35bench.remote.prediction as prediction
from sd35bench.analysis.summary import show_document
from sd35bench.remote.limiter import Limiter
from sd35bench.study.store import Study, decode_rgb
from tests.remote.fault_server import FaultServer, serving
from tests.remote.hosted import PRICE_USD, hosted_plan, run

LONE, BESIDE, ABREAST = 3, 12, 4


WAIT_S = 0.05


def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> Study:
    """A study by a loopback service that takes 20 ms an image, three alone and the rest abreast."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("EACHLABS_API_KEY", raising=False)
    monkeypatch.setattr(prediction, "decode_image", decode_rgb)
    found = Study.open(tmp_path, "study", create=True)
    with serving() as server:
        plan = hosted_plan(server.url, count)
        run(found, plan, server.url, single_stream=LONE, concurrency=ABREAST)
    return found


def test_a_run_gives_latency_parts_throughput_and_dollars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (row,) = show_document(made(tmp_path, monkeypatch, LONE + BESIDE))["settings"]
    remote = row["remote"]
    assert row["n"] == LONE + BESIDE
    assert row["latency_s"]["n"] == remote["single_stream_n"] == LONE
    assert remote["beside_n"] == BESIDE
    parts = {name: part["mean"] for name, part in remote["parts"].items()}
    told = ("submit", "queue", "predict", "download", "other")
    assert sum(parts[name] for name in told) == pytest.approx(parts["total"])
    assert min(parts[name] for name in told) > 0.0
    assert parts["predict"] == pytest.approx(FaultServer().seconds)  # as the service tells it
    assert 0.0 < remote["inference_share"]["value"] < 1.0
    assert row["usd_per_image"]["value"] == pytest.approx(PRICE_USD)
    assert remote["cost_usd"]["total"] == pytest.approx((LONE + BESIDE) * PRICE_USD)
    assert remote["throughput"]["n"] == BESIDE
    assert remote["throughput"]["in_flight"] == ABREAST


def test_a_record_starts_with_its_create_not_with_the_wait_for_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that start and latency say when an image came, which throughput stands on."""

    async def request(*_: object) -> None:
        await asyncio.sleep(WAIT_S)

    monkeypatch.setattr(Limiter, "request", request)
    found = made(tmp_path, monkeypatch, 1)
    (record,), (session,) = found.records(), found.sessions().values()
    assert record.timings is not None
    begun = datetime.fromisoformat(record.started_at) - datetime.fromisoformat(session.started_at)
    assert begun.total_seconds() >= WAIT_S
