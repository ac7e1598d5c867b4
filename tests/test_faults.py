"""Processes that really fail: what is recorded, and that the rest goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from sd35bench.backends.fake import _number
from sd35bench.errors import WorkerDied, WorkerHung, WorkerTooLarge
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.types import Record, Status
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import WorkerProcess, run_plan
from sd35bench.workers.worker import Failed, Ready
from tests import preforked
from tests.studies.fakes import fake_load, fake_plan

pytestmark = pytest.mark.usefixtures("forked_python")
MEMORY_LIMIT_BYTES = 400_000_000  # a worker with the fake backend holds about 100 MB
DEATHS = {
    "segfault": (Status.CRASHED, "signal 11, SIGSEGV"),
    "exit": (Status.CRASHED, "exit code 7"),
    "kill": (Status.CRASHED, "out-of-memory killer"),
    "hang": (Status.TIMED_OUT, "no answer in"),
    "allocate": (Status.OUT_OF_MEMORY, "over memory_limit_gb=0.4"),
}
"""All are tried in generation; elsewhere a signal's number is nothing new."""
IN_THREADS = pytest.mark.usefixtures("fakes_here")
"""Of faults that no process dies of."""


def limits(fault: str, **fields) -> Limits:
    """What ends the fault; a deadline only where something hangs: a busy machine is no hang."""
    return Limits(
        deadline_s=4.0 if fault == "hang" else None,
        memory_limit_bytes=MEMORY_LIMIT_BYTES if fault == "allocate" else None,
        **fields,
    )


@pytest.fixture
def study(tmp_path):
    return Study.open(tmp_path, "s", create=True)


def one_victim(plan: Plan) -> tuple[int, int]:
    """(n, index) such that "every n-th request" is exactly one of the plan's batches."""
    for every in range(2, 10_000):
        hit = [
            index
            for index, batch in enumerate(plan.batches)
            if any(_number(t.request) % every == 0 for t in batch.trials)
        ]
        if len(hit) == 1:
            return every, hit[0]
    raise AssertionError("no such number")


def faulty_plan(count: int, *, batch_size: int = 1, **options) -> tuple[Plan, int]:
    """A plan whose fault befalls one batch, and that batch's index."""
    every, index = one_victim(fake_plan(fake_load(), count, batch_size=batch_size))
    load = fake_load(fault_every=every, **options)
    return fake_plan(load, count, batch_size=batch_size), index


def by_key(study: Study) -> dict[str, Record]:
    return {r.trial.key: r for r in study.records()}


def lines_per_key(study: Study) -> set[int]:
    lines = [
        json.loads(line)
        for path in (study.path / "journal").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return set(Counter(e["trial"]["key"] for e in lines if e["kind"] == "record").values())


def children() -> list[psutil.Process]:
    """Our workers that still run; other tests leave compile pools and trackers behind."""
    found = psutil.Process().children(recursive=True)
    alive = [p for p in found if p.status() != psutil.STATUS_ZOMBIE]
    ours = [p for p in alive if "sd35bench.workers.worker" in p.cmdline()]
    return ours + [p for p in alive if p.pid in preforked.started]


# In generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", DEATHS)
def test_fault_in_generate_costs_one_batch_and_the_rest_goes_on(
    study, fault, tmp_path, monkeypatch, capfd
):
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(dumps))
    plan, index = faulty_plan(4, fault=fault)
    summary = run_plan(plan, study, limits=limits(fault))
    left = [(str(path), path.read_text()) for path in dumps.iterdir()]
    status, text = DEATHS[fault]
    records = by_key(study)
    victim = records.pop(plan.trials[index].key)
    assert (victim.status, victim.phase) == (status, "generate")
    assert text in victim.error
    assert [path in victim.error for path, _ in left] == [True] * (fault == "segfault")
    assert all("Segmentation fault" in stack and "fake.py" in stack for _, stack in left)
    assert "\n" not in victim.error
    assert "Segmentation fault" not in capfd.readouterr().err
    assert (victim.timings, victim.image) == (None, None)
    assert {r.status for r in records.values()} == {Status.OK}
    assert (summary.done, summary.failed) == (3, 1)
    assert summary.loads == (1 if index == 3 else 2)
    assert summary.statuses == {status.value: 1}
    assert lines_per_key(study) == {1}, "a trial that kills is not tried again by the same run"
    assert children() == []


def test_fault_takes_the_batch_that_was_in_flight_and_no_other(study):
    plan, index = faulty_plan(8, batch_size=2, fault="exit")
    run_plan(plan, study)
    crashed = {r.trial.key for r in study.records() if r.status is Status.CRASHED}
    assert crashed == {t.key for t in plan.batches[index].trials}
    assert sum(r.status is Status.OK for r in study.records()) == 6


