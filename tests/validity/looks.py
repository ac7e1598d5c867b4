"""What looking again costs: errors and power of repeated looks, with and without a planned number.

Settings as in `decisions`: the slowest right in 80 % of images, the others as many less the true
loss. A look is made after every 16 prompts up to 256, and the first definitive answer is taken.
*Once* looks at 256 alone. The confidence sequence is the asymptotic one of Waudby-Smith et al. 2024
(arXiv 2103.06476, theorem 2.8, one-sided), tuned for 128 prompts, for two settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.decision import LEVEL, decide
from sd35bench.stats.looks import level_at
from tests.validity.decisions import draw_settings

STUDIES = 400
EVERY, LAST = 16, 256
RULES = ("once", "again and again at 5 %", "planned looks")
SEQUENCE = "confidence sequence"
_TUNED = 128.0

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Looked:
    """Of the studies: definitive and wrong, definitive at all; the mean prompts until then."""

    wrong: float
    decided: float
    prompts: float


def looked(rule: str, settings: int, margin: float, loss: float, studies: int, seed: int) -> Looked:
    """Look until an answer is definitive; whatever loses more than the margin is a wrong one."""
    rng = np.random.default_rng([seed, settings, round(1000 * margin), round(1000 * loss)])
    wrong = decided = used = 0
    for _ in range(studies):
        quality = draw_settings(rng, settings, loss, LAST)
        chosen, prompts = _first_answer(rule, quality, margin)
        used += prompts
        decided += chosen is not None
        wrong += chosen is not None and chosen != settings - 1 and loss > margin
    return Looked(wrong / studies, decided / studies, used / studies)


def _first_answer(rule: str, quality: Floats, margin: float) -> tuple[int | None, int]:
    """The setting that is named definitively first, and after how many prompts."""
    for prompts in [LAST] if rule == "once" else range(EVERY, LAST + 1, EVERY):
        seen = quality[:, :prompts]
        if rule == SEQUENCE:
            chosen = _by_sequence(seen[0] - seen[-1], margin)
        else:
            level = level_at(prompts, LAST if rule == RULES[2] else None)
            cost = np.arange(len(seen)).astype(np.float64) + 1.0
            found = decide(seen, np.arange(prompts), cost, margin, span=1.0, level=level)
            chosen = found.chosen if found.definitive else None
        if chosen is not None:
            return chosen, prompts
    return None, LAST


def _by_sequence(paired: Floats, margin: float) -> int | None:
    """Two settings: whether the cheap one is shown to be within the margin, or beyond it."""
    n, sd = len(paired), float(paired.std())
    rho2 = (-2.0 * np.log(LEVEL) + np.log(1.0 - 2.0 * np.log(LEVEL))) / _TUNED
    spread = n * rho2 + 1.0
    reach = sd * np.sqrt(2.0 * spread / (n**2 * rho2) * np.log(1.0 + np.sqrt(spread) / (2 * LEVEL)))
    mean = float(paired.mean())
    if sd > 0.0 and mean - reach >= -margin:
        return 0
    return 1 if sd > 0.0 and mean + reach <= -margin else None


def looks_table(seed: int, studies: int = STUDIES) -> Iterator[list[str]]:
    """Rows of the table: each rule's errors at the margin, and its power where all are equal."""
    yield [
        "rule, settings, margin",
        "wrong at the margin, %",
        "decided of equal ones, %",
        "prompts until then",
    ]
    for settings in (2, 4):
        for margin in (0.08, 0.05):
            for rule in (*RULES, SEQUENCE) if settings == 2 else RULES:
                worse = looked(rule, settings, margin, margin + 0.001, studies, seed)
                equal = looked(rule, settings, margin, 0.0, studies, seed)
                yield [
                    f"{rule}, {settings}, {margin:g}",
                    f"{100 * worse.wrong:.1f}",
                    f"{100 * equal.decided:.0f}",
                    f"{equal.prompts:.0f}",
                ]
    yield [f"{studies:,} studies a cell, looked at after every {EVERY} prompts up to {LAST}."]
