"""How often a race's answer is right, and what it costs, on surfaces with known truth.

    python -m tests.validity.races [SEEDS]

*Within* is the share of races whose choice is truly within the profile's margin of the best setting
within its limits, *images* their share of the whole grid's, *shown* how many say that the choice is
shown to be as good, and *wrongly* how many of all say so of one that is truly worse by more than
the margin: that is what Holm's correction bounds, at 2.5 %. `Edge` is the worst case for it: every
setting but the best truly lies just beyond the margin, the faster the more tempting.
"""

import argparse
import contextlib
from dataclasses import dataclass

import numpy as np
import optuna

from sd35bench.config import config_dir
from sd35bench.recommend.profiles import Profile, load_profiles
from sd35bench.tune.search import Search
from sd35bench.tune.session import Budget, default_images, tune
from sd35bench.tune.space import Point
from tests.studies.tune_surface import GRID, Surface

__all__ = ["CASES", "Edge", "Measured", "measure"]

CASES = (
    ("balanced", 64, False),
    ("final", 64, False),
    ("final", 256, False),
    ("preview", 64, False),
    ("balanced", 64, True),
    ("balanced", 256, True),
)
"""Profile, prompts, and whether the surface is `Edge`."""
_BEST = 0.8
_BEYOND = 0.001


class Edge(Surface):
    """All settings but the best of a whole grid are worse by the margin and a little more."""

    lost = 0.08 + _BEYOND

    def accuracy(self, point: Point) -> float:
        slowest = max(self.latency_s(GRID.point(i)) for i in range(GRID.size))
        return _BEST if self.latency_s(point) == slowest else _BEST - self.lost


@dataclass(frozen=True, slots=True)
class Measured:
    """Shares of races, and of the whole grid's images; `regret` is the mean, in quality."""

    within: float
    images: float
    shown: float
    wrongly: float
    regret: float


def measure(name: str, prompts: int, edge: bool, seeds: int) -> Measured:
    """Race with so many seeds for a packaged profile."""
    profile = load_profiles(config_dir() / "profile")[name]
    found = np.array([_race(profile, prompts, edge, seed) for seed in range(seeds)])
    return Measured(*found.mean(axis=0).tolist())


def _race(profile: Profile, prompts: int, edge: bool, seed: int) -> tuple[float, ...]:
    lab = (Edge if edge else Surface)(GRID, prompts, seed)
    search = Search(
        GRID,
        optuna.storages.InMemoryStorage(),
        objectives=2,
        identity=lab.identity,
        whole=True,
        seed=seed,
    )
    images = default_images(GRID, prompts, 1, GRID.size)
    budget = Budget(trials=GRID.size, images=images, first=8)
    outcome = tune(lab, search, lambda _: contextlib.nullcontext(True), budget, profile)
    share = lab.images / (GRID.size * prompts)
    if outcome.winner is None or outcome.final is None:
        return 0.0, share, 0.0, 0.0, 1.0
    lost = _lost(lab, outcome.final.chosen, profile)
    within = lost <= lab.margin(profile) + 1e-9
    shown = outcome.shown
    return float(within), share, float(shown), float(shown and not within), lost


def _lost(lab: Surface, chosen: Point, profile: Profile) -> float:
    """True quality lost against the best within the limit; 1 where the choice is over it."""
    points = [GRID.point(i) for i in range(GRID.size)]
    limit = profile.evaluations_limit
    allowed = [p for p in points if limit is None or lab.work(p) <= limit]
    if chosen not in allowed:
        return 1.0
    return max(map(lab.accuracy, allowed)) - lab.accuracy(chosen)


def main(seeds: int) -> None:
    """Print a table of all cases."""
    print(f"| profile | prompts | surface | within | images | shown | wrongly | n = {seeds} |")
    for name, prompts, edge in CASES:
        found = measure(name, prompts, edge, seeds)
        parts = (found.within, found.images, found.shown, found.wrongly)
        shares = " | ".join(f"{100 * part:.1f} %" for part in parts)
        where = "edge" if edge else "demo"
        print(
            f"| {name} | {prompts} | {where} | {shares} | regret {found.regret:.4f} |", flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.validity.races", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("seeds", nargs="?", type=int, default=100)
    main(parser.parse_args().seeds)
