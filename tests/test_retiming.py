"""What a run does with disturbed trials, on a worker that answers with planted readings."""

from dataclasses import replace
from pathlib import Path

import pytest

from sd35bench.engine import local_engine
from sd35bench.errors import WorkerDied
from sd35bench.estimate import estimate
from sd35bench.machine import rates
from sd35bench.study.store import Study
from sd35bench.types import Status, Surroundings, Timings
from sd35bench.workers import process
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import run_plan
from sd35bench.workers.worker import Answer, BatchJob, Made, Ready, Settled
from tests.studies.fakes import fake_load, fake_plan

QUIET, NOISY = (100.0, 99.0), (100.0, 60.0)
WHERE = {"cpu_model": "planted", "threads": 1}


class Planted:
    """Stands in for a worker: each timed job takes the next of `pairs`, then all are quiet."""

    pairs: list[tuple[float, float]]
    jobs: list[BatchJob]
    dies_after = 10**6

    def __init__(self, load, limits, seat=None):
        self.warm = False

    def load(self):
        return Ready(load_s=1.0, in_force={}, environment=WHERE, environment_id="e")

    def settle(self):
        self.warm = True
        return Settled(in_force={}, canary=("planted", 100.0))

    def run(self, job, deadline_s):
        before, after = QUIET
        if self.warm:
            Planted.jobs.append(job)
            before, after = Planted.pairs.pop(0) if Planted.pairs else QUIET
        if len(Planted.jobs) > Planted.dies_after:
            raise WorkerDied("killed")
        latency_s = 1.0 if after > 90.0 else 9.0
        return Answer(
            made=tuple(Made(status=Status.OK, data=f"{r.prompt}".encode()) for r in job.requests),
            timings=Timings(generate_s=latency_s, encode_s=0.0),
            surroundings=Surroundings(canary_before=before, canary_after=after),
            wall_s=1.0,
        )

    def close(self):
        pass

    def kill(self):
        pass


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(process, "WorkerProcess", Planted)
    monkeypatch.setattr(Planted, "jobs", [], raising=False)
    monkeypatch.setattr(Planted, "pairs", [], raising=False)
    return Study.open(tmp_path, "s", create=True)


def run(study: Study, pairs, *, count: int = 8, **limits):
    Planted.pairs[:] = pairs
    Planted.jobs.clear()
    return run_plan(fake_plan(fake_load(), count), study, limits=Limits(**limits))


def latencies(study: Study) -> list[float]:
    return [r.timings.latency_s for r in study.records() if r.timings is not None]


def test_disturbed_trials_are_timed_again_at_the_end(study):
    summary = run(study, [QUIET, NOISY, QUIET, NOISY, QUIET, QUIET, QUIET, QUIET])
    again = [job.requests[0].prompt for job in Planted.jobs[8:]]
    assert again == ["prompt 1", "prompt 3"]
    assert (summary.done, summary.timed, summary.retimed, summary.disturbed) == (8, 8, 2, 0)
    assert latencies(study) == [1.0] * 8
    assert len(list(study.all_records())) == 10
    assert [job.closes for job in Planted.jobs] == [False] * 7 + [True, False, True]


def test_retiming_stops_at_half_of_what_was_timed(study):
    """A neighbour that stays is no reason to time for ever; the rest keeps its times, marked."""
    alternating = [QUIET, NOISY, (60.0, 60.0)] * 40
    summary = run(study, alternating, count=9)
    assert len(Planted.jobs) == 9 + 4
    assert (summary.done, summary.retimed) == (9, 4)
    assert summary.disturbed >= 5
    assert run(study, [], count=9).done == 0  # nothing is missing


@pytest.mark.parametrize("contention", ["warn", "error"])
def test_only_retime_times_again(study, contention):
    summary = run(study, [QUIET, NOISY, QUIET, QUIET, QUIET], count=5, contention=contention)
    assert len(Planted.jobs) == 5
    assert (summary.retimed, summary.disturbed) == (0, 1)


def test_with_error_a_disturbed_trial_failed_and_the_next_run_makes_it_again(study):
    summary = run(study, [QUIET, NOISY, QUIET, QUIET, QUIET], count=5, contention="error")
    assert (summary.done, summary.failed, summary.statuses) == (4, 1, {"disturbed": 1})
    assert "contention=retime" in next(iter(summary.errors))
    again = run(study, [], count=5, contention="error")
    assert [job.requests[0].prompt for job in Planted.jobs] == ["prompt 1"]
    assert (again.done, again.failed, again.skipped) == (1, 0, 4)
    assert run(study, [], count=5, contention="error").skipped == 5


def test_a_worker_that_dies_while_it_times_again_loses_nothing(study, monkeypatch):
    monkeypatch.setattr(Planted, "dies_after", 4)
    summary = run(study, [QUIET, NOISY, QUIET, QUIET], count=4)
    assert (summary.done, summary.failed, summary.disturbed) == (4, 0, 1)
    assert {r.status for r in study.records()} == {Status.OK}


def test_a_run_says_how_far_below_the_machines_best_it_ran(study):
    run(study, [QUIET] * 4, count=4)
    (facts,) = {s.canary for s in study.sessions().values()}
    assert rates.read_best(facts.machine) == 100.0
    rates.keep_best(facts.machine, 250.0)
    summary = run(study, [QUIET] * 8, count=8)
    assert summary.speed == pytest.approx(0.398)
    assert [s.canary.best for s in study.sessions().values()] == [100.0, 250.0]
    rates.keep_best(facts.machine, 200.0)
    assert rates.read_best(facts.machine) == 250.0


def test_a_best_that_cannot_be_read_is_none(study, tmp_path):
    folder = tmp_path / "cache" / "sd35bench" / "canary"
    folder.mkdir(parents=True)
    (folder / "here.json").write_text("{")
    assert rates.read_best("here") == 0.0


def test_estimates_learn_from_undisturbed_trials_alone(study, tmp_path: Path):
    run(study, [QUIET, NOISY, NOISY, QUIET, QUIET], count=5, contention="warn")
    assert sorted(latencies(study)) == [1.0, 1.0, 1.0, 9.0, 9.0]
    plan = fake_plan(fake_load(), 10)
    found = estimate([(plan, local_engine(Limits(), 0.0))], tmp_path, "other")
    load_s = 1.0 + 1.0  # and the warm-up
    assert found.seconds == pytest.approx(load_s + 10 * 1.0)


def test_estimates_know_nothing_from_disturbed_trials(study, tmp_path: Path):
    run(study, [(100.0, 50.0), (50.0, 100.0)], count=2, contention="warn")
    found = estimate([(fake_plan(fake_load(), 3), local_engine(Limits(), 0.0))], tmp_path, "o")
    assert found.seconds is None


def test_a_record_with_surroundings_survives_the_journal(study):
    run(study, [QUIET] * 3, count=3)
    record = study.records()[0]
    assert record.surroundings == Surroundings(canary_before=1.0, canary_after=0.99)
    fresh = Study.open(study.path.parent, "s")
    assert fresh.records() == study.records()
    assert fresh.sessions() == study.sessions()
    plain = replace(record, surroundings=None)
    assert plain.trial.key == record.trial.key
