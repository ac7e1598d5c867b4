"""The Ray engine: the study that one worker makes, whatever is killed, and refusals by name."""

import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sd35bench.errors import ConfigError, WorkerDied, WorkerLost
from sd35bench.loading.checkpoint import weights_digest, whole_digest
from sd35bench.study.store import Study
from sd35bench.types import NO_WEIGHTS, Change, Load, Status
from sd35bench.workers import cluster
from sd35bench.workers.cluster import RayCluster, RayCrew, RaySettings, RayWorker, model_problem
from sd35bench.workers.limits import Limits
from sd35bench.workers.process import run_plan
from sd35bench.workers.worker import BatchJob
from tests.studies.fakes import MODEL, fake_load, fake_plan

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="ray is not installed: pip install 'ray>=2.50,<3'",
)
SMALL = RaySettings(init={"num_cpus": 2, "object_store_memory": 80_000_000})
FREE = {"num_cpus": 0.0}


def free_load(**options) -> Load:
    """A load that occupies nothing, as the fake backend's own configuration says."""
    return replace(fake_load(**options), model=replace(MODEL, weights_digest=NO_WEIGHTS))


def actors() -> list[psutil.Process]:
    """The actors' processes below this one; others of this machine are nobody's business here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::NodeWorker"):
            found.append(process)
    return found


def kill_one(rng: random.Random) -> bool:
    """SIGKILL an actor, if there is one."""
    there = actors()
    if not there:
        return False
    try:
        rng.choice(there).send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def made_by_one(tmp_path: Path, plan) -> dict[str, str | None]:
    """Trial key → image, as one local worker makes them."""
    study = Study.open(tmp_path, "alone", create=True)
    run_plan(plan, study)
    return {r.trial.key: r.image for r in study.records()}


def committed(study: Study) -> Counter[str]:
    """How often each trial was written down as made."""
    return Counter(r.trial.key for r in study.all_records() if r.status is Status.OK)


@needs_ray
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_actors_make_what_one_worker_makes_though_two_are_killed(tmp_path, count):
    plan = fake_plan(free_load(delay_s=0.01), 16, steps=2)
    study = Study.open(tmp_path, "ray", create=True)
    engine = RayCluster(workers=count, settings=SMALL)
    engine.prepare(plan, dry=False)
    rng, seen, kills = random.Random(0), [], []

    def kill(now: Any) -> None:
        seen.append(now.done)
        if len(seen) in (4, 9):
            kills.append(kill_one(rng))

    summary = engine.run(plan, study, kill)
    assert kills == [True, True]
    assert (summary.done, summary.failed) == (16, 0)
    assert set(committed(study).values()) == {1}
    assert {r.trial.key: r.image for r in study.records()} == made_by_one(tmp_path, plan)
    assert len({r.session_id for r in study.records()}) >= 2


# Refused by name, before anything is loaded -----------------------------------------------------


@contextmanager
def listening() -> Iterator[int]:
    """A port where something answers that is no Ray."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@needs_ray
def test_an_address_without_ray_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 1.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = fake_plan(free_load(), 1)
    began = time.monotonic()
    with listening() as port:
        closed = f"127.0.0.1:{port + 1}"
        for address, said in (
            ("127.0.0.1:1", "nothing answers there"),
            (f"127.0.0.1:{port}", "no Ray head"),
            ("ray://h:1", "Ray Client is not taken"),
            ("nonsense", "must be auto or HOST:PORT"),
        ):
            engine = RayCluster(settings=RaySettings(address=address))
            with pytest.raises(ConfigError, match=f"ray.address={address}.*{said}"):
                engine.prepare(plan, dry=False)
    assert closed
    assert time.monotonic() - began < 30


@needs_ray
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (RaySettings(init={"num_cpu": 1}), "ray.init.num_cpu: Ray has no such option.*num_cpus"),
        (RaySettings(actor={"gpus": 1}), "ray.actor.gpus: Ray has no such option"),
    ],
)
def test_options_that_ray_lacks_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        RayCluster(settings=settings).prepare(fake_plan(free_load(), 1), dry=True)


