"""A large journal's Parquet view: it says what the journal says, or it is made anew."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import read_table
from sd35bench.errors import StoreError
from sd35bench.recommend.advice import recommend_document
from sd35bench.report.page import render_report
from sd35bench.score import score_study
from sd35bench.study import columns, view
from sd35bench.study.columns import Records
from sd35bench.study.result_cache import keep_scored, kept_show, read_scored
from sd35bench.study.store import Score, Study
from sd35bench.types import Record, Status, to_json
from sd35bench.verify import verify_study
from tests.scale import make_study
from tests.studies.drawn import document_of
from tests.studies.memory import record, session

RECORDS = 800
PROFILES = {
    "best": {"margins": {"clip_score": 0.5}},
    "fast": {"latency_limit_s": 0.5, "latency_p95_limit_s": 0.6, "margins": {"clip_score": 0.5}},
}
WHY = {"reason": "black image"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("scale"), "s", RECORDS).path


@pytest.fixture(scope="module")
def viewed(made, tmp_path_factory) -> Path:
    """The same with its view, which takes 0.2 s to make."""
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("viewed") / "s"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "LEAST_BYTES", 0)
        opened(path).records()
    return path


@pytest.fixture
def study(viewed, tmp_path, monkeypatch) -> Path:
    """A study of its own, all of whose readings go through the view."""
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    return Path(shutil.copytree(viewed, tmp_path / "s"))


@pytest.fixture
def bare(made, tmp_path, monkeypatch) -> Path:
    """One whose view is not made yet."""
    monkeypatch.setattr(view, "LEAST_BYTES", 0)
    return Path(shutil.copytree(made, tmp_path / "s"))


def opened(path: Path) -> Study:
    return Study.open(path.parent, path.name)


def by_line(path: Path) -> list[Record]:
    """Every record as the journal's reader has it."""
    s = opened(path)
    return [r for p in s.shards() for r in s.check_lines("journal", p) if isinstance(r, Record)]


def append(path: Path, *records: Record, shard: str | None = None) -> None:
    s = opened(path)
    writer = s.shard(s.new_shard_id() if shard is None else shard)
    for each in records:
        writer.append_record(each)
    writer.close()


def test_the_view_has_the_records_of_the_journal(bare):
    wanted = by_line(bare)
    found = opened(bare).all_records()
    assert isinstance(found, Records)
    assert list(found) == wanted
    assert found[7] == wanted[7]
    assert opened(bare).sessions().keys() == {r.session_id for r in wanted}


@pytest.mark.parametrize(
    "name",
    ["key", "status", "session_id", "started_at", "image", "error"],
)
def test_text_columns_are_those_of_a_list(study, name):
    assert list(columns.texts(opened(study).records(), name)) == list(
        columns.texts(by_line(study), name)
    )


@pytest.mark.parametrize(
    "name",
    ["generate_s", "text_s", "batch_size", "peak_rss_bytes", "canary_before", "evaluations"],
)
def test_number_columns_are_those_of_a_list_to_the_digit(study, name):
    wanted = columns.numbers(by_line(study), name)
    np.testing.assert_array_equal(columns.numbers(opened(study).records(), name), wanted)


def test_the_other_columns_are_those_of_a_list(study):
    wanted, found = by_line(study), opened(study).records()
    some = np.arange(len(found))[::-3]
    wanted, found = columns.pick(wanted, some), columns.pick(found, some)
    np.testing.assert_array_equal(columns.step_seconds(found), columns.step_seconds(wanted))
    np.testing.assert_array_equal(columns.seconds(found), columns.seconds(wanted))
    assert list(columns.in_time(found)) == list(columns.in_time(wanted))
    for part in ("gpu", "remote", "surroundings"):
        assert (columns.has(found, part) == columns.has(wanted, part)).all()
    groups = columns.by_session(found), columns.by_session(wanted)
    assert list(groups[0]) == list(groups[1])
    assert [g.tolist() for g in groups[0].values()] == [g.tolist() for g in groups[1].values()]


def test_what_is_appended_is_parsed_alone(study, monkeypatch):
    opened(study).records()
    append(study, record(1), record(2))
    lines = []
    decode = view._DECODE
    monkeypatch.setattr(view, "_DECODE", lambda line: lines.append(line) or decode(line))
    assert list(opened(study).records()) == by_line(study)
    assert len(lines) == 2
    opened(study).records()
    assert len(lines) == 2


