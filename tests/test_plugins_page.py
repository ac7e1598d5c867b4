"""docs/plugins.md as it stands there: its files are written, its commands are run."""

import re
import shlex
from pathlib import Path

import pytest

from sd35bench import plugins
from sd35bench.cli import main
from sd35bench.study.store import Study

TEXT = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the page's two files, in which a command is started."""
    for name, language in (("code/stripes.py", "python"), ("conf/backend/stripes.yaml", "yaml")):
        assert f"`{name}`:" in TEXT
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(block(language))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plugins.use_folder(None)


@pytest.mark.model
def test_page_is_executed(folder):
    assert sum(bool(line.strip()) for line in block("python").splitlines()) <= 22
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines()]
    assert [words[0] for words in commands] == ["contract", "run"]
    assert [main(words) for words in commands] == [0, 0]
    study = Study.open(folder / "results", "stripes")
    assert len(study.done_keys()) == 2
    (session,) = study.sessions().values()
    assert session.in_force["pitch_px"] == 2
    assert session.load.backend.kind == "stripes:Stripes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("class Stripes(Backend)", "class Stripes"), "Stripes does not derive from sd35bench"),
        (("import hashlib", "import hashlibb"), "cannot be imported: ModuleNotFoundError"),
        (("class Stripes", "class Strips"), "cannot be imported: AttributeError"),
    ],
    ids=["no backend", "broken import", "no such class"],
)
def test_what_cannot_run_is_refused_before_a_worker_starts(folder, capsys, change, said):
    path = folder / "code" / "stripes.py"
    path.write_text(path.read_text().replace(*change))
    assert main(["run", "backend=stripes", "--config-dir=conf", "--plugin-dir=code"]) == 2
    assert f"backend.kind=stripes:Stripes: {said}" in capsys.readouterr().err
    assert not (folder / "results").exists()


def test_code_of_a_folder_needs_the_flag(folder, capsys):
    """Not the working folder, not the configuration folder, not a YAML, not another folder."""
    (folder / "stripes.py").write_text(block("python"))
    (folder / "conf" / "stripes.py").write_text(block("python"))
    assert main(["run", "backend=stripes", "--config-dir=conf", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "no installed package has a module 'stripes'; install it, or name the folder" in said
    yaml = folder / "conf" / "backend" / "stripes.yaml"
    yaml.write_text(f"{yaml.read_text()}\nplugin_dir: {folder / 'code'}\n")
    assert main(["run", "backend=stripes", "--config-dir=conf", "--dry-run"]) == 2
    assert "plugin_dir" in capsys.readouterr().err
