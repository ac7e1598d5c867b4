"""Scoring over workers: the rows, scores and bits of one, whatever is killed; refusals by name."""

import importlib.util
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sd35bench.cli import main
from sd35bench.config.place import spread_of
from sd35bench.errors import ConfigError, MetricError, WorkerDied
from sd35bench.metrics.base import Extractor
from sd35bench.metrics.extractors import NanoEvaluator
from sd35bench.pictures import decode_rgb
from sd35bench.score import score_study
from sd35bench.study.store import Study
from sd35bench.workers.features import FeatureProcess, Spread, local_spread, serve
from tests.metrics.doubles import Colours, Redness, pictures
from tests.test_score import put

ROOT = str(Path(__file__).parents[2])


class InProcess:
    """A host that works here: a later batch may be ready before an earlier one, or it dies."""

    def __init__(self, deaths: list[int], order: random.Random | None = None) -> None:
        self.deaths, self.order = deaths, order

    def embed(self, key: bytes, name: str, images: Sequence[Any]) -> np.ndarray:
        if self.deaths:
            self.deaths.pop()
            raise WorkerDied("killed")
        if self.order is not None:
            time.sleep(self.order.uniform(0, 0.01))
        extractor = pickle.loads(key)
        assert extractor.name == name
        return extractor.embed([decode_rgb(i) if isinstance(i, bytes) else i for i in images])

    def kill(self) -> None:
        pass


def spread_here(size: int = 3, deaths: int = 0) -> Spread:
    left, order = [0] * deaths, random.Random(0)
    return Spread(lambda _: InProcess(left, order), size)


def filled(folder: Path, count: int = 130) -> Study:
    """Images of two sizes, so that there are batches of unlike length."""
    study = Study.open(folder, "s", create=True)
    put(study, pictures(count))
    put(study, pictures(20, 24, 16, seed=5), steps=9)
    return study


def rows_and_scores(study: Study) -> tuple[dict[str, bytes], dict[tuple[str, str], float | None]]:
    kept = {digest: row.tobytes() for digest, row in study.features("colours").items()}
    return kept, {(s.metric, s.key): s.value for s in study.scores()}


@pytest.mark.parametrize("deaths", [0, 2])
def test_workers_leave_what_one_process_leaves_to_the_bit(tmp_path, deaths):
    alone, many = filled(tmp_path / "1"), filled(tmp_path / "2")
    one = score_study(alone, [Redness(Colours())])
    seen: list[int] = []
    with_workers = spread_here(deaths=deaths)
    try:
        two = score_study(
            many, [Redness(Colours())], lambda done, of: seen.append(done), spread=with_workers
        )
    finally:
        with_workers.close()
    assert one == two
    assert rows_and_scores(many) == rows_and_scores(alone)
    assert seen[-1] == 150
    assert score_study(many, [Redness(Colours())])["total"] == 0


def test_rows_taken_in_the_order_of_arrival_would_be_found():
    """The mutant of the test above: rows of batches as they come, not as they were asked for."""
    batches = [pictures(2, seed=seed) for seed in range(24)]
    extractor, spread = Colours(), spread_here()
    right = [extractor.embed(batch).tobytes() for batch in batches]
    try:
        assert [rows.tobytes() for rows in spread.embed_all(extractor, batches)] == right
        asked = [spread.ask(extractor, batch) for batch in batches]
        arrived = [future.result().tobytes() for future in as_completed(asked)]
    finally:
        spread.close()
    assert sorted(arrived) == sorted(right)
    assert arrived != right


def test_a_batch_that_every_worker_dies_over_ends_scoring(tmp_path):
    study = filled(tmp_path, 3)
    spread = spread_here(deaths=100)
    try:
        with pytest.raises(WorkerDied):
            score_study(study, [Redness(Colours())], spread=spread)
    finally:
        spread.close()


def test_an_extractor_travels_without_what_it_has_loaded():
    extractor = NanoEvaluator()
    assert extractor.name.startswith("nano-")
    assert extractor.min_images > 0
    sent = pickle.dumps(extractor)
    assert len(sent) < 1000  # its weights are 2 MB
    assert pickle.loads(sent).name == extractor.name


