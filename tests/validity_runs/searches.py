"""`tune` against brute-forced truth: ten searches per profile, replayed on the whole grid.

A search draws its prompts in an order of its own and is shown what the grid has for what it asks,
so it decides as it would have if it had made the images, and none is made. Twice: on all prompts,
whose means are the truth, and on a random half of them, held against the other half.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from sd35bench.analysis.grouping import setting_key
from sd35bench.config.tune import Tuning, read_tuning
from sd35bench.errors import ConfigError
from sd35bench.plan import Plan
from sd35bench.tune.search import Search
from sd35bench.tune.session import default_images, tune
from sd35bench.tune.study_adapter import StudyLab
from tests.validity_runs.grid import BACKEND, View, grid_words, open_grid
from tests.validity_runs.truth import Truth, held_against, read_truth

__all__ = ["FIRST", "PROFILES", "SEARCHES", "Searched", "measure", "search"]

SEARCHES = 10
FIRST = 0
PROFILES = ("preview", "balanced", "final")


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What one search came to: the chosen setting's hash, its images, and the whole grid's."""

    setting: str | None
    stopped: str
    images: int
    exhaustive: int
    prompts: list[str]

    @property
    def share(self) -> float:
        """Images used, of the whole grid's on the same prompts."""
        return self.images / self.exhaustive


def measure(
    root: Path,
    seed: int,
    profile: str,
    first: int = FIRST,
    searches: int = SEARCHES,
    backend: str = BACKEND,
) -> dict[str, Any]:
    """Search with seeds `first` and on for one profile; what it chose against the truth.

    Returns: ``{"seed", "first", "searches", "prompts", "settings", "margin", "all":
    held_against(...) and "runs": [{"seed", "chosen", "regret", "within", "slower", "images",
    "share", "stopped"}], "half": the same on halves}``.
    """
    view = open_grid(root, seed)
    truth = read_truth(view)
    tunings = [
        read_tuning(
            [
                *grid_words(root, seed, len(truth.prompts), backend),
                f"profile={profile}",
                f"order_seed={number}",
            ]
        )
        for number in range(first, first + searches)
    ]
    wanted = tunings[0].profile
    halves = [_half(truth.prompts, seed, number) for number in range(first, first + searches)]
    whole = [search(view, tuning) for tuning in tunings]
    parts = [search(view, t, half) for t, half in zip(tunings, halves, strict=True)]
    others = [truth.without(half) for half in halves]
    return {
        "seed": seed,
        "first": first,
        "searches": searches,
        "prompts": len(truth.prompts),
        "settings": len(truth.settings),
        "margin": wanted.margin(truth.metric),
        "all": _told(wanted, [truth] * searches, whole, first),
        "half": _told(wanted, others, parts, first),
    }


def search(view: View, tuning: Tuning, prompts: Sequence[str] | None = None) -> Searched:
    """One search on some of the grid's prompts (default: all).

    Raises: ConfigError where the grid lacks what the search asks for.
    """
    sources = tuning.sources if prompts is None else _narrowed(tuning, prompts)
    done = view.done_keys()

    def look_up(plan: Plan) -> None:
        missing = sum(trial.key not in done for trial in plan.trials)
        if missing:
            raise ConfigError(f"study {view.name!r} lacks {missing} images: run the grid whole")

    lab = StudyLab(view, tuning.space, sources, look_up, lambda: None)  # type: ignore[arg-type]
    budget = tuning.budget
    if prompts is not None:
        images = default_images(tuning.space, lab.prompts, lab.images_per_prompt, budget.trials)
        budget = replace(budget, images=images)
    asked = Search(
        tuning.space,
        optuna.storages.InMemoryStorage(),
        objectives=lab.objectives,
        identity=lab.identity,
        whole=budget.trials >= tuning.space.size,
        seed=tuning.job.sweep.order_seed,
    )
    found = tune(lab, asked, lambda _: contextlib.nullcontext(False), budget, tuning.profile)
    winner = None if found.winner is None else found.found.points[found.winner]
    items = next(iter(sources.values())).sweep.prompts
    return Searched(
        setting=None if winner is None else setting_key(lab.trial(winner)),
        stopped=found.stopped,
        images=found.images,
        exhaustive=tuning.space.size * lab.prompts * lab.images_per_prompt,
        prompts=[item.prompt for item in items],
    )


def _narrowed(tuning: Tuning, prompts: Sequence[str]) -> dict[Any, Any]:
    """The sources with these prompts alone, in the order that the search drew."""
    kept = frozenset(prompts)
    return {
        key: replace(
            source,
            sweep=replace(
                source.sweep, prompts=tuple(i for i in source.sweep.prompts if i.prompt in kept)
            ),
        )
        for key, source in tuning.sources.items()
    }


def _half(prompts: list[str], seed: int, number: int) -> list[str]:
    drawn = np.random.default_rng([seed, number, 2]).permutation(len(prompts))
    return [prompts[i] for i in sorted(drawn[: len(prompts) // 2])]


def _told(
    profile: Any, truths: Sequence[Truth], found: Sequence[Searched], first: int
) -> dict[str, Any]:
    held = held_against(profile, truths, [s.setting for s in found])
    runs = [
        {
            "seed": first + i,
            "images": each.images,
            "share": each.share,
            "stopped": each.stopped,
            **_one(profile, truth, each.setting),
        }
        for i, (truth, each) in enumerate(zip(truths, found, strict=True))
    ]
    return {**held, "runs": runs}


def _one(profile: Any, truth: Truth, setting: str | None) -> dict[str, Any]:
    if setting is None:
        return {"chosen": None, "regret": None, "within": False, "slower": None}
    i = truth.numbers[setting]
    return {
        "chosen": truth.title(i),
        "regret": float(truth.regrets(profile)[i]),
        "within": bool(truth.within(profile)[i] and truth.allowed(profile)[i]),
        "slower": float(truth.slower(profile)[i]),
    }
