"""What a gate looks at: latency, memory, failures, quality and drift of two sides, as figures.

A figure is one number of both sides, the effect (candidate minus baseline, or their log ratio) and
its interval. Where one side has it and the other has not, it could not be measured; where both
lack it, it does not apply. Nothing is judged here.

Drift has three kinds of figure. `mean_abs` is how far images are apart, whatever the direction.
`shift` is the mean signed difference of a channel: noise cancels in it, and a systematic change of
a third of a level is seen in 64 images. `changed` is the share of images that are not
bit-identical, for sides that should be.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import facts
from sd35bench.gate.figure import Figure, difference, missing, ratio
from sd35bench.gate.policy import Dimension, MetricMargin
from sd35bench.gate.set_figures import set_figure
from sd35bench.gate.sides import Matched, Side, has_image, match_pairs, same_files
from sd35bench.machine.contention import unlike
from sd35bench.pictures import decode_rgb
from sd35bench.stats.clustered import mean_t, student
from sd35bench.stats.intervals import Interval
from sd35bench.stats.latency import Spread, couple_starts, log_ratio, run_drift
from sd35bench.words import digits

Distances = Callable[[Side, Side, Matched], NDArray[np.float64] | str]
"""Differences [n, 4] of matched images in levels of 255: the mean absolute one, then the mean
signed one of each channel (candidate minus baseline); NaN where an image is not there.

