"""Charts: geometry that can be checked, text that is escaped, and the Pareto front."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from sd35bench.report.bars import (
    Samples,
    plot_distributions,
    plot_memory,
    plot_stages,
    quantile,
)
from sd35bench.report.leaderboard import front_ids
from sd35bench.report.plots import Line, Point, plot_front, plot_lines
from sd35bench.report.rows import Row, read_rows
from sd35bench.report.svg import Box, Label, Scale, place_labels, ramp, spread
from sd35bench.words import Estimate
from tests.studies.drawn import HOSTILE, Synthetic


def row(name: str, seconds: float | None, value: float | None, metric: str = "prompt_accuracy"):
    latency = None if seconds is None else Estimate(value=seconds)
    metrics = {metric: Estimate(value=value)}
    empty = dict.fromkeys(
        ("target_ratio", "load_s", "first_call_s", "peak_vram_bytes", "peak_rss_bytes")
    )
    setting = {"steps": 1, "cfg": 1.0, "prompt_strength": None}
    common = {"n": 1, "failed": 0, "latency_s": {}, "stage_s": {}, "setting": setting, **empty}
    return Row(id=name, setting_id=name, latency=latency, metrics=metrics, **common)


def test_front_keeps_what_nothing_beats_in_both():
    rows = [row("a", 1.0, 0.5), row("b", 2.0, 0.9), row("c", 3.0, 0.8), row("d", 1.5, 0.4)]
    rows += [row("e", None, 1.0), row("f", 0.1, None)]
    assert front_ids(rows, "prompt_accuracy") == {"a", "b"}


def test_front_turns_round_for_distances():
    rows = [row("a", 1.0, 50.0, "fid_nano"), row("b", 2.0, 10.0, "fid_nano")]
    rows.append(row("c", 3.0, 90.0, "fid_nano"))
    assert front_ids(rows, "fid_nano") == {"a", "b"}
    assert front_ids(rows, None) == set()


def test_front_keeps_equals_and_takes_2_percent_of_latency_for_none():
    rows = [row("a", 1.0, 0.5), row("b", 1.0, 0.5), row("c", 1.015, 0.6), row("d", 1.1, 0.6)]
    assert front_ids(rows, "prompt_accuracy") == {"c"}
    assert front_ids(rows[:2], "prompt_accuracy") == {"a", "b"}


@pytest.mark.parametrize("log", [False, True], ids=["linear", "log"])
def test_scale_maps_its_ends_and_ticks_inside(log: bool):
    scale = Scale.fit([0.05, 5.0], 10.0, 110.0, log=log)
    assert scale(scale.low) == pytest.approx(10.0)
    assert scale(scale.high) == pytest.approx(110.0)
    assert all(scale.low <= t <= scale.high for t in scale.ticks())
    assert len(scale.ticks()) >= 3


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_scale_of_one_value_has_room(value: float):
    scale = Scale.fit([value], 0.0, 100.0)
    assert scale(value) == pytest.approx(50.0)


def test_spread_keeps_order_distance_and_bounds():
    moved = spread([50.0, 51.0, 10.0, 99.0, 98.0], 14.0, 0.0, 100.0)
    ordered = sorted(moved)
    assert all(b - a >= 14.0 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= 0
    assert ordered[-1] <= 100
    assert moved[2] < moved[0] < moved[1] < moved[4] < moved[3]


def test_labels_never_overlap_each_other():
    box = Box(400.0, 300.0)
    wanted = [Label(200.0 + i, 150.0 + i, f"label number {i}") for i in range(40)]
    drawn = place_labels(wanted, [], box)
    assert 2 <= len(drawn) < 40
    areas = []
    for text in drawn:
        found = {k: re.search(rf'{k}="([^"]*)"', text).group(1) for k in ("x", "y", "class")}
        words = re.search(r">(.*)<", text).group(1)
        width = 6.2 * len(words)
        shift = {"end": width, "mid": width / 2}.get(found["class"].split()[-1], 0.0)
        areas.append((float(found["x"]) - shift, float(found["y"]), width))
    for i, (x, y, width) in enumerate(areas):
        for other_x, other_y, other_width in areas[:i]:
            apart = abs(y - other_y) > 12 or x > other_x + other_width or other_x > x + width
            assert apart


def test_ramp_spans_all_colours_in_order():
    assert [ramp(i, 8) for i in range(8)] == [f"c{i}" for i in range(8)]
    assert (ramp(0, 3), ramp(2, 3)) == ("c0", "c7")


def points(label: str = "28 · cfg 4") -> list[Point]:
    y = Estimate(value=0.9, low=0.8, high=0.95, n=64)
    x = Estimate(value=0.2, low=0.19, high=0.21, n=64)
    slow = Estimate(value=2.0, low=1.9, high=2.1, n=64)
    mark = {"class_": "c1", "marker": "circle"}
    return [
        Point(x=x, y=y, label=label, on_front=True, badge="final", **mark),
        Point(x=slow, y=y, label="50 · cfg 4", **mark),
    ]


def test_front_chart_draws_intervals_names_and_n():
    svg = str(plot_front(points(), metric="prompt accuracy", lower=False, target_s=1.0).svg)
    assert svg.count('class="whisker c1"') == 4
    assert "n = 64" in svg
    assert "final: 28 · cfg 4" in svg
    assert "target 1 s" in svg
    assert "log scale" in svg


def test_front_chart_says_how_surely_a_setting_is_dominated():
    said = [replace(p, dominated=share) for p, share in zip(points(), (None, 0.97), strict=True)]
    svg = str(plot_front(said, metric="prompt accuracy", lower=False, target_s=None).svg)
    assert svg.count("dominated in ") == 1
    assert "dominated in 97 % of resampled prompts" in svg


def test_front_chart_says_where_a_far_target_lies():
    figure = plot_front(points(), metric="prompt accuracy", lower=False, target_s=80.0)
    assert "target 80" not in str(figure.svg)
    assert "80 s lies off this plot, 38× to the right" in figure.note


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_charts_escape_their_texts(text: str):
    front = plot_front(points(text), metric=text, lower=False, target_s=None)
    line = Line(name=text, class_="c1", marker="circle", points=((1.0, Estimate(value=1.0)),))
    lines = plot_lines([line], axis=text, metric=text)
    samples = [Samples(label=text, latencies_s=(1.0, 2.0), stage_s={"text": 0.1, "denoise": 0.9})]
    figures = [front, lines, plot_distributions(samples), plot_stages(samples)]
    figures.append(plot_memory([(text, "rss", 2.0**30)]))
    for figure in figures:
        tree = ElementTree.fromstring(str(figure.svg).replace('role="img"', ""))
        tags = {e.tag for e in tree.iter()}
        allowed = {"svg", "g", "title", "text", "line", "circle", "path", "polyline", "rect"}
        assert tags <= allowed


def test_quantile_interpolates():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([7.0], 0.9) == 7.0


def test_distribution_draws_every_image_and_its_median():
    samples = [Samples(label="a", latencies_s=tuple(0.1 + i / 100 for i in range(20)), stage_s={})]
    svg = str(plot_distributions(samples).svg)
    assert svg.count('class="dot"') == 20
    assert svg.count('class="median"') == 1
    assert "n = 20, p50 0.195 s" in svg


def test_rows_of_a_show_document_come_in_reading_order(demo: Synthetic):
    rows = read_rows(demo.show)
    assert [r.task for r in rows] == ["text-to-image"] * 9 + ["image-to-image"] * 9
    assert [(r.steps, r.cfg) for r in rows[:4]] == [(4, 1.0), (4, 4.0), (4, 7.0), (12, 1.0)]
    assert all(r.latency is not None and r.latency.n == 12 for r in rows)
