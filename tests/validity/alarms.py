"""A/A and power: how often a gate fails what is as good, and how often it sees what was planted."""

from collections.abc import Iterator

import numpy as np

from sd35bench.stats.clustered import Bounds
from sd35bench.stats.intervals import Interval
from sd35bench.stats.latency import Spread, log_ratio, run_drift
from sd35bench.stats.verdicts import Direction, Verdict, decide, holm, judge
from tests.validity.drawn import SEEDS, autoregressive, changed
from tests.validity.kinds import chosen


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
        series = np.exp(0.03 * autoregressive(rng, 128, rho, comparisons))
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
    found = chosen(drawn)
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
            found = chosen(drawn)
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
