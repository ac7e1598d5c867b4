"""The `show` table: every figure of the document, at any width, with nobody's markup."""

import copy
import io

import pytest
from rich.console import Console

from sd35bench.report.render import print_document
from sd35bench.report.show import settings_parts
from tests.studies.drawn import Synthetic


def printed(document: dict, width: int = 160) -> str:
    out = io.StringIO()
    print_document(settings_parts(document), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_table_has_a_row_per_setting_with_intervals(demo: Synthetic):
    text = printed(demo.show)
    rows = [line for line in text.splitlines() if "needs n ≥ 256" in line]
    assert len(rows) == len(demo.show["settings"]) == 18
    assert [line.count("[") for line in rows] == [2] * 9 + [3] * 9


def test_table_prints_the_documents_figures(demo: Synthetic):
    document = copy.deepcopy(demo.show)
    row = document["settings"][0]
    row["latency_s"] |= {"p50": 1.2345, "ci95": [1.2, 1.3]}
    row["latency_ratio"] = 2.469
    row["metrics"]["prompt_accuracy"] |= {"value": 0.5, "ci95": [0.4, 0.6]}
    text = printed(document)
    assert "1.234 [1.200, 1.300]" in text
    assert "2.47" in text
    assert "0.50 [0.40, 0.60]" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_table_fits_the_terminal_and_keeps_what_matters(demo: Synthetic, width: int):
    lines = printed(demo.show, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    heads = " ".join(lines)
    for title in ("steps", "cfg", "strength", "prompt", "latency s"):
        assert title in heads


def test_table_names_what_it_left_out(demo: Synthetic):
    assert "too narrow for" in printed(demo.show, 80)
    assert "too narrow for" not in printed(demo.show, 160)


def test_table_shows_failures_and_warnings_without_reading_markup(demo: Synthetic):
    document = copy.deepcopy(demo.show)
    document["warnings"] = ["2 trials failed [red]"]
    document["settings"][0]["warnings"] = ["no latency [/bold]"]
    document["settings"][0]["failed"] = 2
    text = printed(document)
    assert "failed" in text
    assert "warning 2 trials failed [red]" in text
    assert "warning no latency [/bold] (4 steps · cfg 1)" in text


def test_table_shows_unknown_as_a_dash_not_as_zero(demo: Synthetic):
    document = {"study": "t", "settings": [copy.deepcopy(demo.show["settings"][0])]}
    row = document["settings"][0]
    row |= {"latency_s": {"p50": None}, "latency_ratio": None, "peak_rss_bytes": None}
    row |= {"metrics": {}}
    line = printed(document).splitlines()[-1]
    assert line.split()[:3] == ["4", "1", "12"]
    assert set(line.split()[3:]) == {"–"}


def test_table_names_backends_where_they_differ(demo: Synthetic):
    document = {"study": "t", "settings": copy.deepcopy(demo.show["settings"][:2])}
    document["settings"][1]["backend"] = "int8"
    text = printed(document)
    assert "backend" in text
    assert "int8" in text


def test_table_of_an_empty_study_says_so():
    assert "no trials yet" in printed({"study": "t", "settings": []})
