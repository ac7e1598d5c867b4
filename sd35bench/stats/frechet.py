"""The Fréchet distance between Gaussians fitted to image features: at n, at infinity, paired.

``d² = |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½``. The last trace is the sum of the
square roots of the eigenvalues of a symmetric matrix, which needs no matrix square root of a
product (SciPy's `sqrtm` of it is slow, can turn complex, and changed its signature in 1.18).

With n images the distance is too large by about a constant / n. Values are the plain statistic,
comparable with other implementations and only between sets of equal n. A bootstrap that refits the
covariance in every resample adds that bias a second time and overstates the spread: measured on
synthetic sets of 512 images from 64 prompts in 64 dimensions, its standard deviation was 2.4 times
the true one, that of the distance's first-order expansion in the images' weights 1.2 times. So the
expansion is what is resampled: no extra bias, one decomposition in all. The interval covers the
distance *at this n*.

`frechet_infinity_interval` extrapolates to infinitely many images. The constant of the bias depends
on the set, so that it can turn a ranking round. Measured at several sizes between half of the
prompts and all of them, the distance is a line in 1 / size, and its value at 0 is the
extrapolation.

Whole prompts are drawn, without replacement and from a fixed seed: seeds of one prompt are not
independent. Where the reference is the prompts' own renders, a prompt's renders are drawn with it:
then both sides have the size's bias, the line takes away both, and what the prompts share cancels.
Any other reference is taken as it is, with its own bias.

Two things are uncertain. The images: prompts are resampled in the distance's first-order expansion.
And the line: `fit_se` is the standard error that the choice of
subsets leaves in the extrapolation. The interval has both. The extrapolation has far more variance
than the distance at n where n is not much more than the dimensions: it is the better of the two for
comparing sets of unlike n, not for ranking sets of the same.

`frechet_difference` says which of two sets is nearer to a reference. Two sides of equal n do not
have the same bias. The delete-one jackknife over prompts takes it out of the difference (Quenouille
1956) and gives its spread (Tukey 1958): each prompt is left out with its images of both sides and,
where the reference is the prompts' own renders, with those, so that what they share cancels. The
value is the difference at infinitely many images, up to terms in 1 / n².

The jackknife's variance counts the second order twice, which near the reference is most of it: the
interval would be a quarter too wide or more. Leaving out two prompts at a time shows the second
order alone (Efron and Stein 1981, section 5): with the change ``Δ = θ - θ(i) - θ(j) +
θ(i, j)`` over as many random pairs as prompts, ``Q = k² mean(Δ²) / 2`` is taken away once, and what
is left is held at Q/2 or more, as in `sd35bench.stats.kernel`. The interval is
Student's t with k - 1 degrees of freedom; docs/validity.md has its coverage.

Cost: means and covariances are downdated, and each of 2k of them needs two decompositions of
[d, d], three with renders: 1 ms a prompt at 48 dimensions, seconds at Inception's 2048.

Sources: Heusel et al. 2017 (arXiv 1706.08500), equation 6; Dowson and Landau 1982; Chong and
Forsyth 2020 (arXiv 1911.07023), section 4: theirs are 15 sizes, one draw each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import student
from sd35bench.stats.intervals import RESAMPLES, Interval, percentile_bounds, resampled_means
from sd35bench.stats.kernel import Sample, Twins

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Gaussian:
    """Mean [d] and covariance [d, d] (with n - 1) of n feature vectors."""

    mean: Matrix
    cov: Matrix
    n: int


def fit(features: NDArray) -> Gaussian:
    """Mean and covariance of features [n, d], in float64."""
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0)
    centred = x - mean
    return Gaussian(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Gaussian, b: Gaussian, root: Matrix | None = None) -> float:
    """Return the squared Fréchet distance between two Gaussians (what FID reports).

    `root` is the square root of `b`'s covariance where it is known: half of the work.
    """
    offset = a.mean - b.mean
    root = matrix_root(b.cov) if root is None else root
    shared = _root_trace(root @ a.cov @ root)
    return float(offset @ offset + np.trace(a.cov) + np.trace(b.cov) - 2.0 * shared)


def frechet_interval(
    features: NDArray, clusters: NDArray, reference: Gaussian, *, resamples: int = RESAMPLES
) -> Interval:
    """Distance of features [n, d] to the reference, with an interval over prompts.

    Prompts are resampled with all their images. The reference is taken as it is.
    """
    x = np.asarray(features, np.float64)
    _, labels = np.unique(clusters, return_inverse=True)
    counts = np.bincount(labels).astype(np.float64)
    k = len(counts)
    value = frechet_distance(fit(x), reference)
    if k < 2:
        return Interval(value, None, None, len(x), k)
    sums = np.bincount(labels, weights=influence(x, reference)).astype(np.float64)
    draws = value + resampled_means(sums[:, None], counts, resamples=resamples)[:, 0]
    low, high = percentile_bounds(draws, k)
    return Interval(value, max(0.0, float(low)), float(high), len(x), k)


def influence(x: Matrix, reference: Gaussian) -> Matrix:
    """First-order effect of each image's weight on the distance: [n], mean about 0.

    With ``M = R Σ R`` and ``R² = Σ_ref``: ``d tr M^½ = ½ tr(M^-½ R dΣ R)``.
    """
    here = fit(x)
    centred = x - here.mean
    root = matrix_root(reference.cov)
    values, vectors = np.linalg.eigh(root @ here.cov @ root)
    kept = values > values[-1] * 1e-10
    turned = (centred @ root @ vectors[:, kept]) / values[kept] ** 0.25
    return (
        2.0 * centred @ (here.mean - reference.mean)
        + np.einsum("nd,nd->n", centred, centred)
        - np.einsum("nd,nd->n", turned, turned)
        - (np.trace(here.cov) - np.sqrt(values[kept]).sum())
    )


def matrix_root(cov: Matrix) -> Matrix:
    """Symmetric square root of a covariance [d, d]."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _root_trace(symmetric: Matrix) -> float:
    values = np.linalg.eigvalsh((symmetric + symmetric.T) / 2.0)
    return float(np.sqrt(np.clip(values, 0.0, None)).sum())


