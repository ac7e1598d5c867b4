"""The upper part of docs/validity.md: every table with what it means, each below a mark of its own.

Numbers are measured as the page is written; only the words are kept here. A table that was not
asked for stays as it stands.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sd35bench.disk import write_atomic
from sd35bench.stats.latency import LEAST_FOR_MEAN
from tests.validity.alarms import alarm_table, power_table
from tests.validity.coverage import (
    OF_BOOTSTRAPS,
    OF_SERIES,
    REPETITIONS,
    coverage_table,
    quantile_table,
    ratio_table,
)
from tests.validity.decisions import decision_table, planned_table
from tests.validity.decisions import power_table as decision_power
from tests.validity.drawn import BUSY_SHARE, BUSY_SHIFT, BUSY_STAY, FAILURES, MEANS, SEEDS, SHARES
from tests.validity.kinds import FAILURE_KINDS, MEAN_KINDS, SHARE_KINDS
from tests.validity.latencies import (
    LEAST_IMAGES,
    OF_COMPARE,
    SIGMA,
    SLOW,
    TIMES,
    latency_table,
)
from tests.validity.latencies import REPETITIONS as OF_LATENCIES
from tests.validity.looks import looks_table
from tests.validity.population import REFERENCE, population, population_table
from tests.validity.population import REPETITIONS as OF_POPULATION

Rows = Iterable[list[str]]
PAGE = Path(__file__).parents[2] / "docs" / "validity.md"
MARK = "<!-- made by python -m tests.validity page {} --seed {} -->"
END = "<!-- end of what python -m tests.validity page makes -->"


def tables(seed: int) -> dict[str, Callable[[], Iterator[list[str]]]]:
    """Every table by name, from one seed; a row of one cell is a remark below its table."""
    return {
        "coverage": lambda: coverage_table("mean of", MEANS, MEAN_KINDS, seed),
        "shares": lambda: coverage_table("share", SHARES, SHARE_KINDS, seed),
        "failures": lambda: coverage_table(
            "failures, baseline → candidate", FAILURES, FAILURE_KINDS, seed
        ),
        "ratios": lambda: ratio_table(seed),
        "quantiles": lambda: quantile_table(seed),
        "latencies": lambda: latency_table(seed),
        "population": lambda: population_table(seed),
        "alarms": lambda: alarm_table(seed),
        "power": lambda: power_table(seed),
        "decisions": lambda: decision_table(seed),
        "decided": lambda: decision_power(seed),
        "planned": lambda: planned_table(seed),
        "looks": lambda: looks_table(seed),
    }


def _introductions() -> dict[str, str]:
    """What stands above each table."""
    made = population().made
    return {
        "coverage": (
            f"**Means and paired differences.** {REPETITIONS:,} repetitions, of the bootstraps"
            f" {OF_BOOTSTRAPS:,}; {SEEDS} images a prompt whose values correlate by 1/2. *Chosen*"
            " is what every verdict rests on: Student's t over prompts, whose ends follow the"
            " skewness outwards. The last columns are mutants: ends that also follow it inwards,"
            " and images taken for independent."
        ),
        "shares": "**Shares,** the same interval.",
        "failures": "**Paired differences of failure rates,** which are rare; the same interval.",
        "ratios": "**Ratios of sums,** over the same prompts.",
        "quantiles": (
            f"**Quantiles,** over prompts and over time ({OF_SERIES:,} repetitions): how many of"
            " the intervals that were *told* hold the truth, and how many were. The others are"
            " refused, as n is worth too few unrelated images where neighbours are alike. Busy"
            f" spells: {BUSY_SHARE:.0%} of the time, {BUSY_STAY} images long on average, the times"
            f" are {BUSY_SHIFT:g} standard deviations longer; neighbours then say less of how far"
            " likeness reaches."
        ),
        "latencies": (
            f"**Latencies of few images.** {OF_LATENCIES:,} repetitions, of `compare` {OF_COMPARE}:"
            f" logs with a spread of {SIGMA:.0%}, one image in {1 / SLOW:.0f} takes {TIMES:g} times"
            " as long; *neighbours* is the correlation of consecutive images, *starts apart* the"
            " spread between process starts; n: images of the setting in all its starts (of"
            f" `compare`: in each). –: not told, as below {LEAST_IMAGES} images, a mean below"
            f" {LEAST_FOR_MEAN}. What one start gives is held against that run's own truth, and its"
            " caption says so; the last three kinds are what it would be as a statement on any"
            " start, and two mutants."
        ),
        "population": (
            "**Brute-forced truth.** The values of every setting of a grid on nano"
            f" ({len(population().values)} settings, 256 prompts, an image each) are the whole"
            f" population; prompts are drawn from it with replacement, {OF_POPULATION:,} times, and"
            " intervals are held against the population's own value. Differences and ratios are"
            f" against {REFERENCE[0]} steps, cfg {REFERENCE[1]:g}. Values made {made['at']} at"
            f" commit {made['commit'][:10]} on {made['cpu_model']}, {made['threads']} thread, by"
            f" `{made['command']}`, and kept by `python -m tests.validity.population truth`."
        ),
        "alarms": (
            "**A/A: false alarms** in 1,000 comparisons each. *At the margin*: every figure loses"
            " exactly what is allowed."
        ),
        "decisions": (
            "**Which setting to name.** Two settings, the slow one right in 80 % of images, the"
            " cheap one truly worse by more than the margin: how often `recommend` names the cheap"
            " one, as shown or provisionally, and how often the rule before this one did."
        ),
        "decided": (
            "**Equal quality:** in how many % of studies the cheap setting is named definitively."
        ),
        "planned": (
            "**How many?** `recommend --plan` and `prompts.limit=auto`: the size that a pilot of so"
            " many prompts plans (median), made on top of the pilot, and how often the rule then"
            " decides where all settings are truly equal. *Wrongly*: how often it definitively"
            " names a setting that loses the margin and 0.001 more, where all but the best do."
        ),
        "looks": (
            "**Looking again.** How often the first definitive answer is wrong where every cheaper"
            " setting loses the margin and 0.001 more, and how often and when one comes where all"
            " are equal. Whoever means to look more than once fixes the number of prompts first:"
            " `recommend STUDY --looks N` keeps it in the study, and every look up to N then has a"
            " level of its own (`sd35bench/stats/looks.py`). Without it the stated 5 % is that of"
            " one look. `tune` knows its prompts, and its looks at 8, 16, 32 … have these levels"
            " too. Its races hold many settings, to which the rule's 5 % does not extend: in the"
            ' worst case (`python -m tests.validity.races`) 3 of 40 said "shown" wrongly.'
        ),
        "power": (
            "**Power,** one figure, 400 comparisons each. Starts of a couple share the machine's"
            " state (10 % between couples) but for 2 %."
        ),
    }


def markdown(rows: Rows) -> Iterator[str]:
    """Lines of one table; its remarks follow it, a paragraph each."""
    for number, row in enumerate(rows):
        if len(row) == 1:
            yield f"\n{row[0]}"
            continue
        yield f"| {' | '.join(row)} |"
        if number == 0:
            yield f"| --- | {' | '.join('---:' for _ in row[1:])} |"


def section(name: str, seed: int) -> str:
    """Measure one table: its words, its rows, its remarks."""
    return "\n".join([_introductions()[name], "", *markdown(tables(seed)[name]())])


def split(text: str) -> tuple[str, dict[str, str], str]:
    """What of a page stands above the tables, the tables with their marks, what stands below."""
    above, _, below = text.partition(END)
    pattern = re.escape(MARK).replace(r"\{\}", r"(\w+)")
    starts = [(m.start(), m[1]) for m in re.finditer(pattern, above)]
    ends = [*(start for start, _ in starts[1:]), len(above)][: len(starts)]
    found = {n: above[a:b].strip() for (a, n), b in zip(starts, ends, strict=True)}
    return above[: starts[0][0] if starts else len(above)].rstrip(), found, below.strip()


def write(names: Iterable[str], seed: int) -> None:
    """Measure these tables and put them into the page, each in its place."""
    made = {name: f"{MARK.format(name, seed)}\n\n{section(name, seed)}" for name in names}
    above, found, below = split(PAGE.read_text("utf-8"))
    found |= made
    parts = [found[name] for name in tables(seed) if name in found]
    write_atomic(PAGE, ("\n\n".join([above, *parts, END, below]) + "\n").encode())
