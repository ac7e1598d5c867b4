import os
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sd35bench.errors import DiskFull, StudyLocked
from sd35bench.plan import Plan
from sd35bench.study.store import Study
from sd35bench.trials import shares
from sd35bench.types import Flops, GpuState, Status, Timings
from sd35bench.workers import process
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import WorkerProcess, run_plan
from sd35bench.workers.worker import Answer, Made, Ready, Settled, encode_image
from tests.studies.fakes import fake_load, fake_plan

IN_THREADS = pytest.mark.usefixtures("fakes_here")
"""Of tests that are not about processes."""


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


@IN_THREADS
def test_run_repeated_does_nothing_and_loads_nothing(study):
    plan = fake_plan(fake_load(), 4)
    run_plan(plan, study)
    summary = run_plan(plan, study)
    assert (summary.done, summary.skipped, summary.loads) == (0, 4, 0)
    assert len(study.sessions()) == 1


@IN_THREADS
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


@IN_THREADS
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


def test_run_second_writer_is_refused(study):
    plan = fake_plan(fake_load(), 2)
    with study.lock(plan.load.key), pytest.raises(StudyLocked):
        run_plan(plan, study)


@IN_THREADS
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
    real = WorkerProcess.__init__

    def remembering(self, *arguments):
        real(self, *arguments)
        pids.append(self.pid)

    monkeypatch.setattr(WorkerProcess, "__init__", remembering)
    plan = fake_plan(fake_load(delay_s=0.01), 4)

    def interrupt(_progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, study, interrupt)
    run_plan(plan, study)
    assert len(pids) == 2
    until = time.monotonic() + 60
    while any(process_is_alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_run_overhead_is_the_time_not_measured(study):
    summary = run_plan(fake_plan(fake_load(delay_s=0.05), 10), study)
    assert summary.measured_s >= 0.5
    assert summary.wall_s >= summary.measured_s
    # 0.9 of the time seen; a busy disk takes its time over an fsync
    assert summary.measured_s > 0.1 * summary.wall_s


@IN_THREADS
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


# Starts, warm-ups, what is kept beside the image --------------------------------------------------


def grid_plan(load, prompts: int) -> Plan:
    """Every prompt at two settings, prompt by prompt, as `expand` would have it."""
    short, long = fake_plan(load, prompts, steps=2), fake_plan(load, prompts, steps=8)
    pairs = zip(short.batches, long.batches, strict=True)
    return replace(short, batches=tuple(batch for pair in pairs for batch in pair))


def test_shares_are_contiguous_and_leave_blocks_whole():
    plan = grid_plan(fake_load(), 7)
    found = shares(plan.batches, 3)
    assert [len(share) for share in found] == [4, 4, 6]
    assert [b for share in found for b in share] == list(plan.batches)
    assert shares(plan.batches, 1) == [list(plan.batches)]
    assert [len(share) for share in shares(plan.batches, 100)] == [2] * 7


@IN_THREADS
def test_starts_share_the_trials_and_every_one_sees_every_setting(study):
    plan = grid_plan(fake_load(), 4)
    summary = run_plan(plan, study, limits=Limits(starts=2))
    assert (summary.done, summary.loads) == (8, 2)
    sessions = study.sessions()
    assert sorted(s.start for s in sessions.values()) == [0, 1]
    steps = {s: [] for s in sessions}
    for record in study.records():
        steps[record.session_id].append(record.trial.request.steps)
    assert [Counter(found) for found in steps.values()] == [{2: 2, 8: 2}] * 2
    assert summary.load_s == pytest.approx(sum(s.load_s for s in sessions.values()))
    assert summary.warmup_s == pytest.approx(sum(s.warmup_s for s in sessions.values()))


@IN_THREADS
def test_starts_that_are_done_are_not_started_again(study):
    plan = grid_plan(fake_load(), 4)
    run_plan(plan, study, limits=Limits(starts=2))
    lost = next(r for r in study.records() if r.trial == plan.trials[-1])
    study.image_path(lost.image).unlink()
    summary = run_plan(plan, study, limits=Limits(starts=2))
    assert (summary.done, summary.loads) == (1, 1)
    assert [s.start for s in study.sessions().values()] == [0, 1, 1]


class Recorder:
    """Stands in for the worker process: remembers the jobs, answers with one image each."""

    def __init__(self, load, limits, seat=None):
        self.jobs, self.deadlines = [], []
        Recorder.last = self

    def load(self):
        return Ready(load_s=1.0, in_force={"step": "loaded"}, environment={}, environment_id="e")

    def settle(self):
        self.jobs.append("settle")
        return Settled(in_force={"step": "settled"})

    def run(self, job, deadline_s):
        self.jobs.append(job)
        self.deadlines.append(deadline_s)
        image = f"{job.requests}".encode()
        made = tuple(Made(status=Status.OK, data=image + bytes([n])) for n in range(len(job.inits)))
        return Answer(made=made, timings=TIMINGS, flops=FLOPS, gpu=GPU, wall_s=10.0)

    def close(self):
        self.jobs.append("close")

    def kill(self):
        pass


TIMINGS = Timings(generate_s=1.0, encode_s=0.0)
FLOPS = Flops(text=1.0, denoise=2.0, decode=3.0)
GPU = GpuState(sm_clock_mhz=1, memory_clock_mhz=2, power_w=3.0, temperature_c=4)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(process, "WorkerProcess", Recorder)


def batched_plan(*sizes: int, timed=frozenset({1})) -> Plan:
    """Five prompts at each batch size, so that the last batch of 2 or 4 is a shorter one."""
    plans = [fake_plan(fake_load(), 5, batch_size=size) for size in sizes]
    batches = tuple(b for plan in plans for b in plan.batches)
    return replace(plans[0], batches=batches, timed_batch_sizes=timed)


@pytest.mark.parametrize(
    ("sizes", "timed", "warmed"),
    [
        ((1,), {1}, [1]),
        ((1, 4), {1}, [1]),
        ((4, 1), {1}, [1]),
        ((1, 2, 4), {1, 2, 4}, [1, 2, 4]),
        ((4,), {1}, [4]),
        ((3,), {3}, [3, 2]),
    ],
    ids=["single", "quality", "quality-first", "throughput", "nothing-timed", "short-tail"],
)
@pytest.mark.usefixtures("recorded")
def test_warm_up_covers_every_kind_that_is_timed(study, sizes, timed, warmed):
    run_plan(batched_plan(*sizes, timed=frozenset(timed)), study)
    jobs = Recorder.last.jobs
    assert [len(job.requests) for job in jobs[: jobs.index("settle")]] == warmed


@pytest.mark.usefixtures("recorded")
def test_session_has_what_was_in_force_after_the_warm_up(study):
    run_plan(grid_plan(fake_load(), 2), study)
    (session,) = study.sessions().values()
    assert session.in_force == {"step": "settled"}
    assert Recorder.last.jobs.count("settle") == 1
    assert (session.first_call_s, session.warmup_s, session.start) == (10.0, 20.0, 0)


@pytest.mark.usefixtures("recorded")
def test_record_keeps_flops_and_gpu(study):
    run_plan(fake_plan(fake_load(), 1), study)
    (record,) = study.records()
    assert (record.flops, record.gpu, record.latents) == (FLOPS, GPU, None)


@pytest.mark.usefixtures("recorded")
def test_deadlines_follow_the_warm_up_of_the_same_kind_or_the_work(study):
    run_plan(batched_plan(1, 4), study)
    # Start; five of 10 s x 20; a batch of four is four times the work; the last prompt is alone.
    assert Recorder.last.deadlines == [1800.0, *[200.0] * 5, pytest.approx(800.0), 200.0]


@IN_THREADS
@pytest.mark.parametrize("keep", [True, False])
def test_run_keeps_latents_of_each_image_when_asked(study, keep):
    plan = fake_plan(fake_load(), 3, batch_size=3)
    run_plan(plan, study, limits=Limits(keep_latents=keep))
    records = study.records()
    if not keep:
        assert [r.latents for r in records] == [None] * 3
        return
    assert len({r.latents for r in records}) == 3
    for record in records:
        first, last = study.read_latents(record.latents)
        assert first.shape == last.shape == (3, 6, 8)
        colours = study.read_image(record.image)[::8, ::8]
        assert np.array_equal(np.rint(last * 255).transpose(1, 2, 0), colours)


@IN_THREADS
def test_latents_that_no_record_names_are_kept_by_the_next_writer(study):
    run_plan(fake_plan(fake_load(), 1), study, limits=Limits(keep_latents=True))
    orphan = study.put_latents(np.zeros(1), np.zeros(1))
    (kept,) = {r.latents for r in study.records()}
    run_plan(fake_plan(fake_load(), 1), study)
    assert {p.stem for p in (study.path / "latents").glob("*/*")} == {kept, orphan}
    assert [p.stem for p in study.unnamed()] == [orphan]
