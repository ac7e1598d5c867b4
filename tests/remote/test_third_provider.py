"""The worked example of docs/providers.md, as it stands there: the contract, and a whole run."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import sd35bench.remote.providers as providers
from sd35bench import plugins
from sd35bench.config import compose, freeze
from sd35bench.errors import ConfigError
from sd35bench.plan import expand
from sd35bench.remote.drive import HostedService
from sd35bench.study.store import Study
from sd35bench.types import Status
from tests.remote.contract import ProviderContract
from tests.remote.fault_server import FaultServer, serving

TEXT = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
STATES = {"starting": "queued", "processing": "working", "success": "done", "error": "failed"}


def block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


class JobServer(FaultServer):
    """The service that the example speaks to."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, replies=self._spoken)

    def route(self, method: str, path: str) -> str:
        if path == "/jobs":
            return "create" if method == "POST" else "list"
        return "poll" if path.startswith("/jobs/") else super().route(method, path)

    def _spoken(self, route: str, body: Any) -> Any:
        if route == "create":
            return {"job": body["predictionID"]}
        if route == "list":
            following = body["offset"] + len(body["executions"])
            more = following < body["total_count"]
            return {"jobs": body["executions"], "next": f"{following}" if more else None}
        return {
            "job": body["id"],
            "state": STATES[body["status"]],
            "image": body["output"] if body["status"] == "success" else None,
            "error": body["output"] if body["status"] == "error" else None,
            "seconds": body["metrics"].get("predict_time"),
            "input": body["input"],
            "created": body["created_at"],
        }


@pytest.fixture(autouse=True)
def registered(monkeypatch, tmp_path):
    """Put the module where Python, and the YAML where Hydra, finds it; add the line."""
    (tmp_path / "jobs_example.py").write_text(block("python"))
    (tmp_path / "backend").mkdir()
    (tmp_path / "backend" / "jobs.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "jobs_example", raising=False)
    monkeypatch.setitem(providers.PROVIDERS, "jobs", "jobs_example:Jobs")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("JOBS_API_KEY", raising=False)


@pytest.mark.parametrize("name", ["jobs"])
class TestThirdProvider(ProviderContract):
    def speaks(self, name):
        return JobServer


def test_a_whole_run_needs_nothing_more(tmp_path):
    with serving(JobServer) as server:
        overrides = [
            "model=nano",
            "backend=jobs",
            "prompts.limit=3",
            f"remote.base_url={server.url}",
            "remote.allow_loopback=true",
            f"results_dir={tmp_path / 'results'}",
        ]
        job = freeze(compose(overrides, extra=tmp_path))
        assert isinstance(job.engine, HostedService)
        study = Study.open(job.results_dir, job.study, create=True)
        summary = job.engine.run(expand(job.sweep), study)
        assert (summary.done, summary.failed) == (3, 0)
        records = list(study.records())
        assert {record.status for record in records} == {Status.OK}
        assert {record.remote.provider for record in records if record.remote} == {"jobs"}
        assert max(server.creates.values()) == 1


def test_a_place_in_the_plugin_folder_is_a_provider_too(tmp_path, monkeypatch):
    """`kind: module:Class` instead of the line."""
    monkeypatch.delitem(providers.PROVIDERS, "jobs")
    yaml = tmp_path / "backend" / "jobs.yaml"
    yaml.write_text(yaml.read_text().replace("kind: jobs", "kind: jobs_example:Jobs"))
    words = ["model=nano", "backend=jobs", "prompts.limit=1", "remote.base_url=http://127.0.0.1:9"]
    words += ["remote.allow_loopback=true"]
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    with pytest.raises(ConfigError, match="no installed package has a module 'jobs_example'"):
        freeze(compose(words, extra=tmp_path))
    plugins.use_folder(str(tmp_path))
    assert isinstance(freeze(compose(words, extra=tmp_path)).engine, HostedService)
    plugins.use_folder(None)


def test_the_steps_name_files_that_exist():
    root = Path(__file__).parents[2]
    for path in (
        "sd35bench/remote/providers/__init__.py",
        "sd35bench/remote/providers/wire.py",
        "tests/remote/test_providers.py",
        "tests/remote/test_third_provider.py",
    ):
        assert Path(path).name in TEXT
        assert (root / path).is_file()
