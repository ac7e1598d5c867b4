"""Run a small plan on the fake backend in a process of its own, to be killed by the tests."""

import sys
from pathlib import Path

from sd35bench.study.store import Study
from sd35bench.workers.process import run_plan
from tests.studies.fakes import fake_load, fake_plan


def main(root: str, count: int, delay_s: float, batch_size: int) -> None:
    study = Study.open(Path(root), "killed", create=True)
    plan = fake_plan(fake_load(delay_s=delay_s), count, batch_size=batch_size)
    run_plan(plan, study)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
