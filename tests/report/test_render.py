"""The three forms of a document; a column and a form more are one place each."""

import csv
import io

import pytest
from rich.console import Console

from sd35bench.report import leaderboard
from sd35bench.report.page import render_report
from sd35bench.report.render import (
    HTML,
    MARKDOWN,
    TERMINAL,
    Cell,
    Code,
    Column,
    Heading,
    Layout,
    Table,
    markdown_document,
    paragraph,
    print_document,
    say,
    text_column,
)
from sd35bench.report.show import settings_parts
from tests.studies.drawn import Synthetic, document_of


def printed(parts, width: int = 80) -> str:
    out = io.StringIO()
    print_document(parts, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def table(**options) -> Table:
    """A name and two figures with intervals."""
    cells = tuple(Cell(text=f"0.{i}", beside=f"[0.{i}1, 0.{i}9]") for i in range(2))
    figures = [Column(title=t, cells=cells, rank=i) for i, t in enumerate(("first", "second"))]
    return Table(columns=(text_column("name", ("a", "b|<b>")), *figures), **options)


def test_a_cell_keeps_its_interval_apart_until_it_is_drawn():
    assert "0.1 [0.11, 0.19]" in printed([table()])
    assert "| b\\|\\<b> | 0.1 [0.11, 0.19] |" in markdown_document([table()])
    assert [cell.beside for cell in table().rows(HTML)[0]] == ["", "[0.01, 0.09]", "[0.01, 0.09]"]


@pytest.mark.parametrize(
    ("width", "says"),
    [(60, "0.1 [0.11, 0.19]"), (40, "[0.11, 0.19]"), (24, "0.1"), (15, "too narrow")],
    ids=["beside", "below", "without", "fewer columns"],
)
def test_a_table_fits_the_terminal(width, says):
    text = printed([table()], width)
    assert says in text
    lines = text.split("too narrow")[0].splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert ("0.1 [0.11" in text) == (width == 60)


def test_the_narrow_form_of_a_column_takes_its_place():
    narrow = Column(title="n", cells=(Cell(text="1"),))
    wide = Column(title="long title", cells=(Cell(text="1", beside="[0, 2]"),), narrow=narrow)
    layouts = (Layout(), Layout(between="\n"))
    assert "long title" in printed([Table(columns=(wide,), layouts=layouts)])
    assert printed([Table(columns=(wide,), layouts=layouts)], 8).split() == ["n", "─", "1"]


def test_only_the_forms_that_a_part_names_show_it():
    parts = [say("seen"), paragraph("read"), Heading("both"), Code("c", forms=(MARKDOWN,))]
    assert printed(parts).split() == ["seen", "both"]
    assert markdown_document(parts) == "read\n\n## both\n\n```\nc\n```\n"


@pytest.mark.parametrize(
    ("span", "text"),
    [("a*_b_|\nc", "a\\*\\_b\\_\\| c"), (("a_b", "raw"), "a_b"), (("x", "strong"), "**x**")],
)
def test_markdown_escapes_what_is_not_markup(span, text):
    assert markdown_document([paragraph(span)]) == f"{text}\n"


def test_a_further_column_is_one_place_and_every_form_shows_it(demo: Synthetic, monkeypatch):
    known = leaderboard.setting_columns

    def more(rows, extra, shares):
        cells = tuple(Cell(text=f"{1000 / r.steps:.0f}", sort=1000 / r.steps) for r in rows)
        return [*known(rows, extra, shares), Column(title="per mille", cells=cells)]

    monkeypatch.setattr(leaderboard, "setting_columns", more)
    out = io.StringIO()
    print_document(settings_parts(demo.show), Console(file=out, width=200, highlight=False))
    page = render_report(document_of(demo.study, demo.show, demo.recommend))
    for text in (out.getvalue(), markdown_document(settings_parts(demo.show)), page):
        assert text.count("per mille") == 2  # one table a task
        assert "250" in text


def test_a_further_form_is_one_function_over_the_parts(demo: Synthetic):
    def as_csv(parts) -> str:
        out = io.StringIO()
        for part in parts:
            if isinstance(part, Table):
                csv.writer(out).writerow([c.title for c in part.of(TERMINAL)])
                csv.writer(out).writerows([c.line for c in row] for row in part.rows(TERMINAL))
        return out.getvalue()

    lines = as_csv(settings_parts(demo.show)).splitlines()
    assert lines[0].startswith("steps,cfg,n,prompt accuracy")
    assert len(lines) == len(demo.show["settings"]) + 2
