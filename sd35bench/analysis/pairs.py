"""Candidates side by side on the same prompts, seeds and init images.

Quality is one number per image. For text-to-image it is the first of prompt accuracy and
CLIP-score that was scored. For image-to-image it is the harmonic mean of prompt followed and init
kept, per image: an edit must do both, and a mean that either part can pull to 0 has its optimum
inside, where an arithmetic mean would be content with an untouched init image (0 and 1 give 0.5).

A trial that failed made nothing, which is worth 0: left out, it would spare its own setting, and
take the prompt away from all others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import plugins
from sd35bench.analysis.facts import facts
from sd35bench.analysis.settings import PairKey, pair_clusters, pair_keys
from sd35bench.analysis.speed import LoneImage, log_ratio, lone_images
from sd35bench.analysis.table import GUARD, Row, Table
from sd35bench.columns import Some, distinct_refs, is_text, numbers, pick, seconds, texts
from sd35bench.errors import ConfigError
from sd35bench.evaluations import sequences
from sd35bench.stats.clustered import mean_bounds, mean_t
from sd35bench.stats.intervals import Interval
from sd35bench.types import Status, Task

EDIT_QUALITY = "edit_quality"
_ENOUGH_PAIRS = 0.5
"""A setting with fewer than this share of the largest one's pairs is not compared."""
_NO_IMAGE = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row with its quality and its lone latency per pair; `work` is evaluations per image.

    `work` counts guidance's second half, which doubles an evaluation's cost. `refused` are the keys
    of trials whose images are black, constant or of a wrong size.
    """

    row: Row
    quality: dict[PairKey, float]
    latency_s: dict[PairKey, float]
    work: float
    refused: frozenset[str] = frozenset()
    _tried: list[tuple[Some, Some]] = field(default_factory=list, init=False, compare=False)

    @property
    def tried(self) -> Some:
        """Trials of the batch sizes that made images, but for those that a stopped run skipped."""
        return self._outcome()[0]

    @property
    def failed(self) -> Some:
        """Those of `tried` that made no image, or one that is refused."""
        return self._outcome()[1]

    def _outcome(self) -> tuple[Some, Some]:
        if not self._tried:
            records = self.row.records
            sizes = np.unique(numbers(self.row.usable, "batch_size"))
            made = np.isin(numbers(records, "batch_size"), sizes)
            tried = pick(records, made & ~is_text(records, "status", Status.SKIPPED))
            lost = ~is_text(tried, "status", Status.OK)
            if self.refused:
                lost |= np.array([key in self.refused for key in texts(tried, "key")], bool)
            self._tried.append((tried, pick(tried, lost)))
        return self._tried[0]

    def lone_images(self, by_negative: bool) -> dict[PairKey, LoneImage]:
        """Images made alone by pair, or by what is left of it without the negative prompt."""
        known = lone_images(self.row)
        found = {k: known.get(k, LoneImage(s, None, "")) for k, s in self.latency_s.items()}
        if by_negative:
            return found
        return {(k[0], *k[2:]): found[k] for k in sorted(found, key=lambda k: k in known)}

    def outcomes(self) -> dict[PairKey, float]:
        """Quality per pair, 0 where the trial failed."""
        size, failed = self.row.quality_batch_size, self.failed
        if size is None:
            return dict(self.quality)
        lost = pick(failed, numbers(failed, "batch_size") == size)
        return dict.fromkeys(pair_keys(lost), _NO_IMAGE) | self.quality


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidates on the pairs that all of them have.

    `quality`: [S, n]; `keys`: [n], what each pair is; `clusters`: [n], the prompt of each;
    `left_out` are rows that are in no comparison, each with why; `lacking` counts, by candidate,
    the pairs that others have and it has not.
    """

    metric: str
    candidates: list[Candidate]
    quality: NDArray[np.float64]
    keys: list[PairKey]
    clusters: NDArray[np.int64]
    left_out: list[tuple[Candidate, str]]
    lacking: dict[int, int] = field(default_factory=dict)
    _means: dict[int, Interval] = field(default_factory=dict, repr=False)
    _differences: dict[tuple[int, int], list[Interval]] = field(default_factory=dict, repr=False)

    def mean(self, index: int) -> Interval:
        """One candidate's mean quality."""
        if index not in self._means:
            bounds = (0.0, 1.0) if self.metric == EDIT_QUALITY else facts(self.metric).bounds
            self._means[index] = mean_t(self.quality[index], self.clusters, bounds=bounds)
        return self._means[index]

    def differences(self, index: int) -> list[Interval]:
        """Mean paired differences of quality: `index` minus every candidate, itself included."""
        return self._signed(index, 1)

    def differences_from(self, index: int) -> list[Interval]:
        """The same the other way round: every candidate minus `index`."""
        return self._signed(index, -1)

    def _signed(self, index: int, sign: int) -> list[Interval]:
        if (index, sign) not in self._differences:
            paired = self.quality[index] - self.quality
            if sign < 0:
                paired = self.quality - self.quality[index]
            self._differences[index, sign] = self._intervals(paired)
        return self._differences[index, sign]

    def _intervals(self, paired: NDArray[np.float64]) -> list[Interval]:
        """The mean of each row of paired differences [S, n]."""
        counts = np.bincount(self.clusters).astype(np.float64)
        n, k = paired.shape[1], len(counts)
        if k < 2:
            return [Interval(float(v), None, None, n, k) for v in paired.mean(axis=1)]
        sums = np.zeros((k, len(paired)))
        if k == n:  # adding to nothing, one by one, takes half of the time that a comparison does
            sums[self.clusters] = paired.T
        else:
            np.add.at(sums, self.clusters, paired.T)
        found = mean_bounds(sums, counts, bounds=_span(self.metric))
        ends = zip(found.value, found.low, found.high, strict=True)
        return [Interval(float(v), float(low), float(high), n, k) for v, low, high in ends]

    @property
    def largest_loss(self) -> float | None:
        """The most that one pair can lose, where the metric is a share; ``None`` if unknown."""
        span = _span(self.metric)
        return None if span is None else span[1]

    def log_speed_ratio(self, index: int, base: int) -> Interval | None:
        """Log ratio of latencies over pairs, `index` over `base`; ``None`` without pairs."""
        one, other = self.candidates[index], self.candidates[base]
        guided = one.row.setting["cfg"] > 1 and other.row.setting["cfg"] > 1
        return log_ratio(one.lone_images(guided), other.lone_images(guided))


