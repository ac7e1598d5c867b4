"""What a gate looks at: latency, memory, failures, quality and drift of two sides, as figures.

A figure is one number of both sides, the effect (candidate minus baseline, or their log ratio) and
its interval. Where one side has it and the other has not, it could not be measured; where both
lack it, it does not apply. Nothing is judged here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.quality import facts
from sd35bench.gate.figure import Figure, difference, missing, ratio
from sd35bench.gate.policy import Dimension, MetricMargin
from sd35bench.gate.set_figures import set_figure
from sd35bench.gate.sides import Matched, Side, match_pairs
from sd35bench.stats.clustered import mean_t, student
from sd35bench.stats.intervals import Interval
from sd35bench.stats.latency import Spread, couple_starts, log_ratio, run_drift

Distances = Callable[[Side, Side, Matched], NDArray[np.float64] | str]
"""Mean absolute difference (levels of 255) [n] of matched images; NaN where one is not there.

A text says why no difference could be measured at all.
"""
_QUANTILES = {"p50": 0.5, "p95": 0.95}
_LEAST_PER_START = {"p50": 5, "p95": 40}
"""Lone images that a start needs for a quantile to say anything about it."""
_LEAST_MEMORY_STARTS = 3


def figures(
    name: str, wanted: Dimension, baseline: Side, candidate: Side, distances: Distances
) -> list[Figure]:
    """Measure a dimension's figures; an empty list where it does not apply at all."""
    if name == "latency":
        return _latency(wanted, baseline, candidate)
    if name == "memory":
        return _memory(wanted, baseline, candidate)
    if name == "failures":
        return _failures(wanted, baseline, candidate)
    if name == "quality":
        return _quality(wanted, baseline, candidate)
    return _drift(wanted, baseline, candidate, distances)


def start_drifts(side: Side) -> list[dict[str, Any]]:
    """How the latency of each process start changed while it ran; starts with too few left out."""
    found = []
    for index, start in enumerate(side.starts):
        drift = run_drift(side.of_start(index))
        if drift is not None:
            change = drift.change
            found.append(
                {
                    "start": start.id,
                    "change_frac": change.value,
                    "ci95": change.ci95,
                    "n": change.n,
                    "drifting": drift.drifting,
                }
            )
    return found


# Latency ---------------------------------------------------------------------------------------


def _latency(wanted: Dimension, a: Side, b: Side) -> list[Figure]:
    assert wanted.spread is not None
    return [_quantile(name, m, wanted.spread, a, b) for name, m in wanted.margins.items()]


def _quantile(name: str, margin: MetricMargin, spread: Spread, a: Side, b: Side) -> Figure:
    q = _QUANTILES[name]
    usable = [_usable_starts(side, _LEAST_PER_START[name]) for side in (a, b)]
    pooled = [
        np.concatenate([np.empty(0), *(side.of_start(i) for i in which)])
        for which, side in zip(usable, (a, b), strict=True)
    ]
    values = [float(np.quantile(x, q, method="hazen")) if len(x) else None for x in pooled]
    asked = ratio(name, "s", margin)
    if not usable[0] or not usable[1]:
        least = _LEAST_PER_START[name]
        why = f"no process start with {least} images made alone on the {{}}"
        return missing(asked, values, why)
    couples = couple_starts(
        [a.starts[i].started_at for i in usable[0]], [b.starts[i].started_at for i in usable[1]]
    )
    effect = log_ratio(
        [a.of_start(usable[0][i]) for i, _ in couples],
        [b.of_start(usable[1][j]) for _, j in couples],
        q,
        spread,
    )
    assert effect is not None
    note = f"{len(couples)} couples of process starts in alternation"
    if len(couples) == 1:
        note = (
            "one couple of process starts: the interval has the policy's spread between runs"
            f" (sd {spread.sd:g} of the log ratio); more starts with --rerun K"
        )
    return asked(baseline=values[0], candidate=values[1], effect=effect, note=note)


def _usable_starts(side: Side, least: int) -> list[int]:
    return [i for i in range(len(side.starts)) if len(side.of_start(i)) >= least]


# Memory ----------------------------------------------------------------------------------------


def _memory(wanted: Dimension, a: Side, b: Side) -> list[Figure]:
    assert wanted.noise is not None
    return [_peak(name, m, wanted.noise, a, b) for name, m in wanted.margins.items()]


def _peak(name: str, margin: MetricMargin, noise: float, a: Side, b: Side) -> Figure:
    """Compare peaks of process starts by their medians.

    A peak is nearly the same in every start, so one start decides within the policy's noise; from
    three on, on either side, the starts' own spread does (Welch 1947).
    """
    peaks = [
        np.array([v for s in side.starts if (v := getattr(s, name)) is not None], np.float64)
        for side in (a, b)
    ]
    values = [float(np.median(x)) if len(x) else None for x in peaks]
    asked = ratio(name, "bytes", margin)
    if values[0] is None or values[1] is None:
        return missing(asked, values, f"{name} is not known on the {{}}")
    value, n = float(np.log(values[1] / values[0])), min(map(len, peaks))
    half, degrees, note = float(np.log(noise)), n, f"noise between starts: ratio {noise:g}"
    if n >= _LEAST_MEMORY_STARTS:
        half, degrees = _welch(*map(np.log, peaks))
        note = f"{n} process starts on either side"
    effect = Interval(value, value - half, value + half, sum(map(len, peaks)), degrees + 1)
    return asked(baseline=values[0], candidate=values[1], effect=effect, note=note)


