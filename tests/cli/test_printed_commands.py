"""Every command that is printed can be pasted: it has the folders that this one was given."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import sd35bench
from sd35bench import plugins
from sd35bench.cli import VERBS, answer
from sd35bench.cli.parser import parse
from sd35bench.cli.recommended import with_recommended
from sd35bench.cli.run import COMMANDS
from sd35bench.recommend.reproduce import run_command
from sd35bench.report.provenance import rerun_commands
from tests.studies.memory import record

PACKAGE = Path(sd35bench.__file__).parent
COMMAND = re.compile(rf"sd35bench ({'|'.join(VERBS)}) ($|-|[\w.]+=|[A-Z]{{3,}})")
HELP = ("Command", "Flag")
"""Calls whose texts are help: their examples are of nobody's folders."""


@pytest.fixture
def folders(tmp_path):
    """A command that was given two folders, one with a space in its name."""
    conf, code = tmp_path / "my conf", tmp_path / "code"
    conf.mkdir()
    code.mkdir()
    answer("completion", ["bash", f"--config-dir={conf}", f"--plugin-dir={code}"])
    yield [f"--config-dir={conf}", f"--plugin-dir={code}"]
    answer("completion", ["bash"])


def test_commands_of_a_setting_name_the_folders_and_parse(folders):
    for command in (run_command([record(0)], "s"), rerun_commands("s", [record(0)])[0]["command"]):
        words = shlex.split(command)
        assert words[-2:] == folders
        given = parse("run", COMMANDS["run"], words[2:], as_json=True)
        assert given.config_dir == Path(folders[0].partition("=")[2])


def test_the_next_command_forgets_the_folders(folders):
    assert plugins.command("show s").endswith(folders[1])
    answer("completion", ["bash"])
    assert plugins.command("show s") == "sd35bench show s"


def test_a_file_names_no_folder_of_code(folders, tmp_path):
    """`run from=FILE` takes what a setting is, and flags from the command line alone."""
    path = tmp_path / "recommended.yaml"
    command = run_command([record(0), record(0, seed=1)], "s")
    path.write_text(f"profiles: {{final: {{text-to-image: {{command: {command!r}}}}}}}\n")
    given = with_recommended(parse("run", COMMANDS["run"], [f"from={path}"], as_json=True))
    assert set(given.flags) == {"-m"}
    assert not [word for word in given.settings if word.startswith("-")]
    assert "steps=8" in given.settings


USAGE = (
    "# sd35bench recommend ",  # a file's first line: what wrote it
    "# Made by `sd35bench completion ",
    "expected `sd35bench compare BASELINE CANDIDATE`, not ",
)


def _texts(node: ast.AST) -> Iterator[str]:
    """Texts of a module but for docstrings and help."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in (*HELP, "command"):
            return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "USAGE":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from _texts(child)


def _by_hand(source: str) -> list[str]:
    if not re.search(r"sd35bench [a-z]+ ", source):
        return []
    found = (text for text in _texts(ast.parse(source)) if COMMAND.search(text))
    return [text for text in found if text not in USAGE]


def test_no_command_is_written_by_hand():
    """A verb alone may be named; with words of its own it is for pasting."""
    found = {
        str(path.relative_to(PACKAGE)): texts
        for path in PACKAGE.rglob("*.py")
        if (texts := _by_hand(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        'f"next: sd35bench show {name}"',
        '"add it: sd35bench run -m steps=4"',
        '"sd35bench rm STUDY"',
    ],
)
def test_mutant_that_writes_one_by_hand_is_found(source):
    assert _by_hand(f"print({source})")
