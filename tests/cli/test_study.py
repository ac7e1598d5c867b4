"""What the verbs that read a study do to it."""

import ast
import dataclasses
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from sd35bench import cli
from sd35bench.analysis import table
from sd35bench.cli import answer, main
from sd35bench.errors import ConfigError
from sd35bench.study import journal
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


# Columns, and readers that leave ------------------------------------------------------------------


def test_csv_is_a_line_for_each_setting(results, capsys):
    assert main(["show", "one", "--csv", "--columns", "steps,n", f"--results-dir={results}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "steps,n"
    assert len(lines) == 1 + 18


def test_the_latest_study_needs_no_name(results, capsys):
    os.utime(next((results / "two" / "journal").iterdir()), (4e9, 4e9))
    document = answer("show", ["--latest", f"--results-dir={results}", "--sort=-steps"]).document
    assert document["study"] == "two"
    steps = [row["steps"] for row in document["settings"]]
    assert steps == sorted(steps, reverse=True)
    with pytest.raises(ConfigError, match="--latest names the study; leave 'one' out"):
        answer("show", ["one", "--latest", f"--results-dir={results}"])
    with pytest.raises(ConfigError, match="two forms"):
        answer("show", ["one", "--csv", "--markdown", f"--results-dir={results}"])


LEFT = {
    "show": ["one"],
    "show-markdown": ["one", "--markdown"],
    "show-csv": ["one", "--csv"],
    "recommend": ["one"],
    "recommend-markdown": ["one", "--markdown"],
    "claims-markdown": ["one", "--markdown"],
    "compare": ["one", "two", "--policy", "speed", "--html", "gate.html"],
    "list": [],
}


@pytest.mark.parametrize("name", LEFT)
def test_a_reader_that_leaves_changes_neither_the_code_nor_the_files(
    results, tmp_path, monkeypatch, capsys, name
):
    """Mutant: rich's own `on_broken_pipe`, which exits 1, a regression, before any file."""
    monkeypatch.chdir(tmp_path)
    arguments = [name.partition("-")[0], *LEFT[name], f"--results-dir={results}"]
    wanted = main(arguments)
    assert capsys.readouterr().out
    (tmp_path / "gate.html").unlink(missing_ok=True)
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert main(arguments) == wanted
    assert (tmp_path / "gate.html").exists() == (name == "compare")


def test_no_verb_prints_past_the_guard():
    """Every line goes through `output`, or to stderr; `serve` prints one line to a live reader."""
    bare = {}
    for path in Path(cli.__file__).parent.glob("*.py"):
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        bare[path.name] = sum(not any(k.arg == "file" for k in call.keywords) for call in prints)
    assert {name: n for name, n in bare.items() if n} == {"output.py": 1}
