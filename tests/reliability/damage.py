"""Every kind of file that we write, damaged in seven ways, under every verb, in one process.

A cell is one damaged file and one verb. It must end in a result, where what was damaged is made
again or plays no part, or in one sentence that names the file; never in a traceback or a wait.
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.cli import main
from sd35bench.study.store import Study
from tests.golden.studies import SETS
from tests.reliability.experiment import Experiment, Figure

STUDY = "study"
POINTS = "backend=fake study=study steps=1,2 cfg=1 prompts.limit=8 seed=0"
WAIT_S = 60.0
CELLS = 200
VERBS = {
    "show": "show study --json",
    "score": "score study --json",
    "recommend": "recommend study --json",
    "claims": "claims study --json",
    "report": "report study --json",
    "compare": "compare base.json study --json",
    "compare studies": "compare study other --json",
    "baseline": "baseline make study new.json --images --json",
    "clean": "clean study --json",
    "verify": "verify study --json",
    "run": f"run -m {POINTS} --json",
    "tune": f"tune {POINTS} first=4 images=16 --json",
    "doctor": "doctor fake --json",
}


class Raises:
    """What a pickle runs when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemError('a pickle was read')",)


def _numbers_to_nan(data: bytes) -> bytes:
    """The first number after a colon becomes NaN."""
    import re

    return re.sub(rb'("[a-z_]+": ?)-?[0-9][0-9.e-]*', rb"\1NaN", data, count=1)


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 8]) + data[middle + 8 :]


