"""What the verbs that read a study do to it."""

import dataclasses
from collections import Counter

import pytest

from sd35bench import journal
from sd35bench.analysis import table
from sd35bench.cli import answer
from tests.studies import drawn
from tests.studies.drawn import make_study


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two studies of a model that has no default metric here, so that scoring is quick."""
    root = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MODEL", dataclasses.replace(drawn.MODEL, name="other"))
        for name in ("one", "two"):
            make_study(root, name)
    return root


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("show", ["one"]),
        ("recommend", ["one"]),
        ("report", ["one"]),
        ("claims", ["one"]),
        ("compare", ["one", "two"]),
    ],
    ids=["show", "recommend", "report", "claims", "compare"],
)
def test_verb_parses_each_journal_and_score_file_once(results, monkeypatch, verb, words):
    parsed, sorted_out = Counter(), Counter()
    read_lines, sort_rows = journal.read_lines, table._rows

    def counted(path, parse):
        parsed[path.relative_to(results)] += 1
        return read_lines(path, parse)

    def counted_rows(records, sessions):
        sorted_out["rows"] += 1
        return sort_rows(records, sessions)

    monkeypatch.setattr(journal, "read_lines", counted)
    monkeypatch.setattr(table, "_rows", counted_rows)
    answer(verb, [*words, f"--results-dir={results}"])
    journals = {path for path in parsed if path.parent.name == "journal"}
    assert {path.parts[0] for path in journals} == set(words)
    assert set(parsed.values()) == {1}
    assert sorted_out["rows"] == len(words)
