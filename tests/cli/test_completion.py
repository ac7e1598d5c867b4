"""Completion scripts: bash's is evaluated, all are made of what the verbs take."""

import os
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


def _answers(command, script, folder):
    """What a shell completes of each of `LINES`, in a folder with studies."""
    for name in ("results/grid", "results/gate", "other/third"):
        (folder / name).mkdir(parents=True)
        (folder / name / "study.json").touch()
    done = subprocess.run(
        command,
        input="\n".join(LINES) + "\n",
        env={"SCRIPT": script, "PATH": os.environ["PATH"], "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    return dict(zip(LINES, (set(line.split()) for line in lines), strict=True))


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on PATH")
def test_bash_completes_verbs_flags_fields_values_and_studies(scripts, tmp_path):
    assert _answers(["bash", "--norc", "-c", ASK], scripts["bash"], tmp_path) == LINES


ASK_FISH = """
echo $SCRIPT | string split0 | source
while read -l line
  echo (complete -C "$line" | string replace -r '\\t.*' '')
end
"""
ASK_ZSH = r"""
compdef() { : }
compset() { PREFIX=${PREFIX##${~2}} }
compadd() {
  local name=$@[-1]
  answered+=(${(M)${(P)name}:#${PREFIX}*})
}
_files() { answered+=(${PREFIX}*(/N)) }
eval "$SCRIPT"
while IFS= read -r line; do
  words=(${(s: :)line}) answered=()
  [[ $line == *" " ]] && words+=("")
  CURRENT=$#words PREFIX=$words[-1]
  _sd35bench
  print -r -- $answered
done
"""


@pytest.mark.parametrize(("shell", "ask"), [("fish", ASK_FISH), ("zsh", ASK_ZSH)])
def test_the_newer_shells_complete_the_same(scripts, shell, ask, tmp_path):
    """Not in the default image; executed with fish 3.6 and zsh 5.9."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on PATH")
    found = _answers([shell, "-c", ask], scripts[shell], tmp_path)
    wanted = dict(LINES)
    if shell == "fish":
        wanted |= {"sd35bench ": {*VERBS}, "sd35bench show --results-dir ot": {"other/"}}
        wanted["sd35bench compare grid gate --policy=sp"] = {"--policy=speed"}
        names = {"model": "sd35-m", "sampler": "he"}
        whole = {f"sd35bench run {name}={text}": f"{name}=" for name, text in names.items()}
        whole["sd35bench serve no_auth=t"] = "no_auth="
        wanted |= {line: {head + w for w in LINES[line]} for line, head in whole.items()}
        wanted["sd35bench run -m backend=eager,int8-w8a8-"] = {"backend=eager,int8-w8a8-bf16"}
    else:
        wanted["sd35bench run -m backend=eager,int8-w8a8-"] = {"int8-w8a8-bf16"}
    assert found == wanted


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
