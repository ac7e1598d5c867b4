"""Figures are written with the digits that their interval supports, and in one place."""

import re
from pathlib import Path

import pytest

import sd35bench
from sd35bench import words
from sd35bench.words import Estimate


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
    assert words.estimate(estimate) == text


def test_format_latency_stops_at_milliseconds():
    assert words.latency(Estimate(value=0.04941, low=0.0464, high=0.0496)) == (
        "0.049 [0.046, 0.050] s"
    )
    assert words.latency(Estimate(value=0.00412, low=0.0041, high=0.0042)).startswith("0.0041")
    assert words.latency(None) == "–"


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        pytest.param((2.0, 0.3, 4.2), "2.0 [0.3, 4.2] s", id="was 2 [0, 4]"),
        pytest.param((0.42, 0.1, 1.3), "0.42 [0.10, 1.30] s", id="was 0 [0, 1]"),
        pytest.param((0.036, 0.001, 1.3), "0.036 [0.001, 1.300] s", id="two digits"),
        pytest.param((0.502, 0.5018, 0.5023), "0.5020 [0.5018, 0.5023] s", id="was a point"),
        pytest.param((15.7, 2.0, 60.0), "16 [2, 60] s", id="tens"),
    ],
)
def test_a_latency_has_two_digits_and_ends_that_differ(figure, text):
    value, low, high = figure
    assert words.latency(Estimate(value=value, low=low, high=high)) == text


def test_column_decimals_is_the_median_need():
    column = [Estimate(value=0.5, low=0.4, high=0.6), Estimate(value=50.0, low=20.0, high=80.0)]
    assert words.column_decimals([*column, column[0], None, Estimate(value=None)]) == 2
    assert words.column_decimals([]) == 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.11234, "0.112 s"), (8.0, "8.00 s"), (134.2, "134 s"), (0, "0 s"), (None, "–")],
)
def test_format_seconds_keeps_three_digits(seconds: float | None, text: str):
    assert words.seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (900 * 2**20, "900 MiB"), (3 * 2**30, "3.00 GiB"), (2048, "2 KiB")],
)
def test_format_bytes_picks_the_unit(count: int | None, text: str):
    assert words.size(count) == text


def test_format_plain_types_4_not_4_0():
    assert [words.plain(v) for v in (4.0, 0.85, None, "euler")] == ["4", "0.85", "–", "euler"]


@pytest.mark.parametrize(
    ("raw", "decimals", "sign", "text"),
    [
        pytest.param({"value": 0.0, "ci95": [0.0, 0.21]}, 2, "", "0.00 [0.00, 0.21]", id="tune"),
        pytest.param({"value": 0.77, "ci95": [0.6, 0.88]}, 2, "", "0.77 [0.60, 0.88]", id="plain"),
        pytest.param(
            {"value": 0.1, "ci95": [-0.1, 0.3]}, 2, "+", "+0.10 [-0.10, +0.30]", id="sign"
        ),
        pytest.param({"value": 0.5, "ci95": None}, 2, "", "0.50", id="no interval"),
    ],
)
def test_an_entry_of_a_document_has_one_form(raw, decimals, sign, text):
    assert words.estimate(words.read_estimate(raw), decimals, sign) == text


PACKAGE = Path(sd35bench.__file__).parent
_NO_FIGURES = ("words.py", "report/svg.py", "nano/train/")
"""Beside the home itself: positions in a drawing, and the log of a training."""
_BY_HAND = re.compile(
    r":\+?(?:,|\.(?!15g)(?:\d+|\{\w+\})\w?%?|%)\}"  # 15 digits: as typed, not as a figure
    r"|%\+?\.\d|\bformat\(.*[\"'].*[.,].*[\"']\)"
)


@pytest.mark.parametrize(
    "mutant",
    [
        *('f"{v:.2f}"', 'f"{v:.{d}f}"', 'f"{v:,}"', 'f"{v:+.0%}"', 'f"{v:.3g} s"', 'f"{v:%}"'),
        *('f"{v:.2f} ({low:.2f} to {high:.2f})"', '"{:.2f}".format(v)', '"%.1f" % v'),
        'format(v, ".3g")',
    ],
)
def test_a_figure_written_by_hand_is_seen(mutant):
    assert _BY_HAND.search(mutant)


def test_no_other_module_writes_a_figure_or_an_interval():
    found = {
        name: [line.strip() for line in path.read_text().splitlines() if _BY_HAND.search(line)]
        for path in PACKAGE.rglob("*.py")
        if not (name := path.relative_to(PACKAGE).as_posix()).startswith(_NO_FIGURES)
    }
    assert {name: lines for name, lines in found.items() if lines} == {}
