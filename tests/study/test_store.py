import dataclasses
import errno
import json
import os
import shutil
import subprocess
import time
import types
import typing
from enum import StrEnum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35bench.disk import _processes
from sd35bench.errors import DiskFull, StoreError, StudyGone, StudyLocked
from sd35bench.fields import make_trial
from sd35bench.study import journal, store
from sd35bench.study.journal import new_shard_id
from sd35bench.study.store import Score, Study
from sd35bench.types import (
    Memory,
    PromptRef,
    Record,
    Request,
    SkipLayerGuidance,
    Status,
    Timings,
    from_json,
    to_json,
)
from sd35bench.workers.worker import encode_image
from tests.studies.fakes import fake_load

finite = st.floats(min_value=0, max_value=1e6, allow_nan=False)
requests = st.builds(
    Request,
    prompt=st.text(max_size=40),
    negative_prompt=st.text(max_size=10),
    steps=st.integers(1, 100),
    cfg=finite,
    seed=st.integers(0, 2**64 - 1),
    width=st.integers(8, 128),
    height=st.integers(8, 128),
    prompt_strength=st.none() | st.floats(0.1, 1),
    skip_layer_guidance=st.none()
    | st.builds(
        SkipLayerGuidance,
        layers=st.tuples(st.integers(0, 23)),
        scale=finite,
        start=finite,
        stop=finite,
    ),
)


def make_record(request: Request, status=Status.OK, image="ab" * 32, session="s") -> Record:
    trial = make_trial(
        load=fake_load(), request=request, batch_size=1, prompt=PromptRef(id="p", set="test")
    )
    return Record(
        trial=trial,
        status=status,
        session_id=session,
        started_at="2026-01-01T00:00:00Z",
        timings=Timings(generate_s=0.5, encode_s=0.25, step_s=(0.1, 0.2)),
        memory=Memory(peak_rss_bytes=1),
        image=image,
    )


def request(seed=0, **fields) -> Request:
    return Request(prompt="a", steps=4, cfg=5.0, seed=seed, width=64, height=64, **fields)


