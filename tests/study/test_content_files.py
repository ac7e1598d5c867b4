"""Stored images are held against their names: damaged ones are named and made again."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import sd35bench.remote.prediction as prediction
from sd35bench import disk
from sd35bench.cli import main
from sd35bench.errors import StoreError
from sd35bench.study import content_files
from sd35bench.study.store import Study, decode_rgb
from sd35bench.types import Status
from sd35bench.workers.process import run_plan
from tests.golden.studies import make_sets
from tests.remote.fault_server import serving
from tests.remote.hosted import hosted_plan, run
from tests.studies.fakes import fake_load, fake_plan

COUNT = 8


def _flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


def _pipe(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "swapped": lambda path, other: path.write_bytes(other.read_bytes()),
    "flipped bit": _flip,
    "cut": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path, _: os.truncate(path, 0),
    "link": _link,
    "pipe": _pipe,
    "folder": _folder,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Study:
    study = Study.open(tmp_path_factory.mktemp("made"), "s", create=True)
    run_plan(fake_plan(fake_load(), COUNT), study)
    return study


@pytest.fixture
def study(made, tmp_path, monkeypatch) -> Study:
    """A copy to damage."""
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.path, tmp_path / "results" / "s")
    return Study.open(tmp_path / "results", "s")


def images_of(study: Study) -> list[Path]:
    return [study.image_path(str(r.image)) for r in study.records()]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A pipe that is waited for would hang the suite."""

    def end(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one on its way must not end the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_image_is_named_and_not_read(study, how):
    path, other = images_of(study)[:2]
    DAMAGES[how](path, other)
    with within(5):
        assert list(study.images().damaged) == [path]
        assert len(study.done_keys()) == COUNT - 1
        with pytest.raises(StoreError, match=path.name):
            study.read_image(path.stem)
        assert list(Study(study.path).images().damaged) == [path]


def test_mutant_that_believes_a_file_s_name_reads_another_image_as_its_own(study, monkeypatch):
    path, other = images_of(study)[:2]
    DAMAGES["swapped"](path, other)
    monkeypatch.setattr(content_files, "_read_named", disk.read_regular)
    assert (study.read_image(path.stem) == decode_rgb(other.read_bytes())).all()


def test_mutant_that_opens_whatever_is_there_waits_for_a_pipe(study, monkeypatch):
    path, other = images_of(study)[:2]
    DAMAGES["pipe"](path, other)
    monkeypatch.setattr(
        content_files, "read_regular", lambda path: (path.read_bytes(), path.stat())
    )
    with pytest.raises(TimeoutError), within(0.5):
        study.images()


def test_score_show_and_report_name_what_is_damaged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_sets(Path("results"), prompts=COUNT)  # scored, so that no evaluator is loaded
    study = Study.open(Path("results"), "sets-a")
    path, other = images_of(study)[:2]
    DAMAGES["swapped"](path, other)
    name = str(path.relative_to(study.path))
    assert main(["score", "sets-a", "--metric", "sharpness", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["damaged"] == [name]
    assert scored["images"] == COUNT - 1
    assert main(["show", "sets-a", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert any(name in text for text in shown["warnings"])
    assert sum(row["n"] for row in shown["settings"]) == COUNT
    assert main(["report", "sets-a"]) == 0
    assert name in (study.path / "report.html").read_text()


@pytest.mark.parametrize("how", ["swapped", "pipe"])
def test_a_damaged_image_of_a_baseline_counts_as_gone(study, how):
    from sd35bench.cli.compare import Source

    kept, other = images_of(study)[:2]
    folder = study.path.parent / "base.images"
    folder.mkdir()
    path = folder / kept.name
    path.write_bytes(kept.read_bytes())
    source = Source.__new__(Source)
    source.study, source.images = None, folder
    assert source.find_image(kept.stem) == path
    DAMAGES[how](path, other)
    with within(5):
        assert source.find_image(kept.stem) is None


def test_score_reads_each_image_once(study, monkeypatch):
    import sd35bench.score

    reads: Counter[str] = Counter()

    def counted(path: Path, **options):
        if path.suffix == ".png":
            reads[path.name] += 1
        return disk.read_regular(path, **options)

    study.images()
    study.save_checked()
    monkeypatch.setattr(content_files, "read_regular", counted)
    sd35bench.score.score_study(Study(study.path), ["sharpness", "contrast"])
    assert reads == Counter(path.name for path in images_of(study))


@pytest.mark.usefixtures("fakes_here")
@pytest.mark.parametrize("how", ["swapped", "pipe", "folder"])
def test_run_makes_a_damaged_image_again_and_keeps_what_took_its_place(study, how):
    path, other = images_of(study)[:2]
    whole = path.read_bytes()
    DAMAGES[how](path, other)
    assert run_plan(fake_plan(fake_load(), COUNT), study).done == 1
    assert path.read_bytes() == whole
    assert os.path.lexists(path.with_name(path.name + content_files.DAMAGED))
    assert len(study.done_keys()) == COUNT


@pytest.mark.parametrize("known", [True, False], ids=["fetched again", "unknown to the service"])
def test_a_damaged_image_of_a_service_is_never_bought_again_unasked(tmp_path, monkeypatch, known):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(prediction, "decode_image", decode_rgb)
    study = Study.open(tmp_path, "study", create=True)
    with serving() as server:
        plan = hosted_plan(server.url, 2)
        assert run(study, plan, server.url).done == 2
        path, other = images_of(study)
        DAMAGES["swapped"](path, other)
        if not known:
            server.always("poll", "404")
            server.always("image", "404")
        summary = run(study, plan, server.url)
        assert summary.done == known
        assert sum(server.creates.values()) == 2
        if not known:
            run(study, plan, server.url, on_ambiguous="resubmit")
            assert sum(server.creates.values()) == 3
    assert {r.status for r in study.records()} == {Status.OK} if known else True


def verified(capsys) -> tuple[int, dict]:
    code = main(["verify", "s", "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_verify_of_a_whole_study_says_so_and_writes_nothing(study, capsys):
    before = {p: p.stat().st_mtime_ns for p in study.path.rglob("*")}
    code, found = verified(capsys)
    assert (code, found["whole"], found["problems"]) == (0, True, [])
    assert found["checked"]["images"] == COUNT
    assert {p: p.stat().st_mtime_ns for p in study.path.rglob("*")} == before
    assert main(["verify", "nosuch"]) == 2


def _spoil_journal(study: Study) -> Path:
    (shard,) = study.shards()
    shard.write_bytes(shard.read_bytes().replace(b'"batch_size":1', b'"batch_size":"x"', 1))
    return shard


def _spoil_ledger(study: Study) -> Path:
    path = study.path / "remote" / "x.jsonl"
    path.parent.mkdir()
    path.write_text('{"kind":"created","id":"no intent"}\n')
    return path.parent


def _spoil_features(study: Study) -> Path:
    path = study.path / "features" / "x" / "1.npz"
    path.parent.mkdir()
    path.write_bytes(b"PK")
    return path


def _spoil_image(study: Study) -> Path:
    """Its size and times say nothing."""
    path = images_of(study)[0]
    found = study.path / ".images.checked.json"
    study.save_checked()
    _flip(path, path)
    stamps = json.loads(found.read_text())
    stat = path.stat()
    stamps[path.stem] = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    found.write_text(json.dumps(stamps))
    return path


SPOILS = {
    "journal": _spoil_journal,
    "images": _spoil_image,
    "gone": lambda study: (path := images_of(study)[0], path.unlink())[0],
    "features": _spoil_features,
    "ledger": _spoil_ledger,
}


@pytest.mark.parametrize("what", SPOILS)
def test_verify_names_what_is_damaged_and_its_remedy(study, capsys, what):
    path = SPOILS[what](study)
    code, found = verified(capsys)
    assert code == 1
    files = [problem["file"] for problem in found["problems"]]
    assert str(path.relative_to(study.path)) in files
    assert all(problem["what"] and problem["remedy"] for problem in found["problems"])


def test_mutant_that_trusts_stamps_does_not_see_rot(study, capsys, monkeypatch):
    """A scan may trust them, `verify` may not."""
    path = _spoil_image(study)
    assert path.stem in Study(study.path).images().whole
    assert verified(capsys)[0] == 1