def _arrays(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _change(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


BOTH: dict[str, Callable[[Path], None]] = {
    "empty": _change(lambda _: b""),
    "cut": _change(lambda data: data[: len(data) // 2]),
    "flipped bytes": _change(_flipped),
    "a pipe": _pipe,
}
TEXT = {
    **BOTH,
    "another shape": _change(lambda _: b'[{"kind": "record"}]\n{}\n'),
    "NaN for a number": _change(_numbers_to_nan),
    "nested 100,000 deep": _change(lambda _: b"[" * 100_000 + b"]" * 100_000 + b"\n"),
}
BINARY = {
    **BOTH,
    "a pickle that raises": _change(lambda _: pickle.dumps(Raises())),
    "arrays of another shape": _change(
        lambda _: _arrays(features=np.full((2, 3), np.nan), mean=1, cov=2, n="x", digests=[0])
    ),
    "a folder": _folder,
}


def _first(pattern: str) -> Callable[[Path], Path]:
    return lambda here: min(p for p in here.glob(pattern) if p.is_file())


KINDS: dict[str, tuple[Callable[[Path], Path], dict[str, Callable[[Path], None]]]] = {
    "study.json": (_first("results/study/study.json"), TEXT),
    "journal": (_first("results/study/journal/*.jsonl"), TEXT),
    "scores": (_first("results/study/scores/*.jsonl"), TEXT),
    "machine": (_first("results/study/machine/*.json"), TEXT),
    "ledger": (_first("results/study/remote/*.jsonl"), TEXT),
    "tune journal": (_first("results/study/tune/journal.log"), TEXT),
    "tune.json": (_first("results/study/tune.json"), TEXT),
    "checked files": (_first("results/study/.images.checked.json"), TEXT),
    "lock": (_first("results/study/.lock"), TEXT),
    "digests": (_first("cache/sd35bench/digests.json"), TEXT),
    "baseline": (_first("base.json"), TEXT),
    "image": (_first("results/study/images/*/*.png"), BINARY),
    "init image": (_first("results/study/inits/*/*.img"), BINARY),
    "latents": (_first("results/study/latents/*/*.npz"), BINARY),
    "features": (_first("results/study/features/golden/*.npz"), BINARY),
    "nano features": (_first("results/study/features/nano*/*.npz"), BINARY),
    "reference": (_first("results/study/references/*.npz"), BINARY),
    "baseline features": (_first("base.features.npz"), BINARY),
}


@dataclass(slots=True)
class Cells:
    """What became of all cells."""

    count: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)
    waited: list[str] = field(default_factory=list)


def make(here: Path) -> None:
    """A study with every kind of file, and what is made from it, in the current folder."""
    main(["run", "-m", *POINTS.split(), "keep_latents=true"])
    study = Study.open(Path("results"), STUDY)
    main(["score", STUDY])
    main(["tune", *POINTS.split(), "first=4", "images=16"])
    records = study.records()
    study.put_init(study.read_image_file(str(records[0].image)))
    rows = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    path = study.path / "references" / "golden-r.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {"features": rows, "source": "300 images", "min_images": 2}
    np.savez(path, mean=rows.mean(0), cov=np.cov(rows.T), n=len(rows), **own)
    study.put_features("golden", [str(r.image) for r in records], rows[: len(records)])
    _score_sets(study)
    measured(study)
    buy(study)
    (here / "cache" / "sd35bench").mkdir(parents=True, exist_ok=True)
    (here / "cache" / "sd35bench" / "digests.json").write_text('{"x|1|1|1|1": "00"}')
    main(["baseline", "make", STUDY, "base.json"])
    shutil.copytree(study.path, study.path.with_name("other"))


def _score_sets(study: Study) -> None:
    from sd35bench.study.store import Score

    about = {"extractor": "golden", "reference": "golden-r", "min_images": 2}
    for metric, more in SETS.items():
        study.append_scores(
            metric,
            [
                Score(
                    metric=metric,
                    key=r.trial.key,
                    image=str(r.image),
                    value=None,
                    detail={**about, **more},
                )
                for r in study.records()
            ],
        )


def measured(study: Study) -> None:
    """Give it a measurement of a machine."""
    where = {"key": "k", "device": "cpu", "threads": 1, "measured_at": "2026-11-30T00:00:00"}
    rate = {"best": 1e9, "median": 1e9, "n": 3, "unit": "FLOP/s"}
    study.append_machine({**where, "environment": {}, "rates": {"fp32": rate}})


def buy(study: Study) -> None:
    """Give it a ledger with one purchase."""
    from sd35bench.remote.ledger import Ledger

    ledger = Ledger(study.path, "000009-20261130T000000.000000000-1")
    intent = ledger.intend("trial", {"prompt": "p"}, 0.035, None)
    ledger.created(intent, "p-1", "answered")
    ledger.finished(intent, "succeeded", 0.035, ("http://127.0.0.1/x.png",))
    ledger.close()


@contextlib.contextmanager
def surroundings(here: Path) -> Iterator[None]:
    """A working folder and a home of its own, and one core, whose number keys name."""
    from unittest import mock

    names = {"XDG_CACHE_HOME": str(here / "cache"), "XDG_STATE_HOME": str(here / "state")}
    cores = mock.patch("os.sched_getaffinity", return_value={0})
    with contextlib.chdir(here), mock.patch.dict(os.environ, names), cores:
        yield


def cells(chosen: Sequence[tuple[str, str, str]], folder: Path, whole: Path | None = None) -> Cells:
    """Look at each (kind, damage, verb) in a copy of one study, made here or found in `whole`."""
    if whole is None:
        whole = folder / "whole"
        whole.mkdir()
        with surroundings(whole), quiet():
            make(whole)
    found = Cells()
    for number, (kind, damage, verb) in enumerate(chosen):
        here = folder / f"{number}"
        shutil.copytree(whole, here)
        find, damages = KINDS[kind]
        path = find(here)
        damages[damage](path)
        with surroundings(here):
            code, out = _call(VERBS[verb].split())
        _judge(found, f"{kind}, {damage}, {verb}", path, code, out)
        shutil.rmtree(here)
    return found


def _judge(found: Cells, cell: str, path: Path, code: int, out: str) -> None:
    found.count += 1
    last = out.strip().splitlines()[-1] if out.strip() else ""
    if code == -1:
        found.waited.append(cell)
    elif "Traceback" in out:
        found.tracebacks.append(f"{cell}: {last[:150]}")
    elif code not in (0, 1, 3):
        found.refused += 1
        names = (path.name, path.parent.name, path.stem, f"study '{STUDY}'")
        if not any(name in out for name in names):
            found.unnamed.append(f"{cell}: {last[:150]}")


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    text = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(text):
        yield text


def _call(words: list[str]) -> tuple[int, str]:
    """Exit code and what was said; -1 where it waited for more than a minute."""

    def end(*_: object) -> None:
        raise TimeoutError("waited")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, WAIT_S)
    text = ""
    try:
        with quiet() as said:
            code = main(words)
            text = said.getvalue()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return (-1 if "TimeoutError: waited" in text else code), text


def every() -> list[tuple[str, str, str]]:
    """All cells: kind, damage, verb."""
    return [(k, d, v) for k, (_, damages) in KINDS.items() for d in damages for v in VERBS]


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """A share of all cells, evenly drawn."""
    chosen = every()
    step = max(1, round(1 / scale))
    found = cells(chosen[::step], folder)
    seen = [
        *(f"traceback: {text}" for text in found.tracebacks),
        *(f"not named: {text}" for text in found.unnamed),
        *(f"waited: {text}" for text in found.waited),
    ]
    figures = [
        Figure(name="kinds of file", value=len(KINDS)),
        Figure(name="verbs", value=len(VERBS)),
        Figure(name="cells", value=found.count, least=CELLS * min(1.0, scale)),
        Figure(name="cells that ended in a traceback", value=len(found.tracebacks), most=0),
        Figure(name="cells that waited for more than a minute", value=len(found.waited), most=0),
        Figure(name="refusals", value=found.refused),
        Figure(name="refusals that do not name the file", value=len(found.unnamed), most=0),
    ]
    return figures, seen


DAMAGE = Experiment(
    name="damage",
    title="Damaged files under every verb",
    did=(
        "A study of the fake backend gets every kind of file that a study, a baseline and the"
        " caches have. For each cell it is copied, one file of one kind is damaged in one of seven"
        " ways, and one verb is called in this process. Lines: empty, cut, flipped bytes, a pipe,"
        " JSON of another shape, NaN for a number, nested 100,000 deep. Binary files: empty, cut,"
        " flipped bytes, a pipe, a pickle that raises, arrays of another shape, a folder."
    ),
    fails_if=(
        f"a cell ends in a traceback, waits for more than {WAIT_S:g} s, or ends with exit code 2"
        " or 4 and a message that does not name the file or its folder."
    ),
    shows_not=(
        "That a refused file is refused for the right reason, and damage that leaves a file valid:"
        " a digit changed in a record is believed; `verify` finds it in images alone."
    ),
    run=run,
)


if __name__ == "__main__":
    import sys
    import tempfile
    import time

    wanted = [c for c in every() if all(word in c for word in sys.argv[2:])][:: int(sys.argv[1])]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        seen = cells(wanted, Path(temporary))
    print(json.dumps([seen.tracebacks, seen.unnamed, seen.waited], indent=1, default=str))
    print(seen.count, "cells", seen.refused, "refused", round(time.monotonic() - began), "s")
