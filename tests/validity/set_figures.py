"""Coverage, false alarms and power of the gate's set metrics: KID, CMMD and FID, paired.

    python -m tests.validity.set_figures coverage                 all cells, 20 min of one core
    python -m tests.validity.set_figures coverage --world worse --prompts 128 --seed 7    some, anew
    python -m tests.validity.set_figures power                    verdicts by what was planted
    python -m tests.validity.set_figures family                   what more figures cost the others
    python -m tests.validity.set_figures page                     docs/validity.md, of what was kept

Features are Gaussian, in 48 dimensions with nano's spectrum (12 that matter), so that every truth
is a closed form: the kernels' means are Gaussian integrals. Prompts share most of what there is to
see between both sides and their true renders. The model misses the renders' mean and spread by
`off`, the candidate by `worse` more; `alike` is how far the sides' noise is the same.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd35bench.disk import write_atomic
from sd35bench.gate.set_figures import LEAST_PROMPTS
from sd35bench.stats.clustered import mean_bounds
from sd35bench.stats.frechet import Gaussian, fit, frechet_difference, frechet_distance
from sd35bench.stats.intervals import Interval
from sd35bench.stats.kernel import (
    Sample,
    Twins,
    gaussian_kernel,
    kernel_difference,
    polynomial_kernel,
)
from sd35bench.stats.verdicts import Direction, Verdict, decide, holm, judge
from tests.validity_runs.kept import keep, read

Floats = NDArray[np.float64]
DIMENSIONS = 48
SIGMA = 10.0 * np.sqrt(DIMENSIONS)
"""CMMD's width for features of length sqrt(48) instead of 1."""
SIZES = (64, 128, 192, 256, 512)
REPETITIONS = {
    "KID": {64: 2000, 128: 2000, 192: 1000, 256: 1000, 512: 1000},
    "CMMD": {64: 1000, 128: 2000, 192: 1000, 256: 1000, 512: 300},
    "FID": {128: 300, 256: 300, 512: 150},
}
SEED = 20261123
MARGIN = 0.3
POWER = (("KID", 128, 200), ("KID", 256, 60))
TABLE = "set_figures"
PAGE = Path(__file__).parents[2] / "docs" / "validity.md"
BEGIN = "<!-- made by python -m tests.validity.set_figures page -->"
END = "<!-- end of what python -m tests.validity.set_figures page makes -->"
TEXT = (
    "**Set metrics, paired.** How often the interval of the difference of two sides' KID, CMMD and"
    " FID holds the true one, nominal 95 %; in brackets how often it lies wholly above the truth:"
    " the false-alarm rate where exactly the margin is lost (stated: 2.5 %). Gaussian features in"
    " 48 dimensions with nano's spectrum; true renders of the same prompts as reference but in the"
    f" last rows. The gate refuses KID and CMMD below {LEAST_PROMPTS['kid']} prompts and FID below"
    f" {LEAST_PROMPTS['frechet']}. With both sides exactly at the truth nothing but the statistics'"
    " second order is left and CMMD's interval is too wide, on the careful side; no model is there."
    " 2,000 repetitions of KID up to 128 prompts, else 1,000; of CMMD 1,000, at 128 prompts 2,000,"
    " at 512 300; of FID 300, at 512 150."
    " `python -m tests.validity.set_figures coverage --world worse --prompts 128 --seed 7` draws"
    " one row anew."
)
POWER_TEXT = (
    "**Power of KID,** one figure; the margin is what 0.3 loses, and the noise of both"
    " sides is nearly the same. 200 comparisons at 128 prompts, 60 at 256."
)
FAMILY_TEXT = (
    "**What more figures cost the others:** how often a loss of 0.14 of accuracy fails at a margin"
    " of 0.05 (128 prompts of 2 images) beside figures that lose nothing, by the size of Holm's"
    " family. 4,000 comparisons."
)
_RENDERS = 384
_SPECTRUM = np.exp(-np.arange(DIMENSIONS) / 3.6)
SPREAD = np.sqrt(44.0 * _SPECTRUM / _SPECTRUM.sum())
"""Standard deviations of the true renders' features: squared, they add up to 44 of 48."""
CENTRE = np.full(DIMENSIONS, np.sqrt(2.0 / DIMENSIONS))