_LEAST_PROMPTS = 16
_SIZES = 5
# An eigenvalue problem of 2048 dimensions takes seconds, one of 48 a millisecond.
_LARGE_DIMENSIONS = 512
_DRAWS, _DRAWS_LARGE = 16, 3
_SEED = 20240917


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """Distance at infinitely many images and at this n, and the line's standard error."""

    value: float
    at_n: float
    fit_se: float


@dataclass(frozen=True, slots=True)
class _Set:
    """Images with their prompts' numbers, and a reference: a Gaussian, and rows with numbers."""

    x: Matrix
    labels: NDArray[np.int64]
    prompts: int
    gaussian: Gaussian
    root: Matrix
    y: Matrix | None = None
    y_labels: NDArray[np.int64] | None = None

    def distance(self, kept: NDArray[np.bool_]) -> float:
        """Distance of the prompts that are kept: [prompts] of bool."""
        images = fit(self.x[kept[self.labels]])
        if self.y is None or self.y_labels is None:
            return frechet_distance(images, self.gaussian, self.root)
        return frechet_distance(images, fit(self.y[kept[self.y_labels]]))


def least_prompts(dimensions: int) -> int:
    """Fewest prompts to extrapolate over: the line is straight only well above the dimensions.

    Measured with 48 dimensions, prompts that differ more than their images do, 64 of them with 6
    images each: the extrapolation was 9 % too high, and 13 % of the intervals missed.
    """
    return max(_LEAST_PROMPTS, 2 * dimensions)


def frechet_infinity_interval(
    images: Sample,
    reference: Gaussian,
    renders: Sample | None = None,
    *,
    resamples: int = RESAMPLES,
) -> tuple[Interval, Extrapolation]:
    """Extrapolate the distance of images (with prompts) from a reference.

    Args:
        images: features [n, d] of at least `least_prompts(d)` prompts.
        reference: what they are held against where no renders of their own prompts are there.
        renders: the reference's own features and prompts; used where these include all of the
            images' prompts.
        resamples: of prompts, for the interval.

    Returns: the extrapolation with its interval over prompts, and the line behind it.
    """
    found = _numbered(images, reference, renders)
    line = _extrapolate(found)
    k = found.prompts
    slopes = _slopes(found)
    draws = line.value + k * resampled_means(slopes[:, None], np.ones(k), resamples=resamples)[:, 0]
    draws += line.fit_se * np.random.default_rng(_SEED).standard_normal(len(draws))
    low, high = percentile_bounds(draws, k)
    return Interval(line.value, float(low), float(high), len(found.x), k), line


