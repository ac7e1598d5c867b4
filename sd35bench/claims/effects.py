"""Effects that designs are made of: paired differences, variety, difficulty, files.

What counts as an effect is written here and in `claim_designs`, once: a difference in following
the prompt counts from half of what the profiles may lose, and "as good" allows all of it.
"""

from collections.abc import Callable, Mapping, Sequence
from math import log, log10, sqrt
from typing import Any

import numpy as np

from sd35bench.analysis.grouping import PairKey, pair_clusters, pair_key
from sd35bench.analysis.table import Row
from sd35bench.claims.contrasts import Contrast, Side
from sd35bench.claims.evidence import (
    Evidence,
    Ladder,
    Unmeasured,
    Untestable,
    group_difference,
    log_interval,
    paired_mean,
    variety,
)
from sd35bench.nano.captions import Spec, parse
from sd35bench.types import Record

ALLOWED = {"share": 0.08, "points": 0.8}
"""What "as good" may lose, by unit: the profiles' margins (docs/adr/0010)."""
COUNTS = {"share": 0.04, "points": 0.4}
"""From where on "better" counts."""
VARIETY_RATIO = 1.1
SIZE_RATIO = 1.1
VISIBLE_DB = 1.0
_ROUNDING = 1.0 / sqrt(12.0)
"""Root mean square error of rounding to whole levels: below it PSNR says nothing."""


# Paired ----------------------------------------------------------------------------------------


def quality_contrast(
    evidence: Evidence, name: str, axis: str, sides: tuple[Sequence[Row], Sequence[Row]], sign: int
) -> Contrast:
    """Following the prompt: `sign` +1 for "better", -1 for "as good"."""
    metric = evidence.quality_metric()
    unit = "share" if metric == "prompt_accuracy" else "points"
    least = COUNTS[unit] if sign > 0 else -ALLOWED[unit]
    return score_contrast(evidence, metric, name, axis, sides, least)


def score_contrast(
    evidence: Evidence,
    metric: str,
    name: str,
    axis: str,
    sides: tuple[Sequence[Row], Sequence[Row]],
    least: float,
) -> Contrast:
    """A score, mean of `above` minus mean of `below`, pair by pair. Raises: Unmeasured."""
    above, below = ([evidence.values(metric, row) for row in side] for side in sides)
    if not all((*above, *below)):
        raise Unmeasured(f"{metric} was not scored for every setting")
    effect, means = paired_mean(above, below, metric)
    return Contrast(
        name=name,
        effect=effect,
        least=least,
        unit="points" if metric.startswith("clip_score") else "share",
        images=effect.n * (len(above) + len(below)),
        sides=sides_of(tuple(name_settings(side, axis) for side in sides), means),
    )


def variety_contrast(
    evidence: Evidence, name: str, axis: str, above: Sequence[Row], below: Sequence[Row]
) -> Contrast:
    """Ratio of the variety across seeds, over prompts that all settings share."""
    spreads = [[variety(evidence.vectors(row)) for row in side] for side in (above, below)]
    everyone = [spread for side in spreads for spread in side]
    common = [prompt for prompt in everyone[0] if all(prompt in s for s in everyone)]
    if not common:
        raise Unmeasured("no prompt has features under two seeds in every setting (seed=0,1)")
    top, bottom = (
        [float(np.mean([spread[p] for spread in side])) for p in common] for side in spreads
    )
    return Contrast(
        name=name,
        effect=log_interval(top, bottom, range(len(common))),
        least=log(VARIETY_RATIO),
        unit="ratio",
        images=2 * len(common) * len(everyone),
        sides=sides_of(
            (name_settings(above, axis), name_settings(below, axis)),
            (float(np.mean(top)), float(np.mean(bottom))),
        ),
    )


def neighbour_distances(evidence: Evidence) -> tuple[list[float], list[float]]:
    """For pairs of prompts: mean distance of their images under one seed, and under two.

    Every prompt is in one pair only, with its neighbour of the same difficulty, so pairs are
    independent.
    """
    row = evidence.main_row
    levels = {r.trial.request.prompt: str(r.trial.prompt.level) for r in row.usable}
    vectors = {p: seeds for p, seeds in evidence.vectors(row).items() if len(seeds) > 1}
    prompts = sorted(vectors, key=lambda prompt: (levels[prompt[0]], prompt[0]))
    same, other = [], []
    for a, b in zip(prompts[::2], prompts[1::2], strict=False):
        shared = sorted(set(vectors[a]) & set(vectors[b]))
        if len(shared) < 2:
            continue
        one = [1.0 - float(vectors[a][s] @ vectors[b][s]) for s in shared]
        two = [1.0 - float(vectors[a][s] @ vectors[b][t]) for s in shared for t in shared if s != t]
        same.append(float(np.mean(one)))
        other.append(float(np.mean(two)))
    if len(same) < 2:
        raise Unmeasured("fewer than 2 pairs of prompts have features under two seeds (seed=0,1)")
    return same, other


