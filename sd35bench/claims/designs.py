"""How each claim of the model page is tested: which settings are held against each other, on what.

A design turns evidence into contrasts, or raises `Unmeasured` or `Untestable` with the reason. Its
docstring is the design in words, which the documents show.
"""

from collections.abc import Callable
from itertools import product
from math import log
from urllib.parse import urlsplit

import numpy as np

from sd35bench.analysis.grouping import pair_clusters, pair_key
from sd35bench.analysis.table import Row
from sd35bench.claims.contrasts import Contrast, Side
from sd35bench.claims.effects import (
    COUNTS,
    errors_against_png,
    level_contrast,
    name_settings,
    neighbour_distances,
    psnr_contrast,
    quality_contrast,
    score_contrast,
    seed_against_cfg,
    sides_of,
    singles_contrast,
    size_contrast,
    variety_contrast,
)
from sd35bench.claims.evidence import Evidence, Ladder, Unmeasured, Untestable, ladder, log_interval
from sd35bench.loopback import is_loopback
from sd35bench.nano.captions import Spec
from sd35bench.stats.clustered import mean_t

Design = Callable[[Evidence], list[Contrast]]

SUGGESTED_CFG = (7.0, 10.0)
PREVIEW_STEPS = (20, 30)
FINAL_STEPS = (50, 70)
CREATIVE_STRENGTH = (0.5, 0.7)
EXACT_STRENGTH = (0.8, 1.0)
CLAIMED_LATENCY_S = 8.0
PAGE_STEPS = 40
"""The hosted service's default, which its latency is taken to be about."""

ABOUT_RATIO = 1.5
DETAIL_RATIO = 1.02
STYLE_RATIO = 1.02
DIVERSE_RATIO = 1.1
LOSS_LEVELS = 0.5


# Latency ---------------------------------------------------------------------------------------


def latency(evidence: Evidence) -> list[Contrast]:
    """About 8 s: neither 1.5 times as long nor as short, by calls of 40 steps made alone."""
    rows = [row for row in evidence.text_rows if row.hosted and not _is_here(row)]
    if not rows:
        raise Untestable("the claim is about the hosted service, and these images were made here")
    rows = [row for row in rows if row.setting["steps"] == PAGE_STEPS and row.timed]
    if not rows:
        raise Unmeasured(f"no call of {PAGE_STEPS} steps, the service's default, ran alone")
    row = max(rows, key=lambda r: len(r.timed))
    timed = {pair_key(r.trial): r.timings.latency_s for r in row.timed if r.timings is not None}
    off = [log(s / CLAIMED_LATENCY_S) for s in timed.values()]
    clusters = pair_clusters(timed)
    slow, fast = mean_t(np.negative(off), clusters), mean_t(off, clusters)
    sides = (
        Side(name_settings([row], "steps"), float(np.exp(np.mean(np.log(list(timed.values())))))),
        Side("claimed, s", CLAIMED_LATENCY_S),
    )
    return [
        Contrast(
            name=name,
            effect=effect,
            least=-log(ABOUT_RATIO),
            unit="ratio",
            images=len(timed),
            sides=sides,
        )
        for name, effect in (("not much longer than 8 s", slow), ("not much shorter", fast))
    ]


# cfg -------------------------------------------------------------------------------------------


def cfg_start(evidence: Evidence) -> list[Contrast]:
    """Every cfg in 7 to 10 follows the prompt as well as every other cfg tried, within a margin."""
    inside, outside = _split(_cfgs(evidence), SUGGESTED_CFG, "cfg", "7 to 10")
    return [
        quality_contrast(
            evidence, f"cfg {a:g} as good as {b:g}", "cfg", ([inside[a]], [outside[b]]), -1
        )
        for a, b in product(inside, outside)
    ]


def cfg_follows(evidence: Evidence) -> list[Contrast]:
    """More cfg follows the prompt more closely, up to the suggested range and beyond it."""
    low, middle, high = _ends(_cfgs(evidence))
    return [
        quality_contrast(evidence, f"cfg {b[0]:g} better than {a[0]:g}", "cfg", ([b[1]], [a[1]]), 1)
        for a, b in ((low, middle), (middle, high))
    ]


def cfg_variety(evidence: Evidence) -> list[Contrast]:
    """Less cfg puts a prompt's seeds farther apart (1 - cosine of CLIP features): to 7, and on."""
    low, middle, high = _ends(_cfgs(evidence))
    return [
        variety_contrast(evidence, f"cfg {a[0]:g} more varied than {b[0]:g}", "cfg", [a[1]], [b[1]])
        for a, b in ((low, middle), (middle, high))
    ]


# prompt_strength -------------------------------------------------------------------------------


def strength_follows(evidence: Evidence) -> list[Contrast]:
    """Strengths from 0.8 follow the prompt better than those from 0.5 to 0.7."""
    creative, exact = _strengths(evidence)
    name = "0.8 and more follow the prompt better"
    return [quality_contrast(evidence, name, "prompt_strength", (exact, creative), 1)]


