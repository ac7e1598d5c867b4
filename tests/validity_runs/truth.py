"""What a whole grid says of every setting, and how a choice is held against it.

*Regret* is the true quality that a choice loses against the best setting within the profile's
limits. *Slower* is its median latency over that of the fastest setting that is truly within the
margin: without it, always taking the best would look like a perfect answer to "the fastest that is
as good".
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.pairs import candidates
from sd35bench.analysis.table import read_table
from sd35bench.config import config_dir
from sd35bench.recommend.profiles import Profile, load_profiles
from sd35bench.stats.clustered import mean_bounds
from sd35bench.types import Task

__all__ = ["STAND_INS", "Truth", "document", "held_against", "read_truth"]

STAND_INS = {"the vendor's 40, 5": (28, 4.0), "diffusers' 28, 7": (28, 7.0)}
"""A named default (steps, cfg) → the setting of the grid that is nearest to it; (28, 7) is it."""
_ROUNDING = 1e-9
"""A mean of n values of 0 or 1 is never a margin's exact neighbour: rounding must not decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Every setting of a grid on the same prompts.

    `quality` is [S, P] by setting and prompt, `p50_s` [S]; `settings` are (steps, cfg), and
    `numbers` finds them by their hash.
    """

    metric: str
    settings: list[tuple[int, float]]
    numbers: dict[str, int]
    prompts: list[str]
    p50_s: NDArray[np.float64]
    quality: NDArray[np.float64]

    def title(self, i: int) -> str:
        """What a person calls setting `i`."""
        steps, cfg = self.settings[i]
        return f"{steps} steps, cfg {cfg:g}"

    def without(self, prompts: Sequence[str]) -> "Truth":
        """The same from the other prompts alone."""
        seen = frozenset(prompts)
        kept = [i for i, prompt in enumerate(self.prompts) if prompt not in seen]
        return Truth(
            metric=self.metric,
            settings=self.settings,
            numbers=self.numbers,
            prompts=[self.prompts[i] for i in kept],
            p50_s=self.p50_s,
            quality=self.quality[:, kept],
        )

    def allowed(self, profile: Profile) -> NDArray[np.bool_]:
        """Which settings [S] keep the profile's limit of evaluations."""
        limit = profile.evaluations_limit
        work = np.array([steps * (2 if cfg > 1 else 1) for steps, cfg in self.settings])
        return work <= (np.inf if limit is None else limit)

    def regrets(self, profile: Profile) -> NDArray[np.float64]:
        """Quality lost by each setting [S] against the best that is allowed; 0 at least."""
        means = self.quality.mean(axis=1)
        return np.maximum(means[self.allowed(profile)].max() - means, 0.0)

    def slower(self, profile: Profile) -> NDArray[np.float64]:
        """Latency of each setting [S] over that of the fastest truly within the margin."""
        good = self.allowed(profile) & self.within(profile)
        return self.p50_s / self.p50_s[good].min()

    def within(self, profile: Profile) -> NDArray[np.bool_]:
        """Which settings [S] lose no more than the profile's margin."""
        return self.regrets(profile) <= profile.margin(self.metric) + _ROUNDING

    def best(self, profile: Profile) -> int:
        """The setting of the highest mean that is allowed."""
        means = self.quality.mean(axis=1)
        return int(np.argmax(np.where(self.allowed(profile), means, -np.inf)))

    def half_width(self, profile: Profile) -> float:
        """Median half width of the 95 % intervals of the allowed settings' regrets."""
        allowed, best = self.allowed(profile), self.best(profile)
        others = [i for i in np.flatnonzero(allowed) if i != best]
        lost = (self.quality[best] - self.quality[others]).T
        found = mean_bounds(lost, np.ones(len(lost)), bounds=(-1.0, 1.0))
        return float(np.median((found.high - found.low) / 2))


def read_truth(study: Any) -> Truth:
    """Read a whole grid, on the prompts that all of its settings have.

    Raises: ConfigError where nothing was scored.
    """
    table = read_table(study)
    metric, found = candidates(table, table.rows, Task.TEXT_TO_IMAGE)
    by_prompt = [{key[0]: value for key, value in c.quality.items()} for c in found]
    common = sorted(set.intersection(*map(set, by_prompt)))
    rows = [c.row.setting for c in found]
    return Truth(
        metric=metric,
        settings=[(row["steps"], float(row["cfg"])) for row in rows],
        numbers={row["setting"]: i for i, row in enumerate(rows)},
        prompts=common,
        p50_s=np.array([np.median(list(c.latency_s.values())) for c in found]),
        quality=np.array([[values[prompt] for prompt in common] for values in by_prompt]),
    )


