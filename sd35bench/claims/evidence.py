"""What a study has to say about claims: ladders of settings, values per pair, features, pixels.

A *ladder* is the settings that differ in one field alone. Effects are read off it pair by pair
(same prompt, seed, size and init image) and clustered by prompt; what cannot be paired, because
the prompts themselves are compared, is held against each other as two independent groups.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import hypot, isfinite, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import facts
from sd35bench.analysis.grouping import PairKey, cluster_labels, pair_clusters, pair_key
from sd35bench.analysis.pairs import pick_family
from sd35bench.analysis.table import Row, Table
from sd35bench.metrics.base import is_nano
from sd35bench.stats.clustered import mean_t, ratio_of_sums
from sd35bench.stats.intervals import Interval
from sd35bench.types import Record, Task

Ladder = dict[Any, Row]
"""A field's value → the setting that has it; all else is the same."""

Pixels = Callable[[str], NDArray[np.uint8]]


class Unmeasured(Exception):
    """The trials or scores that a claim needs are not in the study; the text says which."""


class Untestable(Exception):
    """No run of this model can decide a claim; the text says why."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A study's table, the rows of each task that may be compared, and how to see an image.

    `quality` is prompt accuracy where it was scored, else CLIP-score, else ``None``; `nano` says
    that the images are of nano's world. `features` maps an image's digest to its features [d].
    """

    table: Table
    rows: Mapping[Task, Sequence[Row]]
    quality: str | None
    nano: bool
    features: Mapping[str, NDArray[np.float32]]
    read_image: Pixels
    notes: tuple[str, ...] = ()
    _values: dict[Any, dict[PairKey, float]] = field(default_factory=dict)

    @property
    def text_rows(self) -> Sequence[Row]:
        """Text-to-image rows. Raises: Unmeasured where there are none."""
        return self._of(Task.TEXT_TO_IMAGE, "no text-to-image image")

    @property
    def edit_rows(self) -> Sequence[Row]:
        """Image-to-image rows. Raises: Unmeasured where there are none."""
        return self._of(Task.IMAGE_TO_IMAGE, "no image-to-image image")

    @property
    def main_row(self) -> Row:
        """The text-to-image setting with most images: the model's own, in experiment=claims."""
        return max(self.text_rows, key=lambda row: len(row.quality_records()))

    def quality_metric(self) -> str:
        """Name the metric of following the prompt. Raises: Unmeasured."""
        if self.quality is None:
            raise Unmeasured("neither prompt accuracy nor CLIP-score was scored")
        return self.quality

    def values(self, metric: str, row: Row) -> dict[PairKey, float]:
        """A row's scores per pair."""
        found = self._values.get((metric, row.id))
        if found is None:
            scored = ((r, self.table.score(metric, r)) for r in row.quality_records())
            found = {
                pair_key(r.trial): float(s.value)
                for r, s in scored
                if s is not None and s.value is not None
            }
            self._values[metric, row.id] = found
        return found

    def vectors(self, row: Row) -> dict[tuple[str, str | None], dict[int, NDArray[np.float64]]]:
        """A row's features of unit length by prompt, then by seed."""
        found: dict[Any, dict[int, NDArray[np.float64]]] = defaultdict(dict)
        for record in row.quality_records():
            vector = self.features.get(record.image or "")
            if vector is not None:
                unit = np.asarray(vector, np.float64)
                asked = record.trial.request
                found[asked.prompt, asked.init_image][asked.seed] = unit / np.linalg.norm(unit)
        return dict(found)

    def _of(self, task: Task, missing: str) -> Sequence[Row]:
        if not self.rows[task]:
            raise Unmeasured(f"the study has {missing} that may be scored")
        return self.rows[task]


def read_evidence(study: Any, table: Table, read_image: Pixels) -> Evidence:
    """Choose the rows that may be compared (see `pairs.pick_family`) and look up their features."""
    families = {task: pick_family(table.rows, task) for task in Task}
    rows = {task: found for task, (found, _) in families.items()}
    members = [row for found in rows.values() for row in found]
    nano = bool(members) and all(is_nano(str(row.setting["model"])) for row in members)
    records = [r for row in members for r in row.usable]
    clip = sorted(name for name in table.scores if name.startswith("clip_score"))
    named = [name for name in ("prompt_accuracy", *clip) if _scored(table, name, records)]
    notes = tuple(note for _, found in families.values() for note in found)
    return Evidence(
        table=table,
        rows=rows,
        quality=named[0] if named else None,
        nano=nano,
        features=_features(study, table, clip),
        read_image=read_image,
        notes=notes,
    )