def any_of(kind) -> st.SearchStrategy:
    """Values of a field's type, finite numbers only."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else any_of(a) for a in inner])
    if origin is tuple and inner[-1] is not ...:
        return st.tuples(*map(any_of, inner))
    if origin is tuple:
        return st.lists(any_of(inner[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=3), any_of(inner[1]), max_size=2)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{name: any_of(hint) for name, hint in hints.items()})
    if issubclass(kind, StrEnum):
        return st.sampled_from(kind)
    # A prompt may hold a lone surrogate: a byte of the command line that was no UTF-8.
    text = st.text(st.characters(), max_size=5) | st.just("\udcff")
    return {bool: st.booleans(), int: st.integers(), float: finite, str: text}[kind]


def read_as_before(cls, data):
    """The reader that wrote and read all journals before msgspec: their meaning is its result."""
    if data is None or cls is typing.Any:
        return data
    origin = typing.get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(cls) if a is not type(None)]
        return read_as_before(inner[0], data) if len(inner) == 1 else data
    if origin is tuple:
        inner = typing.get_args(cls)
        kinds = inner if inner[-1] is not ... else inner[:1] * len(data)
        return tuple(read_as_before(kind, v) for kind, v in zip(kinds, data, strict=True))
    if origin is dict:
        return {k: read_as_before(typing.get_args(cls)[1], v) for k, v in data.items()}
    if dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        return cls(**{k: read_as_before(hints[k], v) for k, v in data.items() if k in hints})
    if isinstance(cls, type) and issubclass(cls, StrEnum):
        return cls(data)
    return data


@settings(max_examples=30, deadline=None)
@given(any_of(Record))
def test_journal_gives_what_the_reader_before_msgspec_gave(tmp_path_factory, record):
    study = Study.open(tmp_path_factory.mktemp("journal"), "s", create=True)
    study.shard("1").append_record(record)
    (line,) = (study.path / "journal" / "1.jsonl").read_bytes().splitlines()
    newer = json.dumps(json.loads(line) | {"from_a_newer_version": {"a": [1]}}).encode()
    (study.path / "journal" / "2.jsonl").write_bytes(newer)
    found = list(study.all_records())
    assert found == [read_as_before(Record, json.loads(line))] * 2 == [record] * 2
    assert found[0].trial.load == record.trial.load


def test_old_record_without_later_fields_gets_their_defaults(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    line = {"kind": "record", **to_json(make_record(request()))}
    for name in ("remote", "gpu", "flops", "latents", "batch_actual"):
        del line[name]
    (study.path / "journal" / "1.jsonl").write_text(json.dumps(line))
    assert study.records() == [make_record(request())]


@pytest.mark.parametrize(
    "change",
    [{"session_id": None}, {"trial": {}}, {"status": "of another version"}],
    ids=lambda c: next(iter(c)),
)
def test_line_that_is_no_record_is_refused_with_its_place(tmp_path, change):
    study = Study.open(tmp_path, "s", create=True)
    line = {"kind": "record", **to_json(make_record(request())), **change}
    (study.path / "journal" / "1.jsonl").write_text(json.dumps(line))
    with pytest.raises(StoreError, match=r"1\.jsonl:1 cannot be read by this version"):
        study.records()


def test_from_json_refuses_a_missing_field_and_ignores_an_unknown_one():
    fields = to_json(request())
    assert from_json(Request, fields | {"unknown": 1}) == request()
    with pytest.raises(StoreError, match="steps"):
        from_json(Request, {k: v for k, v in fields.items() if k != "steps"})


def test_study_parses_a_shard_once_and_again_when_it_has_grown(tmp_path, monkeypatch):
    read = []
    real = journal.read_lines
    monkeypatch.setattr(
        journal, "read_lines", lambda path, parse: read.append(path.name) or real(path, parse)
    )
    study = Study.open(tmp_path, "s", create=True)
    first, second = study.shard("1"), study.shard("2")
    first.append_record(make_record(request()))
    second.append_record(make_record(request(1)))
    assert len(study.records()) == 2
    study.sessions(), study.done_keys(), study.records()
    assert read == ["1.jsonl", "2.jsonl"]
    second.append_record(make_record(request(2)))
    assert len(study.records()) == 3
    assert read == ["1.jsonl", "2.jsonl", "2.jsonl"]


def test_records_of_one_load_share_it(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    shard = study.shard("1")
    for seed in (0, 1):
        shard.append_record(make_record(request(seed)))
    assert len({id(r.trial.load) for r in study.records()}) == 1


@given(requests, requests)
def test_key_differs_exactly_when_the_request_does(first, second):
    keys = [make_record(r).trial.key for r in (first, second)]
    assert (keys[0] == keys[1]) == (to_json(first) == to_json(second))


@pytest.mark.parametrize("change", ["batch", "threads", "option", "digest"])
def test_key_depends_on_everything_that_changes_an_image_or_its_time(change):
    import dataclasses

    load, batch = fake_load(), 1
    ref = PromptRef(id="p", set="s")
    before = make_trial(load=load, request=request(), batch_size=batch, prompt=ref).key
    if change == "batch":
        batch = 2
    elif change == "threads":
        load = dataclasses.replace(load, threads=2)
    elif change == "option":
        load = fake_load(delay_s=1.0)
    else:
        load = dataclasses.replace(
            load, model=dataclasses.replace(load.model, weights_digest="1" * 64)
        )
    assert make_trial(load=load, request=request(), batch_size=batch, prompt=ref).key != before


def test_key_ignores_where_the_prompt_and_the_weights_came_from():
    import dataclasses

    load = fake_load()
    moved = dataclasses.replace(load, model=dataclasses.replace(load.model, path="elsewhere"))
    keys = {
        make_trial(load=x, request=request(), batch_size=1, prompt=PromptRef(id=i, set="s")).key
        for x in (load, moved)
        for i in ("a", "b")
    }
    assert len(keys) == 1


def test_study_absent_names_those_that_are_there(tmp_path):
    Study.open(tmp_path, "here", create=True)
    with pytest.raises(StoreError, match="here"):
        Study.open(tmp_path, "absent")


def test_records_last_of_a_key_wins(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    first, second = study.shard("1"), study.shard("2")
    first.append_record(make_record(request(), Status.ERROR, image=None))
    first.append_record(make_record(request(1)))
    second.append_record(make_record(request(), Status.OK))
    assert [r.status for r in study.records()] == [Status.OK, Status.OK]


def test_journal_torn_last_line_is_skipped_and_a_torn_middle_refused(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    shard = study.shard("1")
    shard.append_record(make_record(request()))
    shard.append_record(make_record(request(1)))
    shard.close()
    whole = shard.path.read_bytes()
    for cut in (2, 10, len(whole) // 3):
        shard.path.write_bytes(whole[:-cut])
        assert len(study.records()) == 1
    shard.path.write_bytes(whole[: len(whole) // 4] + b"\n" + whole)
    with pytest.raises(StoreError, match=r"1\.jsonl:1"):
        study.records()


def test_done_keys_need_the_image(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    data = encode_image(np.zeros((8, 8, 3), np.uint8), "png", 90)
    digest = study.put_image(data, ".png")
    record = make_record(request(), image=digest)
    study.shard("1").append_record(record)
    assert study.done_keys() == {record.trial.key}
    study.image_path(digest).unlink()
    assert study.done_keys() == set()


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_image_comes_back_as_rgb(tmp_path, output_format):
    study = Study.open(tmp_path, "s", create=True)
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[..., 0] = 200
    digest = study.put_image(encode_image(pixels, output_format, 95), f".{output_format}")
    back = study.read_image(digest)
    assert back.shape == (16, 24, 3)
    assert np.abs(back.astype(int) - pixels).max() <= (0 if output_format == "png" else 6)


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_score_that_is_no_number_is_refused_with_its_line(tmp_path, value):
    study = Study.open(tmp_path, "s", create=True)
    good = '{"metric": "m", "key": "k", "image": "i", "value": 1.0}'
    path = study.path / "scores" / "000001-x.jsonl"
    path.write_text(f"{good}\n{good.replace('1.0', value)}\n")
    with pytest.raises(StoreError, match=rf"{path.name}:2 says m = .* delete that line, then"):
        study.scores()


def test_scores_last_wins_and_features_come_back(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    study.append_scores("m", [Score(metric="m", key="k", image="i", value=1.0)])
    study.append_scores("m", [Score(metric="m", key="k", image="i", value=None)])
    assert [s.value for s in study.scores()] == [None]
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 4)).astype(np.float32)
    study.put_features("e", ["a", "b", "c"], features)
    assert np.array_equal(study.features("e")["b"], features[1])
    assert study.features("other") == {}


def test_lock_refuses_the_same_load_and_lets_another_in(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    with study.lock("one"):
        with pytest.raises(StudyLocked, match="another process"), study.lock("one"):
            pass
        with study.lock("two"):
            pass
    with study.lock("one"):
        pass


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_lock_removes_what_dead_writers_left_and_nothing_else(tmp_path):
    """Unnamed images, files of the user and of writers that live stay: the sweep took them all."""
    study = Study.open(tmp_path, "s", create=True)
    folder = study.path / "images" / "ab"
    folder.mkdir()
    ours = f".sd35bench-{_processes()}-{{}}-{'a' * 64}.png.tmp"
    gone = folder / ours.format(dead_pid())
    kept = [
        study.image_path(study.put_image(b"unnamed", ".png")),
        folder / ours.format(os.getppid()),
        folder / ours.replace(_processes(), "0123abcd").format(dead_pid()),
        folder / "x.tmp",
        study.path / "notes.tmp",
        study.path / "images" / "favourite.png",
    ]
    for path in (gone, *kept):
        path.write_bytes(b"unnamed")
    with study.lock("one"), study.lock("two"):
        assert not gone.exists()
        assert [path for path in kept if not path.exists()] == []
    assert study.unnamed() == [kept[0]]


def test_a_shard_that_is_missing_for_a_moment_costs_no_image(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    for seed in range(4):
        image = study.put_image(f"{seed}".encode(), ".png")
        study.shard(f"{seed}").append_record(make_record(request(seed), image=image))
    shard = study.path / "journal" / "1.jsonl"
    shard.rename(tmp_path / "away")
    with study.lock("one"):
        assert len(study.unnamed()) == 1
    (tmp_path / "away").rename(shard)
    assert len(Study.open(tmp_path, "s").done_keys()) == 4


@pytest.mark.parametrize("written", [0, 500])
def test_a_short_write_is_a_full_disk_and_leaves_whole_lines(tmp_path, monkeypatch, written):
    study = Study.open(tmp_path, "s", create=True)
    shard = study.shard("1")
    shard.append_record(make_record(request(1)))
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:written]))
    with pytest.raises(DiskFull, match="same command"):
        shard.append_record(make_record(request(2)))
    monkeypatch.undo()
    shard.append_record(make_record(request(3)))
    assert [r.trial.request.seed for r in study.records()] == [1, 3]


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_study_that_goes_away_is_said_at_the_next_line(tmp_path, how):
    study = Study.open(tmp_path, "s", create=True)
    shard = study.shard("1")
    shard.append_record(make_record(request(1)))
    if how == "moved":
        study.path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(study.path)
    with pytest.raises(StudyGone, match="was moved or deleted"):
        shard.append_record(make_record(request(2)))


# Clocks ------------------------------------------------------------------------------------------

CLOCKS = st.lists(
    st.tuples(
        st.integers(1_000_000_000, 4_000_000_000),  # the machine's clock, s since 1970
        st.booleans(),  # which machine
        st.lists(st.booleans(), min_size=3, max_size=3),  # which trials succeed
    ),
    min_size=1,
    max_size=8,
)


def by_name(path):
    return path.name


def newest_survives(root, monkeypatch, runs) -> bool:
    """Run after run tries what is missing, on two machines that are merged in the end."""
    machines = [Study.open(root, name, create=True) for name in ("a", "b")]
    last: dict[str, dict[int, str]] = {"a": {}, "b": {}}
    for number, (clock_s, second, outcomes) in enumerate(runs):
        study = machines[second]
        monkeypatch.setattr(time, "time_ns", lambda clock_s=clock_s: clock_s * 10**9)
        shard = study.shard(study.new_shard_id())
        for seed, ok in enumerate(outcomes):
            if make_record(request(seed)).trial.key in study.done_keys():
                continue  # what is done is never made again
            image = study.put_image(b"image", ".png") if ok else None
            status = Status.OK if ok else Status.ERROR
            record = make_record(request(seed), status=status, image=image)
            shard.append_record(dataclasses.replace(record, error=f"{number}"))
            last[study.name][seed] = f"{number}"
        shard.close()
    for study in machines:
        found = {r.trial.request.seed: r.error for r in study.records()}
        if found != last[study.name]:
            return False
    done = machines[0].done_keys() | machines[1].done_keys()
    for path in (machines[1].path / "journal").glob("*.jsonl"):
        shutil.copy(path, machines[0].path / "journal" / f"{path.stem}b.jsonl")
    machines[0].put_image(b"image", ".png")
    return Study.open(root, "a").done_keys() == done


@given(CLOCKS)
@settings(max_examples=20, deadline=None)
def test_the_newest_record_counts_whatever_the_clocks_say(tmp_path_factory, runs):
    with pytest.MonkeyPatch.context() as patch:
        assert newest_survives(tmp_path_factory.mktemp("clocks"), patch, runs)


def test_order_by_name_would_let_the_clock_decide(tmp_path, monkeypatch):
    """The mutant: shards by the time in their names, as before; one run had its clock ahead."""
    real = store.new_shard_id
    monkeypatch.setattr(store, "new_shard_id", lambda *_: real().partition("-")[2])
    monkeypatch.setattr(journal, "shard_order", by_name)
    ahead = [(2_000_000_000, False, [False] * 3), (1_900_000_000, False, [False] * 3)]
    assert not newest_survives(tmp_path, monkeypatch, ahead)


def test_full_disk_is_said_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    study = Study.open(tmp_path, "s", create=True)

    def full(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="same command"):
        study.put_image(b"data", ".png")
    with pytest.raises(DiskFull):
        study.shard("1").append_record(make_record(request()))
    assert not list(study.path.rglob("*.tmp"))


def test_sql_sees_flat_columns(tmp_path):
    study = Study.open(tmp_path, "s'quoted", create=True)
    shard = study.shard("1")
    for seed in range(3):
        shard.append_record(make_record(request(seed)))
    study.append_scores("m", [Score(metric="m", key="k", image="i", value=1.0)])
    table = study.sql(
        "SELECT request_steps, avg(timings_generate_s) AS s, count(*) AS n"
        " FROM records GROUP BY ALL"
    )
    assert table.to_pylist() == [{"request_steps": 4, "s": 0.5, "n": 3}]


def test_sql_of_a_study_without_scores_or_records(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    with pytest.raises(StoreError, match="'s' has no record yet; run it first"):
        study.sql("SELECT 1")
    study.shard("1").append_record(make_record(request(1)))
    found = study.sql(
        "SELECT count(*) AS n, avg(value) AS mean FROM records LEFT JOIN scores USING (key)"
    )
    assert found.to_pylist() == [{"n": 1, "mean": None}]


def test_shard_ids_sort_by_time():
    ids = [new_shard_id() for _ in range(50)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 50


def test_mutant_that_takes_every_temporary_file_for_a_dead_one_removes_a_living_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("sd35bench.study.store.is_abandoned", lambda name: True)
    with pytest.raises(AssertionError):
        test_lock_removes_what_dead_writers_left_and_nothing_else(tmp_path)


@pytest.mark.parametrize("where", ["request", "load", "model", "backend"])
def test_a_setting_with_a_field_of_a_newer_version_is_refused_and_not_pooled(tmp_path, where):
    study = Study.open(tmp_path, "s", create=True)
    study.shard("1").append_record(make_record(request(1)))
    (shard,) = study.shards()
    line = json.loads(shard.read_text())
    trial = line["trial"]
    part = trial if where == "request" else trial["load"]
    (part if where == "load" else part[where])["quantum"] = True
    if where == "load":
        trial["load"]["quantum"] = True
    shard.write_text(json.dumps(line) + "\n")
    with pytest.raises(StoreError, match=rf"{shard.name}:1.*quantum.*newer version"):
        Study.open(tmp_path, "s").records()


def test_a_newer_measurement_of_a_known_setting_is_read_and_kept(tmp_path):
    study = Study.open(tmp_path, "s", create=True)
    study.shard("1").append_record(make_record(request(1)))
    (shard,) = study.shards()
    text = json.dumps({**json.loads(shard.read_text()), "watts": 300.0}) + "\n"
    shard.write_text(text)
    assert len(Study.open(tmp_path, "s").records()) == 1
    assert shard.read_text() == text


def test_mutant_that_ignores_fields_of_a_newer_version_pools_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sd35bench.study.journal._refuse_unknown", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_setting_with_a_field_of_a_newer_version_is_refused_and_not_pooled(
            tmp_path, "request"
        )