@dataclass(frozen=True, kw_only=True)
class World:
    """How far both sides are from the true renders, and from each other.

    `own` is the share of the variance that is an image's and not its prompt's; `foreign` that the
    reference is 480 other images.
    """

    off: float = 0.5
    worse: float = 0.0
    alike: float = 0.0
    own: float = 0.3
    seeds: int = 1
    foreign: bool = False


WORLDS = {
    "A/A, both at the truth": World(off=0.0),
    "A/A, both off": World(),
    "A/A, noise nearly the same": World(alike=0.9),
    "worse": World(worse=0.3),
    "far worse": World(worse=1.5),
    "worse, noise nearly the same": World(worse=0.3, alike=0.9),
    "worse, 2 seeds a prompt": World(worse=0.3, seeds=2),
    "worse, other images as reference": World(worse=0.3, foreign=True),
}
FRECHET_WORLDS = ("A/A, both at the truth", "A/A, both off", "worse")


# What is drawn -----------------------------------------------------------------------------------


def _direction() -> Floats:
    along = np.random.default_rng(5).standard_normal(DIMENSIONS) * SPREAD
    return along / np.linalg.norm(along)


def side(amount: float) -> Gaussian:
    """The distribution of a side that misses the renders by so much."""
    shrunk = 1.0 - 0.1 * amount
    return Gaussian(CENTRE + 2.0 * amount * _direction(), np.diag((shrunk * SPREAD) ** 2), 2)


def foreign_rows() -> Floats:
    rng = np.random.default_rng(6)
    return CENTRE + SPREAD * rng.standard_normal((480, DIMENSIONS))


