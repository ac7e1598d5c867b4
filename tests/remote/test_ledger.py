"""The ledger: what a crash at any byte leaves, what it adds up to, who else writes."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35bench.disk import LineFile
from sd35bench.errors import DiskFull, Paused, StoreError
from sd35bench.remote.ledger import Intent, Ledger
from sd35bench.study.store import Study

PRICE = 0.035


def intended(ledger: Ledger, trial: str = "t", limit_usd: float | None = None) -> Intent:
    return ledger.intend(trial, {"prompt": trial}, PRICE, limit_usd)


def every_end(ledger: Ledger) -> None:
    """One intent in each state."""
    intended(ledger, "intended")
    ledger.lost(intended(ledger, "lost"), "reset")
    ledger.refused(intended(ledger, "refused"), "429")
    created = intended(ledger, "created")
    ledger.created(created, "p-created", "answered")
    for trial, phase, cost in (
        ("free", "succeeded", 0.0),
        ("listed", "succeeded", None),
        ("failed", "failed", None),
    ):
        intent = intended(ledger, trial)
        ledger.created(intent, f"p-{trial}", "answered")
        ledger.finished(intent, phase, cost, ("https://host/a.png",))


def test_replay_gives_the_same_states(tmp_path: Path):
    every_end(Ledger(tmp_path, "a"))
    replayed = Ledger(tmp_path, None)
    states = {
        name: (i.prediction, i.lost, i.refused, i.phase, i.may_exist)
        for name in ("intended", "lost", "refused", "created", "free", "listed", "failed")
        if (i := replayed.latest(name)) is not None
    }
    assert states == {
        "intended": (None, False, False, None, True),
        "lost": (None, True, False, None, True),
        "refused": (None, False, True, None, False),
        "created": ("p-created", False, False, None, True),
        "free": ("p-free", False, False, "succeeded", True),
        "listed": ("p-listed", False, False, "succeeded", True),
        "failed": ("p-failed", False, False, "failed", False),
    }
    owner = replayed.owner("p-free")
    assert owner is not None
    assert owner.outputs == ("https://host/a.png",)
    assert {i.trial for i in replayed.open_intents()} == {
        "intended",
        "lost",
        "created",
        "free",
        "listed",
    }


def test_all_that_is_not_proven_free_counts(tmp_path: Path):
    ledger = Ledger(tmp_path, "a")
    every_end(ledger)
    assert ledger.spent_usd == pytest.approx(5 * PRICE)  # all but the refused and the free one
    assert Ledger(tmp_path, None).spent_usd == pytest.approx(ledger.spent_usd)


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_a_cost_that_cannot_be_is_the_listed_price(tmp_path: Path, cost: float):
    ledger = Ledger(tmp_path, "a")
    ledger.finished(intended(ledger), "succeeded", cost, ())
    assert ledger.spent_usd == pytest.approx(PRICE)


@given(st.data())
def test_every_cut_of_the_file_is_an_earlier_state(tmp_path_factory, data):
    """A crash leaves a prefix: it reads, and no intent whose create may have left is missed."""
    whole = tmp_path_factory.mktemp("whole")
    every_end(Ledger(whole, "a"))
    content = (whole / "remote" / "a.jsonl").read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    part = tmp_path_factory.mktemp("part")
    (part / "remote").mkdir()
    (part / "remote" / "a.jsonl").write_bytes(content[:cut])
    found = Ledger(part, None)
    lines = content[:cut].split(b"\n")
    complete = [line for line in lines if line.endswith(b"}") and line in content.split(b"\n")]
    assert len(found._intents) == sum(b'"kind":"intent"' in line for line in complete)


def test_damage_elsewhere_is_said(tmp_path: Path):
    every_end(Ledger(tmp_path, "a"))
    path = tmp_path / "remote" / "a.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", b"#", 1))
    with pytest.raises(StoreError, match="what was paid for"):
        Ledger(tmp_path, None)


def test_the_budget_is_one_for_all_writers(tmp_path: Path):
    """Two processes that each look first and then spend must not both take the last image."""
    one, other = Ledger(tmp_path, "a"), Ledger(tmp_path, "b")
    intended(one, "t1", limit_usd=2 * PRICE)
    intended(other, "t2", limit_usd=2 * PRICE)
    for ledger in (one, other):
        with pytest.raises(Paused, match=r"remote\.max_cost_usd=0\.07"):
            intended(ledger, "t3", limit_usd=2 * PRICE)
    assert len((tmp_path / "remote" / "a.jsonl").read_text().splitlines()) == 1


def test_a_budget_is_not_passed_by_rounding(tmp_path: Path):
    ledger = Ledger(tmp_path, "a")
    for i in range(3):  # 0.1 + 0.1 + 0.1 > 0.3 in floats
        ledger.intend(f"t{i}", {}, 0.1, 0.3)
    with pytest.raises(Paused):
        ledger.intend("t", {}, 0.1, 0.3)


def test_another_writers_lines_arrive_also_in_pieces(tmp_path: Path):
    writer, reader = Ledger(tmp_path, "a"), Ledger(tmp_path, "b")
    intent = intended(writer)
    path = tmp_path / "remote" / "a.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    reader.catch_up()
    assert reader.latest("t") is None
    path.write_bytes(whole)
    reader.catch_up()
    found = reader.latest("t")
    assert found is not None
    assert found.id == intent.id


def test_a_line_that_does_not_fit_leaves_no_torn_one_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ledger = Ledger(tmp_path, "a")
    intended(ledger, "t1")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    with pytest.raises(DiskFull):
        intended(ledger, "t2")
    monkeypatch.undo()
    intended(ledger, "t3")
    replayed = Ledger(tmp_path, None)
    assert [replayed.latest(t) is not None for t in ("t1", "t2", "t3")] == [True, False, True]


def test_every_line_is_synced_before_the_next_step(tmp_path: Path, monkeypatch):
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    ledger = Ledger(tmp_path, "a")
    intent = intended(ledger)
    assert len(synced) == 2  # the new file's name, and the line
    ledger.created(intent, "p", "answered")
    assert len(synced) == 3


def test_a_reader_writes_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="opened to be read"):
        intended(Ledger(tmp_path, None))


@pytest.mark.parametrize("numbered", [True, False], ids=["as it is", "mutant: names by time"])
def test_the_last_intent_counts_though_the_clock_stepped_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbered: bool
):
    """A refusal under a clock two days ahead hid what was bought later, which was bought again."""
    study = Study.open(tmp_path, "s", create=True)
    for clock_s, prediction in ((2_000_000_000, None), (1_999_800_000, "p-1")):
        monkeypatch.setattr(time, "time_ns", lambda clock_s=clock_s: clock_s * 10**9)
        name = study.new_shard_id()
        ledger = Ledger(study.path, name if numbered else name.partition("-")[2])
        intent = intended(ledger, "t1")
        if prediction is None:
            ledger.refused(intent, "429")
        else:
            ledger.created(intent, prediction, "answered")
        ledger.close()
    latest = Ledger(study.path, None).latest("t1")
    assert latest is not None
    assert (latest.prediction == "p-1") == numbered


def test_mutant_that_believes_a_write_leaves_a_torn_line(tmp_path: Path, monkeypatch):
    """A short write is not looked at: the next line is glued to what was written."""

    def append(self: LineFile, data: bytes) -> None:
        if self._handle is None:
            self._open()
        assert self._handle is not None
        os.write(self._handle, data)

    monkeypatch.setattr(LineFile, "append", append)
    with (
        pytest.MonkeyPatch.context() as inner,
        pytest.raises((AssertionError, StoreError, pytest.fail.Exception)),
    ):
        test_a_line_that_does_not_fit_leaves_no_torn_one_behind(tmp_path, inner)