def test_without_the_extra_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'ray>="):
        RayCluster().prepare(fake_plan(free_load(), 1), dry=True)


@pytest.fixture
def nodes(monkeypatch):
    """Two nodes of a cluster that is not there."""
    there = [
        {"NodeID": "1", "Resources": {"CPU": 5.0}},
        {"NodeID": "2", "Resources": {"CPU": 3.0, "GPU": 1.0}},
    ]
    monkeypatch.setattr(cluster, "_connect", lambda settings: None)
    monkeypatch.setattr(cluster, "_nodes", lambda: there)


@pytest.mark.usefixtures("nodes")
def test_more_actors_than_the_cluster_holds_are_refused():
    on_cores = replace(fake_load(device="cpu"), threads=2)
    assert RayCluster().crew(fake_plan(on_cores, 1)).size == 2 + 1
    assert RayCluster().crew(fake_plan(fake_load(), 1)) == RayCrew(
        1, {"num_gpus": 1.0}, RaySettings()
    )
    assert RayCluster(workers=50).crew(fake_plan(free_load(), 1)).size == 50
    with pytest.raises(ConfigError, match=r"workers=2: backend=fake needs num_gpus=1.*holds 1"):
        RayCluster(workers=2).crew(fake_plan(fake_load(), 1))
    with pytest.raises(ConfigError, match="no node of the cluster has num_cpus=9"):
        RayCluster().crew(fake_plan(replace(fake_load(device="cpu"), threads=9), 1))


def test_a_node_without_the_model_or_with_other_weights_is_named(tmp_path):
    folder = tmp_path / "model"
    spec = replace(MODEL, path=str(folder))
    assert "is not there" in str(model_problem(spec))
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    right = replace(spec, weights_digest=weights_digest(folder))
    assert model_problem(right) is None
    assert "holds other weights" in str(model_problem(replace(spec, weights_digest="1" * 64)))
    lora = Change(kind="lora", path=str(tmp_path / "lora.safetensors"), digest="x", weight=0.5)
    assert "model.lora=" in str(model_problem(replace(right, changes=(lora,))))
    (tmp_path / "lora.safetensors").write_bytes(b"low")
    assert "holds other weights" in str(model_problem(replace(right, changes=(lora,))))
    whole = whole_digest(folder, None, [("lora", lora.path, 0.5)], None)
    assert model_problem(replace(right, changes=(lora,), weights_digest=whole)) is None
    assert model_problem(replace(MODEL, path="", weights="random")) is None


# What dies, and what it means -------------------------------------------------------------------


class FakeRay:
    """Answers calls of an actor with what is planted."""

    class exceptions:  # noqa: N801 - Ray's own name
        class GetTimeoutError(Exception):
            pass

        class RayActorError(Exception):
            pass

        class RaySystemError(Exception):
            pass

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked, self.killed = answer, [], 0

    def get(self, promised: Any, timeout: float | None = None) -> Any:
        if isinstance(self.answer, Exception) and not isinstance(self.answer, WorkerDied):
            raise self.answer
        return self.answer

    def kill(self, actor: Any) -> None:
        self.killed += 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (WorkerDied("exit code 7"), WorkerDied),
        (FakeRay.exceptions.RayActorError("The actor died.\nmore"), WorkerLost),
        (FakeRay.exceptions.GetTimeoutError("late"), WorkerLost),
    ],
    ids=["process", "actor", "no-room"],
)
def test_a_dead_process_is_a_failure_and_a_dead_actor_is_not(monkeypatch, answer, error, tmp_path):
    fake = FakeRay(answer)
    monkeypatch.setattr(cluster, "_ray", lambda: fake)
    worker = object.__new__(RayWorker)
    worker._actor = type("Actor", (), {"ask": type("M", (), {"remote": fake.asked.append})})
    monkeypatch.setattr(worker._actor.ask, "remote", lambda *a: fake.asked.append(a))
    image = tmp_path / "init.img"
    image.write_bytes(b"picture")
    with pytest.raises(error) as found:
        worker.run(BatchJob(requests=(), inits=(str(image), None)), 1.0)
    assert isinstance(found.value, WorkerLost) is (error is WorkerLost)
    assert fake.asked[0][1].inits == (b"picture", None)