def held_against(
    profile: Profile, truth: Truth | Sequence[Truth], chosen: Sequence[str | None]
) -> dict[str, Any]:
    """One profile's choices (by setting hash; ``None``: none was made) against the truth.

    Each choice may have a truth of its own. Returns: ``{"within": share of all that lose no more
    than the margin, "missed": regrets of those that lose more, "none", "over": how many are over
    the latency limit, "mean_regret", "slower": median, "chosen": {title: times}}``.
    """
    truths = [truth] * len(chosen) if isinstance(truth, Truth) else truth
    made = [(t, t.numbers[c]) for t, c in zip(truths, chosen, strict=True) if c is not None]
    regrets = [float(t.regrets(profile)[i]) for t, i in made]
    kept = [bool(t.allowed(profile)[i]) for t, i in made]
    good = [bool(t.within(profile)[i]) for t, i in made]
    titles = Counter(t.title(i) for t, i in made)
    slower = [float(t.slower(profile)[i]) for t, i in made]
    return {
        "within": sum(g and k for g, k in zip(good, kept, strict=True)) / len(chosen),
        "missed": sorted(r for r, g in zip(regrets, good, strict=True) if not g),
        "none": len(chosen) - len(made),
        "over": len(made) - sum(kept),
        "mean_regret": float(np.mean(regrets)) if made else None,
        "slower": float(np.median(slower)) if made else None,
        "chosen": dict(titles.most_common()),
    }


def document(view: Any) -> dict[str, Any]:
    """What the page shows of a whole grid, and what each profile's best is.

    Returns: ``{"prompts", "metric", "settings": [{"steps", "cfg", "value", "p50_s"}], "images":
    {the commit and machine that made them}, "profiles": {name: {"margin", "half_width": of a
    regret, "best", "best_value", "fastest": of those within the margin, "blind": _blind(...)}}}``.
    """
    truth = read_truth(view)
    profiles = load_profiles(config_dir() / "profile")
    means = truth.quality.mean(axis=1)
    places = [session.environment for session in view.sessions().values()]
    return {
        "prompts": len(truth.prompts),
        "metric": truth.metric,
        "settings": [
            {"steps": steps, "cfg": cfg, "value": float(mean), "p50_s": float(p50)}
            for (steps, cfg), mean, p50 in zip(truth.settings, means, truth.p50_s, strict=True)
        ],
        "images": {
            name: sorted({str(place.get(name)) for place in places})
            for name in ("commit", "cpu_model", "torch")
        }
        | {"backend": sorted({record.trial.load.backend.name for record in view.records()})},
        "profiles": {
            name: _best(profile, truth)
            for name, profile in profiles.items()
            if truth.allowed(profile).any()
        },
    }


def _best(profile: Profile, truth: Truth) -> dict[str, Any]:
    best = truth.best(profile)
    good = truth.allowed(profile) & truth.within(profile)
    return {
        "margin": profile.margin(truth.metric),
        "half_width": truth.half_width(profile),
        "best": truth.title(best),
        "best_value": float(truth.quality[best].mean()),
        "good": int(good.sum()),
        "fastest": truth.title(int(np.argmin(np.where(good, truth.p50_s, np.inf)))),
        "blind": _blind(profile, truth),
    }


def _blind(profile: Profile, truth: Truth) -> dict[str, dict[str, Any]]:
    """What is lost without looking: by any allowed setting at random, and by named defaults.

    Returns: ``{name: {"setting", "regret", "within": share or 0 and 1, "allowed", "slower"}}``.
    """
    allowed, regrets = truth.allowed(profile), truth.regrets(profile)
    within, slower = truth.within(profile), truth.slower(profile)
    found: dict[str, dict[str, Any]] = {
        "at random": {
            "setting": None,
            "regret": float(regrets[allowed].mean()),
            "within": float(within[allowed].mean()),
            "allowed": True,
            "slower": float(np.median(slower[allowed])),
        }
    }
    for name, setting in STAND_INS.items():
        if setting in truth.settings:
            i = truth.settings.index(setting)
            found[name] = {
                "setting": truth.title(i),
                "regret": float(regrets[i]),
                "within": float(within[i] and allowed[i]),
                "allowed": bool(allowed[i]),
                "slower": float(slower[i]),
            }
    return found
