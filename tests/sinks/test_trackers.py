"""Each sink on its tracker: the real one where it is installed, else on what it would be called."""

import json
import sqlite3
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from PIL import Image

from sd35bench.sinks.base import Entry, Picture, load_sink

WHY = "is not installed: pip install {}"


@pytest.fixture
def entry(tmp_path) -> Entry:
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    return Entry(
        id="abc@env",
        name="4 steps, cfg 4",
        asked={"steps": 4, "backend": "eager", "cfg": 4.0},
        figures={"latency_s_p50": 0.25, "quality": 0.75},
        on_front=True,
        chosen_for=("preview", "final"),
        pictures=(Picture(path=tmp_path / "a.png", caption="a red cube (seed 0)"),),
    )


def fill(name: str, folder: Path, entry: Entry) -> None:
    report = folder.parent / "report.html"
    report.write_text("<p>report</p>")
    sink = load_sink(name)("grid", folder)
    sink.put_setting(entry)
    sink.put_front([entry])
    sink.put_file(report)
    sink.close()


def test_mlflow_is_asked_for_a_run_of_each_setting(entry, tmp_path, monkeypatch):
    mlflow = MagicMock()
    entities = MagicMock(Metric=lambda *m: m, Param=lambda *p: p, RunTag=lambda *t: t)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    client = mlflow.MlflowClient.return_value
    client.get_experiment_by_name.return_value = None
    client.search_runs.return_value = []
    fill("mlflow", tmp_path / "sink", entry)
    place = mlflow.MlflowClient.call_args.kwargs["tracking_uri"]
    assert place == f"sqlite:///{tmp_path / 'sink' / 'mlflow.db'}"
    batch = client.log_batch.call_args.kwargs
    assert [(m[0], m[1]) for m in batch["metrics"]] == [("latency_s_p50", 0.25), ("quality", 0.75)]
    assert dict(batch["params"]) == {"steps": "4", "backend": "eager", "cfg": "4.0"}
    assert dict(batch["tags"]) == {"chosen_for": "preview, final", "on_front": "True"}
    names = [call.kwargs["run_name"] for call in client.create_run.call_args_list]
    assert names == ["4 steps, cfg 4", "the whole study", "the whole study"]
    files = [Path(call.args[1]).name for call in client.log_artifact.call_args_list]
    assert files == ["a.png", "report.html"]


def test_mlflow_finds_its_run_again_and_asks_where_it_is_told(entry, tmp_path, monkeypatch):
    mlflow = MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", MagicMock())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    fill("mlflow", tmp_path / "sink", entry)
    assert mlflow.MlflowClient.call_args.kwargs == {"tracking_uri": "http://127.0.0.1:1"}
    mlflow.MlflowClient.return_value.create_run.assert_not_called()
    assert not (tmp_path / "sink").exists()


def test_wandb_stays_offline_in_the_studys_folder(entry, tmp_path, monkeypatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fill("wandb", tmp_path / "sink", entry)
    runs = [call.kwargs for call in wandb.init.call_args_list]
    assert {(r["mode"], r["dir"], r["group"]) for r in runs} == {
        ("offline", str(tmp_path / "sink"), "grid")
    }
    assert len({r["id"] for r in runs}) == 3
    assert runs[0]["config"] == entry.asked
    summary = wandb.init.return_value.__enter__.return_value.summary.update.call_args_list
    assert summary[0].args[0] == entry.figures
    wandb.Image.assert_called_once_with(
        str(entry.pictures[0].path), caption=entry.pictures[0].caption
    )


def test_trackio_resumes_a_run_under_a_name_that_is_allowed(entry, tmp_path, monkeypatch):
    trackio = MagicMock()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    sink = load_sink("trackio")("my grid/2", tmp_path / "sink")
    sink.put_setting(entry)
    asked = trackio.init.call_args.kwargs
    assert (asked["project"], asked["resume"]) == ("sd35bench-my-grid-2", "allow")
    assert asked["config"] == entry.asked
    logged = trackio.init.return_value.log.call_args.args[0]
    assert {"latency_s_p50", "on_front", "image_0"} <= set(logged)


def test_tensorboard_has_hparams_scalars_images_and_the_front(entry, tmp_path):
    pytest.importorskip("tensorboard", reason=WHY.format("tensorboard"))
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto import summary_pb2  # noqa: F401

    folder = tmp_path / "sink"
    for _ in range(2):  # the second time replaces the first
        fill("tensorboard", folder, entry)
    files = sorted(folder.glob("*/events*"))
    assert [file.parent.name for file in files] == ["abc@env", "the whole study"]
    values = {
        v.tag: v for f in files for e in EventFileLoader(str(f)).Load() for v in e.summary.value
    }
    wanted = {"latency_s_p50", "quality", "images/0", "front", "_hparams_/session_start_info"}
    assert values.keys() == wanted
    assert values["quality"].tensor.float_val[0] == 0.75
    assert b"4 steps, cfg 4" in values["front"].tensor.string_val[0]


def test_real_trackio_keeps_config_and_figures(entry, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "there"))
    pytest.importorskip("trackio", reason=WHY.format("trackio"))
    fill("trackio", tmp_path / "sink", entry)
    (path,) = (tmp_path / "there").glob("*.db")
    with sqlite3.connect(path) as found:
        rows = [json.loads(row[0]) for row in found.execute("select metrics from metrics")]
    assert any(row.get("latency_s_p50") == 0.25 for row in rows)


@pytest.mark.slow
def test_real_mlflow_finds_its_run_again(entry, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason=WHY.format("mlflow"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    for _ in range(2):
        fill("mlflow", tmp_path / "sink", entry)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'sink' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("sd35bench grid")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"4 steps, cfg 4", "the whole study"}
    data = runs["4 steps, cfg 4"].data
    assert data.params == {"steps": "4", "backend": "eager", "cfg": "4.0"}
    assert data.metrics == entry.figures
    assert data.tags["chosen_for"] == "preview, final"
    assert len(list((tmp_path / "sink" / "artifacts").rglob("a.png"))) == 1


@pytest.mark.slow
def test_real_wandb_writes_offline_runs(entry, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fill("wandb", tmp_path / "sink", entry)
    assert len(list((tmp_path / "sink").rglob("offline-run-*"))) == 3
