"""Tables of wide data on narrow terminals: no line is too long, no word of what differs is lost."""

import io
import re
from collections.abc import Iterable

import pytest
from rich.console import Console

from sd35bench.cli.studies import _table as studies_table
from sd35bench.fields import FIELDS, value_text
from sd35bench.report import leaderboard
from sd35bench.report.claims import _verdicts
from sd35bench.report.gate import comparison_parts
from sd35bench.report.render import WRAPPED, Layout, Part, Table, print_document, text_table
from sd35bench.report.show import ShowOptions, settings_parts
from tests.studies.wide import VARYING, wide_document

WIDTHS = (60, 80, 100, 120)


def drawn(parts: Iterable[Part], width: int = 80) -> str:
    out = io.StringIO()
    print_document(parts, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def printed(document: dict, width: int, shown: ShowOptions | None = None) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    print_document(settings_parts(document, ShowOptions() if shown is None else shown), console)
    return out.getvalue()


def longest(text: str) -> int:
    return max(len(line.rstrip()) for line in text.splitlines())


def lost(document: dict, fields: int, text: str) -> list[str]:
    """Values in which settings differ and that no word of the settings' table is."""
    table = text.partition("Throughput")[0]
    found = set(re.findall(r"[^\s,]+", table))
    gone = re.search(r"too narrow for:[^(]*threads", table) is not None
    names = [n for n in VARYING[:fields] if not (n == "threads" and gone)]
    known = ((n, row[n]) for row in document["settings"] for n in names)
    told = (v for n, v in known if n not in FIELDS or v != FIELDS[n].quiet)
    return [word for v in told for word in value_text(v).split() if word not in found]


@pytest.mark.parametrize("fields", range(1, 21))
def test_what_differs_stays_at_every_width(fields):
    document = wide_document(fields, seed=fields)
    for width in WIDTHS[fields % 2 :: 2]:
        text = printed(document, width)
        assert longest(text) <= width
        assert lost(document, fields, text) == []


def test_mutant_that_folds_nothing_loses_words(monkeypatch):
    layouts = tuple(x for x in leaderboard._SHOW if not x.folds)
    monkeypatch.setattr(leaderboard, "_SHOW", layouts)
    document = wide_document(12, seed=12)
    assert lost(document, 12, printed(document, 80))


def test_the_least_important_columns_go_first_and_are_named_with_a_remedy():
    text = " ".join(printed(wide_document(2, seed=1), 80).split())
    wanted = r"too narrow for: n, .*peak RSS \(--columns n,\S*peak_rss_bytes shows them, --json all"
    assert re.search(wanted, text)
    wide = printed(wide_document(2, seed=1), 200)
    assert "too narrow for" not in wide.partition("Throughput")[0]


def test_what_it_names_can_be_asked_for_and_is_readable():
    picked = ("n", "fid_nano", "latency_ratio", "peak_rss_bytes", "sampler", "steps", "threads")
    document = wide_document(20, seed=1)
    few = printed(document, 80, ShowOptions(columns=picked[:4]))
    assert "n" in few.split()
    many = printed(document, 80, ShowOptions(columns=(*picked, "model", "backend", "weights")))
    assert "steps 1000" in " ".join(many.split())
    assert longest(many) <= 80


def test_other_tables_lose_no_word_at_80_columns():
    row = {"study": "s" * 30, "state": "being written", "images": 10**6, "failed": 10**5}
    row |= {"bytes": 2**40, "cost_usd": 12345.67, "written_at": "2026-11-30T12:00:00+00:00"}
    listed = drawn([studies_table([row, row])])
    for word in ("s" * 30, "being written", "1,000,000", "too narrow for: "):
        assert word in listed
    texts = [f"a{'long' * 5}-{i} and {'more ' * 30}end{i}" for i in range(6)]
    wrapped = drawn([Table(columns=text_table(texts, [texts]), layouts=WRAPPED)])
    assert max(longest(listed), longest(wrapped)) <= 80


DIMENSIONS = ("failures", "latency", "memory", "quality", "drift", "coverage", "validity")


def test_compare_names_what_did_not_pass_where_a_column_of_each_has_no_room():
    name = "eager-bf16, {} steps, cfg 4, heun, shift 3.5, cfg-zero-star, guided 0.1-0.7"
    about = {"n_pairs": 48, "n_prompts": 12, "n_identical": 0, "n_images": 48}
    about |= {"differs": {}, "environment_differs": {}}
    verdicts = {4: "fail", 8: "pass"}
    comparisons = [
        about
        | {
            "title": name.format(steps),
            "dimensions": {
                d: {"verdict": verdict, "figures": [], "reason": "", "required": False}
                for d in DIMENSIONS
            },
        }
        for steps, verdict in verdicts.items()
    ]
    document = {"verdict": "fail", "candidate": "b", "baseline": "a", "n_pairs": 96, "gate": {}}
    document |= {"policy": "all", "comparisons": comparisons, "warnings": []}
    out = io.StringIO()
    print_document(comparison_parts(document), Console(file=out, width=80, highlight=False))
    matrix = out.getvalue().partition("\n\n\n")[0].partition("every setting")[0]
    assert "not passed" in matrix
    assert "quality fail" in " ".join(matrix.split())
    assert longest(matrix) <= 80


def test_claims_of_a_model_with_a_long_name_keep_room_for_their_words():
    claim = {"verdict": "inconclusive", "model": "a-model-whose-name-is-very-long-indeed"}
    claim |= {"says": "more steps follow the prompt better", "tested": None}
    claim |= {"contrasts": [], "deciding": None, "reason": "no images", "p_supported": None}
    text = drawn([_verdicts([claim])])
    assert longest(text) <= 80
    assert "prompt" in text.split()


def test_a_layout_without_room_breaks_words_and_cuts_none():
    layout = Layout(wraps=True, folds=True)
    text = drawn([Table(columns=text_table(["a"], [["x" * 100]]), layouts=(layout,))], 40)
    assert text.count("x") == 100
