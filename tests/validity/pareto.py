"""How often a probability of being dominated comes true.

    python -m tests.validity.pareto [--seed N] [--repetitions N]

Each repetition is a study: 16 settings of 4 steps x 4 cfgs, whose cost is that of their
evaluations (cfgs above 1 cost the same); images follow their prompt or not, with a chance that
depends on the setting and on how easy the prompt is, which all settings share. Truth is the
expected quality and the true cost; it and `resampled_front` are asked the same question, and
settings are counted by what was said of them.
"""

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sd35bench.recommend.pareto import Front, cost_errors, pareto_front, resampled_front

Floats = NDArray[np.float64]
STEPS, CFGS, SEEDS = (4, 8, 16, 28), (1.0, 2.5, 4.0, 6.0), 2
EASE, NOISE = 1.5, 0.04
"""Spread of the prompts' difficulty in the logit; of an image's latency around its setting's."""
CELLS = ((32, 0.1), (32, 0.4), (128, 0.1), (128, 0.4))
"""Prompts, and how far chance moves each setting's quality in the logit."""
BINS = ((0.0, 0.05), (0.05, 0.25), (0.25, 0.75), (0.75, 0.95), (0.95, 1.0))
RESAMPLES = 1000
Finder = Callable[..., Front]


def _settings(rng: np.random.Generator, spread: float) -> tuple[Floats, Floats]:
    """Logits [S] of a surface that rises with steps and has its best cfg inside, and costs [S]."""
    steps, cfg = (x.ravel() for x in np.meshgrid(STEPS, CFGS, indexing="ij"))
    rise, pace, best, bend = rng.uniform((0, 2, 2, 0), (4, 10, 6, 0.3))
    logit = -0.5 + rise * (1 - np.exp(-steps / pace)) - bend * (cfg - best) ** 2 / 4
    cost = 0.01 * steps * np.where(cfg > 1.0, 2.0, 1.0)
    return logit + spread * rng.standard_normal(len(steps)), cost


def _expected(logit: Floats) -> Floats:
    """True quality [S]: the chance of success, averaged over all prompts."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    return special.expit(logit[:, None] + EASE * nodes) @ (weights / weights.sum())


def study(
    rng: np.random.Generator, prompts: int, spread: float, find: Finder = resampled_front
) -> tuple[Floats, NDArray[np.bool_]]:
    """Draw one study: what was said of each setting [S], and whether it is dominated in truth."""
    logit, cost = _settings(rng, spread)
    truth = ~pareto_front(_expected(logit), cost)
    clusters = np.repeat(np.arange(prompts), SEEDS)
    chance = special.expit(logit[:, None] + EASE * rng.standard_normal(prompts)[clusters])
    quality = (rng.random(chance.shape) < chance).astype(np.float64)
    latency = cost[:, None] * np.exp(NOISE * rng.standard_normal(chance.shape))
    timed = cost_errors([{"one start": row} for row in latency])
    seen = np.median(latency, axis=1)
    found = find(quality, clusters, seen, timed, resamples=RESAMPLES, seed=int(rng.integers(1e9)))
    assert found.dominated is not None
    return found.dominated, truth


def reliability(
    prompts: int, spread: float, repetitions: int, seed: int, find: Finder = resampled_front
) -> list[tuple[int, float, float]]:
    """Per bin: how many settings, the mean that was said of them, and the share that was true."""
    rng = np.random.default_rng([seed, prompts, round(100 * spread)])
    drawn = [study(rng, prompts, spread, find) for _ in range(repetitions)]
    said, true = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    found = []
    for low, high in BINS:
        chosen = (said >= low) & ((said < high) if high < 1.0 else (said <= high))
        some = bool(chosen.any())
        means = (float(x[chosen].mean()) if some else float("nan") for x in (said, true))
        found.append((int(chosen.sum()), *means))
    return found


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--repetitions", type=int, default=500)
    asked = parser.parse_args()
    heads = [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in BINS]
    print(f"| prompts | spread | {' | '.join(heads)} |")
    print(f"|{' --- |' * (len(heads) + 2)}")
    for prompts, spread in CELLS:
        rows = reliability(prompts, spread, asked.repetitions, asked.seed)
        cells = [f"{100 * true:.1f} % (said {100 * said:.1f} %, n={n})" for n, said, true in rows]
        print(f"| {prompts} | {spread} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
