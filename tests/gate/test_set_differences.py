"""Paired differences of set metrics: against the distances themselves, truths and mutants."""

from dataclasses import replace

import numpy as np
import pytest

from sd35bench.analysis.reference import Reference
from sd35bench.errors import MetricError
from sd35bench.gate.set_differences import LEAST_PROMPTS, set_difference
from sd35bench.stats import frechet
from sd35bench.stats import kernel as kernels
from sd35bench.stats.clustered import student
from sd35bench.stats.frechet import Gaussian, fit, frechet_difference, frechet_distance
from sd35bench.stats.kernel import (
    Sample,
    Twins,
    gaussian_kernel,
    kernel_difference,
    kernel_distance,
    polynomial_kernel,
)
from tests.validity import set_figures as truth
from tests.validity.set_figures import World, draw


def _uneven(rng: np.random.Generator) -> tuple[Twins, Sample]:
    """Prompts with 1 to 3 seeds, and renders in another order, some of prompts nobody asked for."""
    prompts = np.repeat(np.arange(20), rng.integers(1, 4, 20))
    a, b = rng.normal(size=(2, len(prompts), 5))
    theirs = rng.permutation(np.repeat(np.arange(25), 3))
    return Twins(a, b + 0.3, prompts), Sample(rng.normal(size=(75, 5)) + 0.5, theirs)


@pytest.mark.parametrize("own", [True, False], ids=["own-renders", "other-images"])
@pytest.mark.parametrize("kernel", [polynomial_kernel, gaussian_kernel(3.0)], ids=["kid", "rbf"])
@pytest.mark.parametrize("block", [4_000_000, 40], ids=["one-block", "blocks"])
def test_kernel_difference_is_the_difference_of_the_distances(monkeypatch, own, kernel, block):
    monkeypatch.setattr(kernels, "_BLOCK_ELEMENTS", block)
    twins, reference = _uneven(np.random.default_rng(0))
    if not own:  # where seeds are uneven, a prompt's pairs weigh a little more than its images
        reference = Sample(reference.features)
        twins = Twins(*(x[:20] for x in (twins.baseline, twins.candidate)), np.arange(20) // 2)
    there, here = (
        kernel_distance(Sample(x, twins.prompts), reference, kernel).value
        for x in (twins.candidate, twins.baseline)
    )
    found = kernel_difference(twins, reference, kernel)
    assert found.value == pytest.approx(there - here, rel=1e-9)
    scaled = kernel_difference(twins, reference, kernel, scale=1000.0)
    assert scaled.ci95 == pytest.approx([1000 * end for end in found.ci95 or ()])


def _spread(found) -> float:
    return (found.high - found.low) / 2 / float(student(found.clusters - 1))


def _unpaired(twins: Twins) -> Twins:
    """The mutant: the candidate's images under other prompts' names."""
    return replace(twins, candidate=np.roll(twins.candidate, 7, axis=0))


def test_kernel_difference_has_no_bias_and_the_mutant_with_an_image_s_own_pair_has():
    """Sides of unlike spread: their own pairs are not of one size and do not cancel."""
    rng, d, k = np.random.default_rng(1), 6, 48
    y = rng.normal(size=(64, d))
    points = [Gaussian(row, np.zeros((d, d)), 2) for row in y]
    parts = []
    for spread in (1.4, 0.6):  # candidate, baseline
        side = Gaussian(np.zeros(d), spread**2 * np.eye(d), 2)
        across = np.mean([truth.cubic_mean(side, point) for point in points])
        parts.append(truth.cubic_mean(side, side) - 2 * across)
    found, mutant = [], []
    for _ in range(150):
        noise = rng.normal(size=(k, d))
        twins = Twins(0.6 * noise, 1.4 * noise, np.arange(k))
        found.append(kernel_difference(twins, Sample(y), polynomial_kernel).value)
        there, here = (
            polynomial_kernel(x, x).mean() - 2 * polynomial_kernel(x, y).mean()
            for x in (twins.candidate, twins.baseline)
        )
        mutant.append(there - here)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - (parts[0] - parts[1])) < 3 * error
    assert abs(np.mean(mutant) - (parts[0] - parts[1])) > 6 * error


