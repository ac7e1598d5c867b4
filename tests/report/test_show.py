"""What `show` marks, orders, picks and writes as CSV."""

import copy
import csv
import io
import os
import re
from itertools import chain
from typing import Any

import pytest
import yaml
from rich.console import Console

from sd35bench.errors import ConfigError
from sd35bench.recommend.pareto import SAME_COST
from sd35bench.report.leaderboard import setting_table
from sd35bench.report.render import TERMINAL, markdown_document, print_document
from sd35bench.report.rows import read_rows
from sd35bench.report.show import (
    ShowOptions,
    csv_text,
    flatten,
    mark_rows,
    settings_parts,
    sort_rows,
)
from tests.studies.drawn import Synthetic


def printed(document: dict, width: int = 160, **shown) -> str:
    out = io.StringIO()
    print_document(
        settings_parts(document, ShowOptions(**shown)),
        Console(file=out, width=width, highlight=False),
    )
    return out.getvalue()


@pytest.fixture
def marked(demo: Synthetic, tmp_path):
    """The demo's document with its marks; its third setting was chosen twice."""
    document = copy.deepcopy(demo.show)
    chosen = {"setting": {"setting": document["settings"][2]["setting"]}}
    profiles: dict[str, Any] = {name: {"text-to-image": chosen} for name in ("final", "mine")}
    profiles["preview"] = {"text-to-image": {"setting": None}}
    (tmp_path / "recommended.yaml").write_text(yaml.dump({"profiles": profiles}))
    mark_rows(document, tmp_path, written_at=0.0)
    return document


def test_a_setting_is_on_the_front_where_no_other_is_faster_and_better(marked):
    rows = [r for r in marked["settings"] if r["task"] == "text-to-image"]
    figures = [(r["latency_s"]["p50"], r["metrics"]["prompt_accuracy"]["value"]) for r in rows]
    near = 1 + SAME_COST
    by_hand = [
        not any(t <= s * near and r >= q and (r > q or t * near < s) for t, r in figures)
        for s, q in figures
    ]
    assert [row["front"] for row in rows] == by_hand
    assert 0 < sum(by_hand) < len(rows)


def test_the_chosen_setting_is_named_with_its_profiles(marked):
    assert [r["chosen_for"] for r in marked["settings"]].count(["final", "mine"]) == 1
    text = printed(marked)
    assert "final, mine" in text
    assert "names: the profiles that chose a setting (recommended.yaml)" in text
    assert "final, mine" in markdown_document(settings_parts(marked))


def test_a_choice_older_than_the_images_says_so(marked, tmp_path):
    os.utime(tmp_path / "recommended.yaml", (100, 100))
    mark_rows(marked, tmp_path, written_at=200.0)
    assert "(recommended.yaml, written before the newest images)" in printed(marked)


@pytest.mark.parametrize("text", [None, "[]", "profiles: 3", "profiles: {a: {b: 1}}", "{"])
def test_without_a_file_of_ours_nothing_is_chosen(demo: Synthetic, tmp_path, text):
    if text is not None:
        (tmp_path / "recommended.yaml").write_text(text)
    document = copy.deepcopy(demo.show)
    mark_rows(document, tmp_path, written_at=0.0)
    assert document["recommended"] is None
    assert all(row["chosen_for"] == [] for row in document["settings"])


def test_rows_stand_in_the_order_asked_for_and_unknown_last(marked):
    marked["settings"][3]["metrics"]["prompt_accuracy"]["value"] = None
    sort_rows(marked, "-prompt_accuracy")
    values = [r["metrics"]["prompt_accuracy"]["value"] for r in marked["settings"]]
    assert values[-1] is None
    assert values[:-1] == sorted(values[:-1], reverse=True)


