"""SIGKILL a run at random points: at most the batch in flight is lost, nothing is left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from sd35bench.study.store import Study
from sd35bench.types import Status
from tests.studies.fakes import fake_load, fake_plan

ROOT = Path(__file__).parent.parent
DELAY_S = 0.004
START_S = 60.0
TRIAL_S = 0.04  # with two fsyncs, on a machine that does something else too


def start(root: Path, count: int, batch_size: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.kill_driver"]
    arguments = [str(root), str(count), str(DELAY_S), str(batch_size)]
    environment = {**os.environ, "SD35BENCH_TEST_RUN": str(root)}
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment)


def workers_of(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SD35BENCH_TEST_RUN") == str(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


def ok_lines(study: Study) -> Counter:
    """How often each key was recorded as done: more than once means work done twice."""
    seen: Counter = Counter()
    for shard in (study.path / "journal").glob("*.jsonl"):
        for line in shard.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry["kind"] == "record" and entry["status"] == Status.OK:
                seen[entry["trial"]["key"]] += 1
    return seen


def kill_until_done(root: Path, kills: int, count: int, batch_size: int, seed: int) -> None:
    rng = random.Random(seed)
    plan = fake_plan(fake_load(delay_s=DELAY_S), count, batch_size=batch_size)
    before, landed = 0, 0
    for _ in range(kills):
        process = start(root, count, batch_size)
        time.sleep(rng.uniform(0.05, 2.0))
        landed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (root / "killed" / "study.json").exists():
            study = Study.open(root, "killed")
            now = len(study.done_keys())
            assert now >= before
            before = now
    deadline = time.monotonic() + 60
    while workers_of(root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers_of(root) == []
    left = count - before
    assert start(root, count, batch_size).wait(timeout=START_S + left * TRIAL_S) == 0
    assert landed >= kills // 2, "most kills must hit a live run to mean anything"
    study = Study.open(root, "killed")
    wanted = {t.key for b in plan.batches for t in b.trials}
    assert study.done_keys() == wanted
    assert set(ok_lines(study).values()) == {1}
    named = {r.image for r in study.records()}
    assert {p.stem for p in (study.path / "images").glob("*/*")} == named
    assert not list(study.path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("batch_size", "kills"),
    [pytest.param(1, 4, marks=pytest.mark.slow, id="single"), pytest.param(4, 2, id="batched")],
)
def test_kill_at_random_points_loses_and_repeats_nothing(tmp_path, batch_size, kills):
    kill_until_done(tmp_path, kills, count=300, batch_size=batch_size, seed=batch_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kill_two_hundred_times(tmp_path):
    kill_until_done(tmp_path, kills=200, count=8000, batch_size=1, seed=7)