def _numbered(images: Sample, reference: Gaussian, renders: Sample | None) -> _Set:
    known, labels = np.unique(np.asarray(images.prompts), return_inverse=True)
    x = np.asarray(images.features, np.float64)
    own = None if renders is None else renders.of_prompts(known)
    if own is None:
        return _Set(x, labels, len(known), reference, matrix_root(reference.cov))
    y, y_labels = own
    theirs = fit(y)
    return _Set(x, labels, len(known), theirs, matrix_root(theirs.cov), y, y_labels)


def _extrapolate(found: _Set) -> Extrapolation:
    """Least squares over sizes evenly spaced in 1 / size, once for each draw of subsets."""
    k = found.prompts
    rng = np.random.default_rng([_SEED, k])
    inverse = np.linspace(2.0 / k, 1.0 / k, _SIZES)
    sizes = np.round(1.0 / inverse).astype(int)
    everything = found.distance(np.ones(k, bool))
    draws = _DRAWS if found.x.shape[1] <= _LARGE_DIMENSIONS else _DRAWS_LARGE
    ends = np.empty(draws)
    for i in range(draws):
        values = [found.distance(_pick(rng, k, size)) for size in sizes[:-1]] + [everything]
        ends[i] = np.polynomial.polynomial.polyfit(1.0 / sizes, values, 1)[0]
    return Extrapolation(float(ends.mean()), everything, float(ends.std(ddof=1) / np.sqrt(draws)))


def _pick(rng: np.random.Generator, k: int, size: int) -> NDArray[np.bool_]:
    kept = np.zeros(k, bool)
    kept[rng.choice(k, size, replace=False)] = True
    return kept


def _slopes(found: _Set) -> Matrix:
    """First-order effect of each prompt's weight on the distance: [prompts], both sides."""
    here = influence(found.x, found.gaussian)
    slopes = np.bincount(found.labels, weights=here, minlength=found.prompts) / len(found.x)
    if found.y is not None and found.y_labels is not None:
        there = influence(found.y, fit(found.x))
        slopes += np.bincount(found.y_labels, weights=there) / len(found.y)
    return slopes - slopes.mean()


LeftOut = Sequence[tuple[int, ...]]
"""Numbers of the prompts that are left out: none, one or two each time."""

_BLOCK_ELEMENTS = 2_000_000


def frechet_difference(
    twins: Twins, reference: Gaussian, renders: Sample | None = None
) -> Interval:
    """Distance of the candidate minus that of the baseline, without the bias of n.

    Args:
        twins: features of both sides, of at least 3 prompts.
        reference: what they are held against where no renders of their own prompts are there.
        renders: the reference's own features and prompts; used where these include all of the
            images' prompts.
    """
    known, labels = np.unique(np.asarray(twins.prompts), return_inverse=True)
    k = len(known)
    left_out = [(), *((i,) for i in range(k)), *_pairs(k)]
    found = _differences(twins, labels, _held_against(reference, renders, known), left_out)
    value = float(k * found[0] - (k - 1) * found[1 : k + 1].mean())
    half = float(student(k - 1) * np.sqrt(_variance(found, left_out, k)))
    return Interval(value, value - half, value + half, len(labels), k)


