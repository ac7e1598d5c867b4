"""Hosted services in every rendering: planted seconds and dollars come out, unknowns as dashes."""

import copy
import io
import itertools
import re

import pytest
from rich.console import Console

from sd35bench import words
from sd35bench.report.blocks import comparison_blocks
from sd35bench.report.charts import speed_figures
from sd35bench.report.headline import gives
from sd35bench.report.hosted import hosted_blocks, hosted_figures, hosted_sentences, network_note
from sd35bench.report.page import render_report
from sd35bench.report.render import TERMINAL, Table, markdown_document, print_document
from sd35bench.report.rows import match_records, read_rows
from sd35bench.report.show import settings_parts
from tests.studies.drawn import Synthetic, document_of
from tests.studies.hosted import AMBIGUOUS, LONE, SECONDS, UNTOLD_S, USD

TITLES = ("Hosted calls made alone, seconds", "Hosted calls: throughput and price")
WORDS = {"submit": "submit", "queue": "queue", "predict": "inference", "download": "download"}


def table(block: Table) -> dict[tuple[str, str], dict[str, str]]:
    """(backend, steps) → a row's texts by column title."""
    heads = [column.title for column in block.columns]
    cells = block.rows(TERMINAL)
    rows = [dict(zip(heads, (cell.line for cell in row), strict=True)) for row in cells]
    return {(r["backend"], r["steps"]): r for r in rows}


def blocks_of(document: dict) -> dict[str, dict[tuple[str, str], dict[str, str]]]:
    return {b.title: table(b) for b in hosted_blocks(read_rows(document))}


def printed(document: dict, width: int = 200) -> str:
    out = io.StringIO()
    print_document(settings_parts(document), Console(file=out, width=width, highlight=False))
    return out.getvalue()


def value(text: str) -> float:
    return float(text.split()[0])


def page_of(synthetic: Synthetic) -> str:
    return render_report(document_of(synthetic.study, synthetic.show, None))


def test_a_study_of_this_machine_alone_has_nothing_hosted(demo: Synthetic):
    rows = read_rows(demo.show)
    assert hosted_blocks(rows) == []
    assert hosted_figures(rows) == []
    assert hosted_sentences(demo.show, rows) == []
    assert network_note(rows) == ""
    assert 'id="hosted"' not in render_report(document_of(demo.study, demo.show, None))
    assert "USD" not in printed(demo.show)


def test_seconds_are_the_planted_ones_part_by_part(hosted: Synthetic):
    rows = blocks_of(hosted.show)[TITLES[0]]
    full = rows["eachlabs", "28"]
    planted = SECONDS["eachlabs"]
    for key, title in WORDS.items():
        assert value(full[title]) == pytest.approx(planted[key], rel=0.02), title
        assert " [" not in full[title]  # of 4 calls: a mean has none below 64
    network = planted["submit"] + planted["download"]
    total = network + planted["queue"] + planted["predict"]
    assert value(full["network"]) == pytest.approx(network, rel=0.02)
    assert value(full["total"]) == pytest.approx(total, rel=0.02)
    assert value(full["late by ≤"]) == pytest.approx(planted["late"], rel=0.02)
    assert full["inference share"].startswith(f"{100 * planted['predict'] / total:.0f} %")
    assert full["n"] == str(LONE)


def test_what_a_service_does_not_tell_is_a_dash_and_the_rest_of_the_total(hosted: Synthetic):
    full = blocks_of(hosted.show)[TITLES[0]]["replicate", "28"]
    assert [full[t] for t in ("inference", "queue", "inference share")] == ["–", "–", "–"]
    assert value(full["not told apart"]) == pytest.approx(UNTOLD_S, rel=0.02)


def test_prices_are_reported_or_listed_and_what_is_ambiguous_stands_apart(hosted: Synthetic):
    rows = blocks_of(hosted.show)[TITLES[1]]
    paid = rows["eachlabs", "28"]
    assert (paid["USD/image"], paid["USD/1,000"], paid["USD in all"]) == (
        "$0.0350",
        "$35.00",
        "$0.350",
    )
    assert (paid["reported"], paid["ambiguous"]) == ("10 of 10", "2 ($0.0700)")
    assert rows["replicate", "8"]["reported"] == "0 of 12"
    assert rows["replicate", "8"]["USD in all"] == "$0.480"
    assert rows["eachlabs", "8"]["found again"] == "1"


def test_throughput_has_its_concurrency_and_interval(hosted: Synthetic):
    rows = blocks_of(hosted.show)[TITLES[1]]
    rate = rows["eachlabs", "28"]
    assert (rate["in flight"], rate["images"]) == ("4", "13")  # of both settings, 15 - 2 lost
    assert 20 < value(rate["images/min"]) < 30
    assert " [" in rate["images/min"]


