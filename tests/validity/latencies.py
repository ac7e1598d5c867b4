"""Coverage of every latency interval at the n that people use: 2 to 32 images.

Logs of latencies are drawn from autoregressions of first order, 5 % spread; one image in 20 takes
three times as long; process starts lie 0 or 5 % apart. What is told is what `show`, the tables and
`recommend` tell; `compare`'s is beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from sd35bench.stats.clustered import student
from sd35bench.stats.latency import (
    LEAST_IMAGES,
    Centres,
    Spread,
    centres,
    log_ratio,
    speed_centres,
)

Floats = NDArray[np.float64]
Held = NDArray[np.bool_]
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
LIKENESS, APART = (0.0, 0.3, 0.6), (0.0, 0.05)
SIGMA, SLOW, TIMES = 0.05, 0.05, 3.0
"""Spread of the logs; share of slow images, and how many times as long they take."""
SHARED = 0.10
"""Of starts that a couple's two share, as the machine's state."""
REPETITIONS, OF_COMPARE = 5000, 500
Kind = Callable[[np.random.Generator, int, float, float, int], Held | None]
"""Says of each repetition whether the interval holds the truth; ``None``: it is not told."""


@cache
def true_log_median() -> float:
    """Of one image's log latency: that of the usual ones, moved by the slow ones."""
    rng = np.random.default_rng(0)
    logs = SIGMA * rng.standard_normal(4_000_000)
    return float(np.median(logs + np.log(TIMES) * (rng.random(len(logs)) < SLOW)))


def _series(rng: np.random.Generator, n: int, likeness: float, columns: int) -> Floats:
    """Standard normal series [n, columns] whose neighbours correlate."""
    x = rng.standard_normal((n, columns))
    for t in range(1, n):
        x[t] = likeness * x[t - 1] + np.sqrt(1 - likeness**2) * x[t]
    return x


def drawn(
    rng: np.random.Generator, n: int, likeness: float, columns: int, start: Floats | float = 0.0
) -> Floats:
    """Logs [n, columns] of one start's latencies, in the order of time, whose median is `start`."""
    logs = SIGMA * _series(rng, n, likeness, columns)
    return logs - true_log_median() + np.log(TIMES) * (rng.random(logs.shape) < SLOW) + start


def _starts(
    rng: np.random.Generator, number: int, n: int, likeness: float, apart: float, columns: int
) -> list[Floats]:
    sizes = [len(part) for part in np.array_split(np.arange(n), number)]
    return [
        drawn(rng, size, likeness, columns, apart * rng.standard_normal(columns)) for size in sizes
    ]


def _holds(found: Centres, truth: Floats | float = 0.0) -> Held:
    return np.abs(found.value - truth) <= found.half


def median(
    number: int,
    rng: np.random.Generator,
    n: int,
    likeness: float,
    apart: float,
    columns: int,
) -> Held | None:
    """p50 over so many starts; with one it is held against that run's own median."""
    if n < max(LEAST_IMAGES, number):
        return None
    if number == 1:
        own = apart * rng.standard_normal(columns)
        return _holds(centres([drawn(rng, n, likeness, columns, own)]), own)
    return _holds(centres(_starts(rng, number, n, likeness, apart, columns)))


