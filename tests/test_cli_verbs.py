"""Help, and the verbs that read a study."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd35bench.cli import VERBS, main
from sd35bench.config import choices
from sd35bench.config.models import FIELDS

FAKE = ["backend=fake", "prompts.limit=2", "study=t"]
GRID = ["-m", *FAKE, "steps=4,16", "cfg=1,4", "seed=0,1"]

pytestmark = pytest.mark.usefixtures("empty_folder", "fakes_here")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples(capsys, verb):
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert f"sd35bench {verb} " in out
    assert "--json" in out


def test_run_help_lists_every_field_with_range_and_every_choice(capsys):
    main(["run", "--help"])
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for name, field in FIELDS.items():
        assert f"  {name}=" in out
        assert field.allowed in words
    for group in ("model", "backend", "prompts", "experiment"):
        assert ", ".join(choices(group)) in words
    assert max(map(len, out.splitlines())) <= 100


def test_main_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert main([]) == 2


def test_doctor_json_tells_of_one_thing(call):
    code, document = call("doctor", "backend fake")
    assert (code, document["ok"], document["failed"]) == (0, True, [])
    assert [check["name"] for check in document["checks"]] == ["backend fake"]


@pytest.mark.slow  # every backend's libraries, and one compilation: 5 s
def test_doctor_json_tells_what_works(call):
    code, document = call("doctor")
    assert code == 0
    checks = {check["name"]: check for check in document["checks"]}
    assert {"torch", "model nano", "backend eager", "backend fake", "chromium"} <= set(checks)
    assert {f"backend {name}" for name in choices("backend")} <= set(checks)
    assert {f"model {name}" for name in choices("model")} <= set(checks)
    assert len(checks) == len(document["checks"])
    assert checks["backend eager"]["ok"] is True
    assert all(c["remedy"] for c in checks.values() if c["ok"] is False)
    assert document["ok"] == (not document["failed"])


def test_study_verbs_chain_on_a_small_study(call):
    call("run", *GRID)
    code, scored = call("score", "t", "--metric", "prompt_accuracy")
    assert (code, scored["scored"]) == (0, {"prompt_accuracy": 16})
    code, shown = call("show", "t")
    assert code == 0
    assert sorted((s["steps"], s["cfg"]) for s in shown["settings"]) == [
        (4, 1.0),
        (4, 4.0),
        (16, 1.0),
        (16, 4.0),
    ]
    assert all(s["n"] == 4 and s["latency_s"]["p50"] > 0 for s in shown["settings"])
    code, _ = call("recommend", "t", "--profile", "balanced")
    assert code == 0
    assert Path("results/t/recommended.yaml").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "t", "--metric", "beauty"],
        ["score", "t", "metric.fid.referenc=x"],
        ["recommend", "t", "--profile", "finall"],
        ["show", "t", "--table"],
    ],
    ids=["metric", "option", "profile", "flag"],
)
def test_study_verbs_refuse_with_exit_code_2(call, arguments):
    call("run", *FAKE)
    code, document = call(*arguments)
    assert (code, document["error"]["type"]) == (2, "ConfigError")


def test_show_without_a_study_names_those_that_are_there(call):
    call("run", *FAKE)
    code, document = call("show")
    assert code == 2
    assert "there are: t" in document["error"]["message"]


def test_show_of_a_study_without_an_image_is_exit_code_2(call):
    call("run", *FAKE, "backend.fail_every=1")
    assert call("show", "t")[0] == 2


def test_the_command_works_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "sd35bench", "run", *FAKE, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 2


def test_the_command_works_as_the_packages_module():
    done = subprocess.run(
        [sys.executable, "-m", "sd35bench", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("sd35bench: which settings")