@IN_THREADS
def test_memory_error_is_recorded_without_a_new_worker(study):
    plan, index = faulty_plan(4, fault="memory-error")
    summary = run_plan(plan, study)
    victim = by_key(study)[plan.trials[index].key]
    assert (victim.status, victim.phase) == (Status.OUT_OF_MEMORY, "generate")
    assert (summary.loads, summary.done) == (1, 3)


def test_without_a_limit_nothing_is_watched(study):
    plan, _ = faulty_plan(2, fault="none")
    assert run_plan(plan, study, limits=Limits(memory_limit_bytes=10**12)).done == 2


def test_a_limit_below_what_loading_takes_ends_the_load(study):
    plan = fake_plan(fake_load(load_delay_s=5), 2)
    summary = run_plan(plan, study, limits=Limits(memory_limit_bytes=10**6, max_failures=1))
    statuses = {r.status: r.phase for r in study.records()}
    assert statuses == {Status.OUT_OF_MEMORY: "load", Status.SKIPPED: None}
    assert summary.loads == 0


# After K failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_failures", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_after_so_many_deaths_the_rest_is_skipped_and_said(study, max_failures):
    plan = fake_plan(fake_load(fault="exit"), 5)
    summary = run_plan(plan, study, limits=Limits(max_failures=max_failures))
    records = [by_key(study)[t.key] for t in plan.trials]
    dead, skipped = records[:max_failures], records[max_failures:]
    assert {r.status for r in dead} == {Status.CRASHED}
    assert {r.status for r in skipped} == {Status.SKIPPED}
    (text,) = {r.error for r in skipped}
    assert text.startswith("not tried: the worker died")
    assert "exit code 7" in text
    assert f"raise max_failures={max_failures}" in text
    assert (summary.failed, summary.loads) == (5, max_failures)
    assert summary.statuses == {"crashed": max_failures, "skipped": 5 - max_failures}


def test_skipped_trials_are_tried_by_the_next_run(study):
    plan, index = faulty_plan(4, fault="exit")
    first = run_plan(plan, study, limits=Limits(max_failures=1))
    assert first.statuses["crashed"] == 1
    assert first.done == index
    again = run_plan(plan, study, limits=Limits(max_failures=5))
    assert (again.skipped, again.statuses) == (first.done, {"crashed": 1})
    assert len(study.done_keys()) == 3


def test_deaths_are_counted_over_all_starts(study):
    plan = fake_plan(fake_load(fault="exit"), 6)
    summary = run_plan(plan, study, limits=Limits(max_failures=2, starts=3))
    assert summary.statuses == {"crashed": 2, "skipped": 4}
    assert summary.loads == 2


# In loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["exit", pytest.param("allocate", marks=pytest.mark.slow)])
def test_fault_in_load_has_its_phase(study, fault):
    plan = fake_plan(fake_load(fault=fault, fault_phase="load"), 3)
    summary = run_plan(plan, study, limits=limits(fault, max_failures=2))
    records = [by_key(study)[t.key] for t in plan.trials]
    status, text = DEATHS[fault]
    assert [r.status for r in records] == [status, status, Status.SKIPPED]
    assert records[0].phase == "load"
    assert text in records[0].error
    assert (summary.loads, summary.done) == (0, 0)
    assert study.sessions() == {}


def test_hang_in_load_ends_at_ten_times_the_deadline(study):
    plan = fake_plan(fake_load(fault="hang", fault_phase="load"), 2)
    began = time.monotonic()
    run_plan(plan, study, limits=Limits(deadline_s=0.1, max_failures=1))
    assert 1.0 <= time.monotonic() - began < 120
    first, second = (by_key(study)[t.key] for t in plan.trials)
    assert (first.status, first.phase) == (Status.TIMED_OUT, "load")
    assert "raise deadline_s=0.1" in first.error
    assert second.status is Status.SKIPPED


@IN_THREADS
def test_memory_error_in_load_fails_every_trial_of_every_start_once(study):
    plan = fake_plan(fake_load(fault="memory-error", fault_phase="load"), 4)
    summary = run_plan(plan, study, limits=Limits(starts=2))
    assert summary.statuses == {"out-of-memory": 4}
    assert {r.phase for r in study.records()} == {"load"}
    assert summary.loads == 1


# In warm-up --------------------------------------------------------------------------------------


def two_kinds(fault: str) -> Plan:
    """Three small and three large images; warming up the large ones commits the fault."""
    small, large = fake_plan(fake_load(), 3), fake_plan(fake_load(), 3, width=128)
    numbers = [_number(p.trials[0].request) for p in (small, large)]
    every = next(n for n in range(2, 10_000) if numbers[0] % n and numbers[1] % n == 0)
    load = fake_load(fault=fault, fault_phase="warm-up", fault_every=every)
    plans = fake_plan(load, 3), fake_plan(load, 3, width=128)
    return replace(plans[0], batches=plans[0].batches + plans[1].batches)