def test_width_is_the_spread_and_the_mutant_that_does_not_pair_is_wider():
    rng, world = np.random.default_rng(1), World(worse=0.3, alike=0.9)
    found, unpaired = [], []
    for _ in range(80):
        twins, renders = draw(world, rng, 48)
        found.append(kernel_difference(twins, renders, polynomial_kernel))
        unpaired.append(_spread(kernel_difference(_unpaired(twins), renders, polynomial_kernel)))
    spread = np.std([f.value for f in found])
    assert np.mean([_spread(f) for f in found]) == pytest.approx(spread, rel=0.2)
    assert np.mean(unpaired) > 1.5 * spread


def test_second_order_is_counted_once_where_both_sides_are_at_the_truth(monkeypatch):
    rng, world = np.random.default_rng(2), World(off=0.0)
    drawn = [draw(world, rng, 48) for _ in range(120)]

    def measure():
        found = [kernel_difference(*d, polynomial_kernel) for d in drawn]
        return np.std([f.value for f in found]), np.sqrt(np.mean([_spread(f) ** 2 for f in found]))

    spread, width = measure()
    assert width == pytest.approx(spread, rel=0.15)
    plain = kernels._variance

    def jackknife(found, counts, value, total):  # the mutant that takes nothing away
        pairs = np.square(counts).sum() ** 2 - (counts**4).sum()
        rest = found.squares - 2 * value * found.products + value**2 * pairs
        return plain(found, counts, value, total) + 2 * rest / total**2

    monkeypatch.setattr(kernels, "_variance", jackknife)
    assert measure()[1] > 1.25 * spread


def test_identical_sides_differ_by_nothing_for_certain():
    twins, renders = draw(World(), np.random.default_rng(3), 64)
    same = replace(twins, candidate=twins.baseline)
    assert kernel_difference(same, renders, polynomial_kernel).ci95 == [0.0, 0.0]
    assert frechet_difference(same, fit(renders.features), renders).ci95 == [0.0, 0.0]


def _flat(rng: np.random.Generator, k: int) -> tuple[Twins, Gaussian, float]:
    """Sides of unlike spread in 6 dimensions, their reference and the distances' difference."""
    d, spreads = 6, (0.4, 2.0)
    noise = rng.normal(size=(k, d))
    prompts = np.arange(k)
    reference = Gaussian(np.zeros(d), np.eye(d), 10_000)
    a, b = (Gaussian(np.zeros(d), s**2 * np.eye(d), 2) for s in spreads)
    expected = frechet_distance(b, reference) - frechet_distance(a, reference)
    return Twins(spreads[0] * noise, spreads[1] * noise, prompts), reference, expected


def test_frechet_difference_has_no_bias_of_n_and_the_plain_one_has(monkeypatch):
    rng = np.random.default_rng(4)
    found, plain, width = [], [], []
    for _ in range(150):
        twins, reference, expected = _flat(rng, 24)
        interval = frechet_difference(twins, reference)
        found.append(interval.value)
        width.append(_spread(interval))
        there, here = (
            frechet_distance(fit(x), reference) for x in (twins.candidate, twins.baseline)
        )
        plain.append(there - here)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < 3 * error
    assert abs(np.mean(plain) - expected) > 6 * error
    assert np.mean(width) == pytest.approx(np.std(found), rel=0.2)


