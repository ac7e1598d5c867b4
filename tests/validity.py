"""Truth about the truth: coverage of every interval that a verdict rests on, A/A alarms, power.

    python -m tests.validity                  the tables of docs/validity.md, as Markdown
    python -m tests.validity coverage --seed 7  one of them, from a fresh seed

Truth is known by construction: values are drawn, prompts share a part of them, and each interval is
held against the mean, share or quantile that they were drawn from. All repetitions of a cell are
columns of one call to the very functions that the gate uses.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sd35bench.analysis import clustered
from sd35bench.analysis.clustered import Bounds
from sd35bench.analysis.equivalence import Direction, Verdict, decide, holm, judge
from sd35bench.analysis.intervals import Interval, expanded_tail, weight_chunks
from sd35bench.analysis.latency import Spread, block_quantile, log_ratio, run_drift

Floats = NDArray[np.float64]
REPETITIONS = 4000
SIZES = (32, 128, 512)
SEEDS = 4
"""Images per prompt; their values correlate by 1/2 within it."""
_SEED = 20261123


@dataclass(frozen=True)
class Drawn:
    """Values [k, SEEDS, columns] of known truth, and what they can be at least and at most."""

    values: Floats
    truth: float
    bounds: tuple[float, float] | None = None


# Distributions ---------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, k: int, columns: int) -> Floats:
    shared = rng.standard_normal((k, 1, columns))
    return (shared + rng.standard_normal((k, SEEDS, columns))) / np.sqrt(2)


def normal(rng: np.random.Generator, k: int, columns: int) -> Drawn:
    return Drawn(_normal(rng, k, columns), 0.0)


def lognormal(sigma: float) -> Callable[..., Drawn]:
    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        return Drawn(np.exp(sigma * _normal(rng, k, columns)), float(np.exp(sigma**2 / 2)))

    return draw


def heavy(rng: np.random.Generator, k: int, columns: int) -> Drawn:
    shared = rng.standard_t(3, (k, 1, columns))
    return Drawn(shared + rng.standard_t(3, (k, SEEDS, columns)), 0.0)


def _chance(rng: np.random.Generator, p: float, k: int, columns: int) -> Floats:
    """Each prompt's own chance: a beta variable, so that its seeds correlate by 1/2."""
    return rng.beta(p, 1 - p, (k, 1, columns)) if p < 1.0 else np.ones((k, 1, columns))


def share(p: float) -> Callable[..., Drawn]:
    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        hits = rng.random((k, SEEDS, columns)) < _chance(rng, p, k, columns)
        return Drawn(hits.astype(np.float64), p, (0.0, 1.0))

    return draw


def changed(p: float, same: float, loss: float) -> Callable[..., Drawn]:
    """Paired difference of accuracies: `same` of the images cannot differ, `loss` of hits go."""

    def draw(rng: np.random.Generator, k: int, columns: int) -> Drawn:
        shape = (k, SEEDS, columns)
        chance, luck = _chance(rng, p, k, columns), rng.random(shape)
        other = np.where(rng.random(shape) < same, luck, rng.random(shape))
        after = (other < chance) & (rng.random(shape) >= loss)
        return Drawn(after.astype(np.float64) - (luck < chance), -loss * p, (-1.0, 1.0))

    return draw


MEANS = {
    "normal": normal,
    "lognormal, sigma 0.3": lognormal(0.3),
    "lognormal, sigma 1": lognormal(1.0),
    "Student's t, 3 degrees": heavy,
    "accuracy 0.9, difference, no loss": changed(0.9, 0.5, 0.0),
    "accuracy 0.9, difference, 5 % lost": changed(0.9, 0.5, 0.05),
    "accuracy 0.99, difference, 5 % lost": changed(0.99, 0.9, 0.05),
    "accuracy 1, difference, 2 % lost": changed(1.0, 0.5, 0.02),
}
SHARES = {f"share {p:g}": share(p) for p in (0.5, 0.9, 0.97, 0.99)}


