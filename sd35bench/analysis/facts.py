"""What a metric is: its code, its heading, which way is better, its bounds, what it can judge.

Of a plug-in's metric its class says so (`sd35bench.metrics.base.Metric`). Its scores say it too,
so that a study is read right where the plug-in is not.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sd35bench import plugins
from sd35bench.errors import ConfigError
from sd35bench.types import Task

GUARD = "guard"
"""Name under which `score` keeps what the guards saw in an image: value 1 passed, 0 refused."""
DECLARED = "declared"
"""The part of a score's detail in which a plug-in's metric says what its numbers are."""


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """Whether more is better, and what a value can be at least and at most where that is known.

    `ranks` is False for a description (sharpness), of which neither more nor less is better;
    `task` is the only task that it can judge, ``None`` for any.
    """

    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    ranks: bool = True
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """A metric of this package: where its code is, how it is said, what its numbers are.

    `load` is a module and its function ``load(name, **options) -> Metric``. `label` is a column's
    heading; ``None``: the metric's own name. With `on_features` the bare family name means nano's
    evaluator on a study of nano alone.
    """

    load: str
    label: str | None = None
    facts: MetricFacts = MetricFacts()
    on_features: bool = False


_SHARE = MetricFacts(True, (0.0, 1.0))
_SHARE_OF_TEXT = MetricFacts(True, (0.0, 1.0), task=Task.TEXT_TO_IMAGE)
_DISTANCE = MetricFacts(False, task=Task.TEXT_TO_IMAGE)


METRICS = {
    "prompt_accuracy": Family("sd35bench.metrics.prompt_accuracy:load", "prompt accuracy", _SHARE),
    "init_kept": Family(
        "sd35bench.metrics.init_kept:load",
        "init kept",
        MetricFacts(True, (0.0, 1.0), task=Task.IMAGE_TO_IMAGE),
    ),
    "clip_score": Family(
        "sd35bench.metrics.clip_score:load", "CLIP-score", MetricFacts(True, (-100.0, 100.0)), True
    ),
    "fid_infinity": Family("sd35bench.metrics.fid_infinity:load", "FID∞", _DISTANCE, True),
    "fid": Family("sd35bench.metrics.fid:load", "FID", _DISTANCE, True),
    "kid": Family("sd35bench.metrics.kid:load", "KID", _DISTANCE, True),
    "cmmd": Family("sd35bench.metrics.cmmd:load", "CMMD", _DISTANCE, True),
    "precision": Family(
        "sd35bench.metrics.precision_recall:load", "precision", _SHARE_OF_TEXT, True
    ),
    "recall": Family("sd35bench.metrics.precision_recall:load", "recall", _SHARE_OF_TEXT, True),
    "sharpness": Family("sd35bench.metrics.luma:load", None, MetricFacts(ranks=False)),
    "contrast": Family("sd35bench.metrics.luma:load", None, MetricFacts(ranks=False)),
    "judge": Family("sd35bench.metrics.judge:load", None, MetricFacts()),
    # No bounds: where all are identical the interval is a point, not "never seen in k prompts".
    "drift": Family("sd35bench.metrics.drift:load", None, MetricFacts(False)),
}
"""Metric families, the labelled ones in the order of tables' columns."""
_said: dict[str, MetricFacts] = {}
"""What scores that were read say of plug-ins' metrics, by the metric's full name."""


def known_metrics() -> tuple[str, ...]:
    """Families of metrics of which anything is known, in the order of the alphabet."""
    return tuple(sorted({*METRICS, *plugins.added_names("metrics"), *_said}))


def foreign_metrics(metrics: Iterable[str]) -> list[str]:
    """Those of some metrics that are not the package's own."""
    return [name for name in metrics if not name.startswith((*METRICS, GUARD))]


def facts(metric: str) -> MetricFacts:
    """Return what is known of a metric by the longest known beginning of its name."""
    known = [family for family in METRICS if metric.startswith(family)]
    if known:
        return METRICS[max(known, key=len)].facts
    with suppress(ConfigError):  # who scores with it is told what is wrong
        if (found := added_class(metric)) is not None:
            return of_class(found)
    return _said.get(metric, MetricFacts())


def added_class(metric: str) -> type | None:
    """The class of a plug-in's metric; ``None`` where no plug-in has it.

    Raises: ConfigError where its code cannot be imported.
    """
    added = [family for family in plugins.added_names("metrics") if metric.startswith(family)]
    return plugins.load_class("metrics", max(added, key=len), object) if added else None


def of_class(metric: Any) -> MetricFacts:
    """What a metric, or its class, declares."""
    bounds = getattr(metric, "bounds", None)
    return MetricFacts(
        higher_is_better=bool(getattr(metric, "higher_is_better", True)),
        bounds=None if bounds is None else (float(bounds[0]), float(bounds[1])),
        ranks=bool(getattr(metric, "ranks", True)),
    )


def declared(metric: Any) -> dict[str, Any]:
    """What goes into the detail of a metric's scores; nothing where it is as usual.

    Raises: ConfigError for bounds that are none.
    """
    try:
        found = of_class(metric)
    except (TypeError, ValueError, IndexError) as exc:
        raise ConfigError(
            f"metric {metric.name}: bounds={metric.bounds!r}: must be two numbers, or None"
        ) from exc
    if found == MetricFacts():
        return {}
    said = {"metric": metric.name, "higher_is_better": found.higher_is_better}
    bounds = None if found.bounds is None else list(found.bounds)
    return {DECLARED: {**said, "bounds": bounds, "ranks": found.ranks}}


def take_declared(details: Iterable[Mapping[str, Any]]) -> None:
    """Remember what scores say of their metrics; of several the last."""
    for detail in details:
        if (said := detail.get(DECLARED)) is not None:
            bounds = said["bounds"]
            _said[said["metric"]] = MetricFacts(
                said["higher_is_better"], None if bounds is None else tuple(bounds), said["ranks"]
            )
