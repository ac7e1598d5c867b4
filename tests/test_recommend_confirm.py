"""`recommend --confirm --run`: held-out images through the run itself, then what they say."""

import shlex
from pathlib import Path

import pytest
import yaml

from sd35bench.cli import main
from sd35bench.study.store import Study
from tests.tune_driver import score

pytestmark = pytest.mark.usefixtures("empty_folder", "fakes_here", "ruled")

NEGATIVE = "blurry, low quality"
GRID = [
    *("-m", "backend=fake", "prompts.limit=6", "study=t", "steps=4,40", "cfg=5", "seed=0,1"),
    f'negative_prompt="{NEGATIVE}"',
]


@pytest.fixture
def ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score by a rule: looking for shapes on 100 images takes 5 s, and this is about splits."""

    def by_rule(study: Study, *_: object) -> dict[str, object]:
        score(study)
        return {"refused": {}}

    monkeypatch.setattr("sd35bench.cli.study.score_missing", by_rule)


def _splits() -> dict[str, set[int]]:
    """Which steps were run on which split."""
    found: dict[str, set[int]] = {}
    for record in Study.open(Path("results"), "t").records():
        found.setdefault(record.trial.prompt.split, set()).add(record.trial.request.steps)
    return found


def _unwrapped(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_confirm_run_makes_the_held_out_images_and_says_what_they_say(call, capsys):
    call("run", *GRID)
    code, before = call("recommend", "t", "--confirm", "--profile", "balanced")
    commands = [c["command"] for c in before["confirm"]["commands"]]
    assert code == 0
    assert len(commands) >= 2
    assert main(["recommend", "t", "--confirm", "--profile", "balanced"]) == 0
    assert [line for line in _unwrapped(capsys) if line.startswith("sd35bench run")] == commands
    assert set(_splits()) == {"tune"}  # printed, not run
    code, document = call("recommend", "t", "--confirm", "--run", "--profile", "balanced")
    assert code == 0
    entries = [d["profiles"]["balanced"]["text-to-image"] for d in (before, document)]
    assert entries[0]["confirmation"]["status"] == "not run"
    assert entries[1]["confirmation"]["status"] in ("confirmed", "undecided", "contradicted")
    assert entries[1]["confirmation"]["n_prompts"] >= 6
    assert entries[1]["setting"] == entries[0]["setting"]
    assert document["confirm"] == {"commands": [], "images": 0}
    asked = [c["setting"]["steps"] for c in before["confirm"]["commands"]]
    assert _splits() == {"tune": {4, 40}, "heldout": set(asked)}
    made = Study.open(Path("results"), "t").records()
    assert {r.trial.request.negative_prompt for r in made} == {NEGATIVE}
    written = yaml.safe_load(Path("results/t/recommended.yaml").read_text())
    answer = written["profiles"]["balanced"]["text-to-image"]
    assert answer["setting"] == entries[1]["setting"]
    assert written["confirmed"] is document["confirmed"]


@pytest.mark.slow
def test_a_choice_on_prompts_of_ones_own_is_confirmed_by_the_printed_commands(call, capsys):
    Path("data").mkdir()
    lines = [f"a red circle left of a blue square on white, number {i}" for i in range(40)]
    Path("data/mine.csv").write_text("text\n" + "".join(f'"{line}"\n' for line in lines))
    own = ["prompts.path=data/mine.csv", "prompts.columns.prompt=text", "study=t", "cfg=5"]
    assert main(["run", "-m", "backend=fake", "steps=4,40", *own]) == 0
    out = capsys.readouterr().out
    assert out.index("are held out, by a hash") < out.index("study t:")
    code, before = call("recommend", "t", "--confirm", "--profile", "balanced")
    assert (code, set(_splits())) == (0, {"tune"})
    assert len(before["confirm"]["commands"]) >= 2
    code, document = call("recommend", "t", "--confirm", "--run", "--profile", "balanced")
    entry = document["profiles"]["balanced"]["text-to-image"]
    assert code == 0
    assert entry["confirmation"]["status"] in ("confirmed", "undecided", "contradicted")
    assert set(_splits()) == {"tune", "heldout"}


@pytest.mark.slow
def test_command_of_the_recommendation_runs_as_it_is_printed(call):
    call("run", *GRID)
    _, document = call("recommend", "t", "--profile", "balanced")
    entry = document["profiles"]["balanced"]["text-to-image"]
    code, answer = call(*shlex.split(entry["command"])[1:])
    assert (code, answer["study"], answer["done"]) == (0, "recommended-balanced", 12)
    made = Study.open(Path("results"), "recommended-balanced").records()
    assert {r.trial.request.steps for r in made} == {entry["setting"]["steps"]}
    there = {r.trial.key for r in Study.open(Path("results"), "t").records()}
    assert {r.trial.key for r in made} <= there  # the very same prompts, seeds and negatives
    # The command of a default that is not in the study adds it to the study.
    add = next(d for d in entry["named_defaults"] if d["name"] == "diffusers")["command"]
    assert call(*shlex.split(add)[1:])[0] == 0
    _, document = call("recommend", "t", "--profile", "balanced")
    entry = document["profiles"]["balanced"]["text-to-image"]
    named = {d["name"]: d["status"] for d in entry["named_defaults"]}
    assert named["diffusers"] in ("in the study", "chosen")


def test_markdown_is_all_that_stdout_gets(call, capsys):
    call("run", *GRID)
    capsys.readouterr()
    assert main(["recommend", "t", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("## Recommended settings from study t\n")
    assert "written:" not in out


def test_profile_of_ones_own_is_a_file(call):
    call("run", *GRID)
    mine = Path("mine.yaml")
    mine.write_text("latency_limit_s: 0.000001\n")
    code, document = call("recommend", "t", "--profile", "final,mine.yaml")
    assert (code, list(document["profiles"])) == (0, ["final", "mine"])
    found = document["profiles"]["mine"]["text-to-image"]
    assert found["setting"] is None
    assert "no setting is within 1e-06 s" in found["evidence"]["reason"]
    mine.write_text("name: final\n")
    code, document = call("recommend", "t", "--profile", "final,mine.yaml")
    assert (code, document["error"]["type"]) == (2, "ConfigError")
    assert "two profiles are called 'final'" in document["error"]["message"]


@pytest.mark.parametrize(
    "flags", [["--run"], ["--markdown", "--confirm"]], ids=["run-alone", "two-outputs"]
)
def test_flags_that_do_not_go_together_are_the_users_error(call, flags):
    code, document = call("recommend", "t", *flags)
    assert (code, document["error"]["type"]) == (2, "ConfigError")


def test_run_of_hosted_settings_is_refused_before_anything_is_spent():
    from sd35bench.cli.run import run_confirming
    from sd35bench.errors import ConfigError

    with pytest.raises(ConfigError, match="does not spend money"):
        run_confirming([{"hosted": True, "command": "sd35bench run backend=eachlabs"}])
