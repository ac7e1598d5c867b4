"""docs/ci.md as it stands there: its files, its workflow, its commands and its figures."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from sd35bench.cli import compare, main
from sd35bench.cli.parser import parse
from sd35bench.config import check_overrides, compose
from sd35bench.config.overrides import written
from sd35bench.score import score_study

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "ci.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
FILES = {
    re.search(r"^# ([\w./-]+\.yml|[\w./-]+\.yaml)", text, re.MULTILINE)[1]: text
    for kind, text in BLOCKS
    if kind == "yaml"
}
SHELL = [text for kind, text in BLOCKS if kind == "bash"]
MAKE, TRY, RERUN, IN_TURN, REFACTOR = SHELL
WORKFLOW = yaml.safe_load(FILES[".github/workflows/gate.yml"])
GITLAB = yaml.safe_load(FILES[".gitlab-ci.yml"])["gate"]
STEPS = {s["name"]: s for s in WORKFLOW["jobs"]["gate"]["steps"] if "run" in s}


def commands(script: str) -> Iterator[tuple[list[str], int]]:
    """Each `sd35bench` command of a script: its arguments, and its exit code."""
    for line in script.replace("\\\n", " ").splitlines():
        code = re.search(r"# exit code (\d)", line)
        words = shlex.split(line.partition("||")[0], comments=True)
        if words and Path(words[0]).name == "sd35bench":
            yield words[1:], 0 if code is None else int(code.group(1))


SCRIPTS = [*SHELL, *(step["run"] for step in STEPS.values()), *GITLAB["script"]]
COMMANDS = [list(c) for c in dict.fromkeys(tuple(c) for s in SCRIPTS for c, _ in commands(s))]
INSTEAD = [
    found
    for row in re.findall(r"^\| .* \| `(?:model|prompts)[.=].*$", TEXT, re.MULTILINE)
    for found in re.findall(r"`((?:\S+=\S+ ?)+)`", row)
]


def write_files(root: Path) -> None:
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    shutil.copytree(root / "gate", root / "base")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The document's files in the working directory; small, and with no need of a model."""
    write_files(tmp_path)
    for folder in ("gate", "base"):
        path = tmp_path / folder / "experiment" / "gate.yaml"
        text = path.read_text()
        for found, instead in (("/backend: eager", "/backend: fake"), ("limit: 128", "limit: 12")):
            assert text.count(found) == 1
            text = text.replace(found, instead)
        path.write_text(text)
    only = partial(score_study, metrics=["prompt_accuracy"])
    monkeypatch.setattr(compare, "score_missing", only)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    return tmp_path


def call(arguments: list[str], *more: str) -> int:
    return main([*(a.replace("$GITHUB_STEP_SUMMARY", "summary.md") for a in arguments), *more])


def run_all(script: str) -> None:
    for arguments, code in commands(script):
        # Without a model two steps do no harm, so that one is broken another way.
        broken = ["backend.fail_every=2"] if "study=broken" in arguments else []
        assert call(arguments, *broken) == (3 if broken else code), arguments


def test_the_document_has_what_is_tested_here():
    assert len(COMMANDS) >= 15
    assert len(INSTEAD) == 3
    assert {a[0] for a in COMMANDS} == {"run", "compare", "baseline"}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_there_is(repository, arguments):
    verb, *rest = arguments
    if verb == "run":
        assert rest[0] == "--config-dir"
        asked = [text.replace("$i", "1") for text in rest[2:]]
        check_overrides(asked, multirun=False, extra=repository / rest[1])
    else:
        parse(verb, compare.COMMANDS[verb], rest, as_json=False)


@pytest.mark.parametrize("text", INSTEAD)
def test_what_stands_instead_of_nano_is_known(repository, text):
    asked = ["experiment=gate", *text.split()]
    check_overrides(asked, multirun=False, extra=repository / "gate")
    compose(written(asked), repository / "gate")


