"""Coverage on brute-forced truth: nano's own values, all of them known.

A study ran every setting of a grid on the same 256 prompts. Their values are taken for the whole
population; n prompts are drawn from it with replacement, and an interval is held against the
population's value. So the distributions are real ones (shares near 1, discrete losses, skewed
latencies), and the truth is exact.

    python -m tests.validity.population truth --results-dir DIR     keeps a study's values here
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.disk import write_atomic
from sd35bench.stats import clustered
from sd35bench.stats.clustered import Bounds
from sd35bench.study.store import Study
from sd35bench.types import Record, Status
from tests.validity.coverage import CLAIMED, OFF, SIGN, SIZES, covered, is_off
from tests.validity.drawn import Floats

KEPT = Path(__file__).with_name("nano_population.json")
REPETITIONS = 4000
REFERENCE = (28, 4.0)
"""Steps and cfg that the others are held against; of the grid, nearest to the vendor's 40 and 5."""
_METRICS = {"accuracy": "prompt_accuracy", "clip": "clip_score_nano"}
_DIGITS = {"accuracy": 4, "clip": 3, "latency_s": 6}


@dataclass(frozen=True)
class Population:
    """Per-prompt values [prompts] by setting (steps, cfg) and name; how they were made."""

    values: dict[tuple[int, float], dict[str, Floats]]
    made: dict[str, Any]


@lru_cache(maxsize=1)
def population(path: Path = KEPT) -> Population:
    """Read what was kept."""
    kept = json.loads(path.read_text("utf-8"))
    values = {
        (s["steps"], s["cfg"]): {name: np.array(s[name], np.float64) for name in _DIGITS}
        for s in kept["settings"]
    }
    return Population(values, kept["made"])


# Coverage --------------------------------------------------------------------------------------

Measure = Callable[[np.ndarray, tuple[int, float]], tuple[Bounds, float]]
"""Interval of each column of drawn prompts [n, columns], and the population's own value."""


def _mean(name: str, bounds: tuple[float, float] | None, *, paired: bool) -> Measure:
    def measure(drawn: np.ndarray, setting: tuple[int, float]) -> tuple[Bounds, float]:
        values = population().values
        x = values[setting][name]
        if paired:
            x = x - values[REFERENCE][name]
        return clustered.mean_bounds(x[drawn], np.ones(len(drawn)), bounds=bounds), x.mean()

    return measure


def _ratio(drawn: np.ndarray, setting: tuple[int, float]) -> tuple[Bounds, float]:
    a, b = (population().values[s]["latency_s"] for s in (setting, REFERENCE))
    return clustered.ratio_bounds(a[drawn], b[drawn]), a.sum() / b.sum()


def _quantile(q: float) -> Measure:
    def measure(drawn: np.ndarray, setting: tuple[int, float]) -> tuple[Bounds, float]:
        x = population().values[setting]["latency_s"]
        # Of a whole population, not of a sample: the least value that this share does not exceed.
        truth = float(np.quantile(x, q, method="inverted_cdf"))
        return clustered.quantile_bounds(x[drawn], np.arange(len(drawn)), q), truth

    return measure


MEASURES: dict[str, Measure] = {
    "prompt accuracy": _mean("accuracy", (0.0, 1.0), paired=False),
    "prompt accuracy, difference": _mean("accuracy", (-1.0, 1.0), paired=True),
    "CLIP-score": _mean("clip", (-100.0, 100.0), paired=False),
    "CLIP-score, difference": _mean("clip", (-200.0, 200.0), paired=True),
    "latency, mean": _mean("latency_s", None, paired=False),
    "latency, p50": _quantile(0.5),
    "latency, p95": _quantile(0.95),
    "latency, ratio of sums": _ratio,
}
_FIELDS = {"prompt accuracy": "accuracy", "CLIP": "clip", "latency": "latency_s"}
_LUMP = 0.2
"""Share of the variance that one prompt makes, above which it is why an interval is off."""
_FEW = 12.0
"""Prompts that tell in a sample, below which discreteness shows."""
_AGAINST = ("prompt accuracy, difference", "CLIP-score, difference", "latency, ratio of sums")


def population_table(seed: int, repetitions: int = REPETITIONS) -> Iterator[list[str]]:
    """Coverage over all settings of the grid, and its lowest and highest setting."""
    yield ["value", "prompts", "settings", "on average", "lowest", "highest", "within ± 1.5"]
    remarks = []
    for name, measure in MEASURES.items():
        settings = [s for s in population().values if name not in _AGAINST or s != REFERENCE]
        for n in SIZES:
            found = _coverages(measure, settings, n, seed, repetitions)
            ends = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            off = {s: p for s, p in found.items() if abs(p - 95.0) > OFF}
            average = float(np.mean(list(found.values())))
            yield [
                name,
                str(n),
                str(len(found)),
                f"{average:.1f}{SIGN if is_off(average, n) else ''}",
                *(f"{found[s]:.1f} ({_named(s)})" for s in ends),
                f"{len(found) - len(off)} of {len(found)}{SIGN if off and n >= CLAIMED else ''}",
            ]
            if off and n >= CLAIMED:
                remarks.append([f"{SIGN} {name}, {n} prompts: {_whys(name, n, off)}."])
    yield from remarks


