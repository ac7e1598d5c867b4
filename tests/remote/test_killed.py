"""Clients that die at every step, and one that is interrupted: nothing is paid for twice."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import sd35bench.remote.drive as drive
from sd35bench.remote.providers.eachlabs import Eachlabs
from sd35bench.study.store import Study
from sd35bench.trials import Run
from tests.remote.fault_server import FaultServer
from tests.remote.faults import FAULTS, Fault
from tests.remote.hosted import HASTY, hosted_plan, hosted_settings, ledger_lines, run

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("apart", "forked_python")


HELD = FAULTS["silence"]


@pytest.mark.parametrize(
    ("route", "fault", "creates_before"),
    [
        ("create", replace(HELD, refuses=True), 0),  # the intent is on disk, nothing was made
        ("create", HELD, 1),  # made, and the answer never came
        ("poll", HELD, 1),  # the id is on disk
        ("image", HELD, 1),  # its end is on disk
    ],
    ids=["after-intent", "after-create", "after-id", "after-end"],
)
def test_a_killed_client_pays_once(
    server: FaultServer, study: Study, route: str, fault: Fault, creates_before: int
):
    """SIGKILL while the server holds the answer that the next step needs, then run again."""
    plan = hosted_plan(server.url, 2)
    server.script(route, fault)
    command = [sys.executable, "-m", "tests.remote.hosted", str(study.path.parent), server.url, "2"]
    client = subprocess.Popen(command, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while server.count(route) == 0:
            assert client.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait(60)
    assert sum(server.creates.values()) == creates_before
    settled = run(study, plan, server.url)
    if creates_before == 0:  # only the user can say that it is worth the risk
        assert (settled.done, settled.ambiguous) == (1, 1)
        settled = run(study, plan, server.url, on_ambiguous="resubmit")
    assert len(study.done_keys()) == 2
    assert sorted(server.creates.values()) == [1, 1]


@pytest.mark.parametrize("torn", [False, True], ids=["after-image", "torn-record"])
def test_a_record_that_was_never_written_is_fetched_again(
    server: FaultServer, study: Study, torn: bool
):
    """What a kill between image and record, or in the middle of a record, leaves on disk."""
    plan = hosted_plan(server.url, 2)
    run(study, plan, server.url)
    (journal,) = (study.path / "journal").glob("*.jsonl")
    data = journal.read_bytes()
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    os.truncate(journal, start + 100 if torn else start)
    again = run(study, plan, server.url)
    assert (again.done, again.skipped) == (1, 1)
    assert again.cost_usd == 0
    assert sorted(server.creates.values()) == [1, 1]


def test_ctrl_c_waits_for_the_answer_of_a_create(server: FaultServer, study: Study):
    """A create on its way when the run is cancelled has its id journalled all the same."""
    plan = hosted_plan(server.url, 1)
    server.script("create", Fault(lambda answer: replace(answer, delay_s=0.2)))
    settings = hosted_settings(server.url)
    rounds = drive._Rounds(Run(plan, study, None), settings, Eachlabs(settings))

    async def main() -> None:
        task = asyncio.create_task(rounds.make(None, HASTY))
        while server.count("create") == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with study.lock(plan.load.key):
        asyncio.run(main())
    assert [line["kind"] for line in ledger_lines(study)] == ["intent", "created"]
    assert run(study, plan, server.url).done == 1
    assert sum(server.creates.values()) == 1