A text says why no difference could be measured at all.
"""
FindImage = Callable[[str], Path | None]
"""Path of an image by its digest; ``None`` where it is not there."""
_QUANTILES = {"p50": 0.5, "p95": 0.95}
_LEAST_PER_START = {"p50": 5, "p95": 40}
"""Lone images that a start needs for a quantile to say anything about it."""
_LEAST_MEMORY_STARTS = 3
_LEVELS = "levels of 255"
_CHANNELS = {"shift_red": 1, "shift_green": 2, "shift_blue": 3}
"""Columns of `Distances`."""


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
    found = len(couples)
    couples = [
        (i, j)
        for i, j in couples
        if not unlike(a.starts[usable[0][i]].speed, b.starts[usable[1][j]].speed)
    ]
    if found and not couples:
        why = "the machine ran at speeds a fifth apart under the two sides; run them on a quiet one"
        return asked(baseline=values[0], candidate=values[1], unmeasured=True, note=why)
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
    found = asked(baseline=shares[0], candidate=shares[1], effect=effect, span=(-1.0, 1.0))
    same = not lost.any() and _all_same_files(a, b, len(lost))
    return [_identical(found) if same else replace(found, unchanged=not lost.any())]


def _all_same_files(a: Side, b: Side, pairs: int) -> bool:
    """Whether all pairs that both sides have, so many, have the same image file on both."""
    shown = match_pairs(a, b, (has_image(a), has_image(b)))
    return len(shown.clusters) == pairs and bool(same_files(a, b, shown).all())


def _identical(figure: Figure) -> Figure:
    """A figure that is read off images which are the same files: without any error, at any n."""
    assert figure.effect is not None
    same = Interval(0.0, 0.0, 0.0, figure.effect.n, figure.effect.clusters)
    note = f"all {same.n} images are the same on both sides, bit for bit"
    return replace(figure, effect=same, certain=True, note=note)


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
    for measure, names in ((_metric, {*a.metrics, *b.metrics}), (set_figure, {*a.sets, *b.sets})):
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
    lost = after - before
    effect = mean_t(lost, matched.clusters, bounds=span)
    found = asked(
        baseline=float(before.mean()),
        candidate=float(after.mean()),
        effect=effect,
        span=span,
        unchanged=not lost.any(),
    )
    same = not lost.any() and bool(same_files(a, b, matched).all())
    return _identical(found) if same else found


# Drift -----------------------------------------------------------------------------------------


def _drift(wanted: Dimension, a: Side, b: Side, distances: Distances) -> list[Figure]:
    matched = match_pairs(a, b, (has_image(a), has_image(b)))
    if not len(matched.clusters):
        return [
            difference(name, _LEVELS, margin)(
                unmeasured=True, note="no pair has an image on both sides"
            )
            for name, margin in wanted.margins.items()
        ]
    measured = distances(a, b, matched)
    same = same_files(a, b, matched)
    if not isinstance(measured, str):
        # Files of other bytes may hold the same pixels.
        same |= measured[:, 0] == 0.0
    floor = _floor(wanted, a, b)
    found: list[Figure] = []
    for name, margin in wanted.margins.items():
        if name == "changed":
            found.append(_changed(margin, (a, b), matched, same))
        else:
            found += _levels(name, margin, floor, matched, measured)
    nothing = [same.all() and f.effect is not None and f.effect.value == 0.0 for f in found]
    return [_identical(f) if still else f for f, still in zip(found, nothing, strict=True)]


def _levels(
    name: str,
    margin: MetricMargin,
    floor: tuple[float, str],
    matched: Matched,
    measured: NDArray[np.float64] | str,
) -> list[Figure]:
    """Mean differences of the images: the absolute one, or the signed one of each channel."""
    allowed = MetricMargin(floor[0] + margin.margin, margin.direction)
    columns = {name: 0} if name == "mean_abs" else _CHANNELS
    made = {each: difference(each, _LEVELS, allowed) for each in columns}
    if isinstance(measured, str):
        return [asked(unmeasured=True, note=measured) for asked in made.values()]
    known = np.isfinite(measured[:, 0])
    if not known.any():
        why = "no pair's images could be held together"
        return [asked(unmeasured=True, note=why) for asked in made.values()]
    effects = [
        mean_t(measured[known, column], matched.clusters[known]) for column in columns.values()
    ]
    # The baseline's distance from itself is 0, so the candidate's distance is the effect.
    return [
        asked(baseline=0.0, candidate=effect.value, effect=effect, note=floor[1])
        for asked, effect in zip(made.values(), effects, strict=True)
    ]


def _changed(
    margin: MetricMargin, sides: tuple[Side, Side], matched: Matched, same: NDArray[np.bool_]
) -> Figure:
    """Share of images that are not bit-identical; one that a side failed to make is not.

    Where no share is allowed, one changed image is proof, which needs no test.
    """
    lost = _lost(*sides)
    flags = np.concatenate([~same, np.ones(len(lost), bool)])
    prompts = np.concatenate([sides[1].prompts[matched.candidate], lost])
    effect = mean_t(flags, prompts, bounds=(0.0, 1.0))
    note = f"{int(flags.sum())} of {len(flags)} images are not bit-identical"
    if len(lost):
        note += f", {len(lost)} of them failed on one side"
    return difference("changed", "share of images", margin)(
        baseline=0.0,
        candidate=effect.value,
        effect=effect,
        note=note,
        span=(0.0, 1.0),
        unchanged=not flags.any(),
        certain=margin.margin == 0.0 and bool(flags.any()),
    )


def _lost(a: Side, b: Side) -> NDArray[np.uint64]:
    """Prompts [n] of the pairs that one side failed to make and the other made."""
    made = np.setxor1d(a.pairs[has_image(a)], b.pairs[has_image(b)])
    failed = np.union1d(a.pairs[a.failed], b.pairs[b.failed])
    lost = np.intersect1d(np.intersect1d(made, failed), a.pairs)
    return b.prompts[np.intersect1d(b.pairs, lost, return_indices=True)[1]]


def _floor(wanted: Dimension, a: Side, b: Side) -> tuple[float, str]:
    """The noise floor that drift must be beyond: the baseline's, else the policy's, else 0.

    Never the candidate's: one that became noisy would be excused by its own noise.
    """
    if a.floor_levels is not None:
        floor, said = (
            a.floor_levels,
            f"noise floor {digits(a.floor_levels)} levels, of the baseline",
        )
    elif wanted.floor_levels is not None:
        floor = wanted.floor_levels
        said = f"noise floor {floor:g} levels, from the policy"
    else:
        floor, said = 0.0, "the baseline measured no noise floor: taken as 0"
        said += " (run it with noise_floor=BACKEND to have one)"
    if b.floor_levels is not None and b.floor_levels > floor:
        said += f"; the candidate's own is larger, {digits(b.floor_levels)}, and excuses nothing"
    return floor, said


# How far images are apart -----------------------------------------------------------------------


class ImageDistances:
    """Differences of matched images in levels of 255; each pair is opened once.

    The drift that `score` keeps is between backends of one study; a gate holds one study's images
    against another's, or a baseline's. Files with one digest are one image and are not opened.
    """

    def __init__(self, baseline: FindImage, candidate: FindImage) -> None:
        """Where either side's images are found."""
        self._find = (baseline, candidate)
        self._known: dict[tuple[str, str], NDArray[np.float64]] = {}

    def __call__(
        self, baseline: Side, candidate: Side, matched: Matched
    ) -> NDArray[np.float64] | str:
        """Distances [n, 4] of matched images, or why they cannot be measured.

        The mean absolute difference, and the mean signed one of red, green and blue.

        One missing file refuses them all: the identical ones alone would make drift look small.
        """
        digests = [
            (str(baseline.images[i]), str(candidate.images[j]))
            for i, j in zip(matched.baseline, matched.candidate, strict=True)
        ]
        unlike = [d for d in dict.fromkeys(digests) if d[0] != d[1]]
        for find, name, side in zip(self._find, ("baseline", "candidate"), (0, 1), strict=True):
            missing = sum(find(pair[side]) is None for pair in unlike)
            if missing:
                return (
                    f"{missing} of {len(digests)} images of the {name} differ and are not there;"
                    " keep its study, or make the baseline with --images"
                )
        return np.array([self._distance(*pair) for pair in digests], np.float64).reshape(-1, 4)

    def _distance(self, mine: str, theirs: str) -> NDArray[np.float64]:
        if mine == theirs:
            return np.zeros(4)
        if (mine, theirs) not in self._known:
            paths = [find(digest) for find, digest in zip(self._find, (mine, theirs), strict=True)]
            a, b = (decode_rgb(path.read_bytes()) for path in paths if path is not None)
            self._known[mine, theirs] = image_difference(a, b)
        return self._known[mine, theirs]


def image_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far an image `b` [h, w, 3] is from `a`, [4] in levels of 255.

    The mean absolute difference, and the mean signed one (b minus a) of red, green and blue. NaN
    for images of unlike sizes, which are no pair.
    """
    if a.shape != b.shape:
        return np.full(4, np.nan)
    change = np.subtract(b, a, dtype=np.int16)
    means = change.mean(axis=(0, 1), dtype=np.float64)
    return np.array([np.abs(change).mean(dtype=np.float64), *means])
