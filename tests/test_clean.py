"""`clean`: lists what no record names, moves it on request, and deletes nothing."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from sd35bench.cli import main
from sd35bench.disk import open_lock
from sd35bench.study.store import Study

pytestmark = pytest.mark.usefixtures("fakes_here")


@pytest.fixture
def study(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "backend=fake", "study=s", "prompts.limit=3", "steps=4"]) == 0
    capsys.readouterr()
    return Study.open(Path("results"), "s")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def clean(capsys, *flags: str) -> dict:
    assert main(["clean", "s", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_clean_of_a_whole_study_finds_nothing(study, capsys):
    before = files_of(study.path)
    assert clean(capsys, "--apply")["files"] == []
    assert files_of(study.path) == before


def test_clean_lists_and_moves_with_a_manifest_only_when_asked(study, capsys):
    unnamed = study.image_path(study.put_image(b"nobody names it", ".png"))
    torn = unnamed.with_name(f"{unnamed.name}.77.tmp")  # as older versions left them
    own = study.path / "images" / "zz" / "favourite.png"
    own.parent.mkdir()
    for path in (torn, own):
        path.write_bytes(b"x")
    before = files_of(study.path)
    found = clean(capsys)
    wanted = sorted(str(p.relative_to(study.path)) for p in (unnamed, torn))
    assert (found["files"], found["moved_to"]) == (wanted, None)
    assert files_of(study.path) == before
    trash = Path(clean(capsys, "--apply")["moved_to"])
    manifest = json.loads((trash / "manifest.json").read_text())
    assert [entry["path"] for entry in manifest["files"]] == wanted
    after = files_of(study.path)
    for name in wanted:
        assert (trash / name).read_bytes() == before[name]
        assert name not in after
    assert set(before) - set(wanted) <= set(after)
    assert len(study.done_keys()) == 3


def test_two_studies_on_one_image_store_keep_each_others_images(study, capsys):
    """The second run deleted the images of the first."""
    other = Study.open(Path("results"), "other", create=True)
    (other.path / "images").rmdir()
    os.symlink(study.path.resolve() / "images", other.path / "images")
    assert main(["run", "backend=fake", "study=other", "prompts.limit=2", "steps=8"]) == 0
    assert len(study.done_keys()) == 3
    assert "3 files of images that no record names are kept" in capsys.readouterr().out
    assert main(["clean", "other", "--apply"]) == 0
    assert (len(study.done_keys()), len(other.done_keys())) == (3, 2)


def test_clean_waits_for_no_writer(study, capsys):
    with open_lock(study.path / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        assert main(["clean", "s", "--apply"]) == 3
