"""Clocks that jump between runs, by seconds and by years: which record is the newest?"""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from sd35bench.study.store import Study
from tests.reliability.experiment import Experiment, Figure
from tests.remote.fault_server import serving
from tests.remote.faults import Fault
from tests.remote.hosted import hosted_plan
from tests.remote.hosted import run as run_hosted
from tests.study.test_store import newest_survives

STEPS = 1000
RUNS = 20
SEEDS = 3
EPOCH_S = 1_900_000_000
JUMPS_S = (1, 60, 3600, 86_400, 10 * 365 * 86_400)
HOSTED_RUNS = 20


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Studies of runs under jumping clocks, then reruns of a service's study under one."""
    draw = random.Random(13)
    steps, wrong, seen = 0, 0, []
    while steps < STEPS * scale:
        clock_s, runs = EPOCH_S, []
        for _ in range(RUNS):
            clock_s += draw.choice((-1, 1)) * draw.choice(JUMPS_S)
            outcomes = [draw.random() < 0.3 for _ in range(SEEDS)]
            runs.append((max(1, clock_s), draw.random() < 0.5, outcomes))
        root = folder / f"{steps}"
        root.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            if not newest_survives(root, patch, runs):
                wrong += 1
                seen.append(f"runs {runs}")
        steps += RUNS
    creates, most = _hosted(folder, draw)
    return [
        Figure(name="clock steps", value=steps, least=STEPS * scale),
        Figure(name="studies in which another record counted than the last", value=wrong, most=0),
        Figure(name="hosted runs under a jumping clock", value=HOSTED_RUNS),
        Figure(name="predictions of theirs", value=creates),
        Figure(name="most creates of one input", value=most, most=1),
    ], seen


def _hosted(folder: Path, draw: random.Random) -> tuple[int, int]:
    """Some images fail at first: their records must not hide what came later."""
    study = Study.open(folder, "hosted", create=True)
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.delenv("EACHLABS_API_KEY", raising=False)
        gone = Fault(lambda answer: type(answer).json(404, {}))
        server.script("image", None, gone, gone, gone)
        for _ in range(HOSTED_RUNS):
            jump_s = draw.choice((-1, 1)) * draw.choice(JUMPS_S)
            moment_ns = (EPOCH_S + jump_s) * 10**9
            patch.setattr("sd35bench.study.journal.time.time_ns", lambda now=moment_ns: now)
            run_hosted(study, hosted_plan(server.url, 4), server.url, timeout_s=5.0)
        return sum(server.creates.values()), max(server.creates.values())


CLOCKS = Experiment(
    name="clocks",
    title="Clocks that jump",
    did=(
        f"Studies of {RUNS} runs each, on two machines whose journals are merged in the end; before"
        " each run the clock jumps forwards or back by a second to ten years. A run tries again"
        f" what failed. Then {HOSTED_RUNS} runs of one hosted study, whose service loses images at"
        " first, under such a clock."
    ),
    fails_if=(
        "a record counts that is not the last of its trial, a merge loses a success, or an input is"
        " bought twice."
    ),
    shows_not="Clocks that jump while one line is written; nothing there reads a clock twice.",
    run=run,
)
