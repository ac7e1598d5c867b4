"""A full disk: every output of every verb pauses with exit code 3 and says what to do."""

import errno
import os
from pathlib import Path

import pytest

from sd35bench.cli import main

pytestmark = pytest.mark.usefixtures("all_fakes_here")

STUDIES = {"a": "steps=2,4", "b": "steps=2"}
COMPARE = ("compare", "a", "b", "--policy", "speed")
OUTPUTS = {
    "report.html": ("report", "a"),
    "recommended.yaml": ("recommend", "a"),
    "gate.xml": (*COMPARE, "--junit", "out/gate.xml"),
    "gate.md": (*COMPARE, "--markdown", "out/gate.md"),
    "gate.html": (*COMPARE, "--html", "out/gate.html"),
    "base.json": ("baseline", "make", "a", "out/base.json"),
    "base.images/": ("baseline", "make", "a", "out/base.json", "--images"),
    "ref.npz": ("reference", "make", "ref", "study=b", "extractor=nano"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small studies."""
    root = tmp_path_factory.mktemp("full") / "results"
    for name, steps in STUDIES.items():
        asked = ["prompts.limit=4", steps, f"study={name}", f"results_dir={root}"]
        assert main(["run", "-m", "backend=fake", *asked]) == 0
        assert main(["score", name, "--results-dir", str(root)]) == 0
    return root


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch):
    """Let the disk be full for a file whose path holds a text."""

    def fill(name: str) -> None:
        fsync = os.fsync

        def refuse(handle: int) -> None:
            if name in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr("sd35bench.disk.os.fsync", refuse)

    return fill


@pytest.mark.parametrize("name", OUTPUTS)
def test_full_disk_is_exit_code_3_with_a_remedy_and_no_torn_file(
    name, results, full, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    kept = {"gate.md": "an earlier step\n"}
    for file, text in kept.items():
        Path("out", file).write_text(text)
    full(name)
    assert main([*OUTPUTS[name], "--results-dir", str(results)]) == 3
    assert "is full; free some space and run the same command again" in capsys.readouterr().err
    assert [*results.rglob("*.tmp"), *tmp_path.rglob("*.tmp")] == []
    assert {p.name: p.read_text() for p in Path("out").rglob("gate*")} == kept


def test_full_disk_stops_a_copy_of_what_was_exported(full, tmp_path, monkeypatch):
    from sd35bench.cli.export import _copy
    from sd35bench.errors import DiskFull

    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    full("copied/")
    with pytest.raises(DiskFull, match="free some space"):
        _copy(folder, tmp_path / "copied")
    assert list((tmp_path / "copied").iterdir()) == []


def test_full_disk_under_the_cache_pauses_an_export(tmp_path, monkeypatch, capsys):
    def full(_load):
        from sd35bench.errors import BackendError

        raise BackendError("no room; free some space there") from OSError(errno.ENOSPC, "full")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sd35bench.backends.base.load_backend", full)
    assert main(["export", "threads=1", "backend.device=cpu"]) == 3
    assert "free some space" in capsys.readouterr().err
