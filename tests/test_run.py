import os
import time

import numpy as np
import pytest

from sd35bench import run, worker
from sd35bench.errors import DiskFull, InvalidImage, StudyLocked
from sd35bench.run import CRASH_LIMIT, run_plan
from sd35bench.store import Study
from sd35bench.types import Request, Status
from sd35bench.worker import check_image, encode_image
from tests.fakes import fake_load, fake_plan


@pytest.fixture
def study(tmp_path):
    return Study.open(tmp_path, "s", create=True)


def process_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_run_stores_every_trial_with_its_timings(study):
    plan = fake_plan(fake_load(delay_s=0.01), 5)
    summary = run_plan(plan, study)
    records = study.records()
    assert (summary.planned, summary.done, summary.failed, summary.loads) == (5, 5, 0, 1)
    assert [r.trial for r in records] == [b.trials[0] for b in plan.batches]
    for record in records:
        assert record.status is Status.OK
        assert record.timings.generate_s >= 0.01
        assert record.timings.denoise_s == pytest.approx(0.008)
        assert record.timings.encode_s > 0
        assert record.memory.peak_rss_bytes > 10_000_000
        assert record.memory.peak_vram_bytes is None
        assert study.read_image(record.image).shape == (48, 64, 3)
    (session,) = study.sessions().values()
    assert session.load == plan.load
    assert session.load_s >= 0
    assert session.first_call_s >= 0.01
    assert session.in_force["fake"] is True
    assert session.environment["python"]


def test_run_repeated_does_nothing_and_loads_nothing(study):
    plan = fake_plan(fake_load(), 4)
    run_plan(plan, study)
    summary = run_plan(plan, study)
    assert (summary.done, summary.skipped, summary.loads) == (0, 4, 0)
    assert len(study.sessions()) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_run_redoes_exactly_the_image_that_is_gone(study, batch_size):
    plan = fake_plan(fake_load(), 6, batch_size=batch_size)
    run_plan(plan, study)
    before = {r.trial.key: r for r in study.records()}
    lost = study.records()[4]
    study.image_path(lost.image).unlink()
    summary = run_plan(plan, study)
    after = {r.trial.key: r for r in study.records()}
    assert (summary.done, summary.skipped) == (1, 5)
    assert after[lost.trial.key].image == lost.image
    assert after[lost.trial.key].batch_actual == batch_size
    unchanged = before.keys() - {lost.trial.key}
    assert all(before[k] == after[k] for k in unchanged)


def test_run_records_failures_and_a_rerun_retries_only_them(study):
    plan = fake_plan(fake_load(fail_every=2), 12)
    first = run_plan(plan, study)
    assert first.failed > 0
    assert first.done > 0
    failed = [r for r in study.records() if r.status is Status.ERROR]
    assert len(failed) == first.failed
    assert all("by design" in r.error and r.timings is None and r.image is None for r in failed)
    again = run_plan(plan, study)
    assert (again.failed, again.skipped) == (first.failed, first.done)


def test_run_worker_death_is_recorded_and_the_rest_goes_on(study, monkeypatch):
    real = run.Worker.run
    plan = fake_plan(fake_load(delay_s=0.01), 6)
    victim = plan.batches[2].trials[0].request

    def dying(self, job):
        if job.requests[0] == victim:
            self._process.kill()
        return real(self, job)

    monkeypatch.setattr(run.Worker, "run", dying)
    summary = run_plan(plan, study)
    statuses = [r.status for r in study.records()]
    assert statuses.count(Status.CRASHED) == 1
    assert (summary.done, summary.failed, summary.loads) == (5, 1, 2)
    crashed = next(r for r in study.records() if r.status is Status.CRASHED)
    assert "signal 9" in crashed.error
    assert crashed.phase == "generate"


def test_run_gives_up_on_a_load_that_keeps_dying(study, monkeypatch):
    def dying(self, job):
        self._process.kill()
        return self._ask(job)

    monkeypatch.setattr(run.Worker, "run", dying)
    summary = run_plan(fake_plan(fake_load(), 6), study)
    assert (summary.done, summary.failed, summary.loads) == (0, 6, CRASH_LIMIT)
    assert sum("not tried" in (r.error or "") for r in study.records()) == 6 - CRASH_LIMIT