def paired_difference(metric: str, a: Candidate, b: Candidate) -> Interval | None:
    """Mean of a's quality minus b's over the pairs that both have; ``None`` without any."""
    mine, theirs = a.outcomes(), b.outcomes()
    common = [key for key in mine if key in theirs]
    if not common:
        return None
    paired = [mine[key] - theirs[key] for key in common]
    return mean_t(paired, pair_clusters(common), bounds=_span(metric))


def pick_family(rows: Iterable[Row], task: Task) -> tuple[list[Row], list[str]]:
    """Choose the rows that may be compared: one model, environment and size; no random weights.

    A hosted service's rows are a family of their own: its latency is also that of the network.

    Takes the family with the most settings, then the most images; the notes name the others.
    """
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.random_weights:
            continue
        if row.setting["task"] == task.value and row.usable:
            s = row.setting
            place = (row.environment_id, row.hosted)
            key = (s["model"], s["weights_digest"], place, s["width"], s["height"])
            families.setdefault(key, []).append(row)
    if not families:
        return [], []
    chosen = max(
        families, key=lambda k: (len(families[k]), sum(len(r.usable) for r in families[k]))
    )
    notes = [
        f"left out: {len(rest)} settings of {k[0]} at {k[3]}x{k[4]} {_place(*k[2])}; only one"
        " model, size and environment are compared, hosted services apart"
        for k, rest in families.items()
        if k != chosen
    ]
    return families[chosen], notes


