"""How far `tune` ends from the truth, on a study that has the whole grid: no image is made.

    sd35bench run -m study=truth steps=2,4,8,16,28 cfg=1,2,4,7,12 prompts.split=tune \\
        prompts.limit=256
    python -m tests.tune_truth study=truth steps=2,4,8,16,28 cfg=1,2,4,7,12 prompts.limit=256

The search draws its prompts in another order per seed and is shown what the study has for what it
asks; the truth is the mean over all of the study's prompts. Prints a Markdown table: regret (true
quality lost against the best setting), images, and how often the regret is within the margin.
On nano with 2 cores the 6,400 images take about half an hour, the searches seconds each.
"""

import contextlib
import sys
from collections.abc import Sequence

import optuna

from sd35bench.cli.compare import score_missing
from sd35bench.config.tune import read_tuning
from sd35bench.errors import ConfigError
from sd35bench.plan import Plan
from sd35bench.store import Study
from sd35bench.tune.lab import StudyLab
from sd35bench.tune.search import Search
from sd35bench.tune.session import tune

SEEDS = 10


def measure(overrides: Sequence[str], seed: int) -> tuple[str, float, float, int, int]:
    """One search: what it chose, its regret, the margin, images used, images of the full grid.

    Raises: ConfigError where the study lacks what the search asks for.
    """
    tuning = read_tuning([*overrides, f"order_seed={seed}"])
    study = Study.open(tuning.job.results_dir, tuning.job.study)
    done = study.done_keys()

    def look_up(plan: Plan) -> None:
        missing = sum(trial.key not in done for trial in plan.trials)
        if missing:
            raise ConfigError(
                f"study {study.name!r} lacks {missing} images of the grid; run it whole"
            )

    lab = StudyLab(study, tuning.space, tuning.sources, look_up, lambda: None)
    search = Search(
        tuning.space,
        optuna.storages.InMemoryStorage(),
        objectives=lab.objectives,
        identity=lab.identity,
        whole=tuning.budget.trials >= tuning.space.size,
        seed=seed,
    )
    found = tune(
        lab, search, lambda _: contextlib.nullcontext(False), tuning.budget, tuning.profile
    )
    if found.winner is None:
        raise ConfigError(f"no setting was found: {found.stopped}")
    truth = lab.seen([tuning.space.point(i) for i in range(tuning.space.size)])
    chosen = found.found.points[found.winner]
    regret = max(seen.mean for seen in truth.values()) - truth[chosen].mean
    exhaustive = tuning.space.size * lab.prompts * lab.images_per_prompt
    name = ", ".join(f"{k} {v}" for k, v in tuning.space.named(chosen).items())
    return name, regret, lab.margin(tuning.profile), found.images, exhaustive


def main(overrides: Sequence[str], seeds: int = SEEDS) -> int:
    """Print the table; 0 where at least 9 of 10 searches are within the margin."""
    study = read_tuning(overrides).job
    score_missing(Study.open(study.results_dir, study.study))
    good = 0
    print(
        "| seed | chosen | regret | images | of the grid's |\n| ---: | --- | ---: | ---: | ---: |"
    )
    for seed in range(seeds):
        name, regret, margin, images, exhaustive = measure(overrides, seed)
        good += regret <= margin + 1e-9
        print(f"| {seed} | {name} | {regret:.3f} | {images} | {100 * images / exhaustive:.1f} % |")
    print(f"\nwithin the margin of {margin:g}: {good} of {seeds}")
    return 0 if good >= 0.9 * seeds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