def strength_keeps(evidence: Evidence) -> list[Contrast]:
    """Strengths from 0.8 keep more of the init image than those from 0.5 to 0.7."""
    creative, exact = _strengths(evidence)
    if not evidence.nano:
        raise Untestable("what an edit should keep is known for nano's edit pairs only")
    sides = (exact, creative)
    name = "0.8 and more keep more of the init image"
    return [score_contrast(evidence, "init_kept", name, "prompt_strength", sides, COUNTS["share"])]


def strength_variety(evidence: Evidence) -> list[Contrast]:
    """Strengths from 0.5 to 0.7 put an edit's seeds farther apart than those from 0.8."""
    creative, exact = _strengths(evidence)
    name = "0.5 to 0.7 more varied"
    return [variety_contrast(evidence, name, "prompt_strength", creative, exact)]


# steps -----------------------------------------------------------------------------------------


def steps_preview(evidence: Evidence) -> list[Contrast]:
    """20 to 30 steps follow the prompt as well as 50 to 70, within a margin."""
    previews, finals = _steps(evidence)
    return [
        quality_contrast(
            evidence, f"{a} steps as good as {b}", "steps", ([previews[a]], [finals[b]]), -1
        )
        for a, b in product(previews, finals)
    ]


def steps_quality(evidence: Evidence) -> list[Contrast]:
    """50 to 70 steps follow the prompt better than the most of 20 to 30."""
    previews, finals = _steps(evidence)
    most = max(previews)
    return [
        quality_contrast(
            evidence, f"{b} steps better than {most}", "steps", ([row], [previews[most]]), 1
        )
        for b, row in finals.items()
    ]


def steps_detail(evidence: Evidence) -> list[Contrast]:
    """50 to 70 steps give sharper images than the most of 20 to 30."""
    previews, finals = _steps(evidence)
    most = max(previews)
    below = evidence.values("sharpness", previews[most])
    found = []
    for steps, row in finals.items():
        above = evidence.values("sharpness", row)
        keys = [k for k in above if k in below and min(above[k], below[k]) > 0.0]
        if not keys:
            raise Unmeasured("sharpness was not scored")
        logs = [log(above[k] / below[k]) for k in keys]
        means = (float(np.mean([side[k] for k in keys])) for side in (above, below))
        found.append(
            Contrast(
                name=f"{steps} steps sharper than {most}",
                effect=mean_t(logs, pair_clusters(keys)),
                least=log(DETAIL_RATIO),
                unit="ratio",
                images=2 * len(keys),
                sides=sides_of((f"{steps} steps", f"{most} steps"), tuple(means)),
            )
        )
    return found


# Seeds -----------------------------------------------------------------------------------------


def seed_style(evidence: Evidence) -> list[Contrast]:
    """Two prompts' images are nearer to each other (CLIP features) under one seed than two."""
    same, other = neighbour_distances(evidence)
    effect = log_interval(other, same, range(len(same)))
    means = (float(np.mean(other)), float(np.mean(same)))
    return [
        Contrast(
            name="other seed farther than same seed",
            effect=effect,
            least=log(STYLE_RATIO),
            unit="ratio",
            images=4 * len(same),
            sides=sides_of(("other seed", "same seed"), means),
        )
    ]


def seed_diverse(evidence: Evidence) -> list[Contrast]:
    """Another seed moves an image (its CLIP features) farther than another cfg at the same seed."""
    cfgs = _cfgs(evidence)
    _, middle, _ = _ends(cfgs)
    below = max(cfg for cfg in cfgs if cfg < middle[0])
    seeds, settings = seed_against_cfg(evidence, [cfgs[below], middle[1]])
    means = (float(np.mean(seeds)), float(np.mean(settings)))
    return [
        Contrast(
            name=f"another seed farther than cfg {below:g} to {middle[0]:g}",
            effect=log_interval(seeds, settings, range(len(seeds))),
            least=log(DIVERSE_RATIO),
            unit="ratio",
            images=4 * len(seeds),
            sides=sides_of(("another seed", "another cfg"), means),
        )
    ]


# Prompts ---------------------------------------------------------------------------------------


def prompt_long(evidence: Evidence) -> list[Contrast]:
    """Prompts that list three objects or more fail more often than those of one."""
    return [level_contrast(evidence, "single", "several", "short better than long")]


def scene_crowded(evidence: Evidence) -> list[Contrast]:
    """Several objects in few words ("three red circles") fail more often than one."""
    return [level_contrast(evidence, "single", "count", "one object better than many")]


def scene_overlap(evidence: Evidence) -> list[Contrast]:
    """Two objects of which one hides part of the other fail more often than two side by side."""
    return [level_contrast(evidence, "relation", "overlap", "side by side better than overlapping")]


