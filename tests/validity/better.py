"""How often a choice is called better than a default that is truly as good.

    python -m tests.validity.better [--seed N] [--studies N]

Each study has 15 settings of one true quality, the four named defaults among them, and 3 bad ones.
The choice is made as `recommend` makes it for `final`. *On its own prompts* counts the studies
in which the choice's 95 % interval lies above 0 there, against the vendor's default and against any
of those that are equal: what was once called better. *Said* counts those that are called better
now: on held-out prompts, as many as are planned, corrected for the number of claims. *Found* is the
same where one setting truly is better, by 0.1.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.grouping import PairKey, pair_key, setting_fields
from sd35bench.analysis.pairs import Candidate, Comparison
from sd35bench.analysis.table import Row, Table
from sd35bench.recommend.choice import Choice, choose
from sd35bench.recommend.confirm import HeldOut
from sd35bench.recommend.entry import Entry
from sd35bench.recommend.pareto import Front, speeds
from sd35bench.recommend.profiles import Profile
from sd35bench.stats.verdicts import holm
from sd35bench.types import Record, SkipLayerGuidance, Task
from tests.studies.memory import record

BETTER = "better"
STUDIES, PROMPTS = 300, 64
QUALITY, EASE = 0.8, 0.15
"""True quality of the equal settings, and how far a prompt's own may be from it."""
EQUAL, BAD = 11, 3
"""Settings that nobody ships: as good as the defaults, and worse by a half."""
METRIC = "prompt_accuracy"
PROFILE = Profile(name="final", margins={METRIC: 0.02})
_SLG = SkipLayerGuidance(layers=(2,), scale=2.5, start=0.01, stop=0.2)
_DEFAULTS = (
    {"steps": 40, "cfg": 5.0},
    {"steps": 28, "cfg": 7.0},
    {"steps": 50, "cfg": 5.0, "sampler": "dpmpp_2m"},
    {"steps": 50, "cfg": 4.0, "sampler": "dpmpp_2m", "skip_layer_guidance": _SLG},
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of studies: above the vendor's and above any equal default on the choice's own
    prompts, said to be better than the vendor's, and than any."""

    own_vendor: float
    own_any: float
    said_vendor: float
    said_any: float


def _records() -> list[Record]:
    """One per setting: the defaults, those as good, the bad ones."""
    others = [{"steps": 6 + 2 * i, "cfg": 3.0} for i in range(EQUAL + BAD)]
    return [record(0, **fields) for fields in (*_DEFAULTS, *others)]


def _keys(first: int) -> list[PairKey]:
    return [pair_key(record(first + p).trial) for p in range(PROMPTS)]


class _Studies:
    """Draws studies; `lead` is by how much the first setting that nobody ships is better."""

    def __init__(self, seed: int, lead: float) -> None:
        self.rng = np.random.default_rng([seed, round(1000 * lead)])
        self.rows = [Row(setting_fields(r), "e" * 64, [r], [], [r]) for r in _records()]
        self.keys = _keys(0)
        true = np.full(len(self.rows), QUALITY)
        true[-BAD:] /= 2
        true[: len(_DEFAULTS)] -= lead
        if lead:
            true[len(_DEFAULTS) + 1 : -BAD] -= lead
        self.true = true

    def quality(self, prompts: int) -> NDArray[np.float64]:
        """Images that follow their prompt or not: [settings, prompts]."""
        ease = self.rng.uniform(-EASE, EASE, prompts)
        chance = self.true[:, None] + ease
        return (self.rng.random(chance.shape) < chance).astype(np.float64)

    def candidates(self, prompts: int, first: int) -> list[Candidate]:
        keys = [pair_key(record(first + p).trial) for p in range(prompts)] if first else self.keys
        drawn = self.quality(prompts)
        return [
            Candidate(row, dict(zip(keys, map(float, values), strict=True)), {}, steps)
            for row, values in zip(self.rows, drawn, strict=True)
            for steps in [float(row.setting["steps"])]
        ]

    def entry(self) -> Entry:
        """One study's choice, with the planned number of held-out prompts run."""
        found = self.candidates(PROMPTS, 0)
        quality = np.array([list(c.quality.values()) for c in found])
        compared = Comparison(METRIC, found, quality, self.keys, np.arange(PROMPTS), [])
        speed = speeds(compared)
        choice = choose(compared, speed, PROFILE)
        assert isinstance(choice, Choice)
        entry = Entry(
            study=SimpleNamespace(name="s", path=Path("results/s")),
            table=Table([], {}, {}, []),
            comparison=compared,
            speed=speed,
            front=Front(np.zeros(len(found), np.bool_), None),
            held_out=HeldOut(METRIC, {}, {}),
            profile=PROFILE,
            choice=choice,
        )
        held = {c.row.setting["setting"]: [c] for c in self.candidates(entry.wanted, 1000)}
        return replace(entry, held_out=HeldOut(METRIC, held, dict.fromkeys(held, entry.wanted)))


def rates(lead: float, studies: int, seed: int) -> Rates:
    """Draw studies and count."""
    drawn = _Studies(seed, lead)
    counts = np.zeros((studies, 4))
    for i in range(studies):
        entry = drawn.entry()
        own = entry.comparison.differences(entry.choice.chosen)[: len(_DEFAULTS)]
        above = [d.low is not None and d.low > 0.0 for d in own]
        claims = entry.claims(Task.TEXT_TO_IMAGE)
        p_holm = dict(zip(claims, holm(list(claims.values())), strict=True))
        found = entry.named_defaults(Task.TEXT_TO_IMAGE, p_holm)
        said = [d["verdict"] == BETTER for d in found]
        counts[i] = above[0], any(above), said[0], any(said)
    return Rates(*map(float, counts.mean(axis=0)))


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--studies", type=int, default=STUDIES)
    asked = parser.parse_args()
    heads = ("truly", "own prompts: vendor", "any", "said: vendor", "any")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for lead in (0.0, 0.1):
        r = rates(lead, asked.studies, asked.seed)
        shares = (r.own_vendor, r.own_any, r.said_vendor, r.said_any)
        cells = [f"better by {lead:g}" if lead else "equal", *(f"{100 * s:.1f} %" for s in shares)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
