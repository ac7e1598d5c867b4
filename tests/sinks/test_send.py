"""What goes to sinks, and that none of them can harm a verb."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd35bench import plugins
from sd35bench.analysis.summary import show_document
from sd35bench.cli import main
from sd35bench.cli.output import Answer
from sd35bench.cli.parser import Given
from sd35bench.cli.sinks import named, sent
from sd35bench.errors import ConfigError
from sd35bench.recommend.advice import recommend_document
from sd35bench.sinks import base
from sd35bench.sinks.send import PICTURES, entries_of, send
from tests.sinks.recorder import Recorder
from tests.studies import drawn
from tests.studies.drawn import PROFILES

HERE = "tests.sinks.recorder"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Six settings of a model that has no default metric here, so that scoring is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "MODEL", replace(drawn.MODEL, name="other"))
        root = tmp_path_factory.mktemp("results")
        return drawn.make_study(root, "s", steps=(4, 12), cfgs=(4.0,), strengths=(0.3, 0.6))


@pytest.fixture(scope="module")
def advice(study):
    return recommend_document(study, PROFILES)


@pytest.fixture(autouse=True)
def sinks(monkeypatch):
    for name in ("recorder", "away", "exits", "absent"):
        monkeypatch.setitem(base.SINKS, name, f"{HERE}:{name.capitalize()}")
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder.calls


def test_an_entry_is_a_row_of_show(study, advice):
    entries = {entry.id: entry for entry in entries_of(study, advice)}
    shown = {row["id"]: row for row in show_document(study)["settings"]}
    assert entries.keys() == shown.keys()
    for name, entry in entries.items():
        row = shown[name]
        assert entry.asked["steps"] == row["steps"]
        assert entry.figures["latency_s_p50"] == row["latency_s"]["p50"]
        assert "steps" not in entry.figures
        assert not any(value is None for value in entry.asked.values())
        assert len(entry.pictures) == PICTURES
        assert all(picture.path.is_file() for picture in entry.pictures)
    # The same prompts and seeds for every setting of a task.
    captions = {entry.asked["task"]: set() for entry in entries.values()}
    for entry in entries.values():
        captions[entry.asked["task"]].add(tuple(p.caption for p in entry.pictures))
    assert {len(found) for found in captions.values()} == {1}


def test_an_entry_says_what_was_compared(study, advice):
    entries = {entry.id: entry for entry in entries_of(study, advice)}
    for name, tasks in advice["profiles"].items():
        for found in filter(None, tasks.values()):
            chosen = entries[found["setting_id"]]
            assert name in chosen.chosen_for
            assert chosen.on_front == found["evidence"]["on_front"]
            assert chosen.figures["quality"] == found["evidence"]["quality"]["value"]
            for other in found["alternatives"]:
                assert entries[other["setting_id"]].on_front == other["on_front"]
    assert all(entry.on_front is None for entry in entries_of(study))


def test_a_sink_gets_settings_then_the_front_then_the_report(study, advice, sinks, tmp_path):
    assert send(["recorder"], study, advice, tmp_path) == {"recorder": None}
    kinds = [call[0] for call in sinks]
    assert kinds == ["open", *["setting"] * 6, "front", "file", "close"]
    assert sinks[0][2] == study.path / "sinks" / "recorder"
    front = {call[1].id: call[1] for call in sinks if call[0] == "setting" and call[1].on_front}
    ids = next(call[1] for call in sinks if call[0] == "front")
    assert sorted(ids) == sorted(front)
    latencies = [front[name].figures["latency_s_p50"] for name in ids]
    assert latencies == sorted(latencies)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("away", "ConnectionError: no route to host"),
        ("exits", "SystemExit: 1"),
        ("absent", "No module named 'no_such_tracker'; pip install absent"),
    ],
)
def test_a_sink_that_fails_is_one_line_and_stops_no_other(study, sinks, name, why):
    assert send([name, "recorder"], study) == {name: why, "recorder": None}
    assert ("close",) in sinks


def test_a_study_that_cannot_be_summed_up_is_one_line():
    assert send(["recorder"], SimpleNamespace(name="s")) == {  # pyright: ignore
        "recorder": "AttributeError: 'types.SimpleNamespace' object has no attribute 'sessions'"
    }


def given_of(verb: str, study, sink: str) -> Given:
    flags = {"--sink": sink, "--results-dir": str(study.path.parent)}
    words = [] if verb == "run" else [study.name]
    return Given(verb=verb, words=words, settings=[], flags=flags, as_json=True)


def test_a_run_keeps_its_document_and_exit_code(study, capsys):
    document = {"failed": 1, "paths": {"study": str(study.path)}}
    given = given_of("run", study, "away,recorder")
    found = sent(given, Answer(document=document, exit_code=3), named(given))
    assert found.exit_code == 3
    assert found.document == {
        **document,
        "sinks": {"away": found.document["sinks"]["away"], "recorder": None},
    }
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "warning: not sent to away: ConnectionError: no route to host",
        "sent to recorder",
    ]


def test_a_dry_run_is_sent_nowhere(study, sinks):
    document = {"study": "s", "trials": 4}
    given = given_of("run", study, "recorder")
    answer = Answer(document=document)
    assert sent(given, answer, named(given)) == answer
    assert sinks == []


def test_a_name_that_is_no_sink_is_refused_before_the_verb(study, capsys):
    root = f"--results-dir={study.path.parent}"
    assert main(["report", "s", root, "--sink", "mlfow"]) == 2
    assert "did you mean mlflow" in capsys.readouterr().err
    assert not (study.path / "report.html").exists()


def test_a_report_is_sent_with_its_file(study, sinks, capsys):
    root = f"--results-dir={study.path.parent}"
    assert main(["report", "s", root, "--sink", "recorder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sinks"] == {"recorder": None}
    assert ("file", study.path / "report.html") in sinks
    assert any(call[0] == "front" for call in sinks)
    assert Path(study.path / "report.html").is_file()


def test_a_sink_of_the_plug_in_folder_is_used(study, sinks, tmp_path):
    (tmp_path / "own_tracker.py").write_text(
        "from tests.sinks.recorder import Recorder\nclass Mine(Recorder): pass\nclass No: pass\n"
    )
    plugins.use_folder(str(tmp_path))
    try:
        assert base.sink_names("own_tracker:Mine,mlflow") == ["own_tracker:Mine", "mlflow"]
        assert send(["own_tracker:Mine"], study) == {"own_tracker:Mine": None}
        assert sinks[0] == ("open", study.name, study.path / "sinks" / "own_tracker-Mine")
        with pytest.raises(ConfigError, match=r"does not derive from sd35bench.sinks.base.Sink"):
            base.sink_names("own_tracker:No")
    finally:
        plugins.use_folder(None)