def _welch(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, int]:
    """Half width of the interval of a difference of means, and whole degrees of freedom."""
    parts = [x.var(ddof=1) / len(x) for x in (a, b)]
    total = sum(parts)
    if total <= 0.0:
        return 0.0, len(a) + len(b) - 2
    degrees = total**2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b), strict=True))
    whole = max(1, int(degrees))
    return float(student(whole) * np.sqrt(total)), whole


# Failures --------------------------------------------------------------------------------------


def _failures(wanted: Dimension, a: Side, b: Side) -> list[Figure]:
    matched = match_pairs(a, b)
    flags = [
        _any_failed(side)[rows] for side, rows in ((a, matched.baseline), (b, matched.candidate))
    ]
    lost = flags[1].astype(np.float64) - flags[0]
    effect = mean_t(lost, matched.clusters, bounds=(-1.0, 1.0))
    shares = [float(f.mean()) for f in flags]
    (name, margin), *_ = wanted.margins.items()
    asked = difference(name, "share of trials", margin)
    return [asked(baseline=shares[0], candidate=shares[1], effect=effect)]


def _any_failed(side: Side) -> NDArray[np.bool_]:
    """For each row, whether any trial of its pair failed; a pair may run at several batch sizes."""
    _, number = np.unique(side.pairs, return_inverse=True)
    worst = np.zeros(number.max() + 1, bool)
    np.logical_or.at(worst, number, side.failed)
    return worst[number]


# Quality ---------------------------------------------------------------------------------------


def _quality(wanted: Dimension, a: Side, b: Side) -> list[Figure]:
    if a.random_weights or b.random_weights:
        return []
    found = []
    for measure, names in (
        (_metric, {*a.metrics, *b.metrics}),
        (set_figure, {*a.sets, *b.sets}),
    ):
        judged = [(name, m) for name in sorted(names) if (m := wanted.margin(name)) is not None]
        found += [measure(name, margin, a, b) for name, margin in judged]
    return [one for name in wanted.margins for one in _of_name(name, wanted, found, b)]


def _of_name(name: str, wanted: Dimension, found: list[Figure], b: Side) -> list[Figure]:
    """Figures of one metric that the policy names; one without an effect where there is none."""
    own = [figure for figure in found if wanted.named(figure.name) == name]
    if not own:
        absent = difference(name, "metric", wanted.margins[name])
        own = [absent(note=f"{name} was scored on neither side")]
    if any(figure.effect is not None for figure in own):
        return own
    needed = wanted.needs(name, b.setting["task"])
    return [replace(figure, needed=needed) for figure in own]


def _metric(name: str, margin: MetricMargin, a: Side, b: Side) -> Figure:
    asked = difference(name, "metric", margin)
    columns = [side.metrics.get(name) for side in (a, b)]
    means = [None if c is None else float(np.nanmean(c)) for c in columns]
    if columns[0] is None or columns[1] is None:
        return missing(asked, means, f"{name} was not scored on the {{}}")
    matched = match_pairs(a, b, (np.isfinite(columns[0]), np.isfinite(columns[1])))
    if not len(matched.clusters):
        return asked(unmeasured=True, note=f"no pair has {name} on both sides")
    before, after = columns[0][matched.baseline], columns[1][matched.candidate]
    # Only for shares: what CLIP-score could be at most says nothing of what two images differ by.
    span = (-1.0, 1.0) if facts(name).bounds == (0.0, 1.0) else None
    effect = mean_t(after - before, matched.clusters, bounds=span)
    return asked(baseline=float(before.mean()), candidate=float(after.mean()), effect=effect)


# Drift -----------------------------------------------------------------------------------------


def _drift(wanted: Dimension, a: Side, b: Side, distances: Distances) -> list[Figure]:
    matched = match_pairs(a, b, (_has_image(a), _has_image(b)))
    (name, margin), *_ = wanted.margins.items()
    floor, said = _floor(wanted, a, b)
    allowed = MetricMargin(floor + margin.margin, margin.direction)
    asked = difference(name, "levels of 255", allowed)
    if not len(matched.clusters):
        return [asked(unmeasured=True, note="no pair has an image on both sides")]
    levels = distances(a, b, matched)
    if isinstance(levels, str):
        return [asked(unmeasured=True, note=levels)]
    known = np.isfinite(levels)
    if not known.any():
        return [asked(unmeasured=True, note="no pair's images could be held together")]
    effect = mean_t(levels[known], matched.clusters[known])
    # The baseline's distance from itself is 0, so the candidate's distance is the effect.
    return [asked(baseline=0.0, candidate=effect.value, effect=effect, note=said)]


def _has_image(side: Side) -> NDArray[np.bool_]:
    return np.array([image is not None for image in side.images], bool)


def _floor(wanted: Dimension, a: Side, b: Side) -> tuple[float, str]:
    """The noise floor that drift must be beyond: the baseline's, else the policy's, else 0.

    Never the candidate's: one that became noisy would be excused by its own noise.
    """
    if a.floor_levels is not None:
        floor, said = a.floor_levels, f"noise floor {a.floor_levels:.3g} levels, of the baseline"
    elif wanted.floor_levels is not None:
        floor = wanted.floor_levels
        said = f"noise floor {floor:g} levels, from the policy"
    else:
        floor, said = 0.0, "the baseline measured no noise floor: taken as 0"
        said += " (run it with noise_floor=BACKEND to have one)"
    if b.floor_levels is not None and b.floor_levels > floor:
        said += f"; the candidate's own is larger, {b.floor_levels:.3g}, and excuses nothing"
    return floor, said
