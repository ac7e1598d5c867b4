"""The report's answer: confirmed or not, beside named defaults, and how to ask for it."""

import json
from html import unescape

import pytest

from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import as_profiles
from sd35bench.report.headline import read_headline
from sd35bench.report.page import render_report
from tests.studies.drawn import PROFILES, Synthetic, document_of


def _answer(recommend, rows, profile: str = "final", task: str = "text-to-image"):
    groups = dict(read_headline(rows, recommend, ()).answers)
    return next(a for a in groups[task] if a.profile == profile)


@pytest.fixture(scope="module")
def rows(demo: Synthetic):
    from sd35bench.report.rows import read_rows

    return tuple(read_rows(demo.show))


def test_answer_says_that_it_was_not_confirmed_and_how_many_images_would_decide(demo, rows):
    answer = _answer(demo.recommend, rows)
    assert answer.confirmed == (
        "Not confirmed on held-out prompts: they have not been run.",
        "open",
    )
    entry = demo.recommend["profiles"]["final"]["text-to-image"]
    more = entry["evidence"]["more_images"]
    assert more is None or any(more["text"][1:] in line for line in answer.why)
    assert json.loads(answer.body) == entry["api"]["body"]


@pytest.mark.parametrize(
    ("status", "mark"), [("confirmed", "good"), ("contradicted", "bad"), ("undecided", "open")]
)
def test_confirmation_is_told_with_its_interval_and_margin(demo, rows, status, mark):
    document = json.loads(json.dumps(demo.recommend))
    entry = document["profiles"]["final"]["text-to-image"]
    entry["confirmation"] |= {
        "status": status,
        "difference": {"value": -0.012, "ci95": [-0.03, 0.01]},
        "n_pairs": 200,
        "n_prompts": 100,
        "more": None,
    }
    text, found = _answer(document, rows).confirmed
    assert found == mark
    assert text.startswith(
        f"{status.capitalize()} on 100 held-out prompts (200 images): -0.01 [-0.03"
    )
    assert f"margin {entry['confirmation']['margin']:g}" in text


def test_report_shows_defaults_commands_and_body(demo: Synthetic, demo_page: str):
    page = unescape(demo_page)
    entry = demo.recommend["profiles"]["final"]["text-to-image"]
    adding = [d["command"] for d in entry["named_defaults"] if d["command"]]
    assert len(adding) == 3
    assert all(command in page for command in adding)
    assert page.count("Stability") + page.count("stability") >= 2
    assert json.dumps(entry["api"]["body"], indent=2) in page


def test_every_profile_of_the_tests_is_one(demo: Synthetic):
    assert [p.name for p in as_profiles(PROFILES)] == list(demo.recommend["profiles"])
    assert recommend_document(demo.study, PROFILES) == demo.recommend


def test_report_says_how_surely_each_setting_is_dominated(demo: Synthetic):
    document = document_of(demo.study, demo.show, demo.recommend)
    for section in document.tasks:
        entry = demo.recommend["profiles"]["final"][section.task]
        said = {a["setting_id"]: a["p_dominated"] for a in entry["alternatives"]}
        said[entry["setting_id"]] = entry["evidence"]["p_dominated"]
        board = section.leaderboard
        column = next(c for c in board.table.columns if c.title == "dominated")
        cells = {mark[0]: c for mark, c in zip(board.marks, column.cells, strict=True)}
        assert {row_id: cell.sort for row_id, cell in cells.items()} == said
        # Only the chart of the metric that was judged by says it.
        titles = [str(figure.svg).count("dominated in") for figure in section.fronts]
        assert sorted(titles) == [0] * (len(titles) - 1) + [len(said)]
    page = unescape(render_report(document))
    assert page.count("Dominated: in how many of 2000 resamples of the prompts") == 6
    assert page.count("The choice is on the Pareto front of quality and latency") >= 1


def test_report_without_a_recommendation_has_no_column_about_the_front(demo: Synthetic):
    document = document_of(demo.study, demo.show, None)
    for section in document.tasks:
        assert "dominated" not in [c.title for c in section.leaderboard.table.columns]


@pytest.mark.parametrize("definitive", [True, False])
def test_the_first_sentence_says_what_is_provisional(demo, rows, definitive):
    document = json.loads(json.dumps(demo.recommend))
    document["profiles"]["balanced"]["text-to-image"]["evidence"]["definitive"] = definitive
    (_, _, after), *_ = read_headline(rows, document, ()).lead
    assert after.startswith(" (balanced): " if definitive else " (balanced, provisional): ")
