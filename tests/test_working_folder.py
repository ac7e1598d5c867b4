"""A working folder is data: what lies in it under a module's name is not imported."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sd35bench

PACKAGE = Path(sd35bench.__file__).parent
NAMES = (
    *("profile", "select", "queue", "token", "numpy", "random", "json", "types", "string", "copy"),
    *("statistics", "secrets", "signal", "socket", "logging", "yaml", "psutil", "PIL", "torch"),
    *("sd35bench", "sitecustomize"),
)
MARKER = "imported-from-the-working-folder"


def starts() -> list[tuple[str, int, list[str]]]:
    """Every command line in the package that begins with this Python: file, line, next words."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "sys.executable" in text else ():
            words = list(map(ast.unparse, node.elts)) if isinstance(node, ast.List) else []
            if words[:1] == ["sys.executable"]:
                found.append((path.name, node.lineno, words[1:]))
    return found


def test_every_python_that_is_started_leaves_the_working_folder_out():
    found = starts()
    assert {name for name, _, _ in found} >= {"rates.py", "images.py"}
    assert [each for each in found if each[2][:1] != ["'-P'"]] == []


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    for name in NAMES:
        body = f"open({str(tmp_path / MARKER)!r}, 'a').write({name!r})\n"
        (tmp_path / f"{name}.py").write_text(body)
    return tmp_path


def run(hostile: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    given = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    given["PYTHONPATH"] = os.pathsep.join((str(PACKAGE.parent), str(PACKAGE.parent / "kernels")))
    return subprocess.run(
        [sys.executable, *command],
        cwd=hostile,
        env={**given, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.model
def test_a_run_imports_nothing_from_where_it_is_started(hostile):
    done = run(hostile, "-P", "-m", "sd35bench", "run", "backend=fake", "prompts.limit=1")
    assert done.returncode == 0, done.stderr
    assert not (hostile / MARKER).exists()


@pytest.mark.model
@pytest.mark.parametrize("module", ["sd35bench.workers.worker", "sd35bench.machine.rates"])
def test_mutant_without_the_flag_imports_what_lies_there(hostile, module):
    run(hostile, "-m", module, "--help")
    assert (hostile / MARKER).exists()
