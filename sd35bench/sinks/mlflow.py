"""MLflow: an experiment for each study, a run for each setting, found again by its id.

`MLFLOW_TRACKING_URI` and `MLFLOW_EXPERIMENT_NAME` are MLflow's own; without the first all of it
stays in the study's folder. Of a server that is away MLflow asks seven times over, within minutes:
here twice.
"""

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd35bench.sinks.base import Entry, Sink, front_markdown

_ID = "sd35bench.setting_id"
_WHOLE_STUDY = "the whole study"


class MlflowSink(Sink):
    """Settings as runs: asked → params, figures → metrics; images, front, report → artifacts."""

    def __init__(self, study: str, folder: Path) -> None:
        """Find the experiment, or make it."""
        super().__init__(study, folder)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow: Any = importlib.import_module("mlflow")
        place, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if place is None:
            folder.mkdir(parents=True, exist_ok=True)
            place = f"sqlite:///{folder.resolve() / 'mlflow.db'}"
            artifacts = (folder.resolve() / "artifacts").as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", f"sd35bench {study}")
        found = self._client.get_experiment_by_name(name)
        self._experiment = (
            self._client.create_experiment(name, artifact_location=artifacts)
            if found is None
            else found.experiment_id
        )

    def put_setting(self, entry: Entry) -> None:
        """A run with its params, metrics, tags and images."""
        made: Any = importlib.import_module("mlflow.entities")
        run = self._run(entry.id, entry.name)
        now = int(time.time() * 1000)
        tags = {"chosen_for": ", ".join(entry.chosen_for), "on_front": str(entry.on_front)}
        self._client.log_batch(
            run,
            metrics=[made.Metric(name, value, now, 0) for name, value in entry.figures.items()],
            params=[made.Param(name, str(value)) for name, value in entry.asked.items()],
            tags=[made.RunTag(name, value) for name, value in tags.items()],
        )
        for picture in entry.pictures:
            self._client.log_artifact(run, str(picture.path), "images")
        captions = "".join(f"{p.path.name}: {p.caption}\n" for p in entry.pictures)
        if captions:
            self._client.log_text(run, captions, "images/captions.txt")
        self._client.set_terminated(run)

    def put_front(self, front: Sequence[Entry]) -> None:
        """A table in a run of the study as a whole."""
        run = self._run(_WHOLE_STUDY, _WHOLE_STUDY)
        self._client.log_text(run, front_markdown(front), "front.md")
        self._client.set_terminated(run)

    def put_file(self, path: Path) -> None:
        """The report, in the same run."""
        run = self._run(_WHOLE_STUDY, _WHOLE_STUDY)
        self._client.log_artifact(run, str(path))
        self._client.set_terminated(run)

    def _run(self, setting: str, name: str) -> str:
        """The run of a setting of this study, made where there is none."""
        wanted = f"{self.study}/{setting}"
        query = f"tags.`{_ID}` = '{wanted}'"
        found = self._client.search_runs([self._experiment], query, max_results=1)
        if found:
            return found[0].info.run_id
        tags = {_ID: wanted, "study": self.study}
        return self._client.create_run(self._experiment, tags=tags, run_name=name).info.run_id
