"""`list` shows every study of a folder; `rm` removes whole studies, or nothing."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.disk import open_lock, try_flock
from sd35bench.types import Status
from tests.studies.drawn import make_study


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_study(folder, "one")
    return folder / "one"


@pytest.fixture
def root(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(made, Path("results") / name)
    return Path("results")


def said(capsys, *arguments: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_list_counts_images_failures_and_bytes(root, capsys):
    from sd35bench.study.store import Study

    code, document = said(capsys, "list")
    assert code == 0
    assert [row["study"] for row in document["studies"]] == ["one", "two"]
    records = Study.open(root, "one").records()
    ok = sum(r.status is Status.OK for r in records)
    row = document["studies"][0]
    assert (row["images"], row["failed"]) == (ok, len(records) - ok)
    assert row["bytes"] == sum(p.stat().st_size for p in (root / "one").rglob("*") if p.is_file())
    assert (row["state"], row["cost_usd"], row["error"]) == ("ended", None, None)
    assert main(["list"]) == 0
    assert "one" in capsys.readouterr().out


def test_list_goes_on_after_a_study_that_cannot_be_read(root, capsys):
    (root / "one" / "study.json").write_text('{"schema": 99}')
    code, document = said(capsys, "list")
    assert code == 0
    assert [row["state"] for row in document["studies"]] == ["unreadable", "ended"]
    assert "one" in document["studies"][0]["error"]


def test_list_of_nothing_says_what_makes_a_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert "sd35bench run" in capsys.readouterr().out


def test_a_study_that_is_being_written_is_said_and_stays(root, capsys):
    with open_lock(root / "one" / ".lock") as handle:
        assert try_flock(handle, fcntl.LOCK_SH)
        assert said(capsys, "list")[1]["studies"][0]["state"] == "being written"
        assert said(capsys, "rm", "two", "one", "--yes")[0] == 3
    assert sorted(p.name for p in root.iterdir()) == ["one", "two"]


def test_rm_removes_whole_studies_and_what_an_interrupted_one_left(root, capsys):
    (root / ".removed-old-7").mkdir()
    code, document = said(capsys, "rm", "one", "--yes")
    assert (code, document["removed"]) == (0, ["one"])
    assert [p.name for p in root.iterdir()] == ["two"]


UNCLEAR = (
    (["one"], "--yes"),
    (["nosuch", "--yes"], "there: linked, one, two"),
    (["one", "nosuch", "--yes"], "there: linked, one, two"),
    (["../one", "--yes"], "not a path"),
    (["linked", "--yes"], "is a link"),
)


def test_rm_removes_nothing_unless_all_is_clear(root, capsys):
    (root / "linked").symlink_to("one")
    for words, part in UNCLEAR:
        code, document = said(capsys, "rm", *words)
        assert code == 2
        assert part in document["error"]["message"]
    assert sorted(p.name for p in root.iterdir()) == ["linked", "one", "two"]
