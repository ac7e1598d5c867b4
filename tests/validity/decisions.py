"""How often `recommend`'s rule names a setting that is truly worse than the margin allows.

Two settings, the slow one right in 80 % of images, the cheap one in as many less the true loss. An
image is right where a Gaussian passes a threshold; those of the two settings correlate by 1/2, as
they share the prompt. *Definitive* answers are said to be shown, *provisional* ones name what looks
better and say so. The rule before this one named the cheap setting wherever the two could not be
told apart: its column counts how often it named it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sd35bench.stats.clustered import mean_bounds
from sd35bench.stats.decision import decide
from sd35bench.stats.samples import prompts_for, read_pilot

STUDIES = 4000
PLANNED_STUDIES = 400
POWER = 0.8
PROMPTS = (8, 16, 32, 64, 128)
MORE_PROMPTS = (64, 128, 192, 256)
ACCURACY = 0.8
WORSE = ((0.02, 0.4), (0.02, 0.2), (0.02, 0.1), (0.08, 0.16), (0.08, 0.1))
"""Margins of the ready profiles, and true losses beyond them."""
LIMITS = {0.02: 0.03, 0.08: 0.06}
"""What the upper end of the share of definitive wrong answers must stay below."""
_COST = np.array([1.0, 7.0])

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the studies: the cheap setting named definitively, or provisionally, or by the old rule.

    `dear` counts definitive answers that name the slow setting.
    """

    definitive: float
    provisional: float
    dear: float
    formerly: float


def draw(loss: float, prompts: int, studies: int, seed: int) -> Floats:
    """Right and wrong images [2, studies, prompts]: the cheap setting's, then the slow one's."""
    rng = np.random.default_rng([seed, round(1000 * loss), prompts])
    shared, cheap, slow = rng.standard_normal((3, studies, prompts))
    limits = special.ndtri([ACCURACY - loss, ACCURACY])
    found = [
        np.sqrt(0.5) * (shared + own) < limit
        for own, limit in zip((cheap, slow), limits, strict=True)
    ]
    return np.array(found, np.float64)


def shares(margin: float, loss: float, prompts: int, studies: int, seed: int) -> Shares:
    """Ask the rule itself for every study."""
    drawn = draw(loss, prompts, studies, seed)
    clusters = np.arange(prompts)
    counts = np.zeros(3)
    for quality in drawn.transpose(1, 0, 2):
        found = decide(quality, clusters, _COST, margin, span=1.0)
        if found.chosen == 0:
            counts[0 if found.definitive else 1] += 1
        elif found.definitive:
            counts[2] += 1
    definitive, provisional, dear = counts / studies
    return Shares(definitive, provisional, dear, _formerly(drawn, margin))


def _formerly(drawn: Floats, margin: float) -> float:
    """The rule of the first round: speed decides wherever the two cannot be told apart."""
    paired = (drawn[0] - drawn[1]).T
    found = mean_bounds(paired, np.ones(len(paired)), bounds=(-1.0, 1.0))
    return float(np.mean((found.high >= 0.0) | (found.low > -margin)))


def upper_end(share: float, studies: int) -> float:
    """Upper end of the exact 95 % interval of a share (Clopper and Pearson 1934)."""
    wrong = round(share * studies)
    return float(special.betaincinv(wrong + 1, studies - wrong, 0.975))


def decision_table(seed: int, studies: int = STUDIES) -> Iterator[list[str]]:
    """Rows of the table: names of the truly worse setting, then of an equally good one."""
    yield ["margin", "true loss", *(f"n={n}" for n in PROMPTS)]
    for margin, loss in WORSE:
        cells = [shares(margin, loss, n, studies, seed) for n in PROMPTS]
        yield [f"{margin:g}", f"{loss:g}", *map(_wrong_text, cells)]
    yield [
        f"Cells: definitively wrong / provisionally / by the rule before, in % of {studies:,}"
        " studies."
    ]


def power_table(seed: int, studies: int = STUDIES) -> Iterator[list[str]]:
    """Rows of the table of equal quality: how often the cheap setting is definitively named."""
    yield ["margin", *(f"n={n}" for n in MORE_PROMPTS)]
    for margin in LIMITS:
        cells = [shares(margin, 0.0, n, studies, seed) for n in MORE_PROMPTS]
        yield [f"{margin:g}", *(f"{100 * c.definitive:.0f}" for c in cells)]


@dataclass(frozen=True, slots=True)
class Planned:
    """Of the studies of a planned size: the median size, and the share that decides.

    `wrong` is the share that definitively names a setting truly worse by more than the margin,
    where all but the best are (the plan still takes them for equal).
    """

    prompts: float
    decides: float
    wrong: float


def planned(margin: float, settings: int, pilot: int, studies: int, seed: int) -> Planned:
    """Plan from a pilot, make the study at that size on top of it, and ask the rule."""
    rng = np.random.default_rng([seed, round(1000 * margin), settings, pilot])
    sizes, decided, wrong = [], 0, 0
    for loss in (0.0, margin + 0.001):
        for _ in range(studies):
            quality = draw_settings(rng, settings, loss, pilot)
            found = read_pilot(quality, np.arange(pilot), 0, 1.0)
            size = None if found is None else prompts_for(found, margin, POWER, 1)
            if size is None:
                continue
            more = draw_settings(rng, settings, loss, max(0, size - pilot))
            quality = np.concatenate([quality, more], axis=1)
            cost = np.arange(settings).astype(np.float64) + 1.0
            named = decide(quality, np.arange(quality.shape[1]), cost, margin, span=1.0)
            if loss == 0.0:
                sizes.append(quality.shape[1])
                decided += named.definitive
            else:
                wrong += named.definitive and named.chosen != settings - 1
    return Planned(float(np.median(sizes)), decided / studies, wrong / studies)


def draw_settings(rng: np.random.Generator, settings: int, loss: float, prompts: int) -> Floats:
    """Right and wrong images [S, prompts]; all but the last setting lose `loss`."""
    limits = np.full(settings, special.ndtri(ACCURACY - loss))
    limits[-1] = special.ndtri(ACCURACY)
    shared, own = rng.standard_normal(prompts), rng.standard_normal((settings, prompts))
    return (np.sqrt(0.5) * (shared + own) < limits[:, None]).astype(np.float64)


def planned_table(seed: int, studies: int = PLANNED_STUDIES) -> Iterator[list[str]]:
    """Rows of the table of planned sizes, all settings truly equal."""
    yield ["margin", "settings", "pilot", "prompts planned", "decides, %", "wrongly, %"]
    for margin in (0.08, 0.05):
        for settings in (2, 4):
            for pilot in (8, 16, 32):
                cell = planned(margin, settings, pilot, studies, seed)
                shares = (f"{100 * x:.1f}" for x in (cell.decides, cell.wrong))
                yield [f"{margin:g}", f"{settings}", f"{pilot}", f"{cell.prompts:.0f}", *shares]
    yield [
        f"{studies:,} studies a cell; the stated power is {100 * POWER:.0f} %. With 4"
        " settings the best-looking of three that lose the margin is tested first, which the rule's"
        " 5 % does not allow for."
    ]


def _wrong_text(cell: Shares) -> str:
    return f"{100 * cell.definitive:.1f} / {100 * cell.provisional:.0f} / {100 * cell.formerly:.0f}"