def draw(world: World, rng: np.random.Generator, prompts: int) -> tuple[Twins, Sample]:
    """Both sides' features, prompt by prompt, and the reference's."""

    def noise(seeds: int) -> Floats:
        return np.sqrt(world.own) * SPREAD * rng.standard_normal((prompts, seeds, DIMENSIONS))

    base = np.sqrt(1 - world.own) * SPREAD * rng.standard_normal((prompts, 1, DIMENSIONS))
    first = noise(world.seeds)
    other = world.alike * first + np.sqrt(1 - world.alike**2) * noise(world.seeds)
    made = []
    for own, amount in ((first, world.off), (other, world.off + world.worse)):
        mean = side(amount).mean
        made.append((mean + (1.0 - 0.1 * amount) * (base + own)).reshape(-1, DIMENSIONS))
    twins = Twins(made[0], made[1], np.repeat(np.arange(prompts), world.seeds))
    if world.foreign:
        return twins, Sample(foreign_rows())
    each = -(-_RENDERS // prompts)
    renders = (CENTRE + base + noise(each)).reshape(-1, DIMENSIONS)
    return twins, Sample(renders, np.repeat(np.arange(prompts), each))


# What is true ------------------------------------------------------------------------------------


def cubic_mean(a: Gaussian, b: Gaussian) -> float:
    """Mean of ``(x·y / d + 1)³`` of independent Gaussians."""
    d, m = len(a.mean), float(a.mean @ b.mean)
    both, through = float(np.sum(a.cov * b.cov)), float(a.mean @ b.cov @ a.mean)
    back = float(b.mean @ a.cov @ b.mean)
    square = m**2 + through + back + both
    cube = m**3 + 3 * m * through + 3 * (m * (both + back) + 2 * a.mean @ b.cov @ a.cov @ b.mean)
    return float(cube / d**3 + 3 * square / d**2 + 3 * m / d + 1)


def gaussian_mean(a: Gaussian, b: Gaussian) -> float:
    """Mean of ``exp(-|x - y|² / 2 sigma²)`` of independent Gaussians."""
    total = a.cov + b.cov + SIGMA**2 * np.eye(len(a.mean))
    offset = a.mean - b.mean
    log = np.linalg.slogdet(total / SIGMA**2)[1]
    return float(np.exp(-0.5 * (log + offset @ np.linalg.solve(total, offset))))


def kernel_truth(world: World, mean: Callable[[Gaussian, Gaussian], float]) -> float:
    """The difference of both sides' MMD², over all prompts that could have been drawn."""
    point = np.zeros((DIMENSIONS, DIMENSIONS))
    theirs = [Gaussian(row, point, 2) for row in foreign_rows()] if world.foreign else [side(0.0)]
    found = []
    for amount in (world.off, world.off + world.worse):
        mine = side(amount)
        found.append(mean(mine, mine) - 2 * float(np.mean([mean(mine, y) for y in theirs])))
    return found[1] - found[0]


def frechet_truth(world: World) -> float:
    """The same of the Fréchet distance, at infinitely many images."""
    theirs = fit(foreign_rows()) if world.foreign else side(0.0)
    found = [frechet_distance(side(x), theirs) for x in (world.off, world.off + world.worse)]
    return found[1] - found[0]


@dataclass(frozen=True)
class Kind:
    """A set metric's truth and its paired interval."""

    truth: Callable[[World], float]
    measure: Callable[[Twins, Sample], Interval]


def _frechet(twins: Twins, reference: Sample) -> Interval:
    return frechet_difference(twins, fit(reference.features), reference)


KINDS = {
    "KID": Kind(
        lambda w: kernel_truth(w, cubic_mean),
        lambda t, y: kernel_difference(t, y, polynomial_kernel),
    ),
    "CMMD": Kind(
        lambda w: 1000.0 * kernel_truth(w, gaussian_mean),
        lambda t, y: kernel_difference(t, y, gaussian_kernel(SIGMA), scale=1000.0),
    ),
    "FID": Kind(frechet_truth, _frechet),
}


# Tables ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Percent of repetitions whose interval holds the truth, and of those wholly above it."""

    held: float
    above: float
    repetitions: int

    def __str__(self) -> str:
        return f"{self.held:.1f} ({self.above:.1f}) of {self.repetitions}"


def measure(kind: str, world: World, prompts: int, repetitions: int, seed: int) -> Cell:
    """Coverage of one kind of interval in one world."""
    rng = np.random.default_rng([seed, prompts])
    truth, held, above = KINDS[kind].truth(world), 0, 0
    for _ in range(repetitions):
        found = KINDS[kind].measure(*draw(world, rng, prompts))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
        above += found.low > truth
    return Cell(100 * held / repetitions, 100 * above / repetitions, repetitions)


def repetitions_of(kind: str, name: str, prompts: int) -> int:
    """How often a cell is drawn; 0 where it is not."""
    drawn = kind != "FID" or name in FRECHET_WORLDS
    return REPETITIONS[kind].get(prompts, 0) if drawn else 0


def measure_world(
    name: str, kinds: Sequence[str], sizes: Sequence[int], seed: int
) -> dict[str, str]:
    """One world's cells by kind and prompts."""
    found = {}
    for prompts in sizes:
        for kind in kinds:
            if often := repetitions_of(kind, name, prompts):
                found[f"{kind} {prompts}"] = str(measure(kind, WORLDS[name], prompts, often, seed))
    return found


def verdicts(kind: str, worse: float, prompts: int, comparisons: int, seed: int) -> str:
    """How often one figure fails, is undecided and passes; its margin is what `MARGIN` loses."""
    rng = np.random.default_rng([seed, prompts, round(10 * worse)])
    margin = KINDS[kind].truth(World(worse=MARGIN, alike=0.9))
    world, found = World(worse=worse, alike=0.9), []
    for _ in range(comparisons):
        effect = KINDS[kind].measure(*draw(world, rng, prompts))
        tested = judge(effect, margin, Direction.MORE)
        found.append(decide(tested, tested.p_fail))
    kinds = (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS)
    return " / ".join(f"{100 * found.count(v) / comparisons:.0f}" for v in kinds)


def measure_power(seed: int) -> dict[str, str]:
    """Verdicts by what was planted, kind and prompts."""
    return {
        f"{kind} {prompts}, {worse:g}": verdicts(kind, worse, prompts, comparisons, seed)
        for worse in (0.0, MARGIN, 2 * MARGIN)
        for kind, prompts, comparisons in POWER
    }


def measure_family(seed: int, comparisons: int = 4000) -> dict[str, str]:
    """How often a loss of 0.14 of accuracy fails at a margin of 0.05, by the family's size.

    128 prompts of 2 images, of which 6 % turn either way by chance; the other figures lose nothing.
    """
    rng, size = np.random.default_rng(seed), (128, 2, comparisons)
    lost = rng.random(size) < 0.14
    turned = (rng.random(size) < 0.06).astype(float) - (rng.random(size) < 0.06)
    effect = mean_bounds((turned - lost).sum(axis=1), np.full(128, 2.0), bounds=(-1.0, 1.0))
    p = []
    for value, low, high in zip(effect.value, effect.low, effect.high, strict=True):
        interval = Interval(float(value), float(low), float(high), 256, 128)
        p.append(judge(interval, 0.05, Direction.LESS).p_fail)
    return {
        f"{m} figures": f"{100 * np.mean([holm([x, *[1.0] * (m - 1)])[0] < 0.025 for x in p]):.1f}"
        for m in (1, 3, 4, 5, 7)
    }


# The page ----------------------------------------------------------------------------------------


def section() -> str:
    """What stands between the page's marks, from the kept cells."""
    rows = read(TABLE)
    lines = [
        TEXT,
        "",
        f"| truth | prompts | {' | '.join(KINDS)} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in WORLDS:
        for prompts in SIZES:
            cells = [rows[name].get(f"{kind} {prompts}", "–").split(" of ")[0] for kind in KINDS]
            lines.append(f"| {name} | {prompts} | {' | '.join(cells)} |")
    if "power" in rows:
        lines += [
            "",
            POWER_TEXT,
            "",
            "| metric, prompts, planted | fails / undecided / passes, % |",
        ]
        lines += ["| --- | ---: |", *(f"| {k} | {v} |" for k, v in _cells(rows, "power"))]
    lines += ["", FAMILY_TEXT, "", "| family | loss found, % |", "| --- | ---: |"]
    lines += [f"| {k} | {v} |" for k, v in _cells(rows, "family")]
    made = rows["family"]["made"]
    lines += ["", f"Made {made['at']}, seed {SEED}, on {made['cpu_model']}, 1 thread."]
    return "\n".join(lines)


def _cells(rows: dict[str, dict[str, str]], row: str) -> list[tuple[str, str]]:
    return [(key, cell) for key, cell in rows[row].items() if key != "made"]


def write() -> None:
    """Put the section into the page."""
    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{before.rstrip()}\n\n{BEGIN}\n\n{section()}\n\n{END}\n\n{after.lstrip()}"
    write_atomic(PAGE, made.encode())


def main() -> None:
    """Measure chosen cells, and keep them; or write the page from what was kept."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.validity.set_figures", description=__doc__, formatter_class=form
    )
    parser.add_argument("what", choices=("coverage", "power", "family", "page"))
    parser.add_argument("--world", action="append", choices=tuple(WORLDS), help="default: all")
    parser.add_argument("--kind", action="append", choices=tuple(KINDS), help="default: all")
    parser.add_argument("--prompts", action="append", type=int, choices=SIZES, help="default: all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--keep", action="store_true", help="for the page")
    given = parser.parse_args()
    if given.what == "page":
        write()
        return
    for name, cells in _asked(given):
        print(name, *(f"  {key}: {cell}" for key, cell in cells.items()), sep="\n", flush=True)
        if given.keep:
            kept = {k: v for k, v in read(TABLE).get(name, {}).items() if k != "made"}
            keep(TABLE, name, kept | cells)


def _asked(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, str]]]:
    if given.what == "power":
        yield "power", measure_power(given.seed)
    elif given.what == "family":
        yield "family", measure_family(given.seed)
    else:
        kinds = tuple(KINDS) if given.kind is None else given.kind
        sizes = SIZES if given.prompts is None else given.prompts
        for name in tuple(WORLDS) if given.world is None else given.world:
            yield name, measure_world(name, kinds, sizes, given.seed)


if __name__ == "__main__":
    main()