def _place(environment_id: str | None, hosted: bool) -> str:
    return "by a hosted service" if hosted else f"in environment {str(environment_id)[:8]}"


def candidates(table: Table, rows: list[Row], task: Task) -> tuple[str, list[Candidate]]:
    """Each row's quality per pair under one objective; rows without any are not among them.

    Raises: ConfigError where no metric that can judge this task was scored.
    """
    metric, found = all_candidates(table, rows, task)
    return metric, [c for c in found if c.quality]


def all_candidates(table: Table, rows: list[Row], task: Task) -> tuple[str, list[Candidate]]:
    """Do the same with rows of which no image was scored.

    Raises: ConfigError where no metric that can judge this task was scored.
    """
    metric, names = _objective(table, rows, task)
    found = [
        Candidate(row, _quality(table, row, names), _latency(row), _work(row), _refused(table, row))
        for row in rows
    ]
    return metric, _under_every_negative(found)


def compare(metric: str, found: list[Candidate]) -> Comparison:
    """Put candidates on their common pairs.

    Those with too few pairs are left out, and those that were judged on other prompts: of these the
    larger group is compared.

    Raises: ConfigError with fewer than two candidates, or where they share no pair.
    """
    outcomes = [c.outcomes() if c.quality else {} for c in found]
    enough = _ENOUGH_PAIRS * max(map(len, outcomes), default=0)
    many = [i for i, o in enumerate(outcomes) if len(o) >= max(enough, 1)]
    alike = _on_the_same_pairs(outcomes, many)
    shared = set().union(*(outcomes[i] for i in alike))
    left_out = [
        (c, _why_left_out(metric, c, outcomes[i], shared))
        for i, c in enumerate(found)
        if i not in alike
    ]
    kept, outcomes = [found[i] for i in alike], [outcomes[i] for i in alike]
    if len(many) < 2:
        raise ConfigError(
            f"nothing to compare: {len(many)} setting with {metric}; sweep at least two, for"
            f" example `{plugins.command('run -m steps=4,16 cfg=1,4')}`"
        )
    tally = Counter(key for o in outcomes for key in o)
    common = [key for key in outcomes[0] if tally[key] == len(kept)]
    if not common or len(kept) < 2:
        raise ConfigError(
            "nothing to compare: the settings share no pair of prompt, seed, size and init image;"
            " sweep them over the same prompts and seeds"
        )
    quality = np.array([[o[key] for key in common] for o in outcomes])
    counts = [len(shared) - len(o) for o in outcomes]
    lacking = {i: count for i, count in enumerate(counts) if count}
    return Comparison(metric, kept, quality, common, pair_clusters(common), left_out, lacking)


def _on_the_same_pairs(outcomes: Sequence[Mapping[PairKey, float]], among: list[int]) -> list[int]:
    """Of these, the most that share half of the pairs of one of them, in their order."""
    pairs = [outcomes[i].keys() for i in among]
    if len(set().union(*pairs)) == max(map(len, pairs), default=0):
        return among  # somebody has all pairs
    groups = [
        [i for i, others in zip(among, pairs, strict=True) if 2 * len(mine & others) >= len(mine)]
        for mine in pairs
    ]
    return max(groups, key=len, default=[])


def _why_left_out(
    metric: str, candidate: Candidate, own: Mapping[PairKey, float], shared: set[PairKey]
) -> str:
    if not own:
        return f"not scored: none of its {len(candidate.row.usable)} images has {metric}"
    if shared and not shared & own.keys():
        sets = sorted(name for (name,) in distinct_refs(candidate.row.quality_records(), "set"))
        return f"judged on other prompts: {len(own)} pairs of {', '.join(sets)}"
    return f"too few pairs: {len(own)}"


