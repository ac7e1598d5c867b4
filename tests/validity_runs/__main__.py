"""The part of docs/validity.md that needs real images on nano.

    python -m tests.validity_runs defects                 every planted defect against a baseline
    python -m tests.validity_runs defects --defect guidance --seed 7    one, from a fresh seed
    python -m tests.validity_runs alarms                  real reruns against each other
    python -m tests.validity_runs recommend               small budgets against the whole grid
    python -m tests.validity_runs page                    the page's tables, from results/

Images are kept below --results-dir, so that a command that was cut off goes on where it ended.
`--keep` writes what was found into the files that the page is made from.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.validity_runs import alarms, page, truth
from tests.validity_runs.defects import CONTROL, DEFECTS
from tests.validity_runs.kept import keep
from tests.validity_runs.matrix import run_cell

SEED = 1


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m tests.validity_runs", description=__doc__, formatter_class=form
    )
    parser.add_argument("table", choices=("defects", "alarms", "recommend", "page"))
    names = (CONTROL.name, *DEFECTS)
    parser.add_argument("--defect", action="append", choices=names, help="default: all")
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and images")
    parser.add_argument("--results-dir", type=Path, help="default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="write results/*.json")
    return parser


def main() -> None:
    """Run what was asked for and print its table."""
    given = _parser().parse_args()
    if given.table == "page":
        page.write()
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if given.results_dir is None else given.results_dir.resolve()
        print(
            {"defects": _defects, "alarms": _alarms, "recommend": _recommend}[given.table](
                given, root
            )
        )


def _defects(given: argparse.Namespace, root: Path) -> str:
    known = {CONTROL.name: CONTROL, **DEFECTS}
    cells = {}
    for name in known if given.defect is None else given.defect:
        print(f"{name} …", file=sys.stderr, flush=True)
        cells[name] = run_cell(root, given.seed, known[name])
        if given.keep:
            keep("defects", name, cells[name])
    return page.matrix_table(cells)


def _alarms(given: argparse.Namespace, root: Path) -> str:
    found = alarms.measure(root, given.seed)
    if given.keep:
        keep("alarms", "starts", found)
    return page.alarm_table({"starts": found})


def _recommend(given: argparse.Namespace, root: Path) -> str:
    found = truth.measure(root, given.seed)
    if given.keep:
        keep("recommend", "grid", found)
    return page.choice_table({"grid": found})


if __name__ == "__main__":
    main()