# Kinds of intervals ----------------------------------------------------------------------------


def chosen_mean(drawn: Drawn) -> Bounds:
    counts = np.full(len(drawn.values), float(SEEDS))
    return clustered.mean_bounds(drawn.values.sum(axis=1), counts, bounds=drawn.bounds)


def plain_t(drawn: Drawn) -> Bounds:
    counts = np.full(len(drawn.values), float(SEEDS))
    return clustered.mean_bounds(drawn.values.sum(axis=1), counts)


def by_image(drawn: Drawn) -> Bounds:
    """The mutant: images taken for independent."""
    flat = drawn.values.reshape(-1, drawn.values.shape[-1])
    return clustered.mean_bounds(flat, np.ones(len(flat)))


def wilson(drawn: Drawn) -> Bounds:
    counts = np.full(len(drawn.values), float(SEEDS))
    return clustered.proportion_bounds(drawn.values.sum(axis=1), counts)


def _draws(drawn: Drawn) -> tuple[Floats, Floats, Floats, Floats]:
    """Prompts' centred means, their mean, and resampled means and squares [B, columns]."""
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


MEAN_KINDS = {
    "chosen": chosen_mean,
    "t": plain_t,
    "percentile": percentile,
    "BCa": bca,
    "studentised": studentised,
    "by image (mutant)": by_image,
}
SHARE_KINDS = {"Wilson (chosen)": wilson, "t": plain_t, "percentile": percentile, "BCa": bca}


# Tables ----------------------------------------------------------------------------------------


def covered(found: Bounds, truth: float) -> float:
    """Share of columns whose interval holds the truth, within rounding."""
    slack = 1e-9
    return float(((found.low <= truth + slack) & (truth <= found.high + slack)).mean())


def coverage_table(
    title: str,
    sources: dict[str, Callable[..., Drawn]],
    kinds: dict[str, Callable[[Drawn], Bounds]],
    seed: int,
    repetitions: int = REPETITIONS,
) -> Iterator[list[str]]:
    yield [title, "prompts", *kinds]
    for number, (name, draw) in enumerate(sources.items()):
        for k in SIZES:
            rng = np.random.default_rng([seed, number, k])
            hits = dict.fromkeys(kinds, 0.0)
            for part in _parts(repetitions, k):
                drawn = draw(rng, k, part)
                for kind, measure in kinds.items():
                    hits[kind] += part * covered(measure(drawn), drawn.truth)
            yield [name, str(k), *(f"{100 * h / repetitions:.1f}" for h in hits.values())]


def difference_table(seed: int) -> Iterator[list[str]]:
    """Paired differences of failure rates, which are rare."""
    yield ["failures, baseline → candidate", "prompts", "chosen", "prompts that tell"]
    for before, after in ((0.0, 0.0), (0.0, 0.02), (0.0, 0.05), (0.05, 0.05), (0.05, 0.1)):
        for k in SIZES:
            rng = np.random.default_rng([seed, k])
            shape = (k, REPETITIONS)
            lost = rng.binomial(SEEDS, after, shape) - rng.binomial(SEEDS, before, shape)
            counts = np.full(k, float(SEEDS))
            found = clustered.mean_bounds(lost.astype(np.float64), counts, bounds=(-1.0, 1.0))
            hits = f"{100 * covered(found, after - before):.1f}"
            yield [f"{before:g} → {after:g}", str(k), hits, f"{(lost != 0).sum(axis=0).mean():.0f}"]


