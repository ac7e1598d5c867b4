"""The part of docs/validity.md that needs real images on nano.

    python -m tests.validity_runs defects                 every planted defect against a baseline
    python -m tests.validity_runs defects --defect guidance --seed 7    one, from a fresh seed
    python -m tests.validity_runs systematic              what changes every image by a little
    python -m tests.validity_runs alarms                  real reruns against each other
    python -m tests.validity_runs grid                    every setting on 256 prompts: the truth
    python -m tests.validity_runs tune                    ten searches per profile against it
    python -m tests.validity_runs recommend               small budgets against it
    python -m tests.validity_runs page                    the page's tables, from results/

Images are kept below --results-dir, so that a command that was cut off goes on where it ended.
`--keep` writes what was found into the files that the page is made from. `tune` and `recommend`
make no image: they read the study that `grid` made.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.validity_runs import alarms, choices, grid, page, searches, truth
from tests.validity_runs.defects import CONTROL, DEFECTS, SYSTEMATIC
from tests.validity_runs.kept import keep
from tests.validity_runs.matrix import run_cell

SEED = 1


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.validity_runs", description=__doc__, formatter_class=form
    )
    parser.add_argument("table", choices=(*_TABLES, "page"))
    names = (CONTROL.name, *DEFECTS, *SYSTEMATIC)
    parser.add_argument("--defect", action="append", choices=names, help="default: all")
    parser.add_argument(
        "--seed", type=int, help=f"of prompts and images; default: {SEED}, the grid's {grid.SEED}"
    )
    parser.add_argument(
        "--first-search", type=int, default=searches.FIRST, help="seed of tune's first search"
    )
    parser.add_argument(
        "--results-dir", type=Path, help="default: a temporary folder, for the grid ./results"
    )
    parser.add_argument("--keep", action="store_true", help="write results/*.json")
    return parser


def main() -> None:
    """Run what was asked for and print its table."""
    given = _parser().parse_args()
    if given.table == "page":
        page.write()
        return
    on_grid = given.table in ("grid", "tune", "recommend")
    if given.seed is None:
        given.seed = grid.SEED if on_grid else SEED
    with tempfile.TemporaryDirectory() as temporary:
        own = Path("results" if on_grid else temporary)
        root = own if given.results_dir is None else given.results_dir
        print(_TABLES[given.table](given, root.resolve()))


def _defects(given: argparse.Namespace, root: Path) -> str:
    known = {CONTROL.name: CONTROL, **DEFECTS}
    cells = {}
    for name in known if given.defect is None else given.defect:
        _say(name)
        cells[name] = run_cell(root, given.seed, known[name])
        _keep(given, "defects", name, cells[name])
    return page.matrix_table(cells)


def _systematic(given: argparse.Namespace, root: Path) -> str:
    cells = {}
    for name in SYSTEMATIC if given.defect is None else given.defect:
        _say(name)
        cells[name] = run_cell(root, given.seed, SYSTEMATIC[name])
        _keep(given, "systematic", name, cells[name])
    return page.systematic_table(cells)


def _alarms(given: argparse.Namespace, root: Path) -> str:
    found = alarms.measure(root, given.seed)
    _keep(given, "alarms", "starts", found)
    return page.alarm_table({"starts": found})


def _grid(given: argparse.Namespace, root: Path) -> str:
    grid.run_grid(root, given.seed)
    found = truth.document(grid.open_grid(root, given.seed))
    _keep(given, "grid", "truth", found)
    return page.grid_table({"truth": found})


def _tune(given: argparse.Namespace, root: Path) -> str:
    rows = {}
    for name in searches.PROFILES:
        _say(name)
        rows[name] = searches.measure(root, given.seed, name, given.first_search)
        _keep(given, "tune", name, rows[name])
    return page.search_table(rows)


def _recommend(given: argparse.Namespace, root: Path) -> str:
    rows = {}
    for budget in choices.BUDGETS:
        _say(f"{budget} prompts")
        rows[str(budget)] = choices.measure(root, given.seed, budget)
        _keep(given, "recommend", str(budget), rows[str(budget)])
    return page.choice_table(rows)


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def _keep(given: argparse.Namespace, table: str, row: str, found: dict[str, Any]) -> None:
    if given.keep:
        keep(table, row, found)


_TABLES = {
    "defects": _defects,
    "systematic": _systematic,
    "alarms": _alarms,
    "grid": _grid,
    "tune": _tune,
    "recommend": _recommend,
}


if __name__ == "__main__":
    main()
