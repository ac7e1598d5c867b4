"""The Fréchet distance between Gaussians fitted to image features, and its interval.

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

Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6; Dowson and Landau 1982.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.intervals import (
    RESAMPLES,
    Interval,
    percentile_bounds,
    resampled_means,
)

__all__ = ["Gaussian", "fit", "frechet_distance", "frechet_interval", "influence", "matrix_root"]

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
    features: NDArray,
    clusters: NDArray,
    reference: Gaussian,
    *,
    resamples: int = RESAMPLES,
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
