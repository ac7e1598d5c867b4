"""Precision and recall by nearest neighbours: by hand, naively, and how well intervals hold."""

import numpy as np
import pytest

from sd35bench.stats.neighbours import covered, precision_interval, recall_interval


def _naive(points: np.ndarray, manifold: np.ndarray, k: int) -> list[bool]:
    """Kynkäänniemi et al. 2019, equation 1, word for word."""
    inside = []
    for point in points:
        hit = False
        for i, centre in enumerate(manifold):
            others = np.delete(manifold, i, axis=0)
            radius = sorted(np.linalg.norm(others - centre, axis=1))[k - 1]
            hit = hit or bool(np.linalg.norm(point - centre) <= radius)
        inside.append(hit)
    return inside


@pytest.mark.parametrize("k", [1, 3])
def test_covered_is_the_papers_definition(k):
    rng = np.random.default_rng(0)
    points, manifold = rng.normal(0.8, 1.2, size=(50, 3)), rng.normal(size=(40, 3))
    found = covered(points, manifold, k)
    assert found.tolist() == _naive(points, manifold, k)
    assert 0 < found.mean() < 1


def test_radius_mutant_that_counts_the_point_itself_is_caught():
    rng = np.random.default_rng(1)
    points, manifold = rng.normal(0.8, 1.2, size=(50, 3)), rng.normal(size=(40, 3))
    assert covered(points, manifold, 2).tolist() != _naive(points, manifold, 3)


def test_a_set_against_itself_has_all_of_both():
    x = np.random.default_rng(2).normal(size=(64, 4))
    for interval in (precision_interval(x, np.arange(64), x), recall_interval(x, np.arange(64), x)):
        assert interval.value == 1.0
        assert interval.low < 1.0 == interval.high


def test_one_mode_is_precise_and_forgets_and_noise_is_neither():
    rng = np.random.default_rng(3)
    modes = np.array([[0.0, 0.0], [20.0, 0.0]])
    y = (modes[:, None] + rng.normal(size=(2, 100, 2))).reshape(-1, 2)
    one = rng.normal(size=(200, 2))
    labels = np.arange(200)
    assert precision_interval(one, labels, y).value > 0.9
    assert recall_interval(one, labels, y).value == pytest.approx(0.5, abs=0.05)
    noise = rng.normal(size=(200, 2)) * 500
    assert precision_interval(noise, labels, y).value < 0.1


def test_reference_is_cut_to_as_many_rows_as_there_are_images():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(64, 3)), rng.normal(size=(5000, 3))
    few = precision_interval(x, np.arange(64), y).value
    assert few < covered(x, y, 3).mean()  # a denser manifold has smaller balls but fewer gaps
    assert precision_interval(x, np.arange(64), y) == precision_interval(x, np.arange(64), y)


def test_recall_mutant_that_resamples_with_replacement_shrinks_the_balls():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(128, 4)), rng.normal(size=(128, 4))
    found = recall_interval(x, np.arange(128), y)
    drawn = [covered(y, x[rng.integers(128, size=128)], 3).mean() for _ in range(100)]
    assert np.mean(drawn) < found.low < found.value < found.high


def test_recall_of_few_images_or_one_prompt_has_no_interval():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    assert recall_interval(x, np.zeros(40), y).ci95 is None
    assert recall_interval(x[:12], np.arange(12), y).ci95 is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "seeds"), [(64, 1), (64, 4), (128, 1)], ids=["64", "64x4", "128"]
)
def test_intervals_cover_the_expected_value_at_this_n(prompts, seeds):
    rng = np.random.default_rng(7)
    y = 1.2 * rng.normal(size=(prompts * seeds, 8))
    labels = np.repeat(np.arange(prompts), seeds)
    found = {precision_interval: [], recall_interval: []}
    for _ in range(400):
        base = rng.normal(size=(prompts, 1, 8))
        x = (0.85 * (base + 0.6 * rng.normal(size=(prompts, seeds, 8))) + 0.3).reshape(-1, 8)
        found[precision_interval].append(precision_interval(x, labels, y))
        found[recall_interval].append(recall_interval(x, labels, y, halves=200))
    for each in found.values():
        expected = np.mean([f.value for f in each])
        assert np.mean([f.low <= expected <= f.high for f in each]) >= 0.89