def test_a_shard_that_grows_is_read_on_from_where_it_ended(study):
    append(study, record(1), shard="000900-20270101T000000.1-1")
    append(study, record(2), shard="000901-20270101T000000.1-1")
    opened(study).records()
    append(study, record(3), shard="000900-20270101T000000.1-1")
    assert list(opened(study).records()) == by_line(study)


def test_the_last_record_of_a_trial_counts_and_an_image_before_a_failure(study, monkeypatch):
    old = [r for r in by_line(study) if r.status is Status.OK][:3]
    append(
        study,
        replace(old[0], status=Status.ERROR, image=None, timings=None),
        replace(old[1], image_bytes=1),
        replace(old[2], status=Status.ERROR, image=None, timings=None),
    )
    digest = str(old[2].image)
    (study / "images" / digest[:2] / f"{digest}.png").unlink()
    found = list(opened(study).records())
    done = opened(study).done_keys()
    monkeypatch.setattr(view, "LEAST_BYTES", 1 << 60)
    assert found == list(opened(study).records())
    assert done == opened(study).done_keys()
    assert {r.trial.key: r.status for r in found}[old[0].trial.key] is Status.OK


def test_a_torn_last_line_is_skipped_and_read_once_it_is_whole(bare):
    shard = opened(bare).shards()[-1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-40])
    assert len(opened(bare).records()) == RECORDS - 1
    shard.write_bytes(data)
    assert list(opened(bare).records()) == by_line(bare)


def _part(path: Path) -> Path:
    return next((path / "view" / "journal").glob("*.parquet"))


def _flip(path: Path) -> None:
    data = bytearray(_part(path).read_bytes())
    data[len(data) // 2] ^= 255
    _part(path).write_bytes(data)


def _foreign(path: Path) -> None:
    other = make_study(path.parent, "other", 200)
    other.records()
    shutil.rmtree(path / "view")
    shutil.copytree(other.path / "view", path / "view")


def _older(path: Path) -> None:
    manifest = path / "view" / "journal" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 0}))