# Kills ------------------------------------------------------------------------------------------


def run_under_fire(study: Study, plan, crew: RayCrew, kills: int, seed: int) -> int:
    """Make a plan while actors are killed at random, again until all is made; returns the kills."""
    rng, done, count = random.Random(seed), threading.Event(), [0]

    def fire() -> None:
        while not done.wait(rng.uniform(0.2, 0.8)):
            if count[0] < kills:
                count[0] += kill_one(rng)

    thread = threading.Thread(target=fire)
    thread.start()
    try:
        while len(study.done_keys()) < len(plan.trials) or count[0] < kills:
            left = [t.key for t in plan.trials if t.key not in study.done_keys()]
            if not left:
                break
            run_plan(plan, study, limits=Limits(max_failures=1000), crew=crew)
    finally:
        done.set()
        thread.join()
    return count[0]


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(4))
def test_actors_killed_at_random_lose_nothing_and_make_nothing_twice(tmp_path, seed):
    plan = fake_plan(free_load(delay_s=0.05), 600, steps=2)
    study = Study.open(tmp_path, "ray", create=True)
    engine = RayCluster(workers=2, settings=SMALL)
    engine.prepare(plan, dry=False)
    kills = run_under_fire(study, plan, engine.crew(plan), 25, seed)
    print(f"{kills} kills, {len(study.sessions())} sessions")
    assert kills >= 15
    assert committed(study) == Counter(t.key for t in plan.trials)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_raylets_on_loopback_one_of_which_dies_and_comes_back(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    plan = fake_plan(free_load(delay_s=0.05), 200, steps=2)
    small = {"num_cpus": 2, "object_store_memory": 80_000_000}
    here = Cluster(initialize_head=True, head_node_args=small)
    try:
        other = here.add_node(**small)
        settings = RaySettings(address=here.address)
        engine = RayCluster(workers=4, settings=settings)
        engine.prepare(plan, dry=False)
        assert len([n for n in ray.nodes() if n["Alive"]]) == 2
        study = Study.open(tmp_path, "ray", create=True)
        nodes, seen, made = [other], [], []
        # Ray starts nodes from the main thread alone.
        run = threading.Thread(target=lambda: made.append(engine.run(plan, study, seen.append)))
        run.start()
        for count in (40, 110):
            while len(seen) < count and run.is_alive():
                time.sleep(0.05)
            here.remove_node(nodes.pop(), allow_graceful=False)
            nodes.append(here.add_node(**small))
        run.join()
        (summary,) = made
        assert (summary.done, summary.failed) == (200, 0)
        assert committed(study) == Counter(t.key for t in plan.trials)
        assert {r.trial.key: r.image for r in study.records()} == made_by_one(tmp_path, plan)
    finally:
        ray.shutdown()
        here.shutdown()


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_driver_killed_at_random_is_resumed_and_makes_nothing_twice(tmp_path):
    from ray.cluster_utils import Cluster

    here = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000}
    )
    rng = random.Random(3)
    command = [
        *(sys.executable, "-m", "sd35bench", "run", "backend=fake", "backend.delay_s=0.1"),
        *("steps=2", "prompts.limit=120", "study=s", f"results_dir={tmp_path}", "engine=ray"),
        *("workers=2", f"ray.address={here.address}"),
    ]
    kills = 0
    try:
        for _ in range(40):
            driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                # From before it has joined the cluster to well into the trials.
                driver.wait(timeout=rng.uniform(4.0, 14.0) if kills < 10 else 600)
            except subprocess.TimeoutExpired:
                os.kill(driver.pid, signal.SIGKILL)
                driver.wait()
                kills += 1
                continue
            assert driver.returncode == 0
            break
    finally:
        here.shutdown()
    study = Study.open(tmp_path, "s")
    print(f"{kills} kills of the driver")
    assert len(committed(study)) == 120
    assert set(committed(study).values()) == {1}