class _Moments:
    """Sums of features [n, d] by prompt, to leave some out."""

    def __init__(self, x: NDArray, labels: NDArray[np.int64]) -> None:
        rows = np.asarray(x, np.float64)
        # Centred, so that a covariance is no small difference of large squares.
        self._centre = rows.mean(axis=0)
        rows = (rows - self._centre)[np.argsort(labels, kind="stable")]
        self._parts = np.split(rows, np.cumsum(np.bincount(labels))[:-1])
        self._n, self._sum, self._square = len(rows), rows.sum(axis=0), rows.T @ rows

    def without(self, left_out: LeftOut) -> tuple[Matrix, Matrix]:
        """Means [m, d] and covariances [m, d, d] (with n - 1) without these prompts."""
        none = self._parts[0][:0]
        gone = [np.concatenate([none, *(self._parts[i] for i in those)]) for those in left_out]
        n = self._n - np.array([len(rows) for rows in gone], np.float64)
        mean = (self._sum - np.stack([rows.sum(axis=0) for rows in gone])) / n[:, None]
        square = self._square - np.stack([rows.T @ rows for rows in gone])
        cov = square - n[:, None, None] * mean[:, :, None] * mean[:, None, :]
        return self._centre + mean, cov / (n - 1.0)[:, None, None]


class _Fixed:
    """A reference that does not depend on the prompts."""

    def __init__(self, reference: Gaussian) -> None:
        self._mean, self._cov = reference.mean[None], reference.cov[None]

    def without(self, _: LeftOut) -> tuple[Matrix, Matrix]:
        return self._mean, self._cov


def _held_against(reference: Gaussian, renders: Sample | None, known: NDArray) -> _Moments | _Fixed:
    """The renders of these prompts; the reference as it is where one has none."""
    own = None if renders is None else renders.of_prompts(known)
    return _Fixed(reference) if own is None else _Moments(*own)


def _differences(
    twins: Twins, labels: NDArray[np.int64], other: _Moments | _Fixed, left_out: LeftOut
) -> Matrix:
    """Distance of the candidate minus that of the baseline, each time without some prompts: [m]."""
    before, after = (_Moments(x, labels) for x in (twins.baseline, twins.candidate))
    parts = []
    for some in _blocks(left_out, twins.baseline.shape[1]):
        mean, cov = other.without(some)
        root = _roots(cov)
        there, here = (_distances(*side.without(some), mean, root) for side in (after, before))
        parts.append(there - here)
    return np.concatenate(parts)


def _variance(found: Matrix, left_out: LeftOut, k: int) -> float:
    """Of the differences with none, each and pairs of k prompts left out: the jackknife's, once."""
    whole, one, two = found[0], found[1 : k + 1], found[k + 1 :]
    jackknife = (k - 1) / k * float(np.square(one - one.mean()).sum())
    first, second = np.array(left_out[k + 1 :]).T
    twice = whole - one[first] - one[second] + two
    excess = k**2 / 2 * float(np.square(twice).mean())
    return max(jackknife - excess, excess / 2)


def _distances(mean: Matrix, cov: Matrix, other: Matrix, root: Matrix) -> Matrix:
    """Squared Fréchet distances [m] but for the trace of the reference, which both sides share."""
    product = np.swapaxes(root, -1, -2) @ cov @ root
    values = np.linalg.eigvalsh((product + np.swapaxes(product, -1, -2)) / 2.0)
    shared = np.sqrt(np.clip(values, 0.0, None)).sum(axis=-1)
    offset = np.square(mean - other).sum(axis=-1)
    return offset + np.trace(cov, axis1=-2, axis2=-1) - 2.0 * shared


def _roots(cov: Matrix) -> Matrix:
    """Factors R [m, d, d] with R Rᵀ = cov: triangular, or where one is singular, symmetric.

    Eigenvalues of Rᵀ S R do not depend on which, and a triangular one costs an eighth.
    """
    try:
        return np.asarray(np.linalg.cholesky(cov), np.float64)
    except np.linalg.LinAlgError:
        return np.stack([matrix_root(c) for c in cov])


def _pairs(prompts: int) -> list[tuple[int, int]]:
    """As many pairs as prompts, each prompt in two of them."""
    order = np.random.default_rng([_SEED, prompts]).permutation(prompts).tolist()
    return list(zip(order, order[1:] + order[:1], strict=True))


def _blocks(left_out: LeftOut, dimensions: int) -> Iterator[LeftOut]:
    """Pieces whose covariances are of bounded size."""
    step = max(1, _BLOCK_ELEMENTS // dimensions**2)
    for start in range(0, len(left_out), step):
        yield left_out[start : start + step]
