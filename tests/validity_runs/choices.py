"""`recommend` against brute-forced truth: how often a small budget chooses well enough.

`recommend` sees random parts of the whole grid, prompts drawn without replacement, and its choices
are held against the truth, and against the prompts that it did not see.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.config import config_dir
from sd35bench.recommend.advice import recommend_document
from sd35bench.recommend.profiles import load_profiles
from sd35bench.types import Task
from tests.validity_runs.grid import open_grid
from tests.validity_runs.truth import held_against, read_truth

__all__ = ["BUDGETS", "REPETITIONS", "measure"]

REPETITIONS = 50
BUDGETS = (24, 48, 96)
"""Prompts that a choice is made on, of all settings."""


def measure(root: Path, seed: int, budget: int, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Hold `repetitions` choices from `budget` prompts against the truth, for each profile.

    Returns: ``{"seed", "budget", "prompts", "settings", "repetitions", "profiles": {name:
    {"margin", "definitive": answers said to be shown, "definitive_beyond": those of them that
    lose more than the margin, "all": held_against(...), "unseen": the same on other prompts}}}``.
    """
    view = open_grid(root, seed)
    truth = read_truth(view)
    profiles = load_profiles(config_dir() / "profile")
    rng = np.random.default_rng([seed, budget])
    drawn = [
        rng.choice(truth.prompts, size=budget, replace=False).tolist() for _ in range(repetitions)
    ]
    documents = [recommend_document(view.narrowed(part), profiles)["profiles"] for part in drawn]
    others = [truth.without(part) for part in drawn]
    held = {}
    for name, profile in profiles.items():
        entries = [document[name][Task.TEXT_TO_IMAGE.value] for document in documents]
        chosen = [_setting(entry) for entry in entries]
        shown = [s for s, entry in zip(chosen, entries, strict=True) if _is_shown(entry)]
        held[name] = {
            "margin": profile.margin(truth.metric),
            "definitive": len(shown),
            "definitive_beyond": len(held_against(profile, truth, shown)["missed"]) if shown else 0,
            "all": held_against(profile, truth, chosen),
            "unseen": held_against(profile, others, chosen),
        }
    return {
        "seed": seed,
        "budget": budget,
        "prompts": len(truth.prompts),
        "settings": len(truth.settings),
        "repetitions": repetitions,
        "profiles": held,
    }


def _is_shown(entry: dict[str, Any]) -> bool:
    """Whether an answer says that it is shown, not provisional."""
    return entry["setting"] is not None and entry["evidence"]["definitive"]


def _setting(entry: dict[str, Any]) -> str | None:
    """The chosen setting's hash; an entry has it with its environment."""
    return None if entry["setting"] is None else entry["setting_id"].partition("@")[0]
