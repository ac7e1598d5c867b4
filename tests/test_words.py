"""Figures are written with the digits that their interval supports."""

import pytest

from sd35bench.words import (
    Estimate,
    column_decimals,
    format_bytes,
    format_estimate,
    format_latency,
    format_plain,
    format_seconds,
)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        pytest.param(Estimate(value=0.8333, low=0.79, high=0.87), "0.83 [0.79, 0.87]", id="two"),
        pytest.param(Estimate(value=0.8333, low=0.82, high=0.846), "0.833 [0.820, 0.846]", id="1x"),
        pytest.param(Estimate(value=134.4, low=110.0, high=150.0), "134 [110, 150]", id="hundreds"),
        pytest.param(Estimate(value=12.34), "12.3", id="no interval"),
        pytest.param(Estimate(value=0.0), "0.00", id="zero is a value"),
        pytest.param(Estimate(value=None), "–", id="unknown"),
        pytest.param(Estimate(value=None, needs=2048), "needs n ≥ 2,048", id="refused"),
        pytest.param(Estimate(value=1.0, low=1.0, high=1.0), "1.00 [1.00, 1.00]", id="no width"),
    ],
)
def test_format_estimate_writes_supported_digits(estimate: Estimate, text: str):
    assert format_estimate(estimate) == text


def test_format_latency_stops_at_milliseconds():
    assert format_latency(Estimate(value=0.04941, low=0.0464, high=0.0496)) == (
        "0.049 [0.046, 0.050] s"
    )
    assert format_latency(Estimate(value=0.00412, low=0.0041, high=0.0042)).startswith("0.0041")
    assert format_latency(None) == "–"


def test_column_decimals_is_the_median_need():
    column = [Estimate(value=0.5, low=0.4, high=0.6), Estimate(value=50.0, low=20.0, high=80.0)]
    assert column_decimals([*column, column[0], None, Estimate(value=None)]) == 2
    assert column_decimals([]) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.11234, "0.112 s"), (8.0, "8.00 s"), (134.2, "134 s"), (0, "0 s"), (None, "–")],
)
def test_format_seconds_keeps_three_digits(seconds: float | None, text: str):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (900 * 2**20, "900 MiB"), (3 * 2**30, "3.00 GiB"), (2048, "2 KiB")],
)
def test_format_bytes_picks_the_unit(count: int | None, text: str):
    assert format_bytes(count) == text


def test_format_plain_types_4_not_4_0():
    assert [format_plain(v) for v in (4.0, 0.85, None, "euler")] == ["4", "0.85", "–", "euler"]