def test_what_cannot_be_sent_is_said_once_for_all_services(hosted: Synthetic):
    (block,) = (b for b in hosted_blocks(read_rows(hosted.show)) if b.title == TITLES[1])
    said = "eachlabs and replicate cannot be sent max_sequence_length, negative_prompt"
    assert block.note.count("cannot be sent") == 1
    assert said in block.note


def test_an_unknown_price_is_a_dash_and_says_of_how_many(hosted: Synthetic):
    document = copy.deepcopy(hosted.show)
    for row in document["settings"]:
        if row["backend"] == "replicate":
            row["usd_per_image"] = None
            row["remote"]["cost_usd"] |= {"total": None, "n": 0, "reported": 0, "unknown": 12}
    cells = blocks_of(document)[TITLES[1]]["replicate", "8"]
    assert [cells[t] for t in ("USD/image", "reported", "USD/1,000")] == ["–", "–", "–"]
    assert cells["USD in all"] == "– + 12 unknown"


def test_only_calls_made_alone_are_drawn_as_latencies(hosted: Synthetic):
    """The one that was found again took a hundred thousand seconds."""
    rows = read_rows(hosted.show)
    matched = match_records(rows, hosted.study.records(), hosted.study.sessions())
    figures, _ = speed_figures(rows, matched, {}, ("backend",))
    assert "100000" not in figures[0].svg
    assert f"n = {LONE}, p50" in figures[0].svg
    stages = next(f for f in figures if f.title == "Where the time goes")
    assert "eager" in stages.svg
    assert "eachlabs" not in stages.svg  # a service's parts have a chart of their own


def test_bars_stack_to_the_total_with_the_polling_bound_at_their_end(hosted: Synthetic):
    (figure,) = hosted_figures(read_rows(hosted.show))
    bars = re.findall(
        r'<rect class="st-(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', figure.svg
    )
    by_bar: dict[str, list[tuple[str, float, float]]] = {}
    for name, x, y, width in bars:
        by_bar.setdefault(y, []).append((name, float(x), float(width)))
    parts = list(by_bar.values())
    assert [name for name, _, _ in parts[0]] == ["submit", "queue", "predict", "download"]
    assert [[name for name, _, _ in p] for p in parts[1::2]] == [["local"]] * 4
    for one in parts:
        for (_, x, width), (_, following, _) in itertools.pairwise(one):
            assert x + width == pytest.approx(following, abs=0.2)
    full = {name: width for name, _, width in parts[2]}  # eachlabs at 28 steps
    planted = SECONDS["eachlabs"]
    scale = full["predict"] / planted["predict"]
    for name in WORDS:
        assert full[name] == pytest.approx(planted[name] * scale, abs=0.3), name
    late = re.findall(r'class="late" d="M([\d.]+),[\d.]+v10M([\d.]+),', figure.svg)
    low, high = map(float, late[1])
    assert high == pytest.approx(parts[2][-1][1] + parts[2][-1][2], abs=0.2)
    assert high - low == pytest.approx(planted["late"] * scale, abs=0.3)
    assert len(late) == 4  # none over a bar of this machine


def test_sentences_say_it_in_plain_words(hosted: Synthetic):
    said = dict(hosted_sentences(hosted.show, read_rows(hosted.show)))
    text = said["eachlabs · 28 steps: "]
    assert "an image takes 7.50 s on average (n = 4): 5.90 s inference (79 %)" in text
    assert "1.12 s queue, 0.480 s network." in text
    assert "Polling saw the end up to 0.450 s late." in text
    assert "This machine takes, on average: eager 0.254 s." in text
    assert "An image costs $0.0350, a thousand $35.00" in text
    assert "eager's in every pixel: the drift is exactly zero (n = 10 pairs)." in text
    other = said["replicate · 28 steps: "]
    assert "0.620 s network, 7.00 s not told apart." in other
    assert "exactly zero" not in other


def test_a_setting_without_a_lone_call_says_that_it_has_no_latency(hosted: Synthetic):
    document = copy.deepcopy(hosted.show)
    for row in document["settings"]:
        if row["remote"] is not None:
            nothing = {"p50": None, "ci95": None, "mean": None, "mean_ci95": None, "n": 0}
            row["remote"]["parts"] = dict.fromkeys(row["remote"]["parts"], nothing)
            row["remote"] |= {"inference_share": None, "single_stream_n": 0}
    rows = read_rows(document)
    assert [b.title for b in hosted_blocks(rows)] == [TITLES[1]]
    assert hosted_figures(rows) == []
    assert all("no call ran alone" in text for _, text in hosted_sentences(document, rows))


