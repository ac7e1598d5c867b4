"""`recommend --plan`: before money is spent, how many images would decide, from a study as pilot.

The pilot says how far settings differ between prompts and between seeds, how far latencies scatter
within a start and between starts, and what an image costs. Settings that it already shows to be
worse than the best by more than the margin get no more images. The others, the *contenders*, are
planned for as if they were truly equal (`stats.samples`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from statistics import median
from typing import Any

import numpy as np

from sd35bench.analysis.commands import Elsewhere, results_dir_of
from sd35bench.analysis.hosted_calls import usd_per_image
from sd35bench.analysis.pairs import Comparison, candidates, compare, pick_family
from sd35bench.analysis.speed import seconds_by_start
from sd35bench.analysis.table import Row, Table, read_table
from sd35bench.errors import ConfigError
from sd35bench.recommend.confirm import part_rows
from sd35bench.recommend.entry import setting_of
from sd35bench.recommend.pareto import Speeds, check_limits, speeds
from sd35bench.recommend.profiles import Profile, as_profiles
from sd35bench.recommend.reproduce import run_command
from sd35bench.stats.decision import LEVEL, prompt_sums, shown_beyond
from sd35bench.stats.samples import (
    margin_for,
    prompts_for,
    read_pilot,
    read_timing,
    seeds_for,
    timed_for,
)
from sd35bench.stats.verdicts import POWER
from sd35bench.study.columns import by_session
from sd35bench.types import Record, Session, Task

SPEED_MARGIN = 0.05
"""Difference of two settings' latencies, as a share, that the timed images are to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a plan is to reach: `margin` ``None`` is each profile's own; power from 0.5 to 0.99.

    `keep_seeds`: plan for as many images a prompt as the pilot has.
    """

    margin: float | None = None
    power: float = POWER
    speed_margin: float = SPEED_MARGIN
    keep_seeds: bool = False

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if self.margin is not None and not self.margin > 0.0:
            raise ConfigError(f"margin={self.margin:g}: must be greater than 0")
        if not 0.5 <= self.power <= 0.99:
            raise ConfigError(f"power={self.power:g}: must be from 0.5 to 0.99")


def plan_document(
    study: Any,
    profiles: Mapping[str, Profile | Mapping[str, Any]],
    asked: Asked,
    table: Table | None = None,
) -> dict[str, Any]:
    """Plan how many images decide each profile's choice, from the study's own images.

    Returns: ``{"study", "power", "level", "speed_margin", "profiles": {name: {task: entry or
    None}}}``. An entry has `metric`, `margin`, `pilot`, `contenders` (each with its command),
    `settled` (shown to be beyond the margin), `prompts` and `images_per_prompt` of the whole study,
    pilot included, `more_images`, `set_size`, `smallest_margin` (where the set is too small),
    `decided` (one setting is left),
    `timed` (``{"starts", "images", "one_start"}``), `seconds`, `usd_per_image`, `usd` and `why`,
    which says what could not be planned.

    Raises: ConfigError where neither task has two settings to compare.
    """
    checked = as_profiles(profiles)
    table = read_table(study) if table is None else table
    parted = part_rows(table.rows)
    found: dict[str, dict[str, Any]] = {p.name: {t.value: None for t in Task} for p in checked}
    problems: list[str] = []
    for task in Task:
        rows, _ = pick_family(parted.choice, task)
        if not rows:
            continue
        try:
            metric, each = candidates(table, rows, task)
            comparison = compare(metric, each)
        except ConfigError as exc:
            problems.append(str(exc))
            continue
        speed = speeds(comparison)
        for profile in checked:
            found[profile.name][task.value] = _entry(
                study, table, comparison, speed, profile, asked
            )
    if not any(entry for tasks in found.values() for entry in tasks.values()):
        why = "; ".join(problems) if problems else "it has no usable image with trained weights"
        raise ConfigError(f"no plan from study {study.name!r}: {why}")
    return {
        "study": study.name,
        "power": asked.power,
        "level": LEVEL,
        "speed_margin": asked.speed_margin,
        "profiles": found,
    }


def _entry(
    study: Any, table: Table, comparison: Comparison, speed: Speeds, profile: Profile, asked: Asked
) -> dict[str, Any]:
    margin = profile.margin(comparison.metric) if asked.margin is None else asked.margin
    records = [r for c in comparison.candidates for r in c.row.quality_records()]
    prompt_set = records[0].trial.prompt.set
    entry: dict[str, Any] = {
        "metric": comparison.metric,
        "margin": margin,
        "pilot": {
            "settings": len(comparison.candidates),
            "prompts": int(comparison.clusters.max()) + 1,
            "images_per_prompt": comparison.quality.shape[1] / (comparison.clusters.max() + 1),
            "timed": min(len(c.row.timed) for c in comparison.candidates),
            "starts": min(len({r.session_id for r in c.row.timed}) for c in comparison.candidates),
        },
        **dict.fromkeys(("prompts", "images_per_prompt", "more_images", "smallest_margin")),
        **dict.fromkeys(("timed", "seconds", "usd_per_image", "usd", "why")),
        "decided": False,
        "set_size": set_size(prompt_set),
        "contenders": [],
        "settled": [],
    }
    limits = check_limits(comparison, speed, profile)
    if isinstance(limits, str):
        return {**entry, "why": limits}
    within = [i for i in range(len(speed.values)) if i not in limits.broken]
    left = contenders(comparison, within, margin)
    settled = [i for i in within if i not in left]
    entry["settled"] = [setting_of(comparison.candidates[i].row) for i in settled]
    if len(left) < 2:
        why = "one setting is left: the pilot shows every other one to be beyond the margin"
        return {
            **entry,
            "decided": bool(within),
            "why": why if within else "no setting is within the limits",
        }
    cheapest = min(left, key=lambda i: (speed.values[i], i))
    if profile.objective != "fastest":
        cheapest = max(left, key=lambda i: comparison.quality[i].mean())
    entry |= _prompts(comparison, left, cheapest, entry, asked)
    rows = [comparison.candidates[i].row for i in left]
    entry["timed"] = timed_plan(rows, table.sessions, asked)
    entry["contenders"] = [_contender(study, row, entry) for row in rows]
    return entry | _bill(rows, [speed.values[i] for i in left], speed.basis, entry)


def contenders(comparison: Comparison, within: Sequence[int], margin: float) -> list[int]:
    """Settings that the pilot does not show to be worse than the best by more than the margin."""
    sums, counts = prompt_sums(comparison.quality, comparison.clusters)
    best = max(within, key=lambda i: sums[:, i].sum(), default=0)
    return [
        i
        for i in within
        if i == best or not shown_beyond(sums[:, i] - sums[:, best], counts, margin)
    ]


def _prompts(
    comparison: Comparison, left: Sequence[int], cheapest: int, entry: dict[str, Any], asked: Asked
) -> dict[str, Any]:
    """Prompts and images a prompt; `why` where the pilot cannot tell or the set is too small."""
    margin, most = entry["margin"], entry["set_size"]
    if margin <= 0.0:
        return {"why": "a margin of 0 cannot be shown by any number of images; give --margin"}
    pilot = read_pilot(
        comparison.quality[list(left)],
        comparison.clusters,
        list(left).index(cheapest),
        comparison.largest_loss,
    )
    if pilot is None:
        return {"why": "the pilot has fewer than 4 prompts, or no difference in it to plan from"}
    if asked.keep_seeds:
        images = round(pilot.images)
        prompts = prompts_for(pilot, margin, asked.power, images)
    else:
        prompts, images = seeds_for(pilot, margin, asked.power, most)
    if not prompts:
        return {"why": f"no practicable number of prompts shows a margin of {margin:g}"}
    found: dict[str, Any] = {"prompts": prompts, "images_per_prompt": images}
    if most is not None and prompts > most:
        found["smallest_margin"] = margin_for(pilot, most, asked.power, images)
        found["why"] = (
            f"the set has {most} prompts; with {images} image(s) of each they decide a margin of"
            f" {found['smallest_margin']:g}"
            + ("; a pilot with two seeds would say whether more seeds help" if images == 1 else "")
        )
    return found


def timed_plan(
    rows: Sequence[Row], sessions: Mapping[str, Session], asked: Asked
) -> dict[str, Any] | None:
    """Timed images of each start, and starts, for `speed_margin`; ``None`` where none were timed.

    `one_start`: the pilot has no other start, so that the spread between starts is not in it.
    """
    if not all(row.timed for row in rows):
        return None
    runs = [seconds_by_start(row.timed) for row in rows]
    timing = read_timing([[np.log(x) for x in each] for each in runs])
    if timing is None:
        return None
    if any(row.hosted for row in rows):  # a service is not started: calls are all of one kind
        timing = replace(timing, between_sd=None)
    ids = {i for row in rows for i in by_session(row.timed)}
    loads = [s.load_s + s.warmup_s for i in ids if (s := sessions.get(i)) is not None]
    image_s = median(float(np.median(x)) for each in runs for x in each)
    start_images = median(loads) / image_s if loads else 0.0
    found = timed_for(timing, asked.speed_margin, asked.power, start_images)
    if found is None:
        return {"starts": None, "images": None, "one_start": timing.between_sd is None}
    return {"starts": found[0], "images": found[1], "one_start": timing.between_sd is None}


def set_size(prompt_set: str) -> int | None:
    """How many prompts a set has, where that is known: a file may grow."""
    if prompt_set != "nano":
        return None
    from sd35bench.nano.prompts import MAX_ITEMS

    return MAX_ITEMS


def _contender(study: Any, row: Row, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One setting: how many images it still needs, and the command that makes them."""
    records, prompts = row.quality_records(), entry["prompts"]
    found: dict[str, Any] = {"setting": setting_of(row), "more_images": None, "command": None}
    if prompts is None:
        return found
    images = entry["images_per_prompt"]
    per_seed = _images_per_seed(records)
    seeds = sorted({r.trial.request.seed for r in records})[: ceil(images / per_seed)]
    kept = [r for r in records if r.trial.request.seed in seeds]
    size = entry["set_size"]
    reached = prompts if size is None else min(prompts, size)
    found["more_images"] = max(0, reached * images - len(kept))
    if len(seeds) * per_seed >= images:
        asked = Elsewhere(limit=reached, results_dir=results_dir_of(study.path))
        found["command"] = run_command(kept, study.name, asked)
    return found


def _images_per_seed(records: Sequence[Record]) -> int:
    """Images of one prompt and seed: one, or one for each negative prompt."""
    prompts = {(r.trial.request.prompt, r.trial.request.init_image) for r in records}
    seeds = {r.trial.request.seed for r in records}
    return max(1, round(len(records) / len(prompts) / len(seeds)))


def _bill(
    rows: Sequence[Row], costs: Sequence[float], basis: str, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Images, seconds and dollars that are still to be spent on the contenders."""
    more = [each["more_images"] for each in entry["contenders"]]
    if None in more:
        return {}
    paid = [usd_per_image(row) for row in rows]
    prices = [None if p is None else float(p["value"]) for p in paid]
    known = [p for p in prices if p is not None]
    seconds = None
    if basis == "latency_s":
        seconds = sum(n * s for n, s in zip(more, costs, strict=True))
    usd = None
    if len(known) == len(rows):
        usd = sum(n * p for n, p in zip(more, known, strict=True))
    return {
        "more_images": sum(more),
        "seconds": seconds,
        "usd_per_image": max(known) if known else None,
        "usd": usd,
    }
