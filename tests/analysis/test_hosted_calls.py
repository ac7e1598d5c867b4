"""Hosted calls: latency of lone calls only, parts that add up, images a minute, dollars."""

from dataclasses import replace
from typing import Any

import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.types import (
    Flops,
    Memory,
    Record,
    Status,
)
from tests.studies.hosted_calls import (
    DOWNLOAD,
    LATE,
    PREDICT,
    QUEUE,
    SUBMIT,
    TOTAL,
    call,
    lone,
    made_of,
    row_of,
)


def test_latency_is_that_of_lone_calls_only(tmp_path):
    beside = [call(i, in_flight=4, total_s=50.0) for i in range(10, 22)]
    again = [call(30, total_s=1e6, resumed=True), call(31, total_s=1e6, resumed=True, in_flight=3)]
    row = row_of(tmp_path, *lone(), *beside, *again)
    assert row["latency_s"]["n"] == row["remote"]["single_stream_n"] == 4
    assert row["latency_s"]["mean"] == pytest.approx(TOTAL)
    assert row["latency_s"]["p99"] is None  # of 4 calls
    assert row["n"] == 18
    assert (row["remote"]["beside_n"], row["remote"]["resumed_n"]) == (12, 2)
    assert "12 calls ran beside others: no latency from them" in row["warnings"]
    again_text = "2 calls found again after a crash or a lost answer: no latency from them"
    assert again_text in row["warnings"]


def test_without_a_lone_call_there_is_no_latency_and_it_says_so(tmp_path):
    row = row_of(tmp_path, *(call(i, in_flight=2) for i in range(3)))
    assert row["latency_s"]["p50"] is None
    assert row["latency_ratio"] is None
    assert row["remote"]["parts"]["total"] == {
        "p50": None,
        "ci95": None,
        "mean": None,
        "mean_ci95": None,
        "n": 0,
    }
    assert row["remote"]["inference_share"] is None
    assert "no latency: no call of this setting ran alone" in row["warnings"]


def test_parts_are_told_apart_and_add_up(tmp_path):
    parts = row_of(tmp_path, *lone())["remote"]["parts"]
    planted = {
        "submit": SUBMIT,
        "queue": QUEUE,
        "predict": PREDICT,
        "download": DOWNLOAD,
        "network": SUBMIT + DOWNLOAD,
        "total": TOTAL,
        "poll_bound": LATE,
    }
    for name, seconds in planted.items():
        assert parts[name]["mean"] == pytest.approx(seconds), name
        assert parts[name]["p50"] == pytest.approx(seconds), name
        assert parts[name]["n"] == 4
    assert parts["other"]["mean"] == pytest.approx(0.0, abs=1e-9)
    told = sum(parts[name]["mean"] for name in ("submit", "queue", "predict", "download", "other"))
    assert told == pytest.approx(parts["total"]["mean"])


def test_a_service_that_tells_nothing_leaves_unknowns_and_no_zero(tmp_path):
    untold = {"queue_s": None, "predict_s": None, "poll_bound_s": None, "cost_usd": None}
    row = row_of(tmp_path, *(call(i, **untold, submit_s=None) for i in range(4)))
    parts = row["remote"]["parts"]
    for name in ("queue", "predict", "poll_bound", "submit", "network"):
        assert parts[name]["mean"] is None, name
    assert parts["other"]["mean"] == pytest.approx(TOTAL - DOWNLOAD)
    assert row["remote"]["inference_share"] is None
    assert row["usd_per_image"] is None
    cost = {"total": None, "n": 0, "reported": 0, "unknown": 4, "at_stake": None}
    assert row["remote"]["cost_usd"] == cost


