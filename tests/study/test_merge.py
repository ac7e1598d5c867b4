"""`merge`: everything once, disagreements named, sources untouched, and safe to stop and repeat."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sd35bench.study.merge
from sd35bench.cli import main
from sd35bench.disk import open_lock
from sd35bench.errors import StudyLocked
from sd35bench.study.merge import merge_studies
from sd35bench.study.store import Score, Study
from sd35bench.types import Record, Status
from tests.studies.memory import record, session


def add(study: Study, *records: tuple[int, Status, bytes | None], name: str = "") -> list[Record]:
    """One shard of records by number, status and image; scored where there is an image."""
    shard_id = name or study.new_shard_id()
    shard, kept = study.shard(shard_id), []
    shard.append_session(session(shard_id))
    for number, status, data in records:
        image = None if data is None else study.put_image(data, ".png")
        made = replace(record(number, status=status), session_id=shard_id, image=image)
        shard.append_record(made)
        kept.append(made)
    shard.close()
    scored = [r for r in kept if r.image]
    study.append_scores(
        "m", [Score(metric="m", key=r.trial.key, image=str(r.image), value=1.0) for r in scored]
    )
    if scored:
        digests = [str(r.image) for r in scored]
        study.put_features("e", digests, np.ones((len(digests), 2), np.float32))
    return kept


@pytest.fixture
def pair(tmp_path) -> list[Study]:
    a, b = (Study.open(tmp_path, name, create=True) for name in "ab")
    add(a, (0, Status.OK, b"zero"), (1, Status.OK, b"one"), (2, Status.ERROR, None))
    add(b, (1, Status.OK, b"one"), (2, Status.OK, b"two"), (3, Status.OK, b"three"))
    a.append_machine({"key": "k"})
    (b.path / "remote").mkdir()
    (b.path / "remote" / "000001-20260101T000000.1-7.jsonl").write_text("{}\n")
    return [a, b]


def files_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ctime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def kept(study: Study) -> dict[str, tuple[str, bytes]]:
    return {k: v[:1] for k, v in files_of(study.path).items() if not k.startswith(".")}  # type: ignore[return-value]


def test_merge_has_everything_once_and_leaves_the_sources_alone(pair, tmp_path):
    before = [files_of(s.path) for s in pair]
    found = merge_studies([s.path for s in pair], tmp_path / "c")
    c = Study.open(tmp_path, "c")
    assert [files_of(s.path) for s in pair] == before
    assert {r.image for r in c.records()} == c.images().whole
    assert len(c.records()) == len(c.done_keys()) == 4
    assert set(c.sessions()) == {i for s in pair for i in s.sessions()}
    assert len(c.scores()) == 4
    assert len(c.features("e")) == 4
    assert found.copied["images"] == 4
    assert found.copied["remote"] == found.copied["machine"] == 1


def test_merge_counts_duplicates_and_names_conflicts(pair, tmp_path):
    add(pair[1], (0, Status.OK, b"another zero"))
    found = merge_studies([s.path for s in pair], tmp_path / "c")
    keys = {r.trial.request.prompt: r.trial.key for r in pair[0].records()}
    assert found.duplicates == 1
    by_key = {c["key"]: c for c in found.conflicts}
    assert set(by_key) == {keys["prompt 0"], keys["prompt 2"]}
    assert {s["status"] for s in by_key[keys["prompt 2"]]["sides"]} == {"ok", "error"}
    assert by_key[keys["prompt 2"]]["counts"]["status"] == "ok"
    counted = {r.trial.key: r.image for r in Study.open(tmp_path, "c").records()}
    assert by_key[keys["prompt 0"]]["counts"]["image"] == counted[keys["prompt 0"]]


def test_merge_again_copies_nothing(pair, tmp_path):
    merge_studies([s.path for s in pair], tmp_path / "c")
    before = kept(Study.open(tmp_path, "c"))
    found = merge_studies([pair[1].path, pair[0].path], tmp_path / "c")
    assert not found.copied
    assert kept(Study.open(tmp_path, "c")) == before


def test_merge_adds_what_a_source_got_since(pair, tmp_path):
    merge_studies([s.path for s in pair], tmp_path / "c")
    add(pair[0], (7, Status.OK, b"seven"))
    assert merge_studies([pair[0].path], tmp_path / "c").copied["journal"] == 1
    assert len(Study.open(tmp_path, "c").done_keys()) == 5


@pytest.mark.parametrize("after", range(12))
def test_merge_stopped_anywhere_is_whole_and_ends_the_same(pair, tmp_path, monkeypatch, after):
    merge_studies([s.path for s in pair], tmp_path / "whole")
    wanted, written = kept(Study.open(tmp_path, "whole")), 0
    write = sd35bench.study.merge.write_atomic

    def stopping(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written > after:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(sd35bench.study.merge, "write_atomic", stopping)
    monkeypatch.setattr("sd35bench.study.content_files.write_atomic", stopping)
    with pytest.raises(KeyboardInterrupt):
        merge_studies([s.path for s in pair], tmp_path / "c")
    monkeypatch.undo()
    stopped = Study.open(tmp_path, "c")
    assert {r.image for r in stopped.records() if r.status is Status.OK} <= stopped.images().whole
    merge_studies([s.path for s in pair], tmp_path / "c")
    assert kept(Study.open(tmp_path, "c")) == wanted


def test_shards_of_one_name_and_unlike_bytes_are_both_kept(pair, tmp_path):
    name = "000009-20260101T000000.000000001-7"
    for number, study in enumerate(pair):
        add(study, (10 + number, Status.OK, b"x%d" % number), name=name)
    for _ in range(2):
        found = merge_studies([s.path for s in pair], tmp_path / "c")
    assert not found.renamed
    assert len(Study.open(tmp_path, "c").done_keys()) == 6


def test_merge_refuses_a_study_that_something_writes_to(pair, tmp_path, capsys):
    with pair[0].lock("load"), pytest.raises(StudyLocked, match="writes to study"):
        merge_studies([s.path for s in pair], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    Study.open(tmp_path, "c", create=True)
    with open_lock(tmp_path / "c" / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH)
        argv = ["merge", "a", "b", "--into", "c", "--results-dir", str(tmp_path)]
        assert main(argv) == 3
    assert "writes to study" in capsys.readouterr().err


def test_damaged_images_are_named_and_not_copied(pair, tmp_path):
    path = next((pair[0].path / "images").glob("*/*.png"))
    path.write_bytes(b"swapped")
    found = merge_studies([s.path for s in pair], tmp_path / "c")
    assert found.damaged == [str(path)]
    assert not Study.open(tmp_path, "c").images().damaged


def test_merge_on_the_command_line(pair, tmp_path, capsys):
    argv = ["merge", "a", str(pair[1].path), "--into", "c", "--results-dir", str(tmp_path)]
    assert main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["records"], document["duplicates"]) == (4, 1)
    assert main(argv) == 0
    assert "nothing, all was there" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nowhere"], ["c"], ["a", "a"]], ids=["none", "itself", "twice"])
def test_merge_refuses_what_makes_no_sense(pair, tmp_path, words):
    Study.open(tmp_path, "c", create=True)
    assert main(["merge", *words, "--into", "c", "--results-dir", str(tmp_path)]) == 2