def quantile_table(seed: int) -> Iterator[list[str]]:
    """Quantiles over prompts, and over time where neighbours are alike."""
    yield ["quantile", "n", "p50", "p95", "no end at p95"]
    for k in SIZES:
        drawn = normal(np.random.default_rng([seed, k]), k, 2000)
        labels = np.repeat(np.arange(k), SEEDS)
        cells = []
        for q in (0.5, 0.95):
            flat = drawn.values.reshape(-1, 2000)
            cells.append(clustered.quantile_bounds(flat, labels, q))
        yield _quantile_row(f"over prompts, {SEEDS} images each", k, cells)
    for rho in (0.0, 0.3, 0.6, 0.9):
        for n in SIZES:
            series = _series(np.random.default_rng([seed, n]), n, rho, 2000)
            cells = [_blocks(series, q) for q in (0.5, 0.95)]
            yield _quantile_row(f"over time, neighbours correlate {rho:g}", n, cells)


def _quantile_row(name: str, n: int, cells: list[Bounds]) -> list[str]:
    shares = [covered(c, float(special.ndtri(q))) for c, q in zip(cells, (0.5, 0.95), strict=True)]
    opened = ~(np.isfinite(cells[1].low) & np.isfinite(cells[1].high))
    return [name, str(n), *(f"{100 * s:.1f}" for s in shares), f"{100 * opened.mean():.0f} %"]


def _blocks(series: Floats, q: float) -> Bounds:
    """Unknown ends are infinite, as in the other kinds, though a verdict takes none of them."""
    found = [block_quantile(np.exp(row), q) for row in series]

    def ends(values: list[float | None], unknown: float) -> Floats:
        return np.array([unknown if v is None else np.log(v) for v in values])

    return Bounds(
        np.log([f.value for f in found]),
        ends([f.low for f in found], -np.inf),
        ends([f.high for f in found], np.inf),
    )


def _series(rng: np.random.Generator, n: int, rho: float, columns: int) -> Floats:
    e = rng.standard_normal((columns, n + 60))
    for t in range(1, n + 60):
        e[:, t] = rho * e[:, t - 1] + np.sqrt(1 - rho**2) * e[:, t]
    return e[:, 60:]


# A/A and power ---------------------------------------------------------------------------------


def alarm_table(seed: int, comparisons: int = 1000) -> Iterator[list[str]]:
    """False alarms where the truth is just at the margin, the worst that is allowed."""
    yield ["A/A", "figures", "alarms with Holm", "without", "stated"]
    rng = np.random.default_rng(seed)
    for figures in (1, 5, 20):
        counts = [0, 0]
        for _ in range(comparisons):
            raw = _at_margin(rng, figures)
            for which, found in enumerate((holm(raw), raw)):
                counts[which] += min(found) < 0.025
        rates = [f"{100 * c / comparisons:.1f} %" for c in counts]
        yield ["at the margin, 128 prompts", str(figures), *rates, "2.5 %"]
    alarms = sum(min(holm(_at_margin(rng, 5, loss=0.0))) < 0.025 for _ in range(comparisons))
    yield ["same backend, 128 prompts", "5", f"{100 * alarms / comparisons:.1f} %", "–", "2.5 %"]
    for couples in (1, 2, 3, 5):
        verdicts = [_latency_verdict(rng, couples, 0.0, 0.1) for _ in range(comparisons)]
        rate = f"{100 * verdicts.count(Verdict.FAIL) / comparisons:.1f} %"
        yield [
            f"latency p50, {couples} couples of starts, 10 % between runs",
            "1",
            rate,
            "–",
            "2.5 %",
        ]
    for rho in (0.0, 0.3):
        series = np.exp(0.03 * _series(rng, 128, rho, comparisons))
        rate = np.mean([bool((d := run_drift(row)) and d.drifting) for row in series])
        yield [
            f"drift within a run, neighbours correlate {rho:g}",
            "1",
            f"{100 * rate:.1f} %",
            "–",
            "5 %",
        ]


def _at_margin(rng: np.random.Generator, figures: int, loss: float = 0.05) -> list[float]:
    drawn = changed(0.9, 0.5, loss / 0.9)(rng, 128, figures)
    found = chosen_mean(drawn)
    return [judge(_column(found, i, 128), 0.05, Direction.LESS).p_fail for i in range(figures)]


