"""Values of known truth: drawn so that the images of a prompt share a part of them.

All repetitions of a cell are columns, so that they are one call to the functions of the gate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SEEDS = 4
"""Images per prompt; their values correlate by 1/2 within it."""


@dataclass(frozen=True)
class Drawn:
    """Values [k, images, columns] of known truth, and what they can be at least and at most."""

    values: Floats
    truth: float
    bounds: tuple[float, float] | None = None

    @property
    def counts(self) -> Floats:
        """Images of each prompt [k]."""
        return np.full(len(self.values), float(self.values.shape[1]))


Draw = Callable[[np.random.Generator, int, int], Drawn]
"""Draws k prompts' images, so many columns of them."""


def shared_normal(rng: np.random.Generator, k: int, columns: int) -> Floats:
    """Standard normal values [k, SEEDS, columns]."""
    shared = rng.standard_normal((k, 1, columns))
    return (shared + rng.standard_normal((k, SEEDS, columns))) / np.sqrt(2)


def normal(rng: np.random.Generator, k: int, columns: int) -> Drawn:
    return Drawn(shared_normal(rng, k, columns), 0.0)


def lognormal(sigma: float) -> Draw:
    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        return Drawn(np.exp(sigma * shared_normal(rng, k, columns)), float(np.exp(sigma**2 / 2)))

    return draw


def heavy(rng: np.random.Generator, k: int, columns: int) -> Drawn:
    shared = rng.standard_t(3, (k, 1, columns))
    return Drawn(shared + rng.standard_t(3, (k, SEEDS, columns)), 0.0)


def _chance(rng: np.random.Generator, p: float, k: int, columns: int) -> Floats:
    """Each prompt's own chance: a beta variable, so that its seeds correlate by 1/2."""
    return rng.beta(p, 1 - p, (k, 1, columns)) if p < 1.0 else np.ones((k, 1, columns))


def share(p: float) -> Draw:
    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        hits = rng.random((k, SEEDS, columns)) < _chance(rng, p, k, columns)
        return Drawn(hits.astype(np.float64), p, (0.0, 1.0))

    return draw


def changed(p: float, same: float, loss: float) -> Draw:
    """Paired difference of accuracies: `same` of the images cannot differ, `loss` of hits go."""

    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        shape = (k, SEEDS, columns)
        chance, luck = _chance(rng, p, k, columns), rng.random(shape)
        other = np.where(rng.random(shape) < same, luck, rng.random(shape))
        after = (other < chance) & (rng.random(shape) >= loss)
        return Drawn(after.astype(np.float64) - (luck < chance), -loss * p, (-1.0, 1.0))

    return draw


def failures(before: float, after: float) -> Draw:
    """Paired difference of failures, which strike images at random."""

    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        shape = (k, SEEDS, columns)
        lost = (rng.random(shape) < after).astype(np.float64) - (rng.random(shape) < before)
        return Drawn(lost, after - before, (-1.0, 1.0))

    return draw


def autoregressive(rng: np.random.Generator, n: int, rho: float, columns: int) -> Floats:
    """Standard normal series [columns, n] whose neighbours correlate by `rho`."""
    e = rng.standard_normal((columns, n + 60))
    for t in range(1, n + 60):
        e[:, t] = rho * e[:, t - 1] + np.sqrt(1 - rho**2) * e[:, t]
    return e[:, 60:]


BUSY_SHIFT, BUSY_SHARE, BUSY_STAY = 2.0, 1 / 3, 10
"""A busy machine: so many standard deviations slower, so often, for so many images on average."""


def busy_spells(rng: np.random.Generator, n: int, columns: int) -> Floats:
    """Series [columns, n] of unrelated noise that busy spells move up."""
    busy = np.empty((columns, n), bool)
    busy[:, 0] = rng.random(columns) < BUSY_SHARE
    leave, enter = 1 / BUSY_STAY, BUSY_SHARE / (1 - BUSY_SHARE) / BUSY_STAY
    luck = rng.random((columns, n))
    for t in range(1, n):
        busy[:, t] = np.where(busy[:, t - 1], luck[:, t] >= leave, luck[:, t] < enter)
    return BUSY_SHIFT * busy + rng.standard_normal((columns, n))


MEANS: dict[str, Draw] = {
    "normal": normal,
    "lognormal, sigma 0.3": lognormal(0.3),
    "lognormal, sigma 1": lognormal(1.0),
    "Student's t, 3 degrees": heavy,
    "accuracy 0.9, difference, no loss": changed(0.9, 0.5, 0.0),
    "accuracy 0.9, difference, 5 % lost": changed(0.9, 0.5, 0.05),
    "accuracy 0.99, difference, 5 % lost": changed(0.99, 0.9, 0.05),
    "accuracy 1, difference, 2 % lost": changed(1.0, 0.5, 0.02),
}
SHARES = {f"{p:g}": share(p) for p in (0.5, 0.9, 0.97, 0.99)}
FAILURES = {
    f"{before:g} → {after:g}": failures(before, after)
    for before, after in ((0.0, 0.0), (0.0, 0.02), (0.0, 0.05), (0.05, 0.05), (0.05, 0.1))
}