def _coverages(
    measure: Measure, settings: list[tuple[int, float]], n: int, seed: int, repetitions: int
) -> dict[tuple[int, float], float]:
    """Per cent by setting; every setting on the same drawn prompts."""
    size = len(next(iter(population().values.values()))["clip"])
    hits = dict.fromkeys(settings, 0.0)
    for part in range(0, repetitions, 500):
        columns = min(500, repetitions - part)
        drawn = np.random.default_rng([seed, n, part]).integers(size, size=(n, columns))
        for setting in settings:
            found, truth = measure(drawn, setting)
            hits[setting] += columns * covered(found, truth)
    return {setting: 100.0 * h / repetitions for setting, h in hits.items()}


def _named(setting: tuple[int, float]) -> str:
    return f"{setting[0]} steps, cfg {setting[1]:g}"


def _whys(name: str, n: int, off: dict[tuple[int, float], float]) -> str:
    """What of the population's own values says why coverages are off, settings by reason."""
    found: dict[str, list[str]] = {}
    for setting, percent in off.items():
        why = _why(name, n, _values_of(name, setting), percent)
        found.setdefault(why, []).append(f"{_named(setting)} {percent:.1f}")
    return "; ".join(f"{why}: {', '.join(settings)}" for why, settings in found.items())


def _why(name: str, n: int, x: Floats, percent: float) -> str:
    centred = x - x.mean()
    squares = np.square(centred)
    if squares.sum() <= 1e-12:
        return "all prompts alike"
    if "accuracy" in name:
        return "discrete, and few or no prompts tell" if _telling(x) * n < _FEW else "discrete"
    if squares.max() > _LUMP * squares.sum() and percent < 95.0:
        unseen = (1.0 - 1.0 / len(x)) ** n
        return (
            f"one prompt of {len(x)} makes more than {_LUMP:.0%} of the variance, and {unseen:.0%}"
            " of the samples do not have it"
        )
    skew = float(np.mean(centred**3) / squares.mean() ** 1.5)
    if abs(skew) > 1.0 and percent > 95.0 and not name.endswith(("p50", "p95")):
        return "skewed, and ends move outwards only"
    return "not explained"


def _telling(x: Floats) -> float:
    """Share of prompts that tell anything."""
    return float((np.abs(x - np.median(x)) > 1e-12).mean())


def _values_of(name: str, setting: tuple[int, float]) -> Floats:
    field = next(f for start, f in _FIELDS.items() if name.startswith(start))
    values = population().values
    x = values[setting][field]
    if name == "latency, ratio of sums":
        base = values[REFERENCE][field]
        return x - base * (x.sum() / base.sum())
    return x - values[REFERENCE][field] if name in _AGAINST else x


# Keeping ---------------------------------------------------------------------------------------


def keep(study: Study, path: Path = KEPT) -> None:
    """Write a study's per-prompt values; every setting must have every prompt once.

    Raises: ValueError where a prompt of a setting has no value, or several.
    """
    scores = {(s.key, s.metric): s.value for s in study.scores()}
    by_setting: dict[tuple[int, float], dict[str, Record]] = {}
    for record in study.records():
        if record.status is Status.OK:
            request = record.trial.request
            prompts = by_setting.setdefault((request.steps, float(request.cfg)), {})
            if request.prompt in prompts:
                raise ValueError(f"{study.name}: {request.prompt!r} twice at one setting")
            prompts[request.prompt] = record
    order = sorted(next(iter(by_setting.values())))
    rows = [
        {"steps": steps, "cfg": cfg, **_values([prompts[p] for p in order], scores)}
        for (steps, cfg), prompts in sorted(by_setting.items())
    ]
    text = json.dumps({"made": _made(study), "settings": rows}, separators=(",", ":"))
    write_atomic(path, (text.replace('},{"steps"', '},\n{"steps"') + "\n").encode())


def _values(records: list[Record], scores: dict[tuple[str, str], float | None]) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in _DIGITS}
    for record in records:
        assert record.timings is not None
        found["latency_s"].append(record.timings.latency_s)
        for name, metric in _METRICS.items():
            value = scores[record.trial.key, metric]
            assert value is not None, (metric, record.trial.key)
            found[name].append(value)
    return {name: [round(v, _DIGITS[name]) for v in values] for name, values in found.items()}


def _made(study: Study) -> dict[str, Any]:
    session = next(iter(study.sessions().values()))
    told = ("commit", "dirty", "cpu_model", "torch", "diffusers", "threads")
    return {
        "command": (
            "sd35bench run -m study=truth model=nano backend=eager threads=1"
            " steps=2,4,8,16,28 cfg=1,2,4,7,12 prompts.split=tune prompts.limit=256;"
            " sd35bench score truth"
        ),
        "at": session.started_at[:10],
        "weights_digest": session.load.model.weights_digest,
        **{name: session.environment.get(name) for name in told},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.validity.population")
    parser.add_argument("study")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    given = parser.parse_args()
    keep(Study.open(given.results_dir.resolve(), given.study))


if __name__ == "__main__":
    main()