def _column(found: Bounds, i: int, k: int) -> Interval:
    ends = (float(found.low[i]), float(found.high[i]))
    return Interval(float(found.value[i]), *ends, SEEDS * k, k)


def _latency_verdict(
    rng: np.random.Generator, couples: int, slower: float, between: float
) -> Verdict:
    """The gate at a margin of 5 %; starts of a couple share the machine's state but for 2 %."""
    state = between * rng.standard_normal(couples)
    own = 0.02 * rng.standard_normal((2, couples))
    if couples == 1:
        own = between * rng.standard_normal((2, couples)) / np.sqrt(2)
    noise = np.exp(0.03 * rng.standard_normal((2, couples, 48)) + state[:, None] + own[:, :, None])
    ratio = log_ratio(list(noise[0]), list((1 + slower) * noise[1]), 0.5, Spread(0.15))
    assert ratio is not None
    tested = judge(ratio, float(np.log(1.05)), Direction.MORE)
    return decide(tested, tested.p_fail)


def power_table(seed: int, comparisons: int = 400) -> Iterator[list[str]]:
    """How often a planted effect fails the gate, and how often none passes it."""
    yield ["planted", "prompts", "fails", "undecided", "passes"]
    rng = np.random.default_rng(seed)
    for loss in (0.0, 0.05, 0.1, 0.15, 0.2):
        for k in (64, 128, 256, 512):
            drawn = changed(0.9, 0.7, loss / 0.9)(rng, k, comparisons)
            found = chosen_mean(drawn)
            verdicts = []
            for i in range(comparisons):
                tested = judge(_column(found, i, k), 0.05, Direction.LESS)
                verdicts.append(decide(tested, tested.p_fail))
            yield [f"accuracy {-loss:+.0%}, margin 5 %", str(k), *_shares(verdicts)]
    for slower in (0.0, 0.1, 0.2, 0.5):
        for couples in (1, 3, 5):
            verdicts = [_latency_verdict(rng, couples, slower, 0.1) for _ in range(comparisons)]
            yield [f"{slower:.0%} slower, margin 5 %", f"{couples} couples", *_shares(verdicts)]


def _shares(verdicts: list[Verdict]) -> list[str]:
    kinds = (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS)
    return [f"{100 * sum(v == kind for v in verdicts) / len(verdicts):.0f} %" for kind in kinds]


def _parts(repetitions: int, k: int) -> Iterator[int]:
    """Columns at a time, of bounded size."""
    most = max(1, 2_000_000 // (k * SEEDS))
    for start in range(0, repetitions, most):
        yield min(most, repetitions - start)


def tables(seed: int) -> dict[str, Callable[[], Iterator[list[str]]]]:
    """Every table by name."""
    return {
        "coverage": lambda: coverage_table("mean of", MEANS, MEAN_KINDS, seed),
        "shares": lambda: coverage_table("share", SHARES, SHARE_KINDS, seed),
        "failures": lambda: difference_table(seed),
        "quantiles": lambda: quantile_table(seed),
        "alarms": lambda: alarm_table(seed),
        "power": lambda: power_table(seed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.validity", description=__doc__)
    known = tables(_SEED)
    parser.add_argument("table", nargs="*", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--seed", type=int, default=_SEED)
    given = parser.parse_args()
    for name in given.table if given.table else known:
        if name not in known:
            parser.error(f"unknown table {name!r}; known: {', '.join(known)}")
        print(f"\n## {name}, seed {given.seed}\n", flush=True)
        for number, row in enumerate(tables(given.seed)[name]()):
            print(f"| {' | '.join(row)} |", flush=True)
            if number == 0:
                print(f"| --- | {' | '.join('---:' for _ in row[1:])} |")


if __name__ == "__main__":
    main()