def seed_against_cfg(evidence: Evidence, rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """By prompt: distance between its seeds in two settings, and between the two at one seed."""
    first, second = (evidence.vectors(row) for row in rows)
    spreads = variety(first), variety(second)
    seeds, settings = [], []
    for prompt in spreads[0]:
        shared = set(first[prompt]) & set(second.get(prompt, {}))
        if prompt in spreads[1] and shared:
            seeds.append((spreads[0][prompt] + spreads[1][prompt]) / 2)
            apart = [1.0 - float(first[prompt][s] @ second[prompt][s]) for s in shared]
            settings.append(float(np.mean(apart)))
    if len(seeds) < 2:
        raise Unmeasured("fewer than 2 prompts have features under two seeds (seed=0,1)")
    return seeds, settings


def _judged(evidence: Evidence) -> list[tuple[Record, float, Mapping[str, bool]]]:
    """Records of the main setting with their verdict and its parts. Raises: Untestable."""
    row = evidence.main_row
    if not evidence.nano:
        raise Untestable("which part of a prompt fails is known for nano's prompts only")
    scored = [
        (r, s)
        for r in row.quality_records()
        if (s := evidence.table.score("prompt_accuracy", r)) is not None and s.value is not None
    ]
    if not scored:
        raise Unmeasured("prompt accuracy was not scored")
    return [
        (r, float(s.value), s.detail.get("parts", {})) for r, s in scored if s.value is not None
    ]


def level_contrast(evidence: Evidence, easy: str, hard: str, name: str) -> Contrast:
    """Accuracy of prompts of an easy level minus that of a hard one, other prompts each."""
    judged = _judged(evidence)
    sides = [
        [(r, value) for r, value, _ in judged if r.trial.prompt.level == level]
        for level in (easy, hard)
    ]
    for level, side in zip((easy, hard), sides, strict=True):
        if not side:
            raise Unmeasured(
                f"no prompt of level {level} ran at the setting, and in the environment, with"
                " most images"
            )
    return _unpaired(name, (easy, hard), sides)


def singles_contrast(
    evidence: Evidence, name: str, wanted: Callable[[Spec], bool | None]
) -> Contrast:
    """Single objects: the share of colour, shape, count and background that holds."""
    sides: tuple[list[tuple[Record, float]], ...] = ([], [])
    for record, _, parts in _judged(evidence):
        core = [parts[p] for p in ("background", "count", "colour", "shape") if p in parts]
        if record.trial.prompt.level != "single" or not core:
            continue
        side = wanted(parse(record.trial.request.prompt))
        if side is not None:
            sides[0 if side else 1].append((record, float(np.mean(core))))
    return _unpaired(name, tuple(name.split(" better than ")), sides)


def _unpaired(
    name: str, labels: Sequence[str], sides: Sequence[Sequence[tuple[Record, float]]]
) -> Contrast:
    effect, means = group_difference(sides[0], sides[1])
    return Contrast(
        name=name,
        effect=effect,
        least=COUNTS["share"],
        unit="share",
        images=effect.n,
        sides=sides_of(labels, means),
        paired=False,
    )


# Files' sizes and errors -----------------------------------------------------------------------


def size_contrast(above: Row, below: Row, name: str, files: tuple[Any, Any]) -> Contrast:
    """Ratio of the files' sizes, image by image."""
    sizes = [
        {pair_key(r.trial): r.image_bytes for r in row.quality_records() if r.image_bytes}
        for row in (above, below)
    ]
    keys = [key for key in sizes[0] if key in sizes[1]]
    if not keys:
        raise Unmeasured("the files of the same images were not made in both formats")
    top, bottom = ([float(side[key]) for key in keys] for side in sizes)
    clusters = pair_clusters(keys).tolist()
    return Contrast(
        name=name,
        effect=log_interval(top, bottom, clusters),
        least=log(SIZE_RATIO),
        unit="ratio",
        images=2 * len(keys),
        sides=sides_of([_file(f) for f in files], (float(np.mean(top)), float(np.mean(bottom)))),
    )


def psnr_contrast(
    far: Mapping[PairKey, float], near: Mapping[PairKey, float], name: str, files: tuple[Any, Any]
) -> Contrast:
    """PSNR of one file minus that of another, each against the PNG of the same image."""
    levels = [{k: _psnr_db(e) for k, e in side.items()} for side in (near, far)]
    effect, means = paired_mean(levels[:1], levels[1:], "PSNR")
    return Contrast(
        name=name,
        effect=effect,
        least=VISIBLE_DB,
        unit="dB",
        images=3 * effect.n,
        sides=sides_of([_file(f) for f in files], means),
    )


def errors_against_png(evidence: Evidence, files: Ladder) -> Callable[[Any], dict[PairKey, float]]:
    """Root mean square error per pair of a file's image against the PNG's, in levels of 255."""
    whole = next(row for (form, _), row in files.items() if form == "png")
    png = {
        pair_key(r.trial): evidence.read_image(str(r.image)).astype(np.float64)
        for r in whole.quality_records()
    }

    def errors(file: Any) -> dict[PairKey, float]:
        found = {}
        for record in files[file].quality_records():
            key = pair_key(record.trial)
            if key in png:
                difference = evidence.read_image(str(record.image)) - png[key]
                found[key] = float(np.sqrt(np.square(difference).mean()))
        if not found:
            raise Unmeasured("the PNGs of the same images were not made")
        return found

    return errors


def _psnr_db(error: float) -> float:
    return 20.0 * log10(255.0 / max(error, _ROUNDING))


# Words -----------------------------------------------------------------------------------------


def sides_of(labels: Sequence[str], means: Sequence[float]) -> tuple[Side, ...]:
    """Labels with their means."""
    return tuple(Side(label, mean) for label, mean in zip(labels, means, strict=True))


def name_settings(rows: Sequence[Row], axis: str) -> str:
    """Name settings by the field in which they differ: ``cfg 7 and 10``."""
    values = [f"{row.setting[axis]:g}" for row in rows]
    return f"{axis} {' and '.join(values)}"


def _file(file: tuple[str, int]) -> str:
    return "png" if file[0] == "png" else f"{file[0]} {file[1]}"
