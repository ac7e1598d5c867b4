"""`sd35bench tune` on the fake backend, scored by a rule in place of a model; also as a process.

That process starts none of its own.

The rule: more steps are better up to 8, cfg 2 is best, and prompts are hard or easy for all alike.
"""

import hashlib
import sys

import sd35bench.cli.tune as verb
from sd35bench.cli import main
from sd35bench.study.store import Score, Study
from sd35bench.types import Record, Request, Status
from sd35bench.workers import process
from tests.studies.in_process import HereWorker


def score(study: Study) -> None:
    """Score what is missing, as the verb's own scorer would."""
    there = {s.key for s in study.scores()}
    missing = [r for r in study.records() if r.status is Status.OK and r.trial.key not in there]
    study.append_scores("prompt_accuracy", [_score(r) for r in missing])


def accuracy(steps: int, cfg: float) -> float:
    """The rule's truth."""
    return {1: 0.3, 2: 0.5, 4: 0.8}.get(steps, 0.95) - 0.1 * abs(cfg - 2)


def _score(record: Record) -> Score:
    request = record.trial.request
    easy, own = _uniform(request.prompt), _uniform(f"{request}")
    value = float(0.7 * easy + 0.3 * own < accuracy(request.steps, request.cfg))
    return Score(
        metric="prompt_accuracy", key=record.trial.key, image=str(record.image), value=value
    )


def _uniform(text: str | Request) -> float:
    return int.from_bytes(hashlib.sha256(str(text).encode()).digest()[:6], "big") / 2**48


if __name__ == "__main__":
    verb.score_missing = score
    process.WorkerProcess = HereWorker
    sys.exit(main(["tune", *sys.argv[1:]]))
