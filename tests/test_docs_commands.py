"""Every command of README and docs/, executed page by page with stand-ins: minutes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sd35bench.cli import _command, main
from sd35bench.cli.parser import parse
from sd35bench.study.store import Study
from tests.docs_stand_in import ELSEWHERE, arguments, drifts, refusal, write_files
from tests.documents import ROOT, Shell, commands, pages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
READERS = (
    "reference",
    "data",
    "show",
    "recommend",
    "report",
    "score",
    "compare",
    "baseline",
    "merge",
    "verify",
    "clean",
)
PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
SERVED = "docs/providers.md"


def ours(name: str) -> list[Shell]:
    """The page's commands of ours, those within `docker run` too."""
    found = []
    for shell in commands(PAGES[name]):
        image = [i for i, w in enumerate(shell.words) if w.startswith("sd35bench:")]
        if shell.program == "sd35bench":
            found.append(shell)
        elif shell.words[:2] == ("docker", "run"):
            found.append(Shell(name, ("sd35bench", *shell.words[image[0] + 1 :]), shell.code))
    return found


def studies_read(shell: Shell) -> list[str]:
    """The studies that a command reads, by the parser that reads the command in earnest."""
    verb, *rest = shell.words[1:]
    if verb not in READERS:
        return []
    given = parse(verb, _command(verb), rest, as_json=False)
    asked = [w.removeprefix("study=") for w in given.settings if w.startswith("study=")]
    named = asked if verb == "reference" else given.words
    return [name for name in named if name.isalpha() and name != "make"]


def make_what_is_read(shell: Shell) -> None:
    """Make the studies that a command reads and that no command of the page made.

    A reference is one setting's images.
    """
    steps = "steps=8" if shell.words[1] == "reference" else "steps=4,8"
    for name in studies_read(shell):
        if not Path("results", name).exists():
            words = [steps, "cfg=4", "prompts.limit=8", "backend=fake", f"study={name}"]
            assert main(["run", "-m", *words]) == 0


@pytest.mark.parametrize("name", [n for n in PAGES if n not in ELSEWHERE and ours(n)])
def test_every_command_of_the_page_is_executed(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EACHLABS_API_KEY", "none")
    (tmp_path / "baselines").mkdir()
    write_files(tmp_path, PAGES[name])
    found = ours(name)
    for shell in found:
        if refusal(shell) or shell.words[1] == "serve":
            continue
        make_what_is_read(shell)
        words = arguments(shell, drifts(found))
        capsys.readouterr()
        code = main(words)
        assert code == shell.code, f"{shell.text}\nas {words}\n{capsys.readouterr().err}"


def test_the_served_protocol_gives_the_same_pictures(tmp_path, monkeypatch):
    """docs/providers.md: a local server in the vendor's place, and no drift from it."""
    monkeypatch.chdir(tmp_path)
    found = {
        c.words[1]: c for c in ours(SERVED) if "study=served" in c.words or "port=8000" in c.words
    }
    serve = [w for w in found["serve"].words if not w.startswith("port=")]
    command = [sys.executable, "-m", *serve, "port=0", "threads=1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            words = [w for w in found["run"].words[1:] if not w.startswith("remote.base_url=")]
            monkeypatch.setenv("EACHLABS_API_KEY", "none")
            assert main([*words, "threads=1", f"remote.base_url={url}"]) == 0
        finally:
            server.terminate()
            server.wait(60)
    assert main(["score", "served", "--metric", "drift"]) == 0
    scores = Study.open(Path("results"), "served").scores()
    assert [s.value for s in scores if s.metric == "drift"] == [0.0] * 4
    assert main(["report", "served"]) == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda p: p.name
)
def test_the_copied_files_alone_make_the_wheel(path, tmp_path):
    """As far as an image can be built without a daemon."""
    from tests.test_docs import PYPROJECT, copied

    for name in copied(path):
        source, target = ROOT / name, tmp_path / "src" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", tmp_path, tmp_path / "src"], check=True)
    version = PYPROJECT["project"]["version"]
    assert (tmp_path / f"sd35bench-{version}-py3-none-any.whl").stat().st_size > 20e6
