"""What a configuration folder of somebody else may carry: fields, and nothing that runs."""

import contextlib
import sys
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.config import compose
from sd35bench.config.files import check_group_file
from sd35bench.errors import ConfigError

HEAD = "# @package _global_\n"
TARGET = "{_target_: builtins.open, file: marker, mode: w}"
ATTACKS = {
    "callback": HEAD + f"hydra:\n  callbacks:\n    mine: {TARGET}\n",
    "launcher": HEAD + f"hydra: {{launcher: {TARGET}}}\n",
    "package": f"# @package hydra\ncallbacks:\n  mine: {TARGET}\n",
    "package of a part": f"# @package hydra.callbacks\nmine: {TARGET}\n",
    "target in a group": HEAD + f"backend: {{options: {TARGET}}}\n",
    "quoted target": HEAD + 'backend: {"\\u005ftarget_": "builtins.open"}\n',
    "target by an anchor": HEAD + f"axes: &a {TARGET}\nbackend: {{options: *a}}\n",
    "defaults": "# @package _global_\ndefaults:\n  - override hydra/launcher: joblib\n",
    "defaults by a path": HEAD + "defaults:\n  - /hydra/callbacks: mine\n",
    "defaults into it": HEAD + "defaults:\n  - /model@hydra.callbacks: nano\n",
    "environment": HEAD + "study: ${oc.env:HOME}\n",
    "computed resolver": HEAD + "a: oc.env\nstudy: ${${a}:HOME}\n",
    "decoded": HEAD + 'study: "x${oc.decode:1}"\n',
    "in a key": HEAD + 'axes: {"${oc.env:HOME}": [1]}\n',
}
RUN = ["run", "experiment=mine", "backend=fake", "prompts.limit=1", "--config-dir", "theirs"]

pytestmark = pytest.mark.usefixtures("empty_folder")


def folder(text: str) -> Path:
    path = Path("theirs/experiment/mine.yaml")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS)
def test_what_would_run_is_refused_by_file_and_line(capsys, text, more):
    path = folder(text)
    assert main([*RUN, *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sd35bench: {path}:")
    line = int(said.split(":")[2])
    assert 1 <= line <= len(text.splitlines())
    assert sorted(p.name for p in Path().iterdir()) == ["theirs"]


def test_mutant_that_looks_at_nothing_runs_what_it_is_told(monkeypatch):
    module = sys.modules["sd35bench.config.compose"]  # the package has a function of that name
    monkeypatch.setattr(module, "check_group_file", lambda *_: None)
    folder(ATTACKS["callback"])
    with contextlib.suppress(Exception):
        main([*RUN, "--dry-run"])
    assert Path("marker").exists()


@pytest.mark.parametrize("verb", ["tune", "serve", "export"])
def test_every_verb_that_takes_a_folder_looks_at_it(capsys, verb):
    folder(ATTACKS["callback"])
    more = {"tune": ["study=t", "steps=1,2"], "serve": ["no_auth=true"], "export": []}[verb]
    assert main([verb, *more, "--config-dir", "theirs"]) == 2
    assert "theirs/experiment/mine.yaml:2: hydra" in capsys.readouterr().err


def test_a_folder_called_hydra_is_refused():
    path = Path("theirs/hydra/launcher/basic.yaml")
    path.parent.mkdir(parents=True)
    path.write_text("x: 1\n")
    with pytest.raises(ConfigError, match=r"basic\.yaml:1: a folder"):
        check_group_file(path, Path("theirs"))


def test_what_sets_fields_is_taken():
    body = "axes: {steps: [2, 4]}\nprompts: {limit: 3}\nseed: ${oc.select:order_seed,1}\n"
    folder(HEAD + body + 'negative_prompt: "a hydra, _target_"\ncfg: 4\n')
    found = compose(["experiment=mine", "backend=fake"], Path("theirs"))
    assert found.negative_prompt == "a hydra, _target_"


@pytest.mark.parametrize("text", ["a: [", "a: *b\n", "\xff", "[" * 5000])
def test_what_is_no_yaml_is_one_line(text):
    path = folder("")
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine\.yaml: "):
        check_group_file(path, Path("theirs"))