def ladder(rows: Iterable[Row], *fields: str) -> Ladder:
    """The longest ladder in `fields`: a value (a tuple for several fields) → its row.

    Of ladders as long, the one with most images; no row gives an empty one.
    """
    groups: dict[Any, Ladder] = defaultdict(dict)
    for row in rows:
        rest = {k: v for k, v in row.setting.items() if k not in (*fields, "setting")}
        value = tuple(row.setting[name] for name in fields)
        groups[row.environment_id, repr(sorted(rest.items()))][
            value[0] if len(fields) == 1 else value
        ] = row
    found = max(
        groups.values(),
        key=lambda group: (len(group), sum(len(r.usable) for r in group.values())),
        default={},
    )
    return dict(sorted(found.items()))


def paired_mean(
    above: Sequence[Mapping[PairKey, float]], below: Sequence[Mapping[PairKey, float]], metric: str
) -> tuple[Interval, tuple[float, float]]:
    """Mean of `above` minus mean of `below` over the pairs that all have, and both means.

    Raises: Unmeasured where they share no pair.
    """
    everyone = [*above, *below]
    common = [key for key in everyone[0] if all(key in values for values in everyone)]
    if not common:
        raise Unmeasured(f"the settings share no pair with {metric}")
    top, bottom = (
        np.array([[values[key] for key in common] for values in side]).mean(axis=0)
        for side in (above, below)
    )
    bounds = (-1.0, 1.0) if facts(metric).bounds == (0.0, 1.0) else None
    effect = mean_t(top - bottom, pair_clusters(common), bounds=bounds)
    return effect, (float(top.mean()), float(bottom.mean()))


def group_difference(
    above: Sequence[tuple[Record, float]], below: Sequence[tuple[Record, float]]
) -> tuple[Interval, tuple[float, float]]:
    """Mean share of one group of prompts minus that of another, which shares none with it.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures", on the
    groups' own intervals; the degrees of freedom are the smaller group's.

    Raises: Unmeasured for a group of fewer than 2 prompts.
    """
    sides = []
    for group in (above, below):
        labels = cluster_labels([record for record, _ in group])
        if len(set(labels.tolist())) < 2:
            raise Unmeasured("one of the two kinds of prompt has fewer than 2 prompts")
        sides.append(mean_t([value for _, value in group], labels, bounds=(0.0, 1.0)))
    a, b = sides
    value = a.value - b.value
    low = value - hypot(a.value - a.low, b.high - b.value)
    high = value + hypot(a.high - a.value, b.value - b.low)
    n, clusters = a.n + b.n, min(a.clusters, b.clusters)
    return Interval(value, low, high, n, clusters), (a.value, b.value)


def log_interval(
    above: Sequence[float], below: Sequence[float], clusters: Sequence[int]
) -> Interval:
    """Logarithm of the ratio of two sums, paired: [n] each; an end that is nowhere is ``None``.

    Raises: Unmeasured where a sum is zero.
    """
    if min(sum(above), sum(below)) <= 0.0:
        raise Unmeasured("the settings' images are the same, so that there is no ratio")
    ratio = ratio_of_sums(above, below, clusters)
    low = None if ratio.low is None or ratio.low <= 0.0 else log(ratio.low)
    high = None if ratio.high is None or not isfinite(ratio.high) else log(ratio.high)
    if low is None or high is None:
        low = high = None
    return Interval(log(ratio.value), low, high, ratio.n, ratio.clusters)


def variety(vectors: Mapping[Any, Mapping[int, NDArray[np.float64]]]) -> dict[Any, float]:
    """Mean distance (1 - cosine) between the images of one prompt, by prompt with several seeds."""
    found = {}
    for prompt, seeds in vectors.items():
        distances = [1.0 - float(a @ b) for a, b in combinations(seeds.values(), 2)]
        if distances:
            found[prompt] = float(np.mean(distances))
    return found


def _scored(table: Table, name: str, records: Sequence[Record]) -> bool:
    scores = (table.score(name, record) for record in records)
    return any(s is not None and s.value is not None for s in scores)


def _features(study: Any, table: Table, clip: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Features that CLIP-score was computed from, by image."""
    names = {s.detail.get("features") for metric in clip for s in table.scores[metric].values()}
    found: dict[str, NDArray[np.float32]] = {}
    for name in sorted(n for n in names if n is not None)[:1]:
        found.update(study.features(name))
    return found