def _objective(table: Table, rows: list[Row], task: Task) -> tuple[str, list[str]]:
    """Name of the objective, and the metrics that it combines."""

    def scored(name: str) -> bool:
        found = (table.scores.found(name, row.quality_records()) for row in rows)
        return any(each.valued.any() for each in found)

    clip = sorted(name for name in table.scores if name.startswith("clip_score"))
    usable = [name for name in ("prompt_accuracy", *clip) if scored(name)]
    if task is Task.TEXT_TO_IMAGE and usable:
        return usable[0], usable[:1]
    if task is Task.IMAGE_TO_IMAGE and "prompt_accuracy" in usable and scored("init_kept"):
        return EDIT_QUALITY, ["prompt_accuracy", "init_kept"]
    needs = "prompt_accuracy or clip_score"
    if task is Task.IMAGE_TO_IMAGE:
        needs = "prompt_accuracy and init_kept"
    raise ConfigError(f"nothing to compare: {task.value} needs {needs}, which was not scored")


def _quality(table: Table, row: Row, names: list[str]) -> dict[PairKey, float]:
    records = row.quality_records()
    found = [table.scores.found(name, records) for name in names]
    valued = np.logical_and.reduce([each.valued for each in found])
    values = zip(*(each.values[valued].tolist() for each in found), strict=True)
    return dict(zip(pair_keys(pick(records, valued)), map(_harmonic, values), strict=True))


def _refused(table: Table, row: Row) -> frozenset[str]:
    """Keys of the trials that ended OK with an image that the guards refused."""
    ok = pick(row.records, is_text(row.records, "status", Status.OK))
    found = table.scores.found(GUARD, ok)
    return frozenset(texts(pick(ok, found.there & ~(np.abs(found.values) > 0.0)), "key"))


def _under_every_negative(found: list[Candidate]) -> list[Candidate]:
    """Pair settings without guidance with others under whatever negative prompt these have.

    At cfg <= 1 a negative prompt does nothing, so a plan has its image once, and a command that
    asks for it again may not even name the negative prompt.
    """
    guided = dict.fromkeys(key for c in found if c.row.setting["cfg"] > 1 for key in c.quality)
    if len({key[1] for c in found for key in c.quality}) == 1 or not guided:
        return found
    return [c if c.row.setting["cfg"] > 1 else _spread_out(c, guided) for c in found]


def _spread_out(candidate: Candidate, keys: Iterable[PairKey]) -> Candidate:
    def spread(values: dict[PairKey, float]) -> dict[PairKey, float]:
        by_image = {(key[0], *key[2:]): value for key, value in values.items()}
        found = {key: by_image.get((key[0], *key[2:])) for key in keys}
        return values | {key: value for key, value in found.items() if value is not None}

    quality, latency_s = spread(candidate.quality), spread(candidate.latency_s)
    return replace(candidate, quality=quality, latency_s=latency_s)


def _harmonic(values: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return 0.0 if min(values) <= 0.0 else len(values) / sum(1.0 / v for v in values)


def _latency(row: Row) -> dict[PairKey, float]:
    known = pick(row.timed, ~np.isnan(seconds(row.timed)))
    return dict(zip(pair_keys(known), seconds(known).tolist(), strict=True))


def _work(row: Row) -> float:
    seen, guided = numbers(row.usable, "evaluations"), 2.0 if row.setting["cfg"] > 1 else 1.0
    counted = np.empty(len(seen))
    for count in np.unique(seen):  # of one setting: what the records differ in says the rest
        mine = np.isnan(seen) if np.isnan(count) else seen == count
        known = None if np.isnan(count) else int(count)
        first = row.usable[int(np.argmax(mine))]
        counted[mine] = sequences(first.trial.request, known)
    return float(np.mean(counted)) if len(counted) else guided * float(row.setting["steps"])


def _span(metric: str) -> tuple[float, float] | None:
    """What a difference can be at least and at most, where the metric is a share.

    What CLIP-score could be at most says nothing of what two images differ by.
    """
    share = metric == EDIT_QUALITY or facts(metric).bounds == (0.0, 1.0)
    return (-1.0, 1.0) if share else None
