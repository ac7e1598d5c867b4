import importlib.util
import pickle
import sys

import pytest
from hydra.core.plugins import Plugins

from sd35bench.config import compose
from sd35bench.config.overrides import parse, sweep_values
from sd35bench.config.sweeper import job_overrides, noise_overrides, sweep
from sd35bench.errors import ConfigError
from tests.forked import forget, in_fork


def jobs(*arguments: str, experiment: dict | None = None) -> list[list[str]]:
    config = compose([])
    for name, values in ({} if experiment is None else experiment).items():
        config.axes[name] = values
    return job_overrides(list(arguments), config)


def test_job_overrides_request_fields_stay_in_one_job():
    (job,) = jobs("model=nano", "steps=4,16", "cfg=1,4", "seed=range(0,3)", "study=t")
    assert job == [
        "model=nano",
        "axes.steps=[4,16]",
        "axes.cfg=[1,4]",
        "axes.seed=[0,1,2]",
        "study=t",
    ]


def test_job_overrides_one_job_per_load():
    found = jobs("backend=fake,eager", "threads=1,2", "steps=4,16")
    assert [job[:2] for job in found] == [
        ["backend=fake", "threads=1"],
        ["backend=fake", "threads=2"],
        ["backend=eager", "threads=1"],
        ["backend=eager", "threads=2"],
    ]
    assert all(job[2:] == ["axes.steps=[4,16]"] for job in found)


def test_job_overrides_an_experiments_backends_are_jobs_too():
    found = jobs("study=t", experiment={"backend": ["fake", "eager"]})
    assert found == [["backend=fake", "study=t"], ["backend=eager", "study=t"]]


def test_job_overrides_the_command_line_wins_over_an_experiments_axes():
    (job,) = jobs("steps=5", "backend=fake", experiment={"steps": [1, 2], "backend": ["eager"]})
    assert job == ["backend=fake", "steps=5", "axes.steps=[]"]


@pytest.mark.parametrize(
    ("argument", "reset"),
    [("width=64", "aspect_ratio=null"), ("aspect_ratio=16:9", "axes.width=[]")],
)
def test_job_overrides_one_way_of_saying_the_size_replaces_the_other(argument, reset):
    (job,) = jobs(argument)
    assert reset in job


@pytest.mark.usefixtures("two_cores")
def test_noise_overrides_run_the_reference_with_other_threads_and_in_batches():
    jobs = [["backend=eager", "steps=4"], ["backend=compile", "steps=4"]]
    other_threads, in_batches = noise_overrides(jobs, "eager")
    assert other_threads[0] == in_batches[0] == "backend=eager"
    assert other_threads[1].startswith("threads=")
    assert any(text.startswith("batch_size=") for text in in_batches)
    assert other_threads[-1] == in_batches[-1] == "steps=4"


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("asked", ["batch_size=4", "axes.batch_size=[1,4]", "timed_limit=9"])
def test_noise_overrides_keep_their_own_batch_size(asked):
    _, in_batches = noise_overrides([["backend=eager", asked]], "eager")
    assert asked not in in_batches
    assert "timed_limit=0" in in_batches


@pytest.mark.usefixtures("two_cores")
def test_noise_overrides_cover_every_model_once():
    jobs = [[f"model={m}", f"backend={b}"] for m in ("nano", "big") for b in ("eager", "compile")]
    models = [job[-1] for job in noise_overrides(jobs, "eager")]
    assert models == ["model=nano", "model=nano", "model=big", "model=big"]


def test_noise_floor_may_be_a_backend_of_the_users_own_folder(tmp_path):
    """Mutant: the package's own backends alone, which refused it."""
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "mine.yaml").write_text("defaults: [fake]\nname: mine\n")
    found = []

    class Planned:
        def prepare(self, configs):
            found.extend(config.backend.name for config in configs)
            return True

        def __call__(self, config):
            raise AssertionError("nothing is launched")

    words = ["backend=fake", "noise_floor=mine", "steps=2"]
    sweep(Planned(), words, tmp_path)
    assert found[0] == "fake"
    assert set(found[1:]) == {"mine"}
    with pytest.raises(ConfigError, match="noise_floor=other: must be one of"):
        sweep(Planned(), [*words[:1], "noise_floor=other"], tmp_path)


def test_noise_overrides_nothing_unless_asked():
    assert noise_overrides([["backend=eager"]], None) == []


def test_job_overrides_quoted_texts_keep_their_commas():
    (job,) = jobs("negative_prompt='a, b',c")
    (axis,) = [text for text in job if text.startswith("axes.")]
    assert sweep_values(parse(axis)) == [["a, b", "c"]]
    assert list(compose(job).axes.negative_prompt) == ["a, b", "c"]


class Task:
    """Notes what it was called with."""

    def __init__(self, stop: bool = False) -> None:
        self.stop, self.prepared, self.calls = stop, [], []

    def prepare(self, configs) -> bool:
        self.prepared += [(c.backend.name, list(c.axes.steps)) for c in configs]
        return self.stop

    def __call__(self, config):
        self.calls.append((config.backend.name, list(config.axes.steps)))
        assert len(self.prepared) == 2, "all jobs are prepared before the first is launched"
        return config.backend.name


ARGUMENTS = ["backend=fake,eager", "steps=4,8,16", "results_dir=results"]


def test_sweep_launches_each_load_once_and_returns_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = Task()
    assert sweep(task, ARGUMENTS) == ["fake", "eager"]
    assert task.calls == [("fake", [4, 8, 16]), ("eager", [4, 8, 16])]
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_sweep_that_prepare_ends_launches_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = Task(stop=True)
    assert sweep(task, ARGUMENTS) == []
    assert task.calls == []
    assert list(tmp_path.iterdir()) == []


def test_sweep_passes_the_tasks_own_exceptions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(config):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        sweep(broken, ["backend=fake"])


def test_sweep_refuses_a_wrong_job_before_the_first_is_launched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = Task()
    with pytest.raises(ConfigError, match="steps"):
        sweep(task, ["backend=fake,eager", "axes.steps=[x]"])
    assert task.calls == []


def _unpickle_elsewhere(state: bytes) -> bool:
    forget("sd35bench", "hydra", "hydra_plugins")
    pickle.loads(state)
    return "hydra_plugins" in sys.modules


def test_sweeper_can_be_unpickled_where_hydra_has_not_seen_it():
    sweep(Task(stop=True), ARGUMENTS)
    state = pickle.dumps(Plugins.instance().class_name_to_class)  # part of what launchers send
    assert in_fork(_unpickle_elsewhere, state) is False


@pytest.mark.parametrize(("package", "joins"), [("json", True), ("no_such_package", False)])
def test_optional_backends_join_where_their_packages_are(monkeypatch, package, joins):
    found = importlib.util.find_spec
    asked = {"openvino": package, "nncf": package}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: found(asked.get(n, n), *a))
    config = compose(["experiment=backends"])
    backends = [job[0].removeprefix("backend=") for job in job_overrides([], config)]
    assert ("openvino" in backends) is joins
    assert "eager" in backends


def test_optional_backends_stay_away_where_backends_are_named():
    (job,) = job_overrides(["backend=eager"], compose(["experiment=backends"]))
    assert job == ["backend=eager"]
