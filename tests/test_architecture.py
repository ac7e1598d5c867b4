"""The shape of the code: what loads torch, what must not exist, who imports whom."""

import os
import re
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from sd35bench.backends.fake import FakeBackend
from sd35bench.workers.worker import BatchJob

ROOT = Path(__file__).parent.parent
TORCH_FREE = [
    "sd35bench.types",
    "sd35bench.errors",
    "sd35bench.plugins",
    "sd35bench.config",
    "sd35bench.plan",
    "sd35bench.prompts",
    "sd35bench.study.store",
    "sd35bench.workers.limits",
    "sd35bench.engine",
    "sd35bench.machine.rates",
    "sd35bench.workers.process",
    "sd35bench.trials",
    "sd35bench.workers.worker",
    "sd35bench.analysis",
    "sd35bench.analysis.summary",
    "sd35bench.recommend.advice",
    "sd35bench.cli",
    "sd35bench.api",
    "sd35bench.nano.prompts",
    "sd35bench.nano.verifier",
]


PROBE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name)
"""
"""Names the first module after which torch is there."""


def first_that_loads_torch(*modules, **environment):
    command = [sys.executable, "-c", PROBE, *modules]
    given = {"env": {**os.environ, **environment}, "capture_output": True, "text": True}
    return subprocess.run(command, cwd=ROOT, **given).stderr.strip()


def test_modules_load_no_torch():
    assert first_that_loads_torch(*TORCH_FREE) == ""


def test_torch_probe_can_fail(tmp_path):
    (tmp_path / "torch.py").touch()  # the real one takes 3 s to load
    assert first_that_loads_torch("json", "torch", PYTHONPATH=str(tmp_path)) == "torch"


def test_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_kernels_folder_does_not_shadow_the_kernels_distribution():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_backends_register_modules_that_exist():
    import importlib.util

    from sd35bench.backends.base import KINDS

    for target in KINDS.values():
        assert importlib.util.find_spec(target.split(":")[0]) is not None


def undrawn(text):
    """What the drawing in CONTRIBUTING.md lacks of the root, and what it names without cause."""
    drawing = text.split("```")[1]
    package = ROOT / "sd35bench"
    there = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")} - {"configs/"}
    named = set(re.findall(r"(?<![\w/])[a-z_0-9]+\.py\b", drawing)) | set(
        re.findall(r"\bsd35bench/([a-z_]+(?:\.py|/))", drawing)
    )
    files = {path.name for path in package.rglob("*.py")}
    absent = {n for n in named if not (n in files or (package / n).is_dir())}
    return there - named, absent


def test_contributing_draws_the_whole_root_and_nothing_else():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert undrawn(text) == (set(), set())
    # Mutants: a folder that is left out, and a module that moved.
    assert undrawn(text.replace("sd35bench/machine/ ", "")) == ({"machine/"}, set())
    assert undrawn(text.replace("trials.py  ", "runs.py  ")) == ({"trials.py"}, {"runs.py"})


def test_contributing_sends_to_names_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"`(\w+)`(?: and `(\w+)`)? in\s+`(sd35bench/[\w/]+\.py)`", text)
    assert len(found) >= 6
    for *names, path in found:
        code = (ROOT / path).read_text()
        missing = [n for n in names if n and not re.search(rf"^(def |class )?{n}\b", code, re.M)]
        assert not missing, f"CONTRIBUTING.md says {missing} of {path}"


WHERE = re.compile(
    r"remote is (not )?None|\.is_hosted\b|\b(row|self|like)\.hosted\b|_is_hosted\(conf\)"
    r"|\[.hosted.\]"
)
"""How a line asks whether a hosted service made something."""


def test_few_lines_ask_where_trials_run():
    """That is the engine's affair, and what a load or a row answers by itself: it was 67 lines."""
    package = ROOT / "sd35bench"
    home = ("remote/", "engine.py", "types.py", "analysis/table.py")
    paths = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    lines = [
        f"{name}: {line.strip()}"
        for name, path in paths.items()
        if not name.startswith(home)
        for line in path.read_text().splitlines()
        if WHERE.search(line)
    ]
    assert len(lines) <= 24, lines


def files_on_the_stack() -> set[str]:
    """Files of the package that have called each other up to here."""
    paths = (Path(frame.filename) for frame in traceback.extract_stack())
    package = ROOT / "sd35bench"
    return {str(p.relative_to(package)) for p in paths if p.is_relative_to(package)}


@pytest.mark.usefixtures("empty_folder", "fakes_here")
def test_steps_travel_through_six_of_our_files_to_the_backend(call, monkeypatch):
    """From the command line to the worker, and on to what makes the image."""
    asking, making = set(), set()
    send, generate = Connection.send, FakeBackend.generate

    def sent(self, message):
        if isinstance(message, BatchJob):
            asking.update(files_on_the_stack())
        send(self, message)

    def generated(self, requests, inits):
        making.update(files_on_the_stack())
        return generate(self, requests, inits)

    monkeypatch.setattr(Connection, "send", sent)
    monkeypatch.setattr(FakeBackend, "generate", generated)
    assert call("run", "backend=fake", "steps=2", "prompts.limit=1")[0] == 0
    assert asking == {"cli/__init__.py", "cli/run.py", "workers/process.py", "workers/lane.py"}
    assert making == {"workers/worker.py"}, "and the backend's own file"
