"""`python -m tests.reliability`: run the experiments, then write docs/reliability.md.

Each experiment is a process of its own. Two share the machine at a time, beside the one that
mostly sleeps; the load comes last and alone.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.reliability.experiment import Experiment, Result, measure
from tests.reliability.experiments import EXPERIMENTS, named
from tests.reliability.page import page

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
LIMIT_S = 3600


def main(arguments: Sequence[str]) -> int:
    """Returns 1 where a bound was passed or an experiment did not end."""
    asked = _parser().parse_args(arguments)
    if asked.one is not None:
        return _one(named(asked.one), asked.scale, asked.results)
    chosen = [each for each in EXPERIMENTS if asked.only is None or each.name in asked.only]
    started = time.monotonic()
    shared = [each for each in chosen if each.parallel]
    with ThreadPoolExecutor(asked.jobs) as jobs, ThreadPoolExecutor(1) as asleep:
        codes = [
            (asleep if each.sleeps else jobs).submit(_start, each, asked.scale, asked.results)
            for each in shared
        ]
        failed = sum(code.result() != 0 for code in codes)
    failed += sum(
        _start(each, asked.scale, asked.results) != 0 for each in chosen if not each.parallel
    )
    _write(asked.results, asked.page)
    print(f"{len(chosen)} experiments in {time.monotonic() - started:.0f} s, {failed} failed")
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    names = [each.name for each in EXPERIMENTS]
    parser.add_argument("--only", nargs="*", choices=names, help="these alone; none: the page")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of n and durations; 1: the page's"
    )
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--one", choices=names, help=argparse.SUPPRESS)
    return parser


def _start(experiment: Experiment, scale: float, results: Path) -> int:
    command = [sys.executable, "-m", "tests.reliability", "--one", experiment.name]
    command += ["--scale", f"{scale}", "--results", f"{results.resolve()}"]
    return subprocess.run(command, cwd=ROOT, timeout=LIMIT_S, check=False).returncode


def _one(experiment: Experiment, scale: float, results: Path) -> int:
    """Run one here. A result of an earlier run goes first: a crash must not leave it standing."""
    (results / f"{experiment.name}.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        result = measure(experiment, scale, Path(folder))
    result.write(results)
    said = "holds" if result.holds else "; ".join(["BROKEN", *result.broken])
    print(f"{experiment.name}: {said} ({result.seconds:.0f} s)", flush=True)
    return int(not result.holds)


def _write(results: Path, to: Path) -> None:
    there = [path for each in EXPERIMENTS if (path := results / f"{each.name}.json").exists()]
    found = {result.name: result for result in map(Result.read, there)}
    to.write_text(page(EXPERIMENTS, found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