@pytest.mark.parametrize(
    "fault", ["exit", "hang", pytest.param("allocate", marks=pytest.mark.slow)]
)
def test_fault_in_warm_up_takes_its_kind_and_leaves_the_others(study, fault, monkeypatch):
    plan = two_kinds(fault)
    bounds = limits(fault)
    if fault == "hang":
        # Loading has its own time: on a busy machine a process takes seconds to start.
        monkeypatch.setattr(
            Limits, "start_deadline_s", lambda self, work=0.0: 2.0 if work else 120.0
        )
    summary = run_plan(plan, study, limits=bounds)
    records = [by_key(study)[t.key] for t in plan.trials]
    status, text = DEATHS[fault]
    assert [r.status for r in records] == [Status.OK] * 3 + [status] + [Status.SKIPPED] * 2
    assert text in records[3].error
    assert {r.phase for r in records[3:]} == {"warm-up"}
    assert all("warming up for this size" in r.error and text in r.error for r in records[4:])
    assert (summary.loads, summary.done) == (2, 3)
    assert lines_per_key(study) == {1}


@IN_THREADS
def test_memory_error_in_warm_up_leaves_the_verdict_to_the_trials(study):
    plan = fake_plan(fake_load(fault="memory-error", fault_phase="warm-up"), 2)
    summary = run_plan(plan, study)
    assert (summary.done, summary.failed, summary.loads) == (2, 0, 1)
    (session,) = study.sessions().values()
    assert 0 < session.first_call_s == session.warmup_s


def test_what_died_in_warm_up_is_left_alone_by_later_starts(study):
    plan = two_kinds("exit")
    plan = replace(plan, batches=plan.batches[3:] + plan.batches[:3])  # the large ones first
    summary = run_plan(plan, study, limits=Limits(starts=3))
    assert summary.statuses == {"crashed": 1, "skipped": 2}
    assert summary.done == 3


@IN_THREADS
def test_failure_to_settle_fails_every_trial_once(study):
    plan = fake_plan(fake_load(unproven=True), 4)
    summary = run_plan(plan, study, limits=Limits(starts=2))
    assert summary.statuses == {"error": 4}
    assert summary.loads == 1
    for record in study.records():
        assert record.phase == "warm-up"
        assert record.error.startswith("OptimizationNotApplied: unproven=true")


# The process alone -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("exit", WorkerDied), ("hang", WorkerHung), ("allocate", WorkerTooLarge)],
    ids=["exit", "hang", "allocate"],
)
def test_process_says_by_type_how_it_ended(fault, kind):
    bounds = replace(limits(fault), deadline_s=0.1 if fault == "hang" else None)
    worker = WorkerProcess(fake_load(fault=fault, fault_phase="load"), bounds)
    with pytest.raises(kind) as caught:
        worker.load()
    assert type(caught.value) is kind
    assert not psutil.pid_exists(worker.pid)
    worker.kill()  # a second time does no harm


def test_process_that_is_well_is_not_touched_by_its_watch():
    worker = WorkerProcess(fake_load(), Limits(memory_limit_bytes=10**12))
    try:
        assert isinstance(worker.load(), Ready)
    finally:
        worker.close()


def test_process_whose_backend_refuses_ends_by_itself():
    worker = WorkerProcess(fake_load(fault="memory-error", fault_phase="load"), Limits())
    assert isinstance(worker.load(), Failed)
    worker.close()
    assert not psutil.pid_exists(worker.pid)


# Ctrl-C ------------------------------------------------------------------------------------------


def test_ctrl_c_while_a_worker_hangs_keeps_what_is_done_and_exits_3(tmp_path):
    plan, index = faulty_plan(6, fault="none")
    every = one_victim(plan)[0]
    code = (
        "import sys; import sd35bench.workers.process; from sd35bench.cli import main\n"
        # A suite that was started in the background ignores SIGINT, and so would its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.studies.fakes import fake_load, fake_plan\n"
        f"plan = fake_plan(fake_load(fault='hang', fault_every={every}), 6)\n"
        "real = sd35bench.workers.process.run_plan\n"
        "sd35bench.workers.process.run_plan = lambda _, study, *rest: real(plan, study, *rest)\n"
        "sys.exit(main(['run', 'backend=fake', 'study=s', f'results_dir={sys.argv[1]}', '--json']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "s" / "study.json").exists():
            study = Study.open(tmp_path, "s")
            if study.sessions() and len(study.records()) == index:
                break
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"
    assert len(Study.open(tmp_path, "s").done_keys()) == index
    assert len(workers) == 1
    assert not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers)
