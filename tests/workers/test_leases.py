"""Who times on a device has it alone: in one process, across processes, and as the records show."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from sd35bench.machine.contention import OVERLAPPED, choose, read_contention
from sd35bench.study.store import Study
from sd35bench.types import Session, Status, Timings
from sd35bench.workers import leases
from sd35bench.workers.leases import VARIABLE, Lease, lease_folder
from sd35bench.workers.process import run_plan
from tests.studies.fakes import fake_load, fake_plan
from tests.studies.memory import record, session


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "leases"))
    return tmp_path / "leases"


def waits(lease: Lease, *, alone: bool) -> bool:
    """Whether holding it has to wait, tried in another thread that is left waiting."""
    held = threading.Event()

    def hold() -> None:
        with lease.hold(alone=alone):
            held.set()

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    return not held.wait(0.2)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
    ids=["timed-timed", "timed-shared", "shared-timed", "shared-shared"],
)
def test_a_timed_trial_has_its_device_alone_and_others_share_it(first, second, expected):
    mine, theirs, elsewhere = Lease(["core-0", "core-1"]), Lease(["core-1"]), Lease(["core-2"])
    with mine.hold(alone=first):
        assert waits(theirs, alone=second) is expected
        assert not waits(elsewhere, alone=True)


@pytest.mark.usefixtures("folder")
def test_a_stream_of_sharers_does_not_keep_a_timed_trial_waiting():
    first, timed, later = Lease(["gpu-a"]), Lease(["gpu-a"]), Lease(["gpu-a"])
    with first.hold(alone=False):
        assert waits(timed, alone=True)
        assert waits(later, alone=False), "behind the timed one, not past it"


def test_a_killed_holder_leaves_nothing_behind(folder):
    code = (
        "import sys, time; from sd35bench.workers.leases import Lease\n"
        "with Lease(['core-9']).hold(alone=True):\n    print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    mine = Lease(["core-9"])
    assert waits(mine, alone=True)
    child.kill()
    child.wait()
    with Lease(["core-9"]).hold(alone=True):
        pass


def test_the_folder_is_ours_or_none(folder, monkeypatch, tmp_path):
    assert lease_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert Lease(["core-0"]).is_honoured
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "link"))
    assert lease_folder() is None
    monkeypatch.setenv(VARIABLE, "off")
    assert not Lease(["core-0"]).is_honoured
    monkeypatch.delenv(VARIABLE)
    found = lease_folder()
    assert found is None or found.stat().st_uid == os.getuid()


def test_a_long_wait_says_what_it_is_for(folder, monkeypatch, capfd):
    monkeypatch.setattr(leases, "SAY_S", 0.01)
    mine, theirs = Lease(["gpu-b"]), Lease(["gpu-b"])
    with mine.hold(alone=True):
        assert waits(theirs, alone=True)
        until = time.monotonic() + 30
        text = ""
        while "waiting for gpu-b" not in text and time.monotonic() < until:
            text += capfd.readouterr().err
    assert "another run of yours" in text


@pytest.mark.parametrize("leased", [True, False], ids=["leases", "mutant-without"])
def test_two_runs_at_once_wait_for_each_other_or_both_are_marked(
    tmp_path, folder, monkeypatch, leased
):
    """Without leases, as on a machine where they cannot be had, the records tell."""
    if not leased:
        monkeypatch.setenv(VARIABLE, "off")
    studies = [Study.open(tmp_path, name, create=True) for name in "ab"]
    meet = threading.Barrier(2)

    def run(study: Study) -> None:
        seen = []

        def once(_: object) -> None:
            seen.append(1)
            if len(seen) == 1:
                meet.wait(60)

        run_plan(fake_plan(fake_load(delay_s=0.05), 6), study, once)

    threads = [threading.Thread(target=run, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [r for study in studies for r in study.records()]
    sessions = {k: s for study in studies for k, s in study.sessions().items()}
    assert [s.environment["leased"] for s in sessions.values()] == [leased] * 2
    found = read_contention(records, sessions)
    if leased:
        assert not found.overlapped
    else:
        assert len({mark[0] for mark in found.overlapped}) == 2, "some of both runs"


# As the records show ----------------------------------------------------------------------------


def at(key: str, host: str = "h", occupies: str = "core-0,core-1", boot: str = "b") -> Session:
    where = {"hostname": host, "boot_id": boot, "occupies": occupies}
    return replace(session(key), environment=where)


def timed(key: str, second: float, length_s: float = 1.0, number: int = 0):
    return record(
        number,
        session_id=key,
        started_at=f"2026-11-30T10:00:{second:06.3f}+00:00",
        timings=Timings(generate_s=length_s, encode_s=0.0),
    )


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (at("b"), 2),
        (at("b", occupies="core-1,core-2"), 2),
        (at("b", occupies="core-2"), 0),
        (at("b", host="i"), 0),
        (at("b", boot="c"), 0),
        (at("b", occupies=""), 0),
    ],
    ids=["same", "one-core", "other-core", "other-host", "other-boot", "nothing"],
)
def test_trials_that_overlapped_on_one_device_are_marked_and_never_count(other, expected):
    series = [timed("a", 1.0), timed("b", 1.5), timed("a", 5.0, number=1), timed("b", 6.0)]
    found = read_contention(series, {"a": at("a"), "b": other})
    assert len(found.overlapped) == expected
    chosen = choose(series, found)
    assert len(chosen.kept) == 4 - expected
    assert chosen.left[OVERLAPPED] == expected
    # More than half of them: disturbed ones would count then, overlapped ones do not.
    assert len(choose(series[:2], found).kept) == 2 - expected


def test_batches_of_one_session_and_unfinished_trials_are_no_overlap():
    batch = [timed("a", 1.0, number=n) for n in range(3)]
    lost = replace(timed("b", 1.0), status=Status.ERROR, timings=None)
    found = read_contention([*batch, lost], {"a": at("a"), "b": at("b")})
    assert not found.overlapped
