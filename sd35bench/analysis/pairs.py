"""Candidates side by side on the same prompts, seeds and init images.

Quality is one number per image. For text-to-image it is the first of prompt accuracy and
CLIP-score that was scored. For image-to-image it is the harmonic mean of prompt followed and init
kept, per image: an edit must do both, and a mean that either part can pull to 0 has its optimum
inside, where an arithmetic mean would be content with an untouched init image (0 and 1 give 0.5).

A trial that failed made nothing, which is worth 0: left out, it would spare its own setting, and
take the prompt away from all others.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import plugins
from sd35bench.analysis.facts import facts
from sd35bench.analysis.grouping import PairKey, PairNumbers, pair_clusters
from sd35bench.analysis.speed import LoneImage, log_ratio, lone_images
from sd35bench.analysis.table import GUARD, Row, Table
from sd35bench.errors import ConfigError
from sd35bench.evaluations import sequences
from sd35bench.stats.clustered import mean_bounds, mean_t
from sd35bench.stats.intervals import Interval
from sd35bench.study.columns import (
    Floats,
    Some,
    distinct_refs,
    is_text,
    numbers,
    pick,
    seconds,
    texts,
)
from sd35bench.types import Status, Task

EDIT_QUALITY = "edit_quality"
_ENOUGH_PAIRS = 0.5
"""A setting with fewer than this share of the largest one's pairs is not compared."""
_NO_IMAGE = 0.0
Numbers = NDArray[np.int64]


