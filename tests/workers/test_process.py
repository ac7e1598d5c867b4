"""Several workers at once: the same study as one makes, and what ends a run ends all of them."""

import threading
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from sd35bench.cli import main
from sd35bench.errors import DiskFull, WorkerDied
from sd35bench.study.store import Study
from sd35bench.types import Status, Timings
from sd35bench.workers import process
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import LocalCrew, run_plan, run_plans
from sd35bench.workers.seats import Seat
from sd35bench.workers.worker import Answer, Made, Ready, Settled
from tests.studies.fakes import fake_load, fake_plan

THREE = LocalCrew((Seat(),) * 3)


class Double:
    """Stands in for a worker process; `meet` holds the first batch of every lane back until all
    lanes have one, so that no lane does everything.
    """

    meet: threading.Barrier
    dies_on: frozenset[str] = frozenset()
    made: Counter[str]
    ended: list[str]

    def __init__(self, load, limits, seat):
        self.load_, self.warm, self.met = load, False, False

    def load(self):
        return Ready(load_s=1.0, in_force={}, environment={}, environment_id="e")

    def settle(self):
        self.warm = True
        return Settled(in_force={})

    def run(self, job, deadline_s):
        if self.warm:
            if not self.met:
                self.met = True
                Double.meet.wait(60)
            prompt = job.requests[0].prompt
            if prompt in Double.dies_on:
                raise WorkerDied(f"died of {prompt}")
            Double.made[prompt] += 1
        made = tuple(Made(status=Status.OK, data=f"{r}".encode()) for r in job.requests)
        return Answer(made=made, timings=Timings(generate_s=1.0, encode_s=0.0), wall_s=1.0)

    def close(self):
        Double.ended.append("close")

    def stop(self):
        Double.ended.append("stop")
        Double.meet.abort()

    def kill(self):
        pass


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "WorkerProcess", Double)
    monkeypatch.setattr(Double, "meet", threading.Barrier(3), raising=False)
    monkeypatch.setattr(Double, "made", Counter(), raising=False)
    monkeypatch.setattr(Double, "ended", [], raising=False)
    return Study.open(tmp_path, "s", create=True)


def test_three_workers_make_every_trial_once_in_sessions_of_their_own(study):
    plan = fake_plan(fake_load(), 12)
    summary = run_plan(plan, study, limits=Limits(), crew=THREE)
    assert (summary.done, summary.loads, summary.load_s) == (12, 3, 3.0)
    assert summary.measured_s == 12.0
    assert set(Double.made.values()) == {1}
    assert {r.trial.key for r in study.records()} == {t.key for t in plan.trials}
    assert len(list(study.all_records())) == 12
    assert sorted(s.start for s in study.sessions().values()) == [0, 1, 2]
    assert len({r.session_id for r in study.records()}) == 3
    assert run_plan(plan, study, crew=THREE).skipped == 12


def test_every_load_goes_to_two_workers_at_least(study):
    loads = [replace(fake_load(n=n), threads=1) for n in range(4)]
    plans = [(fake_plan(load, 6), Limits(), None) for load in loads]
    Double.meet = threading.Barrier(1)
    summaries = run_plans(plans, study, LocalCrew((Seat(),) * 2))
    assert [s.done for s in summaries] == [6] * 4
    sessions = defaultdict(set)
    for record in study.records():
        sessions[record.trial.load.key].add(record.session_id)
    assert min(len(found) for found in sessions.values()) >= 2


def test_a_worker_that_dies_costs_one_batch_and_its_lane_goes_on(study, monkeypatch):
    monkeypatch.setattr(Double, "dies_on", frozenset({"prompt 0"}))
    Double.meet = threading.Barrier(1)
    summary = run_plan(fake_plan(fake_load(), 9), study, crew=THREE)
    assert (summary.done, summary.statuses) == (8, {"crashed": 1})
    assert len(list(study.all_records())) == 9


def test_deaths_of_all_workers_count_together(study, monkeypatch):
    plan = fake_plan(fake_load(), 30)
    monkeypatch.setattr(Double, "dies_on", frozenset(t.request.prompt for t in plan.trials))
    Double.meet = threading.Barrier(1)
    summary = run_plan(plan, study, limits=Limits(max_failures=3), crew=THREE)
    assert 3 <= summary.statuses["crashed"] <= 5  # the other lanes were at one each
    assert summary.failed == len(list(study.all_records())) == 30


def test_what_ends_one_lane_ends_all_and_is_raised(study, monkeypatch):
    real = Study.put_image

    def full(self, data, suffix):
        if threading.current_thread().name == "lane-1":
            raise DiskFull("full")
        return real(self, data, suffix)

    monkeypatch.setattr(Study, "put_image", full)
    with pytest.raises(DiskFull):
        run_plan(fake_plan(fake_load(), 200), study, crew=THREE)
    monkeypatch.setattr(Study, "put_image", real)
    Double.meet = threading.Barrier(1)
    assert not [t for t in threading.enumerate() if t.name.startswith("lane-")]
    assert run_plan(fake_plan(fake_load(), 200), study, crew=THREE).failed == 0
    assert len(study.done_keys()) == 200


def test_progress_says_what_every_worker_does(study):
    seen = []
    run_plan(fake_plan(fake_load(), 12), study, seen.append, crew=THREE)
    assert seen[-1].done == 12
    assert ("generate fake",) * 3 in [now.doing for now in seen]
    Double.meet = threading.Barrier(1)
    run_plan(fake_plan(fake_load(), 13), study, seen.append)
    assert seen[-1].doing == ()


@pytest.mark.usefixtures("fakes_here")
@pytest.mark.usefixtures("two_cores")
@pytest.mark.usefixtures("empty_folder")
def test_the_command_shares_loads_out_to_workers_and_refuses_too_many(call, capsys):
    asked = ("-m", "backend=fake", "threads=1,2", "steps=2,4", "prompts.limit=3", "workers=2")
    code, document = call("run", *asked)
    assert (code, document["done"], document["loads"]) == (0, 12, 4)
    assert document["elapsed_s"] > 0
    assert main(["run", "backend=eager", "workers=2000"]) == 2
    assert main(["run", "backend=eager", "threads=1", "workers=1000"]) == 2
    said = capsys.readouterr().err
    assert "workers=2000: must be auto, or an integer from 1 to 1024" in said
    assert "workers=1000: backend=eager occupies threads=1 cores a worker" in said