def test_exact_drift_is_called_that_with_its_pairs(hosted: Synthetic):
    blocks = {b.title: b for b in comparison_blocks(hosted.show, read_rows(hosted.show))}
    drift = table(blocks["Drift from eager"])["eachlabs", "28"]
    assert (drift["pairs"], drift["PSNR dB"]) == ("10", "identical")
    assert (drift["mean abs Δ"], drift["max abs Δ"]) == ("exactly 0", "exactly 0")
    other = table(blocks["Drift from eager"])["replicate", "28"]
    assert other["mean abs Δ"].startswith("3.00")


def test_main_table_has_dollars_and_dashes_beside_each_other(hosted: Synthetic):
    text = printed(hosted.show)
    head = next(line for line in text.splitlines() if "latency s" in line)
    for title in ("× eager", "PSNR dB", "USD/image", "failed"):
        assert title in head
    assert "environment id" not in head  # the backend's name tells it
    assert "threads" not in head
    lost = next(ln for ln in text.splitlines() if "ambiguous)" in ln)
    assert lost.startswith("eachlabs")
    assert f"{AMBIGUOUS} ({AMBIGUOUS} ambiguous)" in lost
    assert "identical" in lost
    at = head.index("USD/image")
    eager = next(ln for ln in text.splitlines() if ln.startswith("eager"))
    assert eager[at : at + len("USD/image")].strip() == "–"
    assert "its time includes queue and network" in text
    assert "2 ambiguous: may have been billed; run again to look for them" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_show_fits_the_terminal(hosted: Synthetic, width: int):
    text = printed(hosted.show, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    for title in TITLES:
        assert title in text


def test_markdown_has_both_tables_and_the_service(hosted: Synthetic):
    text = markdown_document(settings_parts(hosted.show))
    for title in TITLES:
        assert f"## {title}" in text
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("| ---"):
            assert line.count("|") == lines[i - 1].count("|")
    assert f"${USD['eachlabs']:.4f}" in text
    assert "service api.eachlabs.example" in text


def test_headline_names_the_price_where_there_is_one(hosted: Synthetic):
    by_backend = {r.setting["backend"]: r for r in read_rows(hosted.show)}
    assert ("price", "$0.0400 an image", "n = 12") in gives(by_backend["replicate"])
    assert "price" not in {name for name, _, _ in gives(by_backend["eager"])}


def test_threads_of_a_service_do_not_apply(hosted: Synthetic):
    document = copy.deepcopy(hosted.show)
    one = copy.deepcopy(next(r for r in document["settings"] if r["backend"] == "eager"))
    document["settings"].append(one | {"threads": 1, "id": "one", "environment_id": "env-1"})
    rows = {r.id: r for r in read_rows(document)}
    service = next(r for r in rows.values() if r.remote is not None)
    assert service.setting["threads"] is None
    assert service.text("threads") == "n/a"
    assert "thread" not in service.name(("backend", "threads"))
    assert rows["one"].name(("threads",)).endswith("1 thread")
    text = printed(document)
    assert "threads" in text
    assert "n/a" in text


def test_html_has_the_section_between_speed_and_backends(hosted: Synthetic):
    page = page_of(hosted)
    order = [page.index(f'<section id="{name}"') for name in ("speed", "hosted", "backends")]
    assert order == sorted(order)
    assert "Hosted service: where the seconds go" in page
    assert '<a href="#hosted">' in page
    for title in TITLES:
        assert page.count(f"<h3>{title}</h3>") == 1
    assert "hosted by eachlabs" in page
    assert "ambiguous: may have been billed; run again to look for it" in page
    assert "remote.base_url=" in page  # the command that runs it again


def test_html_shows_no_load_or_memory_of_a_service(hosted: Synthetic):
    document = document_of(hosted.study, hosted.show, None)
    loads = {load["backend"]: load for load in document.loads}
    for name in ("load", "first_call", "warmup", "rss", "vram"):
        assert loads["eachlabs"][name] == "–", name
    assert loads["eager"]["load"] == "1.30 s"
    assert "threads=n/a" in loads["eachlabs"]["options"]


def test_names_from_a_study_are_never_markup(hosted: Synthetic):
    document = copy.deepcopy(hosted.show)
    for row in document["settings"]:
        if row["backend"] == "eachlabs":
            row["backend"] = "<img src=x>[/bold]|"
    page = render_report(document_of(hosted.study, document, None))
    assert "<img src=x>" not in page
    assert "<img src=x>[/bold]|" in printed(document)


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (None, "–"),
        (0.0, "$0"),
        (0.035, "$0.0350"),
        (0.00123, "$0.00123"),
        (0.5, "$0.500"),
        (1.0, "$1.00"),
        (1234.5, "$1,234.50"),
    ],
)
def test_format_usd(dollars, text):
    assert words.usd(dollars) == text
