"""Hydra's own launchers: every option can be set, and a job that they lose is no crash of ours."""

import pytest
from hydra.core.plugins import Plugins

from sd35bench.config.overrides import check_overrides, written


@pytest.mark.parametrize(
    "text",
    [
        "hydra.launcher.timeout_min=3",
        "+hydra.launcher.ray.init.object_store_memory=null",
        "hydra.launcher.additional_parameters={requeue:true}",
        "++hydra.launcher.setup=[a,b]",
    ],
)
def test_every_option_of_a_launcher_can_be_set_whether_it_is_known_or_not(text):
    check_overrides([text], multirun=True)
    assert written([text]) == ["++" + text.lstrip("+")]
    assert written(written([text])) == written([text])


class FailedJobError(Exception):
    """What submitit raises of a killed job."""

    __module__ = "submitit.core.utils"


@pytest.mark.usefixtures("two_cores", "empty_folder", "fakes_here")
def test_a_job_that_the_launcher_loses_gives_the_summary_and_exit_code_3(call, monkeypatch):
    """The first job is made, the second is killed before it writes anything."""
    name = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    launcher = Plugins.instance().class_name_to_class[name]  # Hydra loads its module once more
    real = launcher.launch

    def lossy(self, job_overrides, initial_job_idx):
        real(self, job_overrides[:1], initial_job_idx)
        raise FailedJobError("Job 7 was killed\nby somebody")

    monkeypatch.setattr(launcher, "launch", lossy)
    asked = ("run", "-m", "backend=fake", "threads=1,2", "steps=2", "prompts.limit=2")
    code, document = call(*asked, "hydra/launcher=basic")
    assert (code, document["done"], document["failed"], document["planned"]) == (3, 2, 2, 4)
    (said,) = document["errors"]
    assert said.endswith("without an answer: FailedJobError: Job 7 was killed")
    monkeypatch.setattr(launcher, "launch", real)
    code, document = call(*asked, "hydra/launcher=basic")
    assert (code, document["done"], document["skipped"], document["failed"]) == (0, 2, 2, 0)