class PairValues(Mapping[PairKey, float]):
    """A value of each of n pairs: the pairs' numbers [n], and the values [n]."""

    def __init__(self, numbers: PairNumbers, codes: Numbers, values: Floats) -> None:
        """Of a pair that is there several times the last value counts, in the first one's place."""
        unique, firsts = np.unique(codes, return_index=True)
        if len(unique) < len(codes):
            lasts = len(codes) - 1 - np.unique(codes[::-1], return_index=True)[1]
            order = np.argsort(firsts)
            codes, values = unique[order], values[lasts[order]]
        self.numbers, self.codes, self.values_of = numbers, codes, values
        self._made: dict[PairKey, float] = {}

    def __getitem__(self, pair: PairKey) -> float:
        if not self._made:
            self._made.update(zip(self, self.values_of.tolist(), strict=True))
        return self._made[pair]

    def __iter__(self) -> Iterator[PairKey]:
        keys = self.numbers.keys
        return (keys[code] for code in self.codes.tolist())

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def of(cls, found: Mapping[PairKey, float], numbers: PairNumbers | None = None) -> "PairValues":
        """Any values by pair as such, under these numbers where some are given."""
        if isinstance(found, PairValues) and numbers in (None, found.numbers):
            return found
        numbers = PairNumbers() if numbers is None else numbers
        values = np.array([*found.values()], np.float64)
        return cls(numbers, numbers.of_keys(found), values)

    def under(self, codes: Numbers, values: Floats) -> "PairValues":
        """These values after others, which they take the place of."""
        joined = np.concatenate([codes, self.codes]), np.concatenate([values, self.values_of])
        return PairValues(self.numbers, *joined)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row with its quality and its lone latency per pair; `work` is evaluations per image.

    `work` counts guidance's second half, which doubles an evaluation's cost. `refused` are the keys
    of trials whose images are black, constant or of a wrong size.
    """

    row: Row
    quality: Mapping[PairKey, float]
    latency_s: Mapping[PairKey, float]
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

    def outcomes(self) -> PairValues:
        """Quality per pair, 0 where the trial failed."""
        size, failed = self.row.quality_batch_size, self.failed
        quality = PairValues.of(self.quality)
        if size is None:
            return quality
        lost = pick(failed, numbers(failed, "batch_size") == size)
        return quality.under(quality.numbers.of(lost), np.full(len(lost), _NO_IMAGE))


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
    mine, theirs = (dict(side.outcomes()) for side in (a, b))
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
            # A hosted service tells no digest of its weights, so it is a family of its own.
            where = (s["model"], s["weights_digest"], row.environment_id)
            key = (*where, s["width"], s["height"])
            families.setdefault(key, []).append(row)
    if not families:
        return [], []
    chosen = max(
        families, key=lambda k: (len(families[k]), sum(len(r.usable) for r in families[k]))
    )
    notes = [
        f"left out: {len(rest)} settings of {k[0]} at {k[3]}x{k[4]} {_place(rest[0])}; only one"
        " model, size and environment are compared, hosted services apart"
        for k, rest in families.items()
        if k != chosen
    ]
    return families[chosen], notes


def _place(row: Row) -> str:
    return "by a hosted service" if row.hosted else f"in environment {str(row.environment_id)[:8]}"


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
    pairs = PairNumbers()
    found = [
        Candidate(
            row,
            _quality(table, row, names, pairs),
            _latency(row, pairs),
            _work(row),
            _refused(table, row),
        )
        for row in rows
    ]
    return metric, _under_every_negative(found)


def compare(metric: str, found: list[Candidate]) -> Comparison:
    """Put candidates on their common pairs.

    Those with too few pairs are left out, and those that were judged on other prompts: of these the
    larger group is compared.

    Raises: ConfigError with fewer than two candidates, or where they share no pair.
    """
    outcomes = _in_common([c.outcomes() if c.quality else PairValues.of({}) for c in found])
    enough = _ENOUGH_PAIRS * max(map(len, outcomes), default=0)
    many = [i for i, o in enumerate(outcomes) if len(o) >= max(enough, 1)]
    alike = _on_the_same_pairs(outcomes, many)
    shared = set(_counted([outcomes[i] for i in alike])[0].tolist())
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
    codes, tally = _counted(outcomes)
    common = np.array([], np.int64)
    if kept:
        everywhere = codes[tally == len(kept)]
        common = outcomes[0].codes[np.isin(outcomes[0].codes, everywhere)]
    if not len(common) or len(kept) < 2:
        raise ConfigError(
            "nothing to compare: the settings share no pair of prompt, seed, size and init image;"
            " sweep them over the same prompts and seeds"
        )
    quality = np.array([_at(o, common) for o in outcomes])
    counts = [len(shared) - len(o) for o in outcomes]
    lacking = {i: count for i, count in enumerate(counts) if count}
    keys = [outcomes[0].numbers.keys[code] for code in common.tolist()]
    return Comparison(metric, kept, quality, keys, pair_clusters(keys), left_out, lacking)


def _in_common(outcomes: Sequence[PairValues]) -> list[PairValues]:
    """The same under the same numbers."""
    kinds = {id(o.numbers.keys): o.numbers for o in outcomes if o}
    if len(kinds) <= 1:
        return [*outcomes]
    numbers = PairNumbers()
    return [PairValues.of(o, numbers) for o in outcomes]


def _counted(outcomes: Sequence[PairValues]) -> tuple[Numbers, Numbers]:
    """The pairs that some have, and how many have each."""
    found = np.concatenate([np.empty(0, np.int64), *(o.codes for o in outcomes)])
    counts = np.bincount(found)
    used = np.flatnonzero(counts)
    return used, counts[used]


def _at(found: PairValues, codes: Numbers) -> Floats:
    """The values of pairs, all of which are there: [n]."""
    order = np.argsort(found.codes)
    return found.values_of[order[np.searchsorted(found.codes, codes, sorter=order)]]


def _on_the_same_pairs(outcomes: Sequence[PairValues], among: list[int]) -> list[int]:
    """Of these, the most that share half of the pairs of one of them, in their order."""
    pairs = [outcomes[i].codes for i in among]
    if len(_counted([outcomes[i] for i in among])[0]) == max(map(len, pairs), default=0):
        return among  # somebody has all pairs
    groups = [
        [
            i
            for i, others in zip(among, pairs, strict=True)
            if 2 * len(np.intersect1d(mine, others, assume_unique=True)) >= len(mine)
        ]
        for mine in pairs
    ]
    return max(groups, key=len, default=[])


def _why_left_out(metric: str, candidate: Candidate, own: PairValues, shared: set[int]) -> str:
    if not own:
        return f"not scored: none of its {len(candidate.row.usable)} images has {metric}"
    if shared and shared.isdisjoint(own.codes.tolist()):
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


def _quality(table: Table, row: Row, names: list[str], pairs: PairNumbers) -> PairValues:
    records = row.quality_records()
    found = [table.scores.found(name, records) for name in names]
    valued = np.logical_and.reduce([each.valued for each in found])
    values = [each.values[valued] for each in found]
    quality = (
        values[0] if len(values) == 1 else np.array([*map(_harmonic, zip(*values, strict=True))])
    )
    return PairValues(pairs, pairs.of(pick(records, valued)), quality)


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
    values = [PairValues.of(c.quality) for c in found]
    keys = next((each.numbers.keys for each in values), [])
    negatives = {keys[code][1] for code in _counted(values)[0].tolist()}
    of_guided = [v for c, v in zip(found, values, strict=True) if c.row.setting["cfg"] > 1]
    if len(negatives) == 1 or not any(of_guided):
        return found
    guided = dict.fromkeys(code for each in of_guided for code in each.codes.tolist())
    return [c if c.row.setting["cfg"] > 1 else _spread_out(c, [*guided]) for c in found]


def _spread_out(candidate: Candidate, codes: Sequence[int]) -> Candidate:
    def spread(found: Mapping[PairKey, float]) -> PairValues:
        values = PairValues.of(found)
        keys = values.numbers.keys
        by_image = {(key[0], *key[2:]): value for key, value in values.items()}
        every = {code: by_image.get((keys[code][0], *keys[code][2:])) for code in codes}
        known = {code: value for code, value in every.items() if value is not None}
        more = np.array([*known], np.int64), np.array([*known.values()], np.float64)
        return PairValues(values.numbers, *more).under(values.codes, values.values_of)

    quality, latency_s = spread(candidate.quality), spread(candidate.latency_s)
    return replace(candidate, quality=quality, latency_s=latency_s)


def _harmonic(values: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return 0.0 if min(values) <= 0.0 else len(values) / sum(1.0 / v for v in values)


def _latency(row: Row, pairs: PairNumbers) -> PairValues:
    known = pick(row.timed, ~np.isnan(seconds(row.timed)))
    return PairValues(pairs, pairs.of(known), seconds(known))


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