def test_the_table_keeps_the_order_asked_for(marked):
    """Mutant: rows in the usual order, which is by steps upwards."""
    sort_rows(marked, "-steps")
    by_task: dict[str, list[int]] = {}
    for row in marked["settings"]:
        by_task.setdefault(row["task"], []).append(row["steps"])
    first = (line.split()[:1] for line in printed(marked, sort="-steps").splitlines())
    assert [int(w) for w, *_ in filter(None, first) if w.isdigit()] == list(
        chain(*by_task.values())
    )


CALLS = {
    "sort": lambda document: sort_rows(document, "-latency"),
    "columns": lambda document: printed(document, columns=("latency",)),
    "csv": lambda document: csv_text(document["settings"], ("latency",)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_column_that_is_not_there_is_named_with_its_neighbour(marked, call):
    with pytest.raises(ConfigError, match="no such column; did you mean latency_s"):
        call(marked)


def test_picked_columns_stand_in_their_order_with_intervals(marked):
    text = printed(marked, columns=("latency_s", "cfg", "front"))
    head = next(line for line in text.splitlines() if "cfg" in line)
    assert head.split() == ["latency_s", "cfg", "front"]
    row = next(line for line in text.splitlines() if line.rstrip().endswith(("yes", "no")))
    assert "[" in row


def test_csv_has_every_figure_of_the_document(marked):
    rows = list(csv.DictReader(io.StringIO(csv_text(marked["settings"]))))
    assert len(rows) == len(marked["settings"])
    first = marked["settings"][0]
    low, high = first["latency_s"]["ci95"]
    found = [float(rows[0][n]) for n in ("latency_s", "latency_s_low", "latency_s_high")]
    assert found == [first["latency_s"]["p50"], low, high]
    assert float(rows[0]["prompt_accuracy"]) == first["metrics"]["prompt_accuracy"]["value"]
    assert rows[0]["load_s"] == str(first["load_s"])
    assert set(rows[0]) >= {"steps", "cfg", "n", "failed", "peak_rss_bytes", "chosen_for"}
    picked = csv_text(marked["settings"], ("cfg", "latency_s"))
    assert picked.splitlines()[0] == "cfg,latency_s,latency_s_low,latency_s_high"


def test_a_figure_without_a_value_is_empty_in_csv(marked):
    row = copy.deepcopy(marked["settings"][0])
    row["latency_s"]["p50"] = None
    assert flatten(row)["latency_s"] is None
    assert csv_text([row], ("latency_s",)).splitlines()[1].startswith(",")


def test_where_there_is_little_room_n_goes_first_then_threads(demo: Synthetic):
    """What is left out first is what has the highest rank; 0 stays."""
    columns = setting_table(read_rows(demo.show), ("threads",)).columns
    ranks = {c.title: c.rank for c in columns if TERMINAL in c.forms}
    assert sorted(ranks, key=lambda title: -ranks[title])[:2] == ["n", "threads"]
    assert ranks["steps"] == ranks["cfg"] == ranks["strength"] == 0


def test_no_value_is_cut_where_there_is_no_room_for_all(demo: Synthetic):
    """Mutant: rich's ellipsis, under which `heun` and `dpmpp_2m` were one letter each."""
    document = {"study": "t", "settings": [copy.deepcopy(demo.show["settings"][0]) for _ in "ab"]}
    for number, row in enumerate(document["settings"]):
        row |= {"id": f"row {number}", "sampler": ("heun", "dpmpp_2m")[number]}
    assert "…" not in printed(document, 24).split("latency: median")[0]


def test_threads_stay_where_nothing_else_tells_two_settings_apart(demo: Synthetic):
    document = {"study": "t", "settings": [copy.deepcopy(demo.show["settings"][0]) for _ in "ab"]}
    for number, row in enumerate(document["settings"]):
        row |= {"id": f"row {number}", "threads": number + 1}
    left_out = re.compile(r"too narrow for:[^(]*threads")
    assert not left_out.search(printed(document, 40))
    document["settings"][1]["steps"] = 99
    assert left_out.search(printed(document, 40))
