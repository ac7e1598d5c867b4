"""Kinds of intervals: the gate's own, and those that it was chosen against."""

from collections.abc import Callable

import numpy as np
from scipy import special

from sd35bench.stats import clustered
from sd35bench.stats.clustered import Bounds, student
from sd35bench.stats.intervals import expanded_tail, weight_chunks
from tests.validity.drawn import Drawn, Floats

Kind = Callable[[Drawn], Bounds]


def chosen(drawn: Drawn) -> Bounds:
    """What verdicts rest on."""
    return clustered.mean_bounds(drawn.values.sum(axis=1), drawn.counts, bounds=drawn.bounds)


def plain_t(drawn: Drawn) -> Bounds:
    y, k = drawn.values.mean(axis=1), len(drawn.values)
    value, half = y.mean(axis=0), student(k - 1) * y.std(axis=0, ddof=1) / np.sqrt(k)
    return Bounds(value, value - half, value + half)


def by_image(drawn: Drawn) -> Bounds:
    """The mutant: images taken for independent."""
    return plain_t(Drawn(drawn.values.reshape(-1, 1, drawn.values.shape[-1]), drawn.truth))


def inward(drawn: Drawn) -> Bounds:
    """The mutant: both ends follow the sample's skewness, whatever it is worth."""
    y, value, k = drawn.values.mean(axis=1), drawn.values.mean(axis=(0, 1)), len(drawn.values)
    spread = np.maximum(y.std(axis=0), 1e-9)
    t = student(k - 1)
    pull = t * t * ((y - value) ** 3).mean(axis=0) / spread**3 / (2 * np.sqrt(k))
    error, reach = y.std(axis=0, ddof=1) / np.sqrt(k), np.hypot(t, pull)
    return Bounds(value, value + error * (pull - reach), value + error * (pull + reach))


def wilson(drawn: Drawn) -> Bounds:
    """Wilson 1927, with the number of images that the prompts are worth (Kish 1965)."""
    y, k, n = drawn.values.mean(axis=1), len(drawn.values), drawn.values[..., 0].size
    p = y.mean(axis=0)
    variance, error = p * (1 - p), y.var(axis=0, ddof=1) / k
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.clip(np.where(error > 0, variance / error, k), 1e-9, n)
    t = student(k - 1)
    centre = (p + t * t / (2 * worth)) / (1 + t * t / worth)
    half = t * np.sqrt(variance / worth + t * t / (4 * worth**2)) / (1 + t * t / worth)
    return Bounds(p, np.minimum(centre - half, p).clip(0), np.maximum(centre + half, p).clip(0, 1))


def _draws(drawn: Drawn) -> tuple[Floats, Floats, Floats, Floats]:
    """Prompts' means, their mean, and resampled centred means and squares [B, columns]."""
    y = drawn.values.mean(axis=1)
    value, k = y.mean(axis=0), len(y)
    centred = (y - value).astype(np.float32)
    parts = [(w @ centred, w @ centred**2) for w in weight_chunks(k, 2000, 20240917)]
    first, second = (np.concatenate(p).astype(np.float64) / k for p in zip(*parts, strict=True))
    return y, value, first, second


def percentile(drawn: Drawn) -> Bounds:
    y, value, first, _ = _draws(drawn)
    tail = expanded_tail(len(y))
    low, high = np.quantile(first, [tail, 1 - tail], axis=0)
    return Bounds(value, value + low, value + high)


def bca(drawn: Drawn) -> Bounds:
    """Bias-corrected and accelerated (Efron 1987), the acceleration from the prompts' skewness."""
    y, value, first, _ = _draws(drawn)
    resamples, k = first.shape[0], len(y)
    below = (first < 0).mean(axis=0) + 0.5 * (first == 0).mean(axis=0)
    z0 = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    spread = np.maximum(y.std(axis=0), 1e-9)
    pull = ((y - value) ** 3).mean(axis=0) / spread**3 / 6 / np.sqrt(k)
    ordered = np.sort(first, axis=0)

    def end(z: float) -> Floats:
        level = special.ndtr(z0 + (z0 + z) / (1 - pull * (z0 + z)))
        rank = np.clip(level * (resamples - 1), 0, resamples - 1).astype(int)
        return value + ordered[rank, np.arange(len(value))]

    z = float(special.ndtri(1 - expanded_tail(k)))
    return Bounds(value, end(-z), end(z))


def studentised(drawn: Drawn) -> Bounds:
    y, value, first, second = _draws(drawn)
    k = len(y)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = first / np.sqrt(np.maximum(second - first**2, 0.0) / (k - 1))
    t = np.nan_to_num(t, nan=0.0, posinf=1e9, neginf=-1e9)
    low, high = np.quantile(t, [0.025, 0.975], axis=0)
    error = y.std(axis=0, ddof=1) / np.sqrt(k)
    return Bounds(value, value - high * error, value - low * error)


RESAMPLED = ("percentile", "BCa", "studentised")
MEAN_KINDS: dict[str, Kind] = {
    "chosen": chosen,
    "t": plain_t,
    "percentile": percentile,
    "BCa": bca,
    "studentised": studentised,
    "both ends follow (mutant)": inward,
    "by image (mutant)": by_image,
}
SHARE_KINDS: dict[str, Kind] = {
    "chosen": chosen,
    "Wilson": wilson,
    "t": plain_t,
    "percentile": percentile,
    "BCa": bca,
}
FAILURE_KINDS: dict[str, Kind] = {"chosen": chosen, "t": plain_t}
