"""Coverage on synthetic data: how often an interval holds the truth that values were drawn from.

A sign marks what is claimed and lies outside of 95 ± 1.5 points; why is written below the table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from sd35bench.stats import clustered
from sd35bench.stats.clustered import Bounds
from sd35bench.stats.latency import block_quantile
from tests.validity.drawn import (
    SEEDS,
    Draw,
    Drawn,
    Floats,
    autoregressive,
    busy_spells,
    normal,
    shared_normal,
)
from tests.validity.kinds import RESAMPLED, Kind

REPETITIONS = 10_000
OF_BOOTSTRAPS = 4000
"""Repetitions of the kinds that resample, which cost a hundred times more."""
OF_SERIES = 4000
SIZES = (32, 128, 512)
CLAIMED = 128
"""Prompts from which on 95 ± 1.5 % is claimed."""
OFF, SIGN = 1.5, "†"


def covered(found: Bounds, truth: float) -> float:
    """Share of columns whose interval holds the truth, within rounding."""
    return float(_holds(found, truth).mean())


def _holds(found: Bounds, truth: float) -> np.ndarray:
    slack = 1e-9 * max(1.0, abs(truth))
    return (found.low <= truth + slack) & (truth <= found.high + slack)


def is_off(percent: float, n: int) -> bool:
    """Whether a coverage is claimed to be near 95 % and is not."""
    return n >= CLAIMED and abs(percent - 95.0) > OFF


def shown(percent: float, n: int) -> str:
    """A coverage, with the sign where it is off."""
    return f"{percent:.1f}{SIGN if is_off(percent, n) else ''}"


# Means and shares ------------------------------------------------------------------------------


@dataclass
class _Cell:
    """Counts over the repetitions of one distribution and number of prompts."""

    k: int
    hits: dict[str, float]
    done: dict[str, int]
    telling: list[np.ndarray] = field(default_factory=list)

    def percent(self, kind: str) -> float:
        return 100.0 * self.hits[kind] / self.done[kind]

    def why(self, name: str) -> str:
        """Why the chosen interval is off, as far as the samples themselves say it."""
        head = f"{SIGN} {name}, {self.k} prompts:"
        telling = np.concatenate(self.telling)
        blind = 100.0 * float((telling < clustered.FEW_TELLING).mean())
        if self.percent("chosen") > 95.0 and blind > 2.5:
            return (
                f"{head} in {blind:.0f} % of the samples no prompt tells anything, or one alone:"
                " the interval then reaches as far as what was never seen; a narrower one misses"
                " rare losses."
            )
        return f"{head} {telling.mean():.1f} prompts tell on average; not explained."


def coverage_table(
    title: str,
    sources: dict[str, Draw],
    kinds: dict[str, Kind],
    seed: int,
    repetitions: int = REPETITIONS,
) -> Iterator[list[str]]:
    """Coverage of every kind by source and number of prompts, then what is off and why."""
    yield [title, "prompts", *kinds, "prompts that tell"]
    remarks = []
    for number, (name, draw) in enumerate(sources.items()):
        for k in SIZES:
            rng = np.random.default_rng([seed, number, k])
            cell = _measure(draw, kinds, k, rng, repetitions)
            percents = [cell.percent(kind) for kind in kinds]
            tell = f"{np.concatenate(cell.telling).mean():.0f}"
            yield [name, str(k), shown(percents[0], k), *(f"{p:.1f}" for p in percents[1:]), tell]
            if is_off(percents[0], k):
                remarks.append([cell.why(name)])
    yield from remarks


def _measure(
    draw: Draw, kinds: dict[str, Kind], k: int, rng: np.random.Generator, repetitions: int
) -> _Cell:
    cell = _Cell(k, dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0))
    for part in _parts(repetitions, k):
        drawn = draw(rng, k, part)
        cell.telling.append(_telling(drawn))
        for kind, measure in kinds.items():
            if kind not in RESAMPLED or cell.done[kind] < OF_BOOTSTRAPS:
                cell.hits[kind] += part * covered(measure(drawn), drawn.truth)
                cell.done[kind] += part
    return cell


def _telling(drawn: Drawn) -> np.ndarray:
    """Prompts whose mean is not that of most [columns]."""
    means = drawn.values.mean(axis=1)
    return (np.abs(means - np.median(means, axis=0)) > 1e-12).sum(axis=0)


def _parts(repetitions: int, k: int) -> Iterator[int]:
    """Columns at a time, of bounded size."""
    most = max(1, 1_000_000 // (k * SEEDS))
    for start in range(0, repetitions, most):
        yield min(most, repetitions - start)


def ratio_table(seed: int, repetitions: int = REPETITIONS) -> Iterator[list[str]]:
    """Ratios of sums over the same prompts, as of two settings' latencies."""
    yield ["ratio of sums, both lognormal", "prompts", "chosen", "by image (mutant)"]
    for sigma in (0.3, 1.0):
        for k in SIZES:
            rng = np.random.default_rng([seed, int(10 * sigma), k])
            hits = np.zeros(2)
            for part in _parts(repetitions, k):
                sides = [np.exp(sigma * shared_normal(rng, k, part)) for _ in range(2)]
                sums, images = ([f(x) for x in sides] for f in (_by_prompt, _by_image))
                for which, (above, below) in enumerate((sums, images)):
                    hits[which] += part * covered(clustered.ratio_bounds(above, below), 1.0)
            percents = 100.0 * hits / repetitions
            yield [f"sigma {sigma:g}", str(k), shown(percents[0], k), f"{percents[1]:.1f}"]