def test_run_second_writer_is_refused(study):
    plan = fake_plan(fake_load(), 2)
    with study.lock(plan.load.key), pytest.raises(StudyLocked):
        run_plan(plan, study)


def test_run_full_disk_pauses_and_resumes(study, monkeypatch):
    plan = fake_plan(fake_load(), 5)
    real, calls = Study.put_image, []

    def filling(self, data, suffix):
        calls.append(1)
        if len(calls) == 3:
            raise DiskFull("full")
        return real(self, data, suffix)

    monkeypatch.setattr(Study, "put_image", filling)
    with pytest.raises(DiskFull):
        run_plan(plan, study)
    assert len(study.records()) == 2
    assert run_plan(plan, study).done == 3


def test_run_leaves_no_process_behind(study, monkeypatch):
    pids = []
    real = run.Worker.__init__

    def remembering(self, load):
        real(self, load)
        pids.append(self._process.pid)

    monkeypatch.setattr(run.Worker, "__init__", remembering)
    plan = fake_plan(fake_load(delay_s=0.01), 4)

    def interrupt(_done, _total, _record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, study, interrupt)
    run_plan(plan, study)
    time.sleep(0.1)
    assert len(pids) == 2
    assert not any(process_is_alive(pid) for pid in pids)


def test_run_overhead_is_the_time_not_measured(study):
    summary = run_plan(fake_plan(fake_load(delay_s=0.05), 10), study)
    assert summary.measured_s >= 0.5
    assert summary.wall_s >= summary.measured_s
    assert summary.overhead_frac == pytest.approx(1 - summary.measured_s / summary.wall_s)
    assert summary.overhead_frac < 0.5


@pytest.mark.parametrize("scale", [1, 2], ids=["same-size", "larger"])
def test_run_init_images_reach_the_backend(study, scale):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, size=(6, 8, 3), dtype=np.uint8)
    init = blocks.repeat(8, axis=0).repeat(8, axis=1)
    data = encode_image(init.repeat(scale, axis=0).repeat(scale, axis=1), "png", 90)
    digest = study.put_init(data)
    plan = fake_plan(fake_load(), 1, init_image=digest, prompt_strength=0.25)
    run_plan(plan, study)
    (record,) = study.records()
    near = np.abs(study.read_image(record.image).astype(int) - init).mean()
    assert near < 35
    assert record.effective_steps == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), "black"),
        (np.full((8, 8, 3), 90, np.uint8), "constant"),
        (np.full((8, 8, 3), (200, 10, 10), np.uint8), "constant"),
        (np.ones((8, 16, 3), np.uint8), "wanted uint8"),
        (np.random.default_rng(0).random((8, 8, 3)), "wanted uint8"),
    ],
    ids=["black", "grey", "one-colour", "size", "float"],
)
def test_guard_refuses_what_no_metric_should_see(image, message):
    request = Request(prompt="", steps=1, cfg=1, seed=0, width=8, height=8)
    with pytest.raises(InvalidImage, match=message):
        check_image(image, request)


def test_guard_lets_a_dark_picture_pass():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:4, 2:4] = 40
    check_image(image, Request(prompt="", steps=1, cfg=1, seed=0, width=8, height=8))


def test_worker_marks_one_bad_image_of_a_batch():
    class OneBlack(worker.Backend):
        in_force: dict = {}  # noqa: RUF012

        def generate(self, requests, inits):
            good = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            return worker.Generation(images=[good, np.zeros((8, 8, 3), np.uint8)])

    requests = tuple(
        Request(prompt=p, steps=1, cfg=1, seed=0, width=8, height=8) for p in ("a", "b")
    )
    answer = worker.answer(OneBlack(), worker.Job(requests=requests, inits=(None, None)))
    assert [m.status for m in answer.made] == [Status.OK, Status.INVALID_IMAGE]
    assert answer.phase == "guard"
