"""Which of two sets is nearer to a reference by the Fréchet distance, paired.

With n images the distance is too large by about a constant / n, and the constant depends on the
set: two sides of equal n do not have the same. The delete-one jackknife over prompts takes that
term out of the difference (Quenouille 1956) and gives its spread (Tukey 1958): each prompt is left
out with its images of both sides and, where the reference is the prompts' own renders, with those,
so that what they share cancels. The value is the difference at infinitely many images, up to terms
in 1 / n².

The jackknife's variance counts the second order twice, which near the reference is most of it: the
interval would be a quarter too wide or more. Leaving out two prompts at a time shows the second
order alone (Efron and Stein 1981, section 5): with the change ``Δ = θ - θ(i) - θ(j) +
θ(i, j)`` over as many random pairs as prompts, ``Q = k² mean(Δ²) / 2`` is taken away once, and what
is left is held at Q/2 or more, as in `sd35bench.stats.kernel_difference`. The interval is
Student's t with k - 1 degrees of freedom; docs/validity.md has its coverage.

Cost: means and covariances are downdated, and each of 2k of them needs two decompositions of
[d, d], three with renders: 1 ms a prompt at 48 dimensions, seconds at Inception's 2048.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import student
from sd35bench.stats.frechet import Gaussian, matrix_root
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel_difference import Twins
from sd35bench.stats.kernel_distance import Sample

__all__ = ["frechet_difference"]

Matrix = NDArray[np.float64]
LeftOut = Sequence[tuple[int, ...]]
"""Numbers of the prompts that are left out: none, one or two each time."""

_BLOCK_ELEMENTS = 2_000_000
_SEED = 20240917


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
    if renders is None or renders.prompts is None or not np.isin(known, renders.prompts).all():
        return _Fixed(reference)
    kept = np.isin(renders.prompts, known)
    labels = np.searchsorted(known, np.asarray(renders.prompts)[kept])
    return _Moments(np.asarray(renders.features)[kept], labels)


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
