"""Recommendations against brute-forced truth: how often a small budget chooses well enough.

The whole grid is run once; its means over all prompts are the truth. Then `recommend` sees small
random parts of it, prompts drawn without replacement, and its choices are held against the truth.
Speed is counted in evaluations, so that the answer does not depend on the machine.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.analysis.pairs import candidates
from sd35bench.analysis.profiles import Profile, load_profiles
from sd35bench.analysis.recommend import recommend_document
from sd35bench.analysis.table import read_table
from sd35bench.config import config_dir
from sd35bench.store import Score, Study
from sd35bench.types import Record, Task
from tests.validity_runs.sides import command

__all__ = ["GRID", "Part", "held_against", "measure", "run_grid"]

GRID = ("steps=4,8,16,28", "cfg=1,2,4,7")
PROMPTS = 96
SMALL = 24
REPETITIONS = 50


class Part:
    """A study as `recommend` sees it, with only some of its prompts."""

    def __init__(
        self, study: Study, records: list[Record], scores: list[Score], prompts: Iterable[str]
    ) -> None:
        kept = frozenset(prompts)
        self._study = study
        self._records = [r for r in records if r.trial.request.prompt in kept]
        keys = {r.trial.key for r in self._records}
        self._scores = [s for s in scores if s.key in keys]

    def records(self) -> list[Record]:
        return self._records

    def scores(self) -> list[Score]:
        return self._scores

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def run_grid(root: Path, seed: int, prompts: int, backend: str = "eager") -> Study:
    """Run and score the exhaustive grid once, one seed a prompt."""
    study = f"{seed}-grid"
    words = [*GRID, f"seed={seed + 1}", f"prompts.limit={prompts}", f"prompts.seed={seed}"]
    words += ["model=nano", f"backend={backend}", "threads=1", "batch_size=16", "timed_limit=0"]
    command("run", "-m", *words, f"study={study}", f"results_dir={root}")
    command("score", study, "--results-dir", str(root))
    return Study.open(root, study)


def measure(
    root: Path, seed: int, prompts: int = PROMPTS, small: int = SMALL, backend: str = "eager"
) -> dict[str, Any]:
    """Hold `REPETITIONS` choices from `small` prompts against the truth, for each profile.

    Returns: ``{"seed", "prompts", "small", "repetitions", "settings", "profiles": {name: {"margin",
    "best", "best_value", "within": share of choices within the margin, "missed": regrets of the
    others, "mean_regret", "chosen": {title: times}, "none": times without a choice}}}``.
    """
    study = run_grid(root, seed, prompts, backend)
    profiles = load_profiles(config_dir() / "profile")
    records, scores = study.records(), list(study.scores())
    known = sorted({r.trial.request.prompt for r in records})
    rng = np.random.default_rng([seed, 1])
    drawn = [rng.choice(known, size=small, replace=False) for _ in range(REPETITIONS)]
    parts = [Part(study, records, scores, part) for part in drawn]
    documents = [recommend_document(part, profiles)["profiles"] for part in parts]
    truth = _truth(study)
    return {
        "seed": seed,
        "prompts": len(known),
        "small": small,
        "repetitions": REPETITIONS,
        "settings": len(truth),
        "profiles": {
            name: held_against(
                profile, truth, [d[name][Task.TEXT_TO_IMAGE.value] for d in documents]
            )
            for name, profile in profiles.items()
        },
    }


def _truth(study: Study) -> dict[str, tuple[str, float, float, str]]:
    """Setting hash → title, mean quality over all prompts, evaluations, metric."""
    table = read_table(study)
    metric, found = candidates(table, table.rows, Task.TEXT_TO_IMAGE)
    truth = {}
    for candidate in found:
        setting = candidate.row.setting
        title = f"{setting['steps']} steps, cfg {setting['cfg']:g}"
        mean = float(np.mean(list(candidate.quality.values())))
        truth[setting["setting"]] = title, mean, candidate.work, metric
    return truth


def held_against(
    profile: Profile,
    truth: dict[str, tuple[str, float, float, str]],
    entries: list[dict[str, Any]],
) -> dict[str, Any]:
    """One profile's choices against the best that its limits allow."""
    slowest = max(work for _, _, work, _ in truth.values())
    share = profile.latency_limit_frac
    limit = np.inf if share is None else share * slowest
    allowed = {k: v for k, v in truth.items() if v[2] <= limit}
    best = max(allowed.values(), key=lambda v: v[1])
    margin = profile.margin(best[3])
    chosen: dict[str, int] = defaultdict(int)
    regrets = []
    for entry in entries:
        if entry["setting"] is None:
            continue
        title, mean, _, _ = truth[entry["setting_id"].partition("@")[0]]
        chosen[title] += 1
        regrets.append(best[1] - mean)
    # A mean of n values of 0 or 1 is never a margin's exact neighbour: rounding must not decide.
    missed = [r for r in regrets if r > margin + 1e-9]
    return {
        "margin": margin,
        "best": best[0],
        "best_value": best[1],
        "within": (len(regrets) - len(missed)) / len(entries),
        "missed": sorted(missed),
        "mean_regret": float(np.mean(regrets)) if regrets else None,
        "chosen": dict(sorted(chosen.items(), key=lambda item: -item[1])),
        "none": len(entries) - len(regrets),
    }
