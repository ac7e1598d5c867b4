"""Hydra's own flags: the configuration is shown, nothing is checked for being there, or run."""

import logging
from pathlib import Path

import pytest
import yaml

from sd35bench.cli import main

pytestmark = pytest.mark.usefixtures("empty_folder")

SWEEP = ("-m", "backend=eager,fake", "steps=4,16", "study=t")


def test_cfg_job_shows_what_each_load_of_a_sweep_reads(call):
    code, document = call("run", *SWEEP, 'prompt=a "cat", a ${dog}', "--cfg", "job", "--resolve")
    assert code == 0
    jobs = document["cfg"]
    assert [job["backend"]["name"] for job in jobs] == ["eager", "fake"]
    assert [job["axes"]["steps"] for job in jobs] == [[4, 16], [4, 16]]
    assert {job["study"] for job in jobs} == {"t"}
    assert jobs[0]["prompts"]["texts"] == ['a "cat", a ${dog}']
    assert "hydra" not in jobs[0]
    assert not any(Path().iterdir())


@pytest.mark.parametrize(
    ("flags", "head", "inside"),
    [
        (["--cfg", "job", "--package", "model", "model=sd35-medium"], "model", "steps"),
        (["-c", "hydra", "-p", "hydra.sweeper"], "hydra.sweeper", "_target_"),
        (["--cfg=all", "-p", "hydra.job"], "hydra.job", "config_name"),
    ],
)
def test_cfg_prints_yaml_of_a_node(capsys, flags, head, inside):
    assert main(["run", *flags]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# @package {head}\n")
    assert inside in yaml.safe_load(out)


def test_info_says_where_a_configuration_comes_from(call, tmp_path):
    handlers = list(logging.getLogger().handlers)
    code, document = call("run", "--info", "searchpath", "--config-dir", str(tmp_path))
    assert code == 0
    assert str(tmp_path) in document["info"]
    assert logging.getLogger().handlers == handlers


def test_config_name_is_another_primary_file(call, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [run, _self_]\nsteps: 7\nstudy: mine\n")
    asked = ["backend=fake", "prompts.limit=2", "--config-dir", str(tmp_path)]
    code, document = call("run", *asked, "--config-name", "mine", "--cfg", "job", "cfg=2")
    assert code == 0
    (job,) = document["cfg"]
    assert (job["steps"], job["cfg"], job["study"]) == (7, 2, "mine")
    code, document = call("run", *asked, "--config-name=mine", "--dry-run")
    assert (code, document["study"], document["to_do"]) == (0, "mine", 2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cfg", "jobs"], "--cfg=jobs: must be one of job, hydra, all"),
        (["--info", "x"], "--info=x: must be one of all, config"),
        (["--resolve"], "--resolve goes with --cfg"),
        (["--package", "model"], "--package goes with --cfg"),
        (["--cfg", "job", "--info", "all"], "ask one of them at a time"),
        (["--cfg", "job", "--package", "nope"], "--package=nope: there is no such node"),
        (["--config-name", "nope"], "Cannot find primary config 'nope'"),
        (["--cfg", "job", "stepz=4"], "unknown field"),
    ],
)
def test_a_wrong_question_is_the_users_error(call, flags, said):
    code, document = call("run", *flags)
    assert code == 2
    assert said in document["error"]["message"]