def test_few_calls_have_an_interval_of_the_median_and_none_of_the_mean(tmp_path):
    calls = [call(i % 4, at_s=10.0 * i, seed=i // 4, predict_s=1.0 + i % 4) for i in range(8)]
    predict = row_of(tmp_path, *calls)["remote"]["parts"]["predict"]
    assert predict["mean"] == pytest.approx(2.5)
    assert (predict["n"], predict["p50"]) == (8, 2.5)
    assert predict["mean_ci95"] is None
    low, high = predict["ci95"]
    assert low < 1.6  # the mutant, a bootstrap of prompts, stays between 1 and 4 at any number
    assert high > 3.3


def test_inference_share_is_of_the_latency(tmp_path):
    share = row_of(tmp_path, *lone())["remote"]["inference_share"]
    assert share["value"] == pytest.approx(PREDICT / TOTAL)
    assert share["n"] == 4


def _phase(at_s: float, count: int, first: int = 100, **fields: Any) -> list[Record]:
    """Calls 2 s apart, four at a time, 8 s each: an image every 2 s from 8 s on."""
    return [
        call(first + i, at_s=at_s + 2.0 * i, total_s=8.0, in_flight=4, **fields)
        for i in range(count)
    ]


def test_throughput_is_images_over_the_wall_time_of_the_phase(tmp_path):
    rate = row_of(tmp_path, *lone(), *_phase(100.0, 20))["remote"]["throughput"]
    assert rate["wall_s"] == pytest.approx(8.0 + 19 * 2.0)
    assert rate["images_per_min"] == pytest.approx(60 * 20 / 46.0)
    assert (rate["n"], rate["in_flight"], rate["settings"]) == (20, 4, 1)
    assert rate["ci95"][0] <= rate["images_per_min"] <= rate["ci95"][1]


def test_throughput_leaves_out_what_ran_alone_between_two_phases(tmp_path):
    between = [call(1, at_s=1000.0)]
    calls = [*_phase(100.0, 4), *between, *_phase(2000.0, 4, first=200)]
    rate = row_of(tmp_path, *calls)["remote"]["throughput"]
    assert rate["wall_s"] == pytest.approx(2 * 14.0)
    assert rate["n"] == 8


def test_throughput_counts_images_not_failures_or_what_was_found_again(tmp_path):
    failed = [replace(r, status=Status.ERROR, timings=None) for r in _phase(99.0, 1, first=300)]
    absurd = [call(400, at_s=101.0, total_s=1e6, in_flight=4, resumed=True)]
    rate = row_of(tmp_path, *_phase(100.0, 4), *failed, *absurd)["remote"]["throughput"]
    assert rate["n"] == 4
    assert rate["wall_s"] == pytest.approx(15.0)  # the failed one was sent a second before
    assert rate["ci95"] is None  # one block of gaps shows no spread


def test_settings_of_one_phase_share_its_throughput(tmp_path):
    mixed = [
        replace(a, trial=b.trial)
        for a, b in zip(
            _phase(100.0, 8), (call(i, steps=8 + 20 * (i % 2)) for i in range(8)), strict=True
        )
    ]
    rows = show_document(made_of(tmp_path, *mixed))["settings"]
    rates = [row["remote"]["throughput"] for row in rows]
    assert len(rates) == 2
    assert rates[0] == rates[1]
    assert (rates[0]["n"], rates[0]["settings"]) == (8, 2)


def test_without_calls_beside_each_other_there_is_no_throughput(tmp_path):
    row = row_of(tmp_path, *lone())
    assert row["remote"]["throughput"] is None
    assert row["throughput"] == []


def test_dollars_are_the_services_or_else_the_listed_price(tmp_path):
    listed = [call(i, cost_usd=0.04, cost_reported=False) for i in range(10, 12)]
    refused = replace(call(20, cost_usd=0.035), status=Status.ERROR, timings=None, image=None)
    unknown = call(21, cost_usd=None)
    row = row_of(tmp_path, *lone(2), *listed, refused, unknown)
    usd = row["usd_per_image"]
    assert usd["value"] == pytest.approx((2 * 0.035 + 2 * 0.04) / 4)
    assert (usd["n"], usd["reported"]) == (4, 2)
    cost = row["remote"]["cost_usd"]
    assert cost["total"] == pytest.approx(2 * 0.035 + 2 * 0.04 + 0.035)  # the failed one was billed
    assert (cost["n"], cost["reported"], cost["unknown"]) == (5, 3, 1)


def test_a_price_of_zero_is_known(tmp_path):
    row = row_of(tmp_path, *(call(i, cost_usd=0.0) for i in range(3)))
    assert row["usd_per_image"]["value"] == 0.0
    assert row["remote"]["cost_usd"]["total"] == 0.0


def test_polls_and_refused_creates(tmp_path):
    calls = [call(0, polls=2), call(1, polls=5, attempts=3), call(2, polls=90, resumed=True)]
    remote = row_of(tmp_path, *calls)["remote"]
    assert remote["polls_per_image"] == {"value": 3.5, "n": 2}
    assert remote["refused_creates"] == 2
    assert remote["unsent"] == ["negative_prompt", "sampler"]
    assert remote["provider"] == "eachlabs"


def _lost(number: int) -> Record:
    """As a run leaves it: the price is counted as spent, and perhaps was not."""
    unknown = {"submit_s": None, "queue_s": None, "predict_s": None, "download_s": None}
    lost = call(number, **unknown, prediction_id=None, cost_reported=False)
    return replace(lost, status=Status.AMBIGUOUS, timings=None, image=None)


def test_ambiguous_trials_are_counted_and_worded(tmp_path):
    lost = [_lost(10), _lost(11)]
    broken = replace(call(12), status=Status.ERROR, timings=None, image=None)
    document = show_document(made_of(tmp_path, *lone(), *lost, broken))
    row = document["settings"][0]
    assert (row["failed"], row["ambiguous"], row["remote"]["ambiguous"]) == (3, 2, 2)
    text = "2 ambiguous: may have been billed; run again to look for them"
    assert row["remote"]["cost_usd"]["at_stake"] == pytest.approx(0.07)
    assert row["remote"]["cost_usd"]["total"] == pytest.approx(5 * 0.035)
    assert text in row["warnings"]
    assert "1 trial failed" in row["warnings"]
    assert text in document["warnings"]
    assert any(w.startswith("1 trial failed,") for w in document["warnings"])


def test_a_setting_of_ambiguous_trials_only_has_a_row(tmp_path):
    row = row_of(tmp_path, _lost(0))
    assert (row["n"], row["failed"], row["remote"]["ambiguous"]) == (0, 1, 1)
    assert row["remote"]["cost_usd"] | {"at_stake": None} == {
        "total": None,
        "n": 0,
        "reported": 0,
        "unknown": 0,
        "at_stake": None,
    }
    assert row["usd_per_image"] is None


def test_a_failure_before_any_call_leaves_nothing_known(tmp_path):
    skipped = replace(call(0), status=Status.SKIPPED, timings=None, image=None, remote=None)
    remote = row_of(tmp_path, skipped)["remote"]
    assert (remote["provider"], remote["in_flight"], remote["refused_creates"]) == (
        "eachlabs",
        None,
        None,
    )


def test_calls_found_again_have_images_and_prices_without_times(tmp_path):
    again = [replace(call(i, resumed=True, submit_s=None), timings=None) for i in range(3)]
    row = row_of(tmp_path, *again)
    assert (row["n"], row["latency_s"]["n"], row["remote"]["resumed_n"]) == (3, 0, 3)
    assert row["usd_per_image"]["n"] == 3
    text = "3 calls found again after a crash or a lost answer: no latency from them"
    assert text in row["warnings"]


def test_nothing_of_this_machine_is_said_of_a_hosted_row(tmp_path):
    memory = Memory(peak_rss_bytes=5, peak_vram_bytes=6)
    flops = Flops(text=1e15, denoise=1e15, decode=1e15)
    calls = [replace(r, memory=memory, flops=flops) for r in lone()]
    study = made_of(tmp_path, *calls)
    study.machines = [
        {
            "key": "k",
            "device": "cpu",
            "threads": 7,
            "environment": {},
            "measured_at": "",
            "rates": {"fp32": {"best": 1e-9, "median": 1e-9}},
        }
    ]
    row = show_document(study)["settings"][0]
    unknown = ("flops", "achieved_tflops", "limit_fraction", "gpu", "load_s", "first_call_s")
    for name in (
        *unknown,
        "peak_rss_bytes",
        "peak_vram_bytes",
        "cold_compile_s",
        "threads",
        "weights_digest",
    ):
        assert row[name] is None, name
    assert set(row["stage_s"].values()) == {None}
    assert not any(w.startswith("impossible") for w in row["warnings"])
