"""Completion scripts: bash's is evaluated, all are made of what the verbs take."""

import shutil
import subprocess

import pytest

from sd35bench.cli import VERBS, answer
from sd35bench.config.files import choices
from sd35bench.errors import ConfigError

ASK = """
eval "$SCRIPT"
while IFS= read -r COMP_LINE; do
  COMP_POINT=${#COMP_LINE}
  _sd35bench
  echo "${COMPREPLY[*]}"
done
"""
LINES = {
    "sd35bench sh": {"show"},
    "sd35bench ": {*VERBS, "--help", "--version"},
    "sd35bench show --so": {"--sort"},
    "sd35bench show --sort steps --cs": {"--csv"},
    "sd35bench show g": {"grid", "gate"},
    "sd35bench show --results-dir other ": {"third"},
    "sd35bench show --results-dir=other th": {"third"},
    "sd35bench show --results-dir ot": {"other"},
    "sd35bench compare grid ga": {"gate"},
    "sd35bench compare grid gate --policy=sp": {"speed"},
    "sd35bench run model=sd35-m": {"sd35-medium"},
    "sd35bench run -m backend=eager,int8-w8a8-": {"eager,int8-w8a8-bf16"},
    "sd35bench run sampler=he": {"heun"},
    "sd35bench run step": {"steps=", "step_cache="},
    "sd35bench serve no_auth=t": {"true"},
    "sd35bench baseline m": {"make"},
    "sd35bench score grid --metric prompt_": {"prompt_accuracy"},
    "sd35bench nosuch ": set(),
}


@pytest.fixture(scope="module")
def scripts():
    return {s: answer("completion", [s]).document["script"] for s in ("bash", "zsh", "fish")}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on PATH")
def test_bash_completes_verbs_flags_fields_values_and_studies(scripts, tmp_path):
    for name in ("results/grid", "results/gate", "other/third"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "study.json").touch()
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK],
        input="\n".join(LINES) + "\n",
        env={"SCRIPT": scripts["bash"], "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = dict(zip(LINES, (set(line.split()) for line in done.stdout.splitlines()), strict=True))
    assert found == LINES


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_verb_and_choice_is_in_every_script(scripts, shell):
    words = set(scripts[shell].replace("'", " ").replace("=", " ").split())
    assert words >= {*VERBS, *choices("model"), *choices("backend"), "prompt_strength", "heun"}


def test_the_newer_shells_read_their_scripts_where_they_are_there(scripts, tmp_path):
    for shell in ("zsh", "fish"):
        if shutil.which(shell) is not None:
            path = tmp_path / shell
            path.write_text(scripts[shell])
            assert subprocess.run([shell, "-n", path], check=False).returncode == 0


def test_a_shell_that_has_no_script_is_refused():
    with pytest.raises(ConfigError, match="give one of bash, zsh, fish; did you mean bash"):
        answer("completion", ["bsh"])