class OtherWeights(Colours):
    """What a node has that holds other weights than the driver."""

    name = "other"


def test_other_weights_on_a_node_are_refused_by_name():
    answers: list[Any] = []

    class Connection:
        left = iter([(pickle.dumps(OtherWeights()), "colours", pictures(1)), None])

        def recv(self) -> Any:
            return next(self.left)

        def send(self, answer: Any) -> None:
            answers.append(answer)

    serve(Connection())  # type: ignore[arg-type]
    (answer,) = answers
    assert isinstance(answer, MetricError)
    assert "weights here are others (other)" in str(answer)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["workers=0"], "workers=0: must be auto, or an integer from 1 to 1024"),
        (["workers=9999", "threads=1"], "workers=9999: must be auto"),
        (["workers=1000", "threads=1"], "scoring occupies threads=1 cores a worker"),
        (["threads=4096"], "threads=4096"),
        (["ray.address=auto"], "ray.address: it acts with engine=ray only"),
        (["engine=rays"], "engine=rays: must be one of processes, ray"),
        (["workres=2"], "workres=2: expected metric.NAME.OPTION=VALUE"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(words, said):
    from sd35bench.config.overrides import metric_options

    with pytest.raises(ConfigError, match=said):  # noqa: PT012 - either may see it first
        metric_options(words)
        with spread_of(words):
            pass


def test_without_such_words_this_process_embeds():
    with spread_of(["metric.fid.reference=x"]) as spread:
        assert spread is None
    with local_spread("auto", 1) as spread:  # no process starts before a batch comes
        assert spread.most_out == 2 * len(os.sched_getaffinity(0))


def test_a_process_that_is_killed_is_an_error_and_the_next_goes_on(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ROOT)  # where the extractor's module is
    images = pictures(3)
    want, key = Colours().embed(images), pickle.dumps(Colours())
    first = FeatureProcess(1)
    try:
        assert first.embed(key, "colours", images).tobytes() == want.tobytes()
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="ended with signal 9"):
            first.embed(key, "colours", images)
    finally:
        first.kill()


# The real thing ---------------------------------------------------------------------------------


def scored(root: Path, name: str, *words: str) -> tuple[dict[str, bytes], dict]:
    """Nano's features and scores of a study's copy, scored by the command."""
    command = ["score", name, "--metric", "clip_score_nano", f"--results-dir={root}", *words]
    assert main(command) == 0
    study = Study.open(root, name)
    features = study.features(NanoEvaluator().name)
    return (
        {digest: row.tobytes() for digest, row in features.items()},
        {s.key: s.value for s in study.scores() if s.metric == "clip_score_nano"},
    )


def copies(root: Path, count: int, *names: str) -> None:
    for name in names:
        put(Study.open(root, name, create=True), pictures(count, 64, 64))


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores")
def test_two_processes_score_as_one_does_to_the_bit_though_one_is_killed(tmp_path):
    copies(tmp_path, 700, "one", "two")
    alone = scored(tmp_path, "one", "threads=1")
    done = threading.Event()

    def kill_one() -> None:
        while not done.wait(0.2):
            for child in psutil.Process().children():
                if "sd35bench.workers.features" in child.cmdline() and child.cpu_times().user > 2:
                    child.kill()
                    return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        assert scored(tmp_path, "two", "workers=2", "threads=1") == alone
    finally:
        done.set()
        killer.join()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'sd35bench[ray]'")
def test_actors_score_as_one_process_does_to_the_bit(tmp_path):
    copies(tmp_path, 300, "one", "two")
    alone = scored(tmp_path, "one", "threads=1")
    ray = ("ray.init.num_cpus=2", "ray.init.object_store_memory=80000000")
    assert scored(tmp_path, "two", "engine=ray", "workers=2", "threads=1", *ray) == alone
    assert isinstance(NanoEvaluator(), Extractor)
