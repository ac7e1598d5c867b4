"""Code that lies where data is expected: in the working folder, and in a configuration folder."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.experiment import Experiment, Figure
from tests.test_group_files import ATTACKS
from tests.test_working_folder import MARKER, NAMES, PACKAGE

VERBS = (
    ["run", "backend=fake", "prompts.limit=1", "study=t"],
    ["score", "t", "--metric", "sharpness"],
    ["tune", "backend=fake", "study=u", "steps=1,2", "prompts.limit=4", "first=4", "--dry-run"],
    ["show", "t"],
    ["report", "t"],
    ["doctor", "fake"],
)


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Run verbs in a folder of hostile modules, then every attack by a configuration folder."""
    imported, failed = _working_folder(folder / "work")
    ran, unnamed = _config_folders(folder)
    return [
        Figure(name="module names in the working folder", value=len(NAMES), least=20),
        Figure(name="verbs that were run there", value=len(VERBS)),
        Figure(name="modules imported from there", value=len(imported), most=0),
        Figure(name="verbs that failed there", value=len(failed), most=0),
        Figure(name="configuration attacks", value=2 * len(ATTACKS), least=12),
        Figure(name="attacks that ran", value=len(ran), most=0),
        Figure(name="attacks not refused by file and line", value=len(unnamed), most=0),
    ], [*imported, *failed, *ran, *unnamed]


def _working_folder(folder: Path) -> tuple[list[str], list[str]]:
    folder.mkdir()
    for name in NAMES:
        body = f"open({str(folder / MARKER)!r}, 'a').write({name + chr(10)!r})\n"
        (folder / f"{name}.py").write_text(body)
    failed = [
        f"{' '.join(verb)}: {done.stderr[-200:]}"
        for verb in VERBS
        if (done := _verb(folder, *verb)).returncode != 0
    ]
    marker = folder / MARKER
    return (sorted(set(marker.read_text().split())) if marker.exists() else []), failed


def _config_folders(folder: Path) -> tuple[list[str], list[str]]:
    ran, unnamed = [], []
    for number, (name, text) in enumerate(ATTACKS.items()):
        here = folder / f"attack-{number}"
        (here / "theirs" / "experiment").mkdir(parents=True)
        (here / "theirs" / "experiment" / "mine.yaml").write_text(text)
        words = ["run", "experiment=mine", "backend=fake", "--config-dir", "theirs"]
        for more in ([], ["--dry-run"]):
            done = _verb(here, *words, *more)
            if (here / "marker").exists() or sorted(os.listdir(here)) != ["theirs"]:
                ran.append(name)
            if done.returncode != 2 or not re.search(r"mine\.yaml:\d+: ", done.stderr):
                unnamed.append(f"{name}: {done.stderr[-200:]}")
    return ran, unnamed


def _verb(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(PACKAGE.parent), str(PACKAGE.parent / "kernels")))
    return subprocess.run(
        [sys.executable, "-P", "-m", "sd35bench", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


CODE = Experiment(
    name="code",
    title="Code where data is expected",
    did=(
        f"Verbs ({', '.join(verb[0] for verb in VERBS)}) run in a folder with modules named after"
        f" {len(NAMES)} that Python or we import; then `run`, with and without --dry-run, on"
        f" {len(ATTACKS)} configuration folders that carry `hydra` sections, `_target_` in several"
        " guises, or resolvers."
    ),
    fails_if=(
        "a module of the working folder is imported, a verb fails there, an attack leaves a trace,"
        " or one is refused without naming file and line."
    ),
    shows_not=(
        "Names that no library of today imports. What a model's folder may carry is tested in"
        " tests/loading/test_sources.py."
    ),
    run=run,
)
