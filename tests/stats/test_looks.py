"""Looks that are planned hold together; looks that are not do not."""

import numpy as np
import pytest
from scipy import special

from sd35bench.stats.decision import LEVEL
from sd35bench.stats.looks import level_at

LAST, EVERY = 256, 16


def _errors(planned: int | None, studies: int = 20_000) -> float:
    """How often a true loss of the margin is called less at any look, by the test statistic."""
    rng = np.random.default_rng(3)
    steps = rng.standard_normal((studies, LAST // EVERY)).cumsum(axis=1)
    looks = np.arange(1, LAST // EVERY + 1)
    levels = np.array([level_at(int(n * EVERY), planned) for n in looks])
    return float(np.mean((steps / np.sqrt(looks) >= -special.ndtri(levels)).any(axis=1)))


def test_planned_looks_keep_the_level():
    assert 0.6 * LEVEL < _errors(LAST) <= 1.05 * LEVEL


def test_mutant_that_looks_at_the_whole_level_each_time_does_not():
    assert _errors(None) > 3 * LEVEL


@pytest.mark.parametrize(
    ("prompts", "planned", "level"),
    [(8, None, 0.05), (256, 256, 0.025), (128, 256, 0.00279), (257, 256, 0.0), (0, 256, 0.0)],
)
def test_level_of_a_look(prompts, planned, level):
    assert level_at(prompts, planned) == pytest.approx(level, rel=0.01)