DAMAGE = {
    "a part with other bytes": _flip,
    "a part that is gone": lambda path: _part(path).unlink(),
    "a part cut short": lambda path: os.truncate(_part(path), 500),
    "another study's view": _foreign,
    "an older version's": _older,
    "a manifest of nonsense": lambda path: (path / "view" / "journal" / "manifest.json").write_text(
        "{"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_view_that_is_not_the_journals_is_named_by_verify_and_made_anew(study, damage):
    opened(study).records()
    assert verify_study(study).problems == []
    damage(study)
    (problem,) = verify_study(study).problems
    assert "Parquet view" in problem["what"]
    assert list(opened(study).records()) == by_line(study)
    assert verify_study(study).problems == []


def test_a_journal_that_was_changed_in_place_makes_the_view_anew(study):
    opened(study).records()
    shard = opened(study).shards()[0]
    shard.write_bytes(shard.read_bytes().replace(b'"switches":1', b'"switches":2'))
    assert {r.surroundings.switches for r in opened(study).records() if r.surroundings} == {1, 2}


def test_a_copied_study_keeps_its_view(study, tmp_path, monkeypatch):
    opened(study).records()
    copy = Path(shutil.copytree(study, tmp_path / "copy"))
    monkeypatch.setattr(view, "_DECODE", None)
    assert len(opened(copy).records()) == RECORDS


def test_a_line_that_cannot_be_read_is_named(bare):
    shard = opened(bare).shards()[0]
    lines = shard.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b'"steps":4', b'"steps":"x"')
    shard.write_bytes(b"\n".join(lines))
    with pytest.raises(StoreError, match=rf"{shard.name}:4 "):
        opened(bare).records()
    lines[3] = b"{"
    shard.write_bytes(b"\n".join(lines))
    with pytest.raises(StoreError, match=rf"{shard.name}:4 is not JSON"):
        opened(bare).records()


def test_a_text_that_is_no_unicode_is_read_line_by_line(bare):
    append(bare, record(1, prompt="\ud800"))
    found = opened(bare).records()
    assert not isinstance(found, Records)
    assert len(found) == RECORDS + 1


def test_a_folder_that_cannot_be_written_is_read_all_the_same(bare, monkeypatch):
    def full(*_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(view, "write_atomic", full)
    assert list(opened(bare).records()) == by_line(bare)


def test_a_small_study_has_no_view(made):
    opened(made).records()
    assert not (made / "view").exists()
    assert to_json(session())["id"] == "s"


def documents(path: Path) -> list[str]:
    """What `show`, `recommend` and the report say of a study."""
    s = opened(path)
    table = read_table(s)
    show = show_document(s, table)
    advice = recommend_document(s, PROFILES, table)
    page = render_report(document_of(s, show, advice))
    return [json.dumps(show), json.dumps(advice), page]


@pytest.mark.slow  # tests/study/test_columns.py holds a study of more kinds, and fewer settings
def test_documents_are_the_same_to_the_digit_with_and_without_a_view(study, monkeypatch):
    failing = [r for r in by_line(study) if r.status is Status.OK][::97]
    append(study, *(replace(r, image_bytes=1) for r in failing))
    append(study, *(replace(record(n), session_id="nobody", status=Status.ERROR) for n in (1, 2)))
    guard = [Score(metric="guard", key=r.trial.key, image=str(r.image), value=0.0, detail=WHY)
             for r in failing[:2]]  # fmt: skip
    opened(study).append_scores("guard", guard)
    found = documents(study)
    monkeypatch.setattr(view, "LEAST_BYTES", 1 << 60)
    for one, other in zip(found, documents(study), strict=True):
        assert one == other


def test_nothing_to_score_is_remembered_until_something_changes(study):
    s = opened(study)
    s.records()
    said = {"total": 0, "refused": {}}
    keep_scored(s, said)
    assert read_scored(opened(study)) == said
    opened(study).append_scores("m", [Score(metric="m", key="k", image="i", value=1.0)])
    assert read_scored(opened(study)) is None
    keep_scored(s, said)
    append(study, record(1))
    assert read_scored(opened(study)) is None
    keep_scored(opened(study), {"total": 3, "refused": {}})
    assert read_scored(opened(study)) is None


def touch_image(path: Path) -> None:
    """Change an image in place, with its size and time of change as they were."""
    image = next(path.glob("images/*/*.png"))
    at = image.stat()
    image.write_bytes(b"x" * at.st_size)
    os.utime(image, ns=(at.st_atime_ns, at.st_mtime_ns))


def score_again(path: Path) -> None:
    opened(path).append_scores("guard", [Score(metric="guard", key="k", image="i", value=1.0)])


CHANGES = {
    "a record": lambda path: append(path, record(1)),
    "a score": score_again,
    "an image that is gone": lambda path: next(path.glob("images/*/*.png")).unlink(),
    "an image changed in place": touch_image,
    "a journal of another time": lambda path: os.utime(next(path.glob("journal/*"))),
    "a measured machine": lambda path: opened(path).append_machine({"key": "m"}),
    "another name": lambda path: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_show_said_is_kept_until_something_changes(study, change, tmp_path):
    opened(study).records()
    said = {"study": "s", "settings": [0.1, None, 1e-7]}
    assert kept_show(opened(study), lambda: said) == said
    assert kept_show(opened(study), dict) == said
    part = opened(study).part({"side": "left"})
    assert kept_show(part, dict) == {}
    change(study)
    if change is CHANGES["another name"]:
        study = study.rename(tmp_path / "t")
    assert kept_show(opened(study), dict) == {}


@pytest.mark.parametrize("name", ["image_changes", "images"])
def test_a_kept_show_that_looks_at_too_little_is_seen(study, monkeypatch, name):
    opened(study).records()
    kept_show(opened(study), lambda: {"old": 1})
    monkeypatch.setattr(Study, name, lambda self: [])
    kept_show(opened(study), lambda: {"old": 1})
    touch_image(study)
    assert kept_show(opened(study), dict) == {"old": 1}


def test_scoring_after_an_append_reads_one_record_of_each_kind_and_what_is_new(study, monkeypatch):
    score_study(opened(study), ["sharpness"])
    first = next(r for r in by_line(study) if r.status is Status.OK)
    again = replace(first, trial=replace(first.trial, key="new"))
    append(study, again)
    read: list[int] = []
    whole = columns.Columns._read

    def counted(self, places):
        read.extend(places.tolist())
        return whole(self, places)

    monkeypatch.setattr(columns.Columns, "_read", counted)
    assert score_study(opened(study), ["sharpness"])["scored"] == {"sharpness": 1}
    kinds = 200  # 10 loads of 20 settings
    assert len(read) <= kinds + 1 < RECORDS
