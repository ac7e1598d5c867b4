"""Planned numbers decide as often as they promise, held against the very rule that decides."""

import numpy as np
import pytest

from sd35bench.stats.decision import decide
from sd35bench.stats.samples import (
    Pilot,
    Timing,
    margin_for,
    prompts_for,
    read_pilot,
    read_timing,
    seeds_for,
    timed_for,
)
from sd35bench.stats.verdicts import prompts_needed

MARGIN, POWER = 0.1, 0.8


def _pilot(sd: float, prompts: int = 10_000, settings: int = 2) -> Pilot:
    between = np.full((settings - 1, settings - 1), sd**2 / 2)
    np.fill_diagonal(between, sd**2)
    return Pilot(between, None, prompts, 1.0)


def _images(rng: np.random.Generator, settings: int, prompts: int, seeds: int) -> np.ndarray:
    """Right and wrong images [S, prompts * seeds] of equal settings, alike within a prompt."""
    shared = 0.9 * rng.standard_normal((prompts, 1)) + 0.5 * rng.standard_normal((prompts, seeds))
    own = 0.7 * rng.standard_normal((settings, prompts, 1))
    own = own + 0.3 * rng.standard_normal((settings, prompts, seeds))
    return (shared + own < 0.8).reshape(settings, -1).astype(float)


def _decided(settings: int, seeds: int, by_image: bool, studies: int = 120) -> float:
    """Share of studies that decide at the number that a pilot of 24 prompts planned.

    `by_image` is the mutant: a pilot whose images count as so many prompts.
    """
    rng = np.random.default_rng(5)
    decided = 0
    for _ in range(studies):
        first = _images(rng, settings, 24, seeds)
        labels = np.repeat(np.arange(24), seeds)
        pilot = read_pilot(first, np.arange(len(labels)) if by_image else labels, 0, 1.0)
        assert pilot is not None
        found = prompts_for(pilot, MARGIN, POWER, 1 if by_image else seeds)
        assert found is not None
        prompts = max(found // seeds if by_image else found, 24)
        rest = _images(rng, settings, prompts - 24, seeds)
        quality = np.concatenate([first, rest], axis=1)
        cost = np.arange(settings).astype(np.float64) + 1.0
        clusters = np.repeat(np.arange(prompts), seeds)
        decided += decide(quality, clusters, cost, MARGIN, span=1.0).definitive
    return decided / studies


@pytest.mark.parametrize("settings", [2, 4])
def test_planned_number_decides_about_as_often_as_stated(settings):
    assert _decided(settings, 2, by_image=False) > POWER - 0.07  # 3 % is one standard error


def test_mutant_that_counts_images_as_prompts_decides_too_seldom():
    assert _decided(2, 4, by_image=True) < POWER - 0.15


def _planned(pilot: Pilot, margin: float, power: float, images: int) -> int:
    found = prompts_for(pilot, margin, power, images)
    assert found is not None
    return found


def test_one_pair_of_known_spread_is_the_closed_form():
    for sd, margin in ((0.5, 0.08), (0.3, 0.02)):
        planned = _planned(_pilot(sd), margin, 0.8, 1)
        needed = prompts_needed(sd, margin, tail=0.05, power=0.8)
        assert planned == pytest.approx(needed, rel=0.06)


def test_a_small_pilot_more_settings_and_more_power_ask_for_more():
    known = _planned(_pilot(0.5), 0.1, 0.8, 1)
    assert known < _planned(_pilot(0.5, prompts=8), 0.1, 0.8, 1)
    assert known < _planned(_pilot(0.5, settings=6), 0.1, 0.8, 1)
    assert known < _planned(_pilot(0.5), 0.1, 0.9, 1)


def test_a_pilot_without_a_difference_is_no_proof_of_none():
    quality = np.ones((2, 16))
    pilot = read_pilot(quality, np.arange(16), 0, 1.0)
    assert pilot is not None
    assert np.sqrt(pilot.between[0, 0]) == pytest.approx(np.sqrt(1 - 0.5 ** (1 / 16)))
    assert read_pilot(quality, np.arange(16), 0) is None
    assert read_pilot(quality[:, :3], np.arange(3), 0, 1.0) is None


def test_spread_between_prompts_and_seeds_is_told_apart():
    rng = np.random.default_rng(0)
    k, seeds = 400, 4
    prompts = rng.normal(0, 0.3, (k, 1)) + rng.normal(0, 0.4, (k, seeds))
    quality = np.stack([prompts.ravel(), np.zeros(k * seeds)])
    pilot = read_pilot(quality, np.repeat(np.arange(k), seeds), 0)
    assert pilot is not None
    assert pilot.within is not None
    assert np.sqrt(pilot.between[0, 0]) == pytest.approx(0.3, rel=0.1)
    assert np.sqrt(pilot.within[0, 0]) == pytest.approx(0.4, rel=0.1)


def test_more_seeds_only_where_prompts_run_out():
    pilot = Pilot(np.array([[0.01]]), np.array([[0.25]]), 200, 2.0)
    prompts, images = seeds_for(pilot, 0.05, 0.8, None)
    assert images == 1
    assert prompts > 400
    few, more = seeds_for(pilot, 0.05, 0.8, 400)
    assert few <= 400
    assert more == 2
    # One image a prompt: nothing says what a second would tell.
    assert pilot.within is not None
    single = Pilot(pilot.between + pilot.within, None, 200, 1.0)
    assert seeds_for(single, 0.05, 0.8, 400) == (prompts, 1)


def test_smallest_margin_is_what_the_number_decides():
    pilot = _pilot(0.5, prompts=32, settings=3)
    margin = margin_for(pilot, 300, 0.8, 1)
    assert margin is not None
    assert _planned(pilot, margin * 1.01, 0.8, 1) <= 300 < _planned(pilot, margin * 0.97, 0.8, 1)


def test_timing_reads_scatter_likeness_and_starts():
    rng = np.random.default_rng(1)
    runs = [[], []]
    for _ in range(40):
        state = rng.normal(0, 0.05)  # shared by the settings of a start: no ratio sees it
        for setting, each in enumerate(runs):
            each.append(state + setting + rng.normal(0, 0.03) + rng.normal(0, 0.02, 30))
    found = read_timing(runs)
    assert found is not None
    assert found.within_sd == pytest.approx(0.02, rel=0.1)
    assert found.between_sd == pytest.approx(0.03 * np.sqrt(2), rel=0.3)
    assert found.worth > 0.9
    single = read_timing([[r[0]] for r in runs])
    assert single is not None
    assert single.between_sd is None
    assert read_timing([[np.zeros(1)]]) is None


def test_starts_cannot_be_made_up_for_by_images():
    steady = timed_for(Timing(0.02, 0.0, 1.0), 0.05, 0.8, 10.0)
    unlike = timed_for(Timing(0.02, 0.05, 1.0), 0.05, 0.8, 10.0)
    assert steady is not None
    assert unlike is not None
    assert unlike[0] > 2 * steady[0]
    assert timed_for(Timing(0.02, 1.0, 1.0), 0.05, 0.8, 10.0) is None
    alike = timed_for(Timing(0.02, None, 0.2), 0.05, 0.8, 10.0)
    unlike = timed_for(Timing(0.02, None, 1.0), 0.05, 0.8, 10.0)
    assert alike is not None
    assert unlike is not None
    assert alike[1] > 3 * unlike[1]
