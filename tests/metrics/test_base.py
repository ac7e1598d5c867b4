import importlib
import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from sd35bench.analysis.facts import METRICS, Family
from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import (
    FeatureMetric,
    ImageMetric,
    PairMetric,
    SetMetric,
    default_metrics,
    load_metric,
    require_uint8_rgb,
)
from sd35bench.metrics.reference import ReferencedMetric
from sd35bench.types import Task
from tests.forked import in_fork, refuse_torch
from tests.studies.hosted_calls import HOSTED, call
from tests.studies.memory import LOAD, record

CONFIGS = Path(__file__).parents[2] / "configs" / "metric"


@pytest.mark.parametrize("family", sorted(METRICS))
def test_metric_contract(family):
    """Every metric: one module, one YAML of its name, a name of its own, a kind, and tasks."""
    name = f"{family}_nano" if METRICS[family].on_features else family
    metric = load_metric(name)
    assert metric.name == name
    assert isinstance(metric, ImageMetric | PairMetric | FeatureMetric | SetMetric)
    assert metric.tasks
    assert yaml.safe_load((CONFIGS / f"{family}.yaml").read_text())["family"] == family


@pytest.mark.parametrize("family", sorted(METRICS))
def test_metric_yaml_names_the_options_that_load_takes(family):
    conf = yaml.safe_load((CONFIGS / f"{family}.yaml").read_text())
    function = importlib.import_module(METRICS[family].load.split(":")[0]).load
    own = inspect.signature(function).parameters
    taken = {name for name, p in own.items() if p.kind is not p.VAR_KEYWORD} - {"name"}
    if any(p.kind is p.VAR_KEYWORD for p in own.values()):
        taken |= inspect.signature(ReferencedMetric.load).parameters.keys() - {"name"}
    metric = load_metric(f"{family}_nano" if METRICS[family].on_features else family)
    taken -= getattr(metric, "not_taken", frozenset())
    assert set(conf.get("options", {})) == set(conf.get("allowed", {})) == taken


def test_metric_added_as_module_and_line_is_loaded(monkeypatch):
    monkeypatch.setitem(METRICS, "brightness", Family(load="tests.metrics.added:load"))
    assert load_metric("brightness", radius=3).name == "brightness_3"


@pytest.mark.parametrize("name", ["fidd", "clip", "", "prompt_accuracies"])
def test_unknown_metric_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="clip_score"):
        load_metric(name)


@pytest.mark.parametrize(
    ("model", "task", "expected"),
    [
        ("nano", Task.TEXT_TO_IMAGE, ("prompt_accuracy", "clip_score_nano", "fid_nano")),
        ("nano", Task.IMAGE_TO_IMAGE, ("prompt_accuracy", "init_kept", "clip_score_nano")),
        ("nano-int4", Task.TEXT_TO_IMAGE, ("prompt_accuracy", "clip_score_nano", "fid_nano")),
        ("sd35-medium", Task.TEXT_TO_IMAGE, ("clip_score",)),
        ("nanometre", Task.TEXT_TO_IMAGE, ("clip_score",)),
    ],
)
def test_default_metrics_by_model_and_task(model, task, expected):
    assert default_metrics(model, task) == expected


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("prompt_accuracy", {}, True),
        ("init_kept", {}, False),
        ("init_kept", {"init_image": "i" * 64, "prompt_strength": 0.5}, True),
        ("fid_nano", {"init_image": "i" * 64, "prompt_strength": 0.5}, False),
        ("fid_nano", {}, True),
        ("clip_score_nano", {"init_image": "i" * 64, "prompt_strength": 0.5}, True),
    ],
)
def test_metric_applies_by_task(name, fields, expected):
    assert load_metric(name).applies(record(0, **fields)) is expected


@pytest.mark.parametrize("name", ["prompt_accuracy", "clip_score_nano", "fid_nano"])
def test_metric_of_nanos_world_does_not_apply_to_other_models(name):
    other = replace(LOAD, model=replace(LOAD.model, name="sd35-medium"))
    assert not load_metric(name).applies(record(0, load=other))


@pytest.mark.parametrize("name", ["prompt_accuracy", "clip_score_nano", "fid_nano"])
@pytest.mark.parametrize(("made_by", "expected"), [("nano", True), ("sana", False), (None, False)])
def test_metric_of_nanos_world_applies_to_what_nano_made_in_anothers_name(name, made_by, expected):
    load = replace(HOSTED, model=replace(HOSTED.model, name="sd35-medium"))
    asked = call(0, made_by=made_by)
    assert asked.remote is not None
    of_other = replace(record(0, load=load), remote=asked.remote)
    assert load_metric(name).applies(of_other) is expected


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        [[0, 0, 0]],
    ],
    ids=["float", "grey", "channels-first", "alpha", "list"],
)
def test_anything_but_uint8_rgb_is_refused(image):
    with pytest.raises(MetricError, match="images must be"):
        require_uint8_rgb([image])


def _name_metrics_without_torch():
    refuse_torch()
    for name in ("analysis.summary", "report.recommend", "recommend.advice", "score"):
        importlib.import_module(f"sd35bench.{name}")
    base = importlib.import_module("sd35bench.metrics.base")
    return [base.load_metric(n).name for n in ("fid_nano", "clip_score_nano", "init_kept")]


def test_analysis_and_metric_names_load_without_torch():
    assert in_fork(_name_metrics_without_torch) == ["fid_nano", "clip_score_nano", "init_kept"]


def _load_what_needs_torch():
    refuse_torch()
    try:
        importlib.import_module("sd35bench.backends.pipeline")
    except ImportError:
        return "refused"


def test_probe_refuses_what_needs_torch():
    assert in_fork(_load_what_needs_torch) == "refused"
