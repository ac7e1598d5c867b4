"""The files of docs/workers.md: each parses, and each command in it is one that we take."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sd35bench.config.overrides import check_overrides

DOCS = Path(__file__).parent.parent / "docs"
FILES = {name: (DOCS / "workers" / name).read_text() for name in
         ("slurm.sbatch", "rayjob.yaml", "skypilot.yaml")}  # fmt: skip


def command(text: str) -> list[str]:
    """The settings of the `sd35bench run` in a file."""
    flat = " ".join(text.replace("\\\n", " ").split())
    found = re.search(r"sd35bench run (.*?engine=ray ray\.address=auto)", flat)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize("name", FILES)
def test_every_files_command_is_taken(name):
    words = command(FILES[name])
    assert words[0] == "-m"
    check_overrides(words[1:], multirun=True)
    with pytest.raises(Exception, match="unknown field"):
        check_overrides([*words[1:], "ray.adress=auto"], multirun=True)


def test_the_commands_of_the_page_are_taken():
    lines = re.findall(r"^sd35bench run (.*?)(?: +#.*)?$", (DOCS / "workers.md").read_text(), re.M)
    assert lines
    for line in lines:
        words = shlex.split(line)
        check_overrides([w for w in words if w != "-m"], multirun="-m" in words)


def test_the_slurm_file_is_a_shell_script_with_directives_that_slurm_has():
    text = FILES["slurm.sbatch"]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    directives = re.findall(r"^#SBATCH --([a-z-]+)", text, re.M)
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time",
             "requeue"}  # fmt: skip
    assert set(directives) <= known
    last = max(i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    first = next(i for i, line in enumerate(text.splitlines()) if line[:1] not in ("#", ""))
    assert last < first, "Slurm reads no directive after the first command"
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", "-s", "bash", "-"], input=text, text=True, check=True)


def test_the_rayjob_has_the_version_that_is_tested_and_results_that_stay():
    job = yaml.safe_load(FILES["rayjob.yaml"])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    constraints = (DOCS.parent / "constraints.txt").read_text()
    assert f"ray=={spec['rayClusterSpec']['rayVersion']}\n" in constraints
    assert spec["shutdownAfterJobFinishes"] is True
    assert "\n" not in spec["entrypoint"].strip()
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert mounts == {v["name"]: "/results" for v in pod["volumes"]}
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    for each in (spec["rayClusterSpec"]["headGroupSpec"], group):
        for container in each["template"]["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_skypilot_task_has_only_fields_that_skypilot_has():
    task = yaml.safe_load(FILES["skypilot.yaml"])
    known = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs"}
    assert set(task) <= known
    assert set(task["resources"]) <= {"accelerators", "use_spot", "cloud", "region", "cpus"}
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is absent")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own, of its imports
@pytest.mark.parametrize("name", ["slurm.sbatch", "skypilot.yaml"])
def test_ray_takes_the_options_of_its_symmetric_run(name):
    from ray.scripts.symmetric_run import symmetric_run

    flat = " ".join(FILES[name].replace("\\\n", " ").split())
    words = re.sub(r'"?\$[A-Za-z_]+(:\d+)?"?', r"1", flat)
    found = re.search(r"ray symmetric-run (.*?) -- ", words)
    assert found is not None
    arguments = shlex.split(found[1])
    given = {arguments[i] for i in range(0, len(arguments), 2)}
    options = {name for each in symmetric_run.params for name in getattr(each, "opts", ())}
    from ray.scripts.scripts import start

    options |= {name for each in start.params for name in getattr(each, "opts", ())}
    assert given <= options
