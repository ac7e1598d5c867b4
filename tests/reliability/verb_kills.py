"""SIGKILL every verb at random points while a second process works on the same study.

Each verb is a forked child of a process that has imported most of it, so that a life is the verb's
work and not Python's start. After each kill the whole study is verified; a record that was there
must stay, and the process beside must never fail.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from sd35bench.cli import main
from sd35bench.study.store import Study
from sd35bench.types import Status
from sd35bench.verify import verify_study
from tests.reliability.experiment import Experiment, Figure

KILLS = 500
LIFE_S = 1.2
SHORTEST_S = 0.01
BRIEF, BRIEF_S = ("clean", "verify"), 0.08
"""They end within 0.1 s: with other lives none of 75 kills met them."""
SAID = "said"
ENOUGH = "enough"
ONE = ("run", "backend=fake", "study=one", "steps=1", "cfg=1", "prompts.limit=4")
PRELOADED = (
    *("torch", "numpy", "hydra", "optuna", "sd35bench.cli.run", "sd35bench.cli.study"),
    *("sd35bench.cli.tune", "sd35bench.cli.compare", "sd35bench.cli.studies", "sd35bench.score"),
    *("sd35bench.report.page", "sd35bench.recommend.advice", "sd35bench.claims.catalogue"),
)
"""Imported before the first fork, and never called there: a thread's lock would be forked, too."""
POINTS = "backend=fake study=s steps=1,2 cfg=1 prompts.limit=8"
VERBS = {
    "run": f"run -m {POINTS} threads=1 seed={{n}}",
    "score": "score s --metric {metric}",
    "show": "show s",
    "recommend": "recommend s",
    "tune": f"tune {POINTS} threads=1 seed=0 first=4 images=16",
    "claims": "claims s",
    "compare": "compare one one",
    "baseline": "baseline make s out.json --images",
    "report": "report s",
    "clean": "clean s --apply",
    "verify": "verify s",
}
METRICS = ("sharpness", "contrast", "prompt_accuracy", "clip_score_nano")
BESIDE = f"run -m {POINTS} threads=2 seed={{n}}"


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Kill until there were enough; then each verb once in peace."""
    os.environ.update({"XDG_CACHE_HOME": f"{folder / 'cache'}", "COLUMNS": "80"})
    seen: list[str] = []
    with contextlib.chdir(folder):
        for module in PRELOADED:
            import_module(module)
        for words in (VERBS["run"].format(n=0), " ".join(ONE)):
            _exit_code(_fork(lambda words=words: main(words.split())))
        beside = _fork(_work_beside)
        try:
            killed, in_vain, figures = _kill(round(KILLS * scale), folder, seen)
        finally:
            Path(ENOUGH).touch()
            failed = _exit_code(beside) != 0
        if failed:
            seen.append(f"the process beside failed: {_last_words(beside)}")
        bad = [text for verb in VERBS if (text := _in_peace(verb)) is not None]
    twice = sum(count > 1 for count in _ok_lines(folder / "results" / "s").values())
    return [
        Figure(name="SIGKILLs of a running verb", value=sum(killed.values()), least=KILLS * scale),
        *(Figure(name=f"of them: {verb}", value=killed[verb]) for verb in VERBS),
        Figure(name="verbs that had ended before", value=in_vain),
        *figures,
        Figure(name="trials that were made twice", value=twice, most=0),
        Figure(name="failures of the process beside", value=int(failed), most=0),
        Figure(name="verbs that do not end well in peace", value=len(bad), most=0),
    ], [*seen, *bad]


def _in_peace(verb: str) -> str | None:
    """What a verb that is left alone complains of."""
    words = VERBS[verb].format(n=1, metric=METRICS[0]).split()
    child = _fork(lambda: main(words))
    code = _exit_code(child)
    good = (0, 1) if verb == "compare" else (0,)  # the gate may fail: times differ
    return None if code in good else f"{verb} ended with {code}: {_last_words(child)}"


def _kill(wanted: int, folder: Path, seen: list[str]) -> tuple[Counter[str], int, list[Figure]]:
    draw = random.Random()
    killed: Counter[str] = Counter()
    in_vain = lost = damaged = number = 0
    before: set[str] = set()
    study = folder / "results" / "s"
    while sum(killed.values()) < wanted:
        number += 1
        verb = list(VERBS)[number % len(VERBS)]
        words = VERBS[verb].format(n=number, metric=METRICS[number % len(METRICS)]).split()
        child = _fork(lambda words=words: main(words))
        time.sleep(draw.uniform(SHORTEST_S, BRIEF_S if verb in BRIEF else LIFE_S))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if _exit_code(child) == -signal.SIGKILL:
            killed[verb] += 1
        else:
            in_vain += 1
        problems = verify_study(study).problems
        damaged += bool(problems)
        seen += [f"{verb}: {problem['what']}" for problem in problems]
        now = Study.open(study.parent, "s").done_keys()
        lost += len(before - now)
        before = now
    return (
        killed,
        in_vain,
        [
            Figure(name="images in the end", value=len(before), least=1),
            Figure(name="times that the study was not whole", value=damaged, most=0),
            Figure(name="images or records lost", value=lost, most=0),
        ],
    )


def _ok_lines(study: Path) -> Counter[str]:
    done = (r for r in Study(study).all_records() if r.status is Status.OK)
    return Counter(record.trial.key for record in done)


def _work_beside() -> int:
    """Make images of another load, and look at them, until it is told to end."""
    number, parent = 0, os.getppid()
    while not Path(ENOUGH).exists() and os.getppid() == parent:
        number += 1
        for words in (BESIDE, "score s --metric sharpness", "show s"):
            code = main(words.format(n=number).split())
            if code != 0:
                return code
    return 0


def _fork(act: Callable[[], int]) -> int:
    """Start `act` in a child, in a group of its own with its workers; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setpgid(0, 0)
        said = os.open(f"{SAID}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = act()
    finally:
        os._exit(code)


def _exit_code(child: int) -> int:
    """Wait for a child; what it said goes unless it failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (0, -signal.SIGKILL):
        Path(f"{SAID}-{child}").unlink(missing_ok=True)
    return code


def _last_words(child: int) -> str:
    return Path(f"{SAID}-{child}").read_text("utf-8", "replace").strip()[-200:]


VERB_KILLS = Experiment(
    name="verb-kills",
    title="Every verb killed, another process beside",
    did=(
        f"Verbs ({', '.join(VERBS)}) on one study of the fake backend, each a forked child with"
        f" its workers, are sent SIGKILL after a time drawn evenly from {SHORTEST_S:g} to"
        f" {LIFE_S:g} s ({BRIEF_S:g} s for {' and '.join(BRIEF)}, which are short)."
        " A second process makes images of another load in the same study, scores"
        " and shows them all the while. After each kill `verify` reads the study; in the end each"
        " verb runs in peace."
    ),
    fails_if=(
        "the study is not whole after a kill, an image or record that was there is gone, a trial is"
        " made twice, the process beside fails, or a verb does not end well in peace."
    ),
    shows_not=(
        "Power cuts. `serve` and hosted runs are killed in experiments of their own; `export`,"
        " `reference` and `doctor` are not among these verbs."
    ),
    run=run,
    parallel=False,
)
