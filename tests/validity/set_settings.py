"""What set metrics say of settings whose accuracy is known: where their margins come from.

    python -m tests.validity.set_settings STUDY --results-dir DIR --against 28,4

STUDY was scored with `kid` and `fid`. Each setting is held against one of them, image by image, as
the gate holds a candidate against its baseline.
"""

import argparse
from pathlib import Path

import numpy as np

from sd35bench.gate.policy import MetricMargin
from sd35bench.gate.set_figures import set_figure
from sd35bench.gate.sides import Side, match_pairs, read_sides
from sd35bench.stats.clustered import mean_t
from sd35bench.stats.intervals import Interval
from sd35bench.stats.verdicts import Direction
from sd35bench.study.store import Study

METRICS = ("kid_nano", "fid_nano")


def rows(sides: list[Side], steps: int, cfg: float) -> list[list[str]]:
    """One row a setting: steps and cfg, then the difference of accuracy and of each set metric."""
    by = {(s.setting["steps"], s.setting["cfg"]): s for s in sides}
    before = by[steps, cfg]
    found = []
    for key in sorted(by):
        if key == (steps, cfg):
            continue
        after, cells = by[key], []
        columns = [side.metrics["prompt_accuracy"] for side in (before, after)]
        pairs = match_pairs(before, after, (np.isfinite(columns[0]), np.isfinite(columns[1])))
        lost = columns[1][pairs.candidate] - columns[0][pairs.baseline]
        cells.append(_told(mean_t(lost, pairs.clusters, bounds=(-1.0, 1.0))))
        for name in METRICS:
            figure = set_figure(name, MetricMargin(0.0, Direction.MORE), before, after)
            cells.append(_told(figure.effect) if figure.effect is not None else str(figure.note))
        found.append([f"{key[0]} steps, cfg {key[1]:g}", *cells])
    return found


def _told(effect: Interval) -> str:
    assert effect.low is not None
    assert effect.high is not None
    return f"{effect.value:+.3g} ({effect.low:+.3g} to {effect.high:+.3g})"


def main() -> None:
    """Print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.validity.set_settings", description=__doc__, formatter_class=form
    )
    parser.add_argument("study")
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--against", default="28,4", help="steps,cfg")
    given = parser.parse_args()
    steps, cfg = given.against.split(",")
    sides = read_sides(Study.open(given.results_dir, given.study))
    print("| against " + given.against + " | accuracy | " + " | ".join(METRICS) + " |")
    print("| --- | ---: |" + " ---: |" * len(METRICS))
    for row in rows(sides, int(steps), float(cfg)):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
