"""The tables beside the settings: planted figures come out, in every rendering, at any width."""

import copy
import io

import pytest
from rich.console import Console

from sd35bench.analysis.summary import show_document
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.charts import throughput_figures
from sd35bench.report.page import render_report
from sd35bench.report.render import TERMINAL, Table, markdown_document, print_document
from sd35bench.report.rows import read_rows
from sd35bench.report.show import settings_parts
from tests.studies.backends import DRIFT, GAIN, NOISE, SPEED, make_backends_study, with_impossible
from tests.studies.drawn import Synthetic, document_of

TITLES = (
    "Throughput, images per second",
    "Load, compilation, first image",
    "Drift from eager",
    "Noise floor of eager",
    "GPU while images were made",
    "What this machine can do at most",
)


def blocks_of(document: dict) -> dict[str, Table]:
    return {b.title: b for b in comparison_blocks(document, read_rows(document))}


def table(block: Table) -> list[dict[str, str]]:
    """The table's rows by column title."""
    heads = [column.title for column in block.columns]
    rows = block.rows(TERMINAL)
    return [dict(zip(heads, (cell.line for cell in row), strict=True)) for row in rows]


def printed(document: dict, width: int) -> str:
    out = io.StringIO()
    print_document(settings_parts(document), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def value(text: str) -> float:
    return float(text.split()[0].rstrip("×"))


def test_every_block_is_there_and_every_row_fills_its_columns(backends: Synthetic):
    found = blocks_of(backends.show)
    assert tuple(found) == TITLES
    for block in found.values():
        assert len({len(column.cells) for column in block.columns}) == 1


def test_a_study_of_one_backend_at_one_batch_size_has_no_blocks(demo: Synthetic):
    assert blocks_of(demo.show) == {}


def test_throughput_shows_each_batch_size_and_the_planted_gain(backends: Synthetic):
    rows = table(blocks_of(backends.show)[TITLES[0]])
    assert len(rows) == 2 * len(SPEED)  # eager with one thread ran at batch 1 only
    for row in rows:
        assert value(row["batch 4"]) / value(row["batch 1"]) == pytest.approx(GAIN[4], rel=0.1)
        assert value(row["gain"]) == pytest.approx(GAIN[4], rel=0.1)
        assert [" [" in row[f"batch {n}"] for n in GAIN] == [True, True, False]  # of two batches
        assert row["batches"] == "12/6/2"


def test_starts_show_cold_and_warm_compilation_apart(backends: Synthetic):
    rows = {(r["backend"], r["threads"]): r for r in table(blocks_of(backends.show)[TITLES[1]])}
    compiled, eager = rows["compile-bf16", "2"], rows["eager", "2"]
    assert (compiled["compile, cold"], compiled["compile, warm"]) == ("31.0 s", "3.10 s")
    assert (eager["compile, cold"], eager["compile, warm"]) == ("–", "–")
    assert (compiled["first image"], compiled["first, warm"]) == ("31.4 s", "3.50 s")
    assert (eager["first image"], eager["first, warm"]) == ("0.400 s", "–")
    assert compiled["starts"] == "2"
    assert value(compiled["between starts"]) == pytest.approx(1.05, abs=0.03)


def test_drift_shows_the_planted_distance_and_its_verdict(backends: Synthetic):
    rows = table(blocks_of(backends.show)[TITLES[2]])
    assert {r["backend"] for r in rows} == set(DRIFT)
    for row in rows:
        assert value(row["mean abs Δ"]) == pytest.approx(DRIFT[row["backend"]], rel=0.1)
        assert row["> noise"] == "yes"
    floor = table(blocks_of(backends.show)[TITLES[3]])
    assert {r["what"] for r in floor} == {
        "1 thread instead of 2",
        "batch size 2 instead of 1",
        "batch size 4 instead of 1",
    }
    assert all(value(r["mean abs Δ"]) == pytest.approx(NOISE, rel=0.15) for r in floor)


def test_identical_images_are_called_that_and_have_no_psnr(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    row = document["drift"]["rows"][0]
    row |= {"identical": row["n_pairs"], "psnr_db": {"value": None, "ci95": None, "n": 12}}
    row["mean_abs"] = {"value": 0.0, "ci95": [0.0, 0.0], "n": 12}
    assert table(blocks_of(document)[TITLES[2]])[0]["PSNR dB"] == "identical"


def test_drift_too_small_for_decimals_is_not_shown_as_zero(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    document["drift"]["rows"][0]["mean_abs"] = {"value": 3.2e-5, "ci95": [1e-5, 5e-5], "n": 12}
    assert table(blocks_of(document)[TITLES[2]])[0]["mean abs Δ"] == "3.2e-05"


def test_lpips_has_a_column_where_it_was_measured_and_else_none(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    rows = [*document["drift"]["rows"], *document["drift"]["noise_floor"]]
    for i, row in enumerate(rows):
        row["lpips"] = {"value": 0.1 + i / 100, "ci95": [0.05, 0.95], "n": 12}
    found = blocks_of(document)
    assert table(found[TITLES[2]])[0]["LPIPS"] == "0.10 [0.05, 0.95]"
    last = table(found[TITLES[3]])[-1]["LPIPS"]
    assert value(last) == pytest.approx(0.1 + (len(rows) - 1) / 100)
    page = render_report(document_of(backends.study, document, None))
    for text in (printed(document, 300), markdown_document(settings_parts(document)), page):
        assert text.count("LPIPS") == 2
    page = render_report(document_of(backends.study, backends.show, None))
    for text in (
        printed(backends.show, 300),
        markdown_document(settings_parts(backends.show)),
        page,
    ):
        assert "LPIPS" not in text


def test_drift_warnings_are_said_with_the_table(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    document["drift"]["warnings"] = ["no noise floor: run it"]
    assert "No noise floor: run it." in blocks_of(document)[TITLES[2]].note


def test_drift_is_no_quality_metric_of_the_settings(backends: Synthetic):
    assert {name for row in read_rows(backends.show) for name in row.metrics} == {"prompt_accuracy"}


def test_gpu_shows_clocks_power_and_why_they_fell(backends: Synthetic):
    rows = table(blocks_of(backends.show)[TITLES[4]])
    assert {r["SM clock MHz"] for r in rows} == {"1800"}
    assert {r["power W"] for r in rows} == {"612"}
    throttled = [r for r in rows if r["throttled"] != "0 %"]
    assert throttled
    assert all((r["lowest"], r["why"]) == ("1500", "power-cap") for r in throttled)


def test_machine_shows_best_and_median_rates(backends: Synthetic):
    (row,) = table(blocks_of(backends.show)[TITLES[5]])
    assert row["device"] == "Test CPU"
    assert row["fp32 TFLOP/s"] == "0.180 (0.171)"
    assert row["int8 TOP/s"] == "1.75 (1.66)"


def test_a_machine_that_could_not_be_measured_says_why(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    document["machine"] = [
        {"device": "cuda", "name": None, "threads": 2, "rates": {}, "error": "no driver"}
    ]
    block = blocks_of(document)[TITLES[5]]
    assert "Not measured on cuda: no driver." in block.note
    assert table(block)[0]["copy GB/s"] == "–"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_show_fits_the_terminal_and_says_what_it_leaves_out(backends: Synthetic, width: int):
    text = printed(backends.show, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for title in TITLES:
        assert title in text
    assert ("too narrow for: intervals" in text) == (width <= 120)
    assert "…" not in text or width < 80


def test_show_holds_backends_against_eager_in_the_main_table(backends: Synthetic):
    text = printed(backends.show, 200)
    head = next(line for line in text.splitlines() if "latency s" in line)
    assert head.split()[0] == "backend"
    for title in ("× eager", "PSNR dB", "TFLOP/s"):
        assert title in head
    line = next(row for row in text.splitlines() if row.startswith("int8-w8a8"))
    assert "3.9 [3.5, 4.4]" in line  # the planted factor is 4, on the same prompts
    # The study is on a GPU whose rates were not measured: no share of a limit is made up.
    assert "%)" not in line


def test_show_names_the_share_of_the_measured_limit(tmp_path):
    document = show_document(make_backends_study(tmp_path))
    row = next(r for r in document["settings"] if (r["backend"], r["threads"]) == ("eager", 2))
    share = f"({100 * row['achieved_tflops'] / 0.18:.0f} %)"
    assert share in printed(document, 200)
    assert share in markdown_document(settings_parts(document))


def test_an_impossible_latency_is_called_that_everywhere(tmp_path):
    study = with_impossible(make_backends_study(tmp_path))
    document = show_document(study)
    assert "warning impossible: " in printed(document, 120)
    assert "Warning: impossible: " in markdown_document(settings_parts(document))
    page = render_report(document_of(study, document, None))
    assert "<li>impossible: " in page


def test_markdown_has_every_block_with_its_intervals(backends: Synthetic):
    text = markdown_document(settings_parts(backends.show))
    for title in TITLES:
        assert f"## {title}" in text
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            assert line.count("|") == lines[i - 1].count("|")
    assert "× eager" in text
    assert "1.75 (1.66)" in text


def test_html_has_every_block_and_its_columns(backends: Synthetic):
    page = render_report(document_of(backends.study, backends.show, None))
    assert '<section id="backends"' in page
    assert '<a href="#backends">Backends</a>' in page
    for title in TITLES:
        assert f"<h3>{title}</h3>" in page
    for head in ("× eager", "PSNR dB", "TFLOP/s"):
        assert f">{head}</button>" in page


def test_throughput_is_drawn_once_with_a_line_per_backend(backends: Synthetic, demo: Synthetic):
    (figure,) = throughput_figures(read_rows(backends.show))
    assert [name for _, _, name in figure.legend] == sorted(SPEED)
    assert str(figure.svg).count("<polyline") == len(SPEED)
    assert "8 steps" in figure.note
    assert throughput_figures(read_rows(demo.show)) == []


def test_html_of_one_backend_has_no_such_section(demo_page: str):
    assert 'id="backends"' not in demo_page


def test_hostile_backend_names_stay_text(backends: Synthetic):
    document = copy.deepcopy(backends.show)
    for row in (*document["settings"], *document["drift"]["rows"]):
        if row["backend"] == "int8-w8a8":
            row["backend"] = "<img src=x>[/bold]|"
    page = render_report(document_of(backends.study, document, None))
    assert "<img src=x>" not in page
    assert "<img src=x>[/bold]|" in printed(document, 200)
    assert "\\<img src=x>[/bold]\\|" in markdown_document(settings_parts(document))
