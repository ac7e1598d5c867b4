"""Both sides of a comparison, run, scored and compared by the commands that a user types.

The only thing that differs is the environment of the worker processes: with `SD35BENCH_PLANT` set
they find a planted backend behind the kind that was asked for.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35bench.cli import main
from sd35bench.gate.rerun import rerun
from sd35bench.stats.verdicts import Verdict
from sd35bench.study.store import Study
from tests.validity_runs.defects import Defect

__all__ = ["Amount", "alternate", "command", "judge", "planted", "run_side"]

SITE = Path(__file__).parent / "site"
ROOT = Path(__file__).parents[2]
SETTING = ("model=nano", "steps=8", "cfg=4", "threads=1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How many images a side has: `prompts` x `seeds` in batches, and `alone` of them once more.

    At `batch` 1 every image is made alone and `alone` says nothing.
    """

    prompts: int
    seeds: int
    batch: int
    alone: int = 0

    @property
    def images(self) -> int:
        """Images of one side."""
        return self.prompts * self.seeds + (self.alone if self.batch > 1 else 0)

    def overrides(self, seed: int) -> list[str]:
        """Command-line words; seed 0 is left to the defect that ignores seeds."""
        seeds = [str(self.seeds * seed + 1 + i) for i in range(self.seeds)]
        words = [
            f"prompts.limit={self.prompts}",
            f"prompts.seed={seed}",
            f"seed={','.join(seeds)}",
            f"batch_size={self.batch}",
        ]
        return words if self.batch == 1 else [*words, f"timed_limit={self.alone}"]


@contextlib.contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have worker processes that start meanwhile find the defect, or none."""
    before = {k: os.environ.get(k) for k in ("SD35BENCH_PLANT", "PYTHONPATH")}
    _plant(name)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def run_side(
    root: Path,
    study: str,
    amount: Amount,
    seed: int,
    *,
    defect: Defect | None,
    backend: str,
    words: Callable[[Path], list[str]] | None = None,
) -> Study:
    """Run one side below `root`, asked for `words` too; what is there is not made again.

    Raises: RuntimeError where the command ended with neither 0 nor 3 (some trials failed).
    """
    checkpoint = None if defect is None else defect.checkpoint(root)
    own = [] if checkpoint is None else [f"model.path={checkpoint}"]
    more = [] if words is None else words(root)
    every = [*SETTING, *amount.overrides(seed), f"backend={backend}", *own, *more]
    with planted(None if defect is None or defect.patch is not None else defect.name):
        command("run", "-m", *every, f"study={study}", f"results_dir={root}")
    return Study.open(root, study)


def alternate(baseline: Study, candidate: Study, rounds: int, defect: Defect) -> None:
    """Start both sides `rounds` more times in turn, the candidate's with its defect."""

    def told(_number: int, _of: int, study: str) -> None:
        _plant(defect.name if study == candidate.name else None)

    with planted(None):
        rerun(baseline, candidate, rounds, told)


def judge(root: Path, baseline: str, candidate: str, policy: str) -> tuple[dict[str, Any], int]:
    """Compare two studies; the document and the exit code.

    Raises: RuntimeError where a side was cut off: no defect takes images away, and a gate that
    fails for the missing ones would have caught nothing.
    """
    words = ("--policy", policy, "--results-dir", str(root))
    document, code = command("compare", baseline, candidate, *words, codes=(0, 1))
    coverage = document["gate"]["coverage"]
    if coverage["verdict"] == Verdict.FAIL:
        raise RuntimeError(f"{candidate} is incomplete, make it again: {coverage['reason']}")
    return document, code


def command(*words: str, codes: tuple[int, ...] = (0, 3)) -> tuple[dict[str, Any], int]:
    """Call the command with --json; its document and exit code.

    Raises: RuntimeError for another exit code.
    """
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main([*words, "--json"])
    if code not in codes:
        raise RuntimeError(f"sd35bench {' '.join(words)} ended with {code}: {out.getvalue()}")
    return json.loads(out.getvalue()), code


def _plant(name: str | None) -> None:
    if name is None:
        os.environ.pop("SD35BENCH_PLANT", None)
        return
    os.environ["SD35BENCH_PLANT"] = name
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (SITE, ROOT)))