def _by_prompt(values: Floats) -> Floats:
    return values.sum(axis=1)


def _by_image(values: Floats) -> Floats:
    return values.reshape(-1, values.shape[-1])


# Quantiles -------------------------------------------------------------------------------------

_QUANTILES = {"p50": 0.5, "p95": 0.95}
_FEW_TOLD = 50.0
"""Per cent of series that are told, below which the interval is rather refused than claimed."""


@dataclass(frozen=True)
class _Told:
    """Per cent of series with ends, of those how many hold the truth, and of all how many err."""

    told: float
    holds: float
    wrong: float

    @classmethod
    def of(cls, found: Bounds, truth: float) -> "_Told":
        known = np.isfinite(found.low) & np.isfinite(found.high)
        holds = _holds(found, truth) & known
        of_told = 100.0 * holds.sum() / max(known.sum(), 1)
        return cls(100.0 * known.mean(), of_told, 100.0 * (known & ~holds).mean())

    def cells(self, n: int) -> list[str]:
        off = is_off(self.holds, n) and self.told > 0.0
        value = f"{self.holds:.1f}{SIGN if off else ''}" if self.told > 0.0 else "–"
        return [value, f"{self.told:.0f} %"]

    def why(self, name: str, n: int, worth: str) -> str:
        """Why it is off; `worth` says how alike neighbours are."""
        rare = f"told in {self.told:.0f} % of the series, wrong in {self.wrong:.1f} % of all"
        kind = "refused rather than claimed; " if self.told < _FEW_TOLD else ""
        return f"{SIGN} {name}, n {n}: {kind}{rare}; {worth}."


def _worth(series: Floats) -> str:
    """How many unrelated values series [columns, n] are worth, in truth and by their neighbours."""
    n, columns = series.shape[1], len(series)
    centred = series - series.mean()
    power = np.square(centred).mean()
    true = power / np.square(centred.mean(axis=1)).mean()
    rho = float((centred[:, 1:] * centred[:, :-1]).mean() / power)
    near = n * (1 - rho) / (1 + rho)
    return (
        f"{n} values are worth {true:.0f} unrelated ones, {near:.0f} by the correlation of"
        f" neighbours (from all {columns:,} series)"
    )


def quantile_table(seed: int, repetitions: int = OF_SERIES) -> Iterator[list[str]]:
    """Quantiles over prompts, and over time where neighbours are alike."""
    yield ["quantile", "n", *(c for q in _QUANTILES for c in (q, f"{q} told"))]
    remarks: list[list[str]] = []
    for name, n, told, worth in _quantile_cells(seed, repetitions):
        cells = [told[q].cells(n) if q in told else ["–", "–"] for q in _QUANTILES]
        yield [name, str(n), *(c for pair in cells for c in pair)]
        for quantile, found in told.items():
            if found.told > 0.0 and is_off(found.holds, n):
                remarks.append([found.why(f"{quantile} {name}", n, worth)])
    yield from remarks


def _quantile_cells(
    seed: int, repetitions: int
) -> Iterator[tuple[str, int, dict[str, _Told], str]]:
    normal_ends = {name: float(special.ndtri(q)) for name, q in _QUANTILES.items()}
    for k in SIZES:
        flat = normal(np.random.default_rng([seed, k]), k, repetitions).values
        flat, labels = flat.reshape(-1, repetitions), np.repeat(np.arange(k), SEEDS)
        told = {
            name: _Told.of(clustered.quantile_bounds(flat, labels, q), normal_ends[name])
            for name, q in _QUANTILES.items()
        }
        yield f"over prompts, {SEEDS} images each", k, told, "not explained"
    for rho in (0.0, 0.3, 0.6, 0.9):
        for n in SIZES:
            series = autoregressive(np.random.default_rng([seed, n]), n, rho, repetitions)
            name = f"over time, neighbours correlate {rho:g}"
            yield name, n, _over_time(series, normal_ends), _worth(series)
    long = busy_spells(np.random.default_rng(seed), 20_000, 100)
    truths = {name: float(np.quantile(long, q)) for name, q in _QUANTILES.items()}
    for n in SIZES:
        series = busy_spells(np.random.default_rng([seed, n]), n, repetitions)
        yield "over time, busy spells", n, _over_time(series, truths), _worth(series)


def _over_time(series: Floats, truths: dict[str, float]) -> dict[str, _Told]:
    return {
        name: _Told.of(_blocks(series, _QUANTILES[name]), truth) for name, truth in truths.items()
    }


def _blocks(series: Floats, q: float) -> Bounds:
    """Ends that are not told are infinite, as in the other kinds."""
    found = [block_quantile(np.exp(row), q) for row in series]

    def ends(values: list[float | None], unknown: float) -> Floats:
        return np.array([unknown if v is None else np.log(v) for v in values])

    return Bounds(
        np.log([f.value for f in found]),
        ends([f.low for f in found], -np.inf),
        ends([f.high for f in found], np.inf),
    )
