"""A kept composition is what Hydra's own loader composes, and never one of files that changed."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode

from sd35bench.config import compose
from sd35bench.errors import ConfigError

MULTIRUN = RunMode.MULTIRUN
MODULE = importlib.import_module("sd35bench.config.compose")  # the package has its function's name
ASKED = (["backend=fake", "steps=4"], ["backend=fake", "cfg=2", "prompts.limit=3"])


def written(folder: Path, steps: int) -> Path:
    (folder / "experiment").mkdir(exist_ok=True)
    text = f"# @package _global_\nsteps: {steps}\n"
    (folder / "experiment" / "own.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(MODULE, "_repositories", {})


def test_every_composition_is_hydras_own(monkeypatch):
    found = [compose(asked) for asked in (*ASKED, *ASKED)]
    (repository,) = MODULE._repositories.values()
    assert len(repository.composed) == 1, "values are put on top of one composition"
    monkeypatch.setattr(MODULE, "KeepingLoader", ConfigLoaderImpl)
    assert found == [compose(asked) for asked in ASKED] * 2


def test_a_sweep_s_own_configuration_is_hydras_too():
    asked = ["backend=fake,eager", "steps=4,8", "study=x", "hydra.sweep.dir=/tmp/x", "+a.b=1"]
    with MODULE.hydra_session() as hydra:
        ours = hydra.config_loader
        hydras = ConfigLoaderImpl(ours.config_search_path)
        for _ in range(2):
            found = [each.load_configuration("run", asked, MULTIRUN) for each in (ours, hydras)]
            assert found[0] == found[1]


def test_what_a_caller_changes_changes_no_other_composition():
    first = compose(ASKED[0])
    first.prompts.limit = 77
    assert compose(ASKED[0]).prompts.limit != 77


def test_mutant_without_copies_has_one_configuration_for_all(monkeypatch):
    same = SimpleNamespace(dumps=lambda value: value, loads=lambda value: value)
    monkeypatch.setattr(MODULE, "pickle", same)
    compose(ASKED[0])  # which takes Hydra's own node out
    with pytest.raises(ConfigError, match="hydra"):
        compose(ASKED[0])


def test_a_changed_or_a_gone_file_counts_at_once(tmp_path):
    for steps in (5, 6):
        folder = written(tmp_path, steps)
        assert compose(["experiment=own", "backend=fake"], folder).steps == steps
    (folder / "experiment" / "own.yaml").unlink()
    with pytest.raises(ConfigError, match="own"):
        compose(["experiment=own", "backend=fake"], folder)


def test_mutant_that_does_not_look_at_the_files_is_late(tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "_files", lambda places: iter(()))
    steps = [compose(["experiment=own"], written(tmp_path, n)).steps for n in (5, 6)]
    assert steps == [5, 5]


def test_few_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "KEPT", 1)
    for steps in (5, 6):
        compose(["experiment=own"], written(tmp_path, steps))
        assert len(MODULE._repositories) == 1