def any_start(
    rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """p50 of one start, taken for that of all starts, which its caption forbids."""
    if n < LEAST_IMAGES:
        return None
    return _holds(centres(_starts(rng, 1, n, likeness, apart, columns)))


def speed(
    number: int, rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """`× eager`, so many starts a side; with one, within these two runs."""
    if n < max(LEAST_IMAGES, number):
        return None
    if number == 1:
        own = [apart * rng.standard_normal(columns) for _ in range(2)]
        sides = [drawn(rng, n, likeness, columns, start) for start in own]
        return _holds(centres([sides[0] - sides[1]]), own[0] - own[1])
    sides = [_starts(rng, number, n, likeness, apart, columns) for _ in range(2)]
    return _holds(speed_centres(sides[0], sides[1], []))


def coupled(
    number: int, rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """The same from couples of starts in alternation, which share the machine's state."""
    if n < max(LEAST_IMAGES, number):
        return None
    sides = [_starts(rng, number, n, likeness, apart, columns) for _ in range(2)]
    for one, other in zip(*sides, strict=True):
        state = SHARED * rng.standard_normal(columns)
        one += state
        other += state
    return _holds(speed_centres(sides[0], sides[1], [(i, i) for i in range(number)]))


def together(
    number: int, rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """Two settings of the same starts, which take turns: what a start adds cancels."""
    if n < max(LEAST_IMAGES, number):
        return None
    sides = [_starts(rng, number, n, likeness, 0.0, columns) for _ in range(2)]
    return _holds(centres([a - b for a, b in zip(*sides, strict=True)]))


def compared(
    number: int, rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """`compare`'s p50 of couples of n images a start, one of them with the policy's spread."""
    held = []
    for _ in range(min(columns, OF_COMPARE)):
        sides = [
            [
                np.exp(drawn(rng, n, likeness, 1, apart * rng.standard_normal(1))[:, 0])
                for _ in range(number)
            ]
            for _ in range(2)
        ]
        found = log_ratio(sides[0], sides[1], 0.5, Spread(0.15))
        if found is not None and found.low is not None and found.high is not None:
            held.append(found.low <= 0.0 <= found.high)
    return np.array(held) if held else None


def reach(
    rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """The mutant: from the least to the largest value, which no bootstrap leaves."""
    logs = drawn(rng, n, likeness, columns)
    return (logs.min(axis=0) <= 0.0) & (logs.max(axis=0) >= 0.0)


def unrelated(
    rng: np.random.Generator, n: int, likeness: float, apart: float, columns: int
) -> Held | None:
    """The mutant: images of 2 starts taken for unrelated ones, by Student's t; none is slow."""
    starts = [
        SIGMA * _series(rng, len(part), likeness, columns) + apart * rng.standard_normal(columns)
        for part in np.array_split(np.arange(n), min(2, n))
    ]
    logs = np.concatenate(starts)
    half = student(n - 1) * logs.std(axis=0, ddof=1) / np.sqrt(n)
    return np.abs(logs.mean(axis=0)) <= half


KINDS: dict[str, Kind] = {
    "p50, one start, of that run": partial(median, 1),
    "p50, 2 starts": partial(median, 2),
    "p50, 4 starts": partial(median, 4),
    "× eager, one start a side, of these runs": partial(speed, 1),
    "× eager, 2 starts a side": partial(speed, 2),
    "× eager, 3 couples": partial(coupled, 3),
    "two settings of one start": partial(together, 1),
    "two settings of 2 starts": partial(together, 2),
    "compare, one couple": partial(compared, 1),
    "compare, 3 couples": partial(compared, 3),
    "p50, one start, read as of any": any_start,
    "least to largest (mutant: bootstrap)": reach,
    "unrelated images of 2 starts (mutant)": unrelated,
}


def latency_table(
    seed: int,
    kinds: Sequence[str] = tuple(KINDS),
    sizes: Sequence[int] = SIZES,
    repetitions: int = REPETITIONS,
) -> Iterator[list[str]]:
    """Coverage in per cent by kind, likeness of neighbours and spread between starts."""
    yield ["interval", "neighbours", "starts apart", *(f"n = {n}" for n in sizes)]
    for number, name in enumerate(KINDS):
        if name not in kinds:
            continue
        for likeness in LIKENESS:
            for apart in APART:
                cells = []
                for n in sizes:
                    key = [seed, number, int(10 * likeness), int(100 * apart), n]
                    rng = np.random.default_rng(key)
                    held = KINDS[name](rng, n, likeness, apart, repetitions)
                    cells.append("–" if held is None else f"{100.0 * held.mean():.1f}")
                yield [name, f"{likeness:g}", f"{apart:.0%}", *cells]
