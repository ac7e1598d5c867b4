"""`prompts.limit=auto`: a pilot, a plan from it, and what is refused."""

import pytest

from sd35bench.cli import answer, auto_limit
from sd35bench.cli.auto_limit import PILOT, Planned, read_auto, run_planned
from sd35bench.cli.output import Answer
from sd35bench.cli.parser import Given
from sd35bench.errors import ConfigError
from tests.studies.memory import LOAD, planted

NEAR = {(4, 4.0): (0.80, 0.10), (12, 4.0): (0.82, 0.30), (28, 4.0): (0.30, 0.70)}
ASKED = ["-m", "steps=4,12,28", "prompts.limit=auto", "margin=0.05"]


def _given(*settings: str, dry: bool = False) -> Given:
    flags = {"--dry-run": ""} if dry else {}
    return Given(verb="run", words=[], settings=list(settings), flags=flags, as_json=True)


def _made(tmp_path, monkeypatch, study, *, settings=3, prompts=10_000, margin=0.05, load=LOAD):
    """Run with doubles that make nothing; returns the answer and the limits that were run."""
    made: list[str] = []
    monkeypatch.setattr(auto_limit.Study, "open", lambda *_: study)
    monkeypatch.setattr(auto_limit, "score_missing", lambda _: None)

    def make(given: Given) -> Answer:
        made.append(given.settings[-1])
        return Answer(document={"failed": 0})

    given = _given("steps=4,12,28", "prompts.limit=auto", f"margin={margin}")
    auto = read_auto(given.settings)
    assert auto is not None
    planned = Planned(settings, prompts, [load], "synthetic", tmp_path)
    return run_planned(given, auto, make, lambda _: planned), made


def test_the_pilot_comes_first_and_plans_the_rest(tmp_path, monkeypatch):
    study = planted(tmp_path, NEAR, prompts=PILOT, seeds=1)
    found, made = _made(tmp_path, monkeypatch, study)
    prompts = found.document["planned_prompts"]["prompts"]
    assert prompts > PILOT
    assert made == [f"prompts.limit={PILOT}", f"prompts.limit={prompts}"]


def test_where_the_pilot_decides_nothing_more_is_made(tmp_path, monkeypatch):
    study = planted(tmp_path, {k: NEAR[k] for k in ((4, 4.0), (28, 4.0))}, prompts=40)
    found, _ = _made(tmp_path, monkeypatch, study)
    assert found.document["planned_prompts"]["prompts"] == 40


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"settings": 1}, "one setting"),
        ({"prompts": 20}, "the set has 20"),
        ({"margin": 0.02}, "the set has 400 prompts"),
    ],
    ids=["one-setting", "small-file", "small-set"],
)
def test_what_cannot_be_planned_is_refused(tmp_path, monkeypatch, fields, why):
    study = planted(tmp_path, NEAR, prompts=PILOT, seeds=1)
    with pytest.raises(ConfigError, match=why):
        _made(tmp_path, monkeypatch, study, **fields)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["prompts.limit=auto"], "give margin=M"),
        (["prompts.limit=auto", "margin=wide"], "margin=wide: must be a number"),
        (["prompts.limit=auto", "margin=0"], "greater than 0"),
        (["prompts.limit=auto", "margin=0.1", "power=2"], "power=2"),
        (["prompts.limit=8", "margin=0.1"], "give it with prompts.limit=auto"),
    ],
)
def test_bad_wishes_are_refused_by_name(settings, why):
    with pytest.raises(ConfigError, match=why):
        read_auto(settings)


def test_a_dry_run_without_a_pilot_says_what_the_pilot_takes(tmp_path, capsys):
    words = [*ASKED, f"results_dir={tmp_path}", "study=new", "--dry-run"]
    found = answer("run", words)
    assert found.document["trials"] == 3 * PILOT
    assert "the pilot comes first" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