@pytest.mark.usefixtures("fakes_here")
def test_the_whole_path_on_a_backend_without_a_model(repository):
    """Baseline, workflow, then a repeated run that passes and a broken one that fails."""
    assert call(next(a for a, _ in commands(STEPS["Compare"]["run"]))) == 2  # no baseline yet
    run_all(MAKE)
    for name in ("Make the candidate's images", "Compare", "Make what accepts the change"):
        run_all(STEPS[name]["run"])
    summary = Path("summary.md").read_text()
    # 12 prompts are few, but the same images pass at any number.
    assert summary.startswith("# Pass: candidate against baseline")
    suites = list(ElementTree.parse("out/gate.xml").getroot())
    assert suites
    assert {suite.get("failures") for suite in suites} == {"0"}
    assert Path("out/gate.html").stat().st_size > 10_000
    accepted = ["compare", "out/baseline.json", "candidate", "--policy", "gate/policy.yaml"]
    assert call(accepted) == 0
    run_all(TRY)


@pytest.mark.parametrize(("code", "goes_on"), [(0, True), (2, False), (3, True), (4, False)])
def test_the_workflow_goes_on_after_failed_trials_only(code, goes_on):
    script = STEPS["Make the candidate's images"]["run"]
    stub = f"sd35bench() {{ return {code}; }}\n"
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", stub + script])
    assert (done.returncode == 0) == goes_on


def test_the_workflow_keeps_its_files_when_the_gate_is_red():
    assert WORKFLOW[True] == "pull_request"  # YAML 1.1 reads `on` as true; GitHub does not
    steps = WORKFLOW["jobs"]["gate"]["steps"]
    red = [s.get("name", s.get("uses", "")) for s in steps if s.get("if") == "${{ !cancelled() }}"]
    assert red == ["Make what accepts the change", "actions/upload-artifact@v4"]
    assert steps[-1]["with"]["path"] == "out/"
    written = [a for arguments in COMMANDS for a in arguments if a.startswith("out/")]
    assert {"out/gate.xml", "out/gate.html", "out/baseline.json"} <= set(written)
    assert all(re.search(r"@v\d+$", s["uses"]) for s in steps if "uses" in s)
    assert GITLAB["artifacts"]["reports"]["junit"] == "out/gate.xml"


def test_figures_are_those_of_the_validity_page():
    measured = (DOCS / "validity.md").read_text().splitlines()
    quoted = [line for line in TEXT.splitlines() if re.match(r"\| (accuracy -|\d+% slower)", line)]
    assert len(quoted) == 13
    assert [line for line in quoted if line not in measured] == []


def test_links_lead_somewhere_and_nowhere_else():
    links = re.findall(r"\]\(([^)]*)\)", TEXT)
    assert links
    assert all((DOCS / link).is_file() for link in links)
    assert "http" not in TEXT


# On the embedded model, as typed ------------------------------------------------------------------


def bash(script: str, root: Path) -> subprocess.CompletedProcess[str]:
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n"
    summary = "export GITHUB_STEP_SUMMARY=summary.md\n"
    command = ["bash", "-eo", "pipefail", "-c", path + summary + script]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_path_on_nano(tmp_path):
    write_files(tmp_path)
    assert bash(MAKE, tmp_path).returncode == 0
    for name, step in STEPS.items():
        if name != "Install":
            done = bash(step["run"], tmp_path)
            assert done.returncode == 0, done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Pass")
    assert "[-2.84 %, +2.84 %]" in summary
    assert "less than 2.84 % more fail" in TEXT
    done = bash(TRY, tmp_path)
    assert done.returncode == 1
    assert "fail: broken against baseline" in done.stdout
    assert "prompt_accuracy is worse than the margin allows" in done.stdout


@pytest.mark.slow
def test_speed_by_rerun_and_in_turn(repository):
    """Without a model; both ways give the couples that the document says."""
    run_all(RERUN)
    shutil.rmtree("results")
    for arguments, _ in commands(IN_TURN):
        for i in range(1, 6) if "$i" in arguments[-1] else [0]:
            more = ["backend.delay_s=0.01"] if "study=branch" in arguments[-1] else []
            judged = arguments[0] == "compare"
            code = call([a.replace("$i", str(i)) for a in arguments], *more)
            assert code == (1 if judged else 0)
