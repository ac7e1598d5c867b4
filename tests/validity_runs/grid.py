"""The grid that is run whole, once: what it says of every setting is taken for the truth.

25 settings on 256 prompts, every image made alone and so timed: 6,400 images by the compiled core,
two workers of one core each. Both `tune` (`searches`) and `recommend` (`choices`) are held against
it, and both only read it: no image is made for either. The same in the words that a user types:

    sd35bench run -m study=truth model=nano backend=core threads=1 workers=2 steps=2,4,8,16,28 \\
        cfg=1,2,4,7,12 prompts.split=tune prompts.limit=256
    sd35bench score truth

The truth has an error of its own, that of 256 prompts. A choice made on some of these prompts is
favoured by it, as chance that helped a setting counts on both sides; so each choice is also held
against the prompts that it did not see, where the best of 25 noisy means is too good instead.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd35bench.cli.study import open_study
from sd35bench.errors import ConfigError
from sd35bench.study.store import Score, Study
from sd35bench.types import Record, Session
from tests.validity_runs.sides import command

__all__ = ["BACKEND", "PROMPTS", "SEED", "View", "grid_words", "open_grid", "run_grid"]

BACKEND = "core"
WORKERS = 2
AXES = ("steps=2,4,8,16,28", "cfg=1,2,4,7,12")
PROMPTS = 256
SEED = 0


class View:
    """A study that is read once, and may be narrowed to some of its prompts."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._records = study.records()
        self._scores = study.scores()
        self._sessions = study.sessions()

    def narrowed(self, prompts: Iterable[str]) -> "View":
        """The same study as if only these prompts had been run."""
        kept = frozenset(prompts)
        part = View.__new__(View)
        part._study, part._sessions = self._study, self._sessions
        part._records = [r for r in self._records if r.trial.request.prompt in kept]
        keys = {r.trial.key for r in part._records}
        part._scores = [s for s in self._scores if s.key in keys]
        return part

    def records(self) -> list[Record]:
        return self._records

    def scores(self) -> list[Score]:
        return self._scores

    def sessions(self) -> dict[str, Session]:
        return self._sessions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def grid_words(root: Path, seed: int, prompts: int, backend: str) -> list[str]:
    """Command-line words of the grid: for `run` and for `tune` alike."""
    return [
        f"study={_name(seed)}",
        "model=nano",
        f"backend={backend}",
        "threads=1",
        *AXES,
        f"prompts.limit={prompts}",
        f"prompts.seed={seed}",
        f"seed={seed}",
        f"results_dir={root}",
    ]


def run_grid(root: Path, seed: int, prompts: int = PROMPTS, backend: str = BACKEND) -> Study:
    """Run and score what is missing of the grid below `root`."""
    words = grid_words(root, seed, prompts, backend)
    command("run", "-m", *words, "prompts.split=tune", f"workers={WORKERS}")
    command("score", _name(seed), "--results-dir", str(root))
    return Study.open(root, _name(seed))


def open_grid(root: Path, seed: int) -> View:
    """Open a grid that was run.

    Raises: ConfigError where it was not run or not scored; the message has the command.
    """
    study = open_study(root, _name(seed))
    if not study.scores():
        raise ConfigError(
            f"study {study.name!r} has no scores: python -m tests.validity_runs grid"
            f" --seed {seed} --results-dir {root}"
        )
    return View(study)


def _name(seed: int) -> str:
    return "truth" if seed == SEED else f"truth-{seed}"