def prompt_detailed(evidence: Evidence) -> list[Contrast]:
    """What all single-object prompts ask for comes out better where size or place is said too."""

    def says_more(spec: Spec) -> bool:
        return spec.size is not None or spec.place is not None

    return [singles_contrast(evidence, "detailed better than plain", says_more)]


def scene_fine(evidence: Evidence) -> list[Contrast]:
    """What all single-object prompts ask for comes out worse for small objects than for large."""

    def is_large(spec: Spec) -> bool | None:
        return None if spec.size is None else spec.size == "large"

    return [singles_contrast(evidence, "large better than small", is_large)]


# Files -----------------------------------------------------------------------------------------


def output_quality(evidence: Evidence) -> list[Contrast]:
    """More output_quality gives a larger file and an image nearer to the PNG: both, per format."""
    files = _files(evidence)
    png = errors_against_png(evidence, files)
    found = []
    for name in ("jpg", "webp"):
        qualities = sorted(quality for form, quality in files if form == name)
        if len(qualities) < 2:
            raise Unmeasured(f"{name} was not made at two qualities")
        low, high = (name, qualities[0]), (name, qualities[-1])
        label = f"{name} {high[1]} against {low[1]}"
        found.append(size_contrast(files[high], files[low], f"{label}: larger", (high, low)))
        found.append(psnr_contrast(png(low), png(high), f"{label}: nearer to the PNG", (high, low)))
    return found


def output_format(evidence: Evidence) -> list[Contrast]:
    """PNG files are larger than lossy ones at their best quality here, which lose something."""
    files = _files(evidence)
    png = errors_against_png(evidence, files)
    best = [max(f for f in files if f[0] == name) for name in ("jpg", "webp")]
    whole = next(f for f in files if f[0] == "png")
    found = []
    for lossy in best:
        label = f"{lossy[0]} {lossy[1]}"
        found.append(
            size_contrast(files[whole], files[lossy], f"PNG larger than {label}", (whole, lossy))
        )
        errors = png(lossy)
        effect = mean_t(list(errors.values()), pair_clusters(errors))
        found.append(
            Contrast(
                name=f"{label} differs from the PNG",
                effect=effect,
                least=LOSS_LEVELS,
                unit="levels",
                images=2 * len(errors),
            )
        )
    return found


# Which settings --------------------------------------------------------------------------------


def _cfgs(evidence: Evidence) -> Ladder:
    return ladder(evidence.text_rows, "cfg")


def _split(
    steps: Ladder, inside: tuple[float, float], name: str, said: str
) -> tuple[Ladder, Ladder]:
    within = {v: row for v, row in steps.items() if inside[0] <= v <= inside[1]}
    without = {v: row for v, row in steps.items() if v not in within}
    if not within or not without:
        where = "inside" if not within else "outside"
        raise Unmeasured(f"no {name} {where} of {said} was tried with all else the same")
    return within, without


def _ends(cfgs: Ladder) -> tuple[tuple[float, Row], ...]:
    """The lowest cfg, the lowest of the suggested range, the highest of all."""
    inside, _ = _split(cfgs, SUGGESTED_CFG, "cfg", "7 to 10")
    low, middle, high = min(cfgs), min(inside), max(cfgs)
    if not low < middle < high:
        raise Unmeasured("no cfg below 7 and above it was tried with all else the same")
    return tuple((value, cfgs[value]) for value in (low, middle, high))


def _strengths(evidence: Evidence) -> tuple[list[Row], list[Row]]:
    found = ladder(evidence.edit_rows, "prompt_strength")
    groups = [
        [row for v, row in found.items() if low <= v <= high]
        for low, high in (CREATIVE_STRENGTH, EXACT_STRENGTH)
    ]
    if not groups[0] or not groups[1]:
        raise Unmeasured("no prompt_strength from 0.5 to 0.7 and from 0.8 on was tried")
    return groups[0], groups[1]


def _steps(evidence: Evidence) -> tuple[Ladder, Ladder]:
    found = ladder(evidence.text_rows, "steps")
    previews, finals = (
        {v: row for v, row in found.items() if low <= v <= high}
        for low, high in (PREVIEW_STEPS, FINAL_STEPS)
    )
    if not previews or not finals:
        raise Unmeasured("no steps from 20 to 30 and from 50 to 70 were tried, all else the same")
    return previews, finals


def _files(evidence: Evidence) -> Ladder:
    files = ladder(evidence.text_rows, "output_format", "output_quality")
    if not {"png", "jpg", "webp"} <= {form for form, _ in files}:
        raise Unmeasured("png, jpg and webp files of the same images were not made")
    return files


def _is_here(row: Row) -> bool:
    """Whether the "service" is this machine's own."""
    return is_loopback(f"{urlsplit(str(row.setting['backend_options']['base_url'])).hostname}")