def test_frechet_difference_counts_the_second_order_once(monkeypatch):
    """Both sides are the reference's own distribution, where there is no other order."""
    rng, k, reference = np.random.default_rng(9), 24, Gaussian(np.zeros(5), np.eye(5), 10_000)
    drawn = [Twins(*rng.normal(size=(2, k, 5)), np.arange(k)) for _ in range(120)]

    def measure():
        found = [frechet_difference(twins, reference) for twins in drawn]
        return np.std([f.value for f in found]), np.sqrt(np.mean([_spread(f) ** 2 for f in found]))

    spread, width = measure()
    assert width == pytest.approx(spread, rel=0.2)

    def jackknife(found, left_out, k):  # the mutant that takes nothing away
        one = found[1 : k + 1]
        return (k - 1) / k * float(np.square(one - one.mean()).sum())

    monkeypatch.setattr(frechet, "_variance", jackknife)
    assert measure()[1] > 1.25 * spread


@pytest.mark.parametrize("block", [2_000_000, 1], ids=["one-block", "blocks"])
def test_frechet_difference_leaves_out_prompts_with_their_renders(monkeypatch, block):
    """Against covariances that are computed anew without each prompt."""
    monkeypatch.setattr(frechet, "_BLOCK_ELEMENTS", block)
    twins, renders = _uneven(np.random.default_rng(5))
    assert renders.prompts is not None
    kept = renders.prompts < 20

    def distance(without: int) -> float:
        mine, theirs = twins.prompts != without, kept & (renders.prompts != without)
        reference = fit(renders.features[theirs])
        there, here = (
            frechet_distance(fit(x[mine]), reference) for x in (twins.candidate, twins.baseline)
        )
        return there - here

    left = np.array([distance(i) for i in range(20)])
    expected = 20 * distance(-1) - 19 * left.mean()
    found = frechet_difference(twins, fit(renders.features), renders)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert (found.n, found.clusters) == (len(twins.prompts), 20)


def test_frechet_difference_of_a_singular_reference_needs_no_other_root():
    rng = np.random.default_rng(6)
    twins, _, _ = _flat(rng, 40)
    flat = Gaussian(np.zeros(6), np.diag([1.0, 1, 1, 1, 1, 0]), 100)
    near = Gaussian(np.zeros(6), np.diag([1.0, 1, 1, 1, 1, 1e-12]), 100)
    found, other = (frechet_difference(twins, reference) for reference in (flat, near))
    assert found.value == pytest.approx(other.value, rel=1e-4)


def _reference(dimensions: int, prompts: int | None = None) -> Reference:
    rows = np.random.default_rng(7).normal(size=(600, dimensions)).astype(np.float32)
    names = None if prompts is None else np.array([str(i % prompts) for i in range(600)])
    return Reference(name="r", gaussian=fit(rows), source="test", features=rows, prompts=names)


def _twins(prompts: int, dimensions: int) -> Twins:
    a, b = np.random.default_rng(8).normal(size=(2, prompts, dimensions))
    return Twins(a, b, np.array([str(i) for i in range(prompts)]))


@pytest.mark.parametrize(
    ("statistic", "prompts", "dimensions", "message"),
    [
        ("kid", LEAST_PROMPTS["kid"] - 1, 4, "needs 128 prompts, there are 127"),
        ("cmmd", LEAST_PROMPTS["cmmd"] - 1, 4, "needs 128 prompts"),
        ("frechet", LEAST_PROMPTS["frechet"] - 1, 4, "needs 256 prompts"),
        ("frechet", 256, 60, "needs 300 prompts at 60 dimensions"),
        ("frechet", 256, 600, "takes too long"),
        ("recall", 256, 4, "no paired interval"),
        ("frechet_infinity", 256, 4, "no paired interval"),
    ],
)
def test_what_has_no_known_interval_is_refused(statistic, prompts, dimensions, message):
    with pytest.raises(MetricError, match=message):
        set_difference(statistic, _twins(prompts, dimensions), _reference(dimensions), {"k": 3})


@pytest.mark.parametrize("statistic", ["kid", "cmmd"])
def test_values_are_those_that_show_has(statistic):
    twins, reference = _twins(128, 8), _reference(8, 128)
    parameters = {"normalise": True}
    found = set_difference(statistic, twins, reference, parameters)
    assert found.candidate - found.baseline == pytest.approx(found.effect.value, rel=1e-9)
    assert found.effect.clusters == 128
