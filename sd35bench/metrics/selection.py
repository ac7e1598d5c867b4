"""Which metrics a study gets: those asked for, or its models' defaults, and why not the others.

Metrics of quality do not run on images made with random weights: such images are noise, and a
number for noise would one day be read as a number for the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd35bench.analysis.facts import METRICS
from sd35bench.errors import MetricError
from sd35bench.metrics.base import (
    FeatureMetric,
    Metric,
    PairMetric,
    SetMetric,
    default_metrics,
    is_nano,
    judged,
    known_families,
    load_metric,
    maker,
)
from sd35bench.metrics.drift import STANDARD_REFERENCE
from sd35bench.study.columns import Some, kinds
from sd35bench.types import Load, Record

RANDOM_WEIGHTS = (
    "made with random weights, which say nothing about quality; for quality run with"
    " model.weights=checkpoint (drift, latency and memory need no weights)"
)

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Selection:
    """The metrics to score, and by name why another one is not, or not for every image."""

    metrics: list[Metric] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def select_metrics(
    asked: Sequence[str | Metric] | None, records: Some, options: Options
) -> Selection:
    """Load the metrics for these records; ``asked=None`` means the defaults.

    Raises: MetricError where one that was asked for cannot be had, or only random weights are
    there to judge; a default that cannot be had is in `refused`.
    """
    if asked is None:
        chosen, refused = _defaults(records, options)
    else:
        only_nano = bool(records) and all(is_nano(maker(r)) for r in kinds(records)[1])
        chosen = [m if isinstance(m, Metric) else _load(m, options, only_nano) for m in asked]
        refused = {}
    selection = Selection(refused=refused)
    for metric in chosen:
        _admit(metric, records, selection, by_name=asked is not None)
    return selection


def _admit(metric: Metric, records: Some, selection: Selection, *, by_name: bool) -> None:
    """Take a metric in if there is something for it to judge."""
    if isinstance(metric, PairMetric):
        fit = count = len(metric.pairing(records))
    else:
        fit, count = (int(part.sum()) for part in judged(metric, records))
    if not fit:
        why = f"applies to no image of this study: {metric.remedy}"
        selection.refused[metric.name] = why
        return
    if count:
        selection.metrics.append(metric)
    elif by_name:
        raise MetricError(f"{metric.name}: the images of this study were {RANDOM_WEIGHTS}")
    if count < fit:
        selection.refused[metric.name] = f"{fit - count} images {RANDOM_WEIGHTS}"


def _defaults(records: Some, options: Options) -> tuple[list[Metric], dict[str, str]]:
    """Load the defaults of each model and task; note those that cannot be had."""
    refused: dict[str, str] = {}
    names: dict[str, None] = {}
    _, unlike = kinds(records)
    pairs = {
        (maker(r), r.trial.request.task, r.trial.load.model.weights == "random") for r in unlike
    }
    for model, task, random in sorted(pairs):
        for name in default_metrics(model, task):
            if random:
                refused[name] = f"its images were {RANDOM_WEIGHTS}"
            else:
                names[name] = None
    found: list[Metric] = []
    for name in names:
        refused.pop(name, None)
        try:
            metric = _load(name, options, False)
            if isinstance(metric, FeatureMetric | SetMetric):
                _ = metric.extractor.name  # finds out whether there are weights
        except MetricError as exc:
            refused[name] = str(exc)
        else:
            found.append(metric)
    if _has_contestants(unlike, options):
        found.append(_load("drift", options, False))
    return found, refused


def _has_contestants(records: Sequence[Record], options: Options) -> bool:
    """Whether some model ran on the reference backend and on another load."""
    reference = options.get("drift", {}).get("reference", STANDARD_REFERENCE)
    found = {id(r.trial.load): r.trial.load for r in records}.values()
    loads = {load.key: load for load in found}
    named = [(key, load) for key, load in loads.items() if load.backend.name == reference]
    return any(
        key != other and _same_model(load, contestant)
        for key, load in named
        for other, contestant in loads.items()
    )


def _same_model(a: Load, b: Load) -> bool:
    """By name, and by digest where both tell it."""
    digests = {a.known_digest, b.known_digest}
    return a.model.name == b.model.name and (len(digests) == 1 or None in digests)


def _load(name: str, options: Options, only_nano: bool) -> Metric:
    """Load one metric; the bare family name means nano's evaluator on a study of nano alone."""
    family = max((f for f in known_families() if name.startswith(f)), key=len, default=name)
    chosen = dict(options.get(family, {}))
    own = METRICS.get(name)
    if own and own.on_features and only_nano and not {"model", "extractor"} & chosen.keys():
        name = f"{name}_nano"
    return load_metric(name, **chosen)
