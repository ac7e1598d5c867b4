"""SIGKILL a client again and again: nothing is paid for twice, nothing that was made is lost.

Study after study of a few trials: a client process is started, killed after a random time, started
again; then one is left alone until no trial of the study is open. The server counts creates by
their input, which no two trials share, and is slow to read and to answer, so that many kills meet
a create on its way.

Only one thing cannot be decided from here: an intent on disk that the service lists nothing for.
The client leaves such a trial ambiguous and creates it no more. In the end it is told to
(`on_ambiguous=resubmit`), as a user would who has looked, and must then create it exactly once.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd35bench.errors import StoreError
from sd35bench.remote.drive import HostedService
from sd35bench.remote.ledger import Intent, Ledger
from sd35bench.study.store import Study
from sd35bench.trials import RunSummary
from sd35bench.types import Status
from tests.reliability.client import STUDY, policy
from tests.reliability.experiment import Experiment, Figure
from tests.remote.fault_server import FaultServer, serving
from tests.remote.faults import Answer, Fault, picture
from tests.remote.hosted import hosted_plan, hosted_settings

__all__ = ["CLIENT_KILLS", "Kills", "Losses", "losses_of", "note", "started"]

KILLS = 200
TRIALS = 10
"""Not more than may be in flight: a slot whose prediction nobody could find stays taken for ten
minutes, and limits are not what is tested here."""
LIFE_S = 1.2
"""A client is killed after a time drawn evenly from 0 to this, counted from its first step."""
WAY_S = 0.05
"""Between a create's arrival and its being read, and between its being made and its answer."""
PREDICTION_S = 0.2
WAIT_S = 60.0
KILLED = "SIGKILLs of a running client"
MOST_KILLS = 8
"""Of one study, which then is completed in peace; many beginnings are worth more than one study
that hardly moves, as each start first looks for what the one before it lost."""
ROOT = Path(__file__).parents[2]


class SlowServer(FaultServer):
    """A service that takes a moment to read each request."""

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        await asyncio.sleep(random.uniform(0, WAY_S))
        return await FaultServer._answer(self, reader)


@dataclass(slots=True, kw_only=True)
class Losses:
    """What must stay zero, and what of it was counted over."""

    predictions: int = 0
    paid_twice: int = 0
    lost: int = 0
    never_made: int = 0
    seen: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Kills:
    """How many kills there were, and what each left open on disk (one can leave several)."""

    done: int = 0
    starts: int = 0
    torn: int = 0
    left: Counter[str] = field(default_factory=Counter)


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Kill clients until there were enough, then count."""
    kills, losses = Kills(), Losses()
    wanted = round(KILLS * scale)
    ambiguous = studies = 0
    draw = random.Random()
    with serving(SlowServer, seconds=PREDICTION_S) as server:
        server.always("create", Fault(lambda a: replace(a, delay_s=random.uniform(0, WAY_S))))
        while kills.done < wanted:
            root = folder / f"{studies}"
            with _limits_of(root):
                ambiguous += _one_study(root, server, studies, kills, draw)
            losses_of(server, Study.open(root, STUDY, create=False), studies, losses)
            studies += 1
    return _figures(wanted, kills, losses, studies, ambiguous), losses.seen


def _one_study(
    root: Path, server: FaultServer, seed: int, kills: Kills, draw: random.Random
) -> int:
    """Have one study made in spite of kills; returns how many trials had to be resubmitted."""
    study = Study.open(root, STUDY, create=True)
    for _ in range(MOST_KILLS):
        kills.starts += 1
        if not _killed(root, server, seed, draw.uniform(0.0, LIFE_S)):
            break
        kills.done += 1
        note(kills, study, server)
    first = _run(study, server, seed)
    return 0 if first.ambiguous == 0 else _run(study, server, seed, "resubmit").done


def _run(study: Study, server: FaultServer, seed: int, on_ambiguous: str = "keep") -> RunSummary:
    """Go on with it in this process, to the end."""
    plan = hosted_plan(server.url, TRIALS, seed=seed)
    settings = hosted_settings(server.url, on_ambiguous=on_ambiguous)
    return HostedService(settings=settings, policy=policy()).run(plan, study)


@contextlib.contextmanager
def started(root: Path, server: FaultServer, seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """A client process that has begun; it is killed where it is left running."""
    command = [sys.executable, "-m", "tests.reliability.client", f"{root}", server.url]
    client = subprocess.Popen([*command, f"{TRIALS}", f"{seed}"], cwd=ROOT, stdout=subprocess.PIPE)
    assert client.stdout is not None
    with client.stdout:
        try:
            assert client.stdout.readline() == b"running\n"
            yield client
        finally:
            client.send_signal(signal.SIGKILL)
            client.wait(WAIT_S)


def _killed(root: Path, server: FaultServer, seed: int, life_s: float) -> bool:
    """Start a client and kill it after `life_s`; false where it had ended before."""
    with started(root, server, seed) as client, contextlib.suppress(subprocess.TimeoutExpired):
        code = client.wait(life_s)
        assert code == 0, f"a client ended with {code}"
        return False
    return True


def note(kills: Kills, study: Study, server: FaultServer) -> None:
    """What the kill left on disk, trial by trial."""
    time.sleep(2.5 * WAY_S)  # a create that had left may still be read
    done = study.done_keys()
    ledger = Ledger(study.path, None)
    left = {_stage(intent, server) for intent in ledger.open_intents() if intent.trial not in done}
    kills.left.update(left if left else {"no prediction open"})
    kills.torn += sum(
        not path.read_bytes().endswith(b"\n")
        for path in study.path.rglob("*.jsonl")
        if path.stat().st_size > 0
    )


def _stage(intent: Intent, server: FaultServer) -> str:
    if intent.phase is not None:
        return "an end on disk, no record"
    if intent.prediction is not None:
        return "an id on disk, no end"
    made = server.created(intent.input) > 0
    return "an intent, made, no answer" if made else "an intent, never made"


def losses_of(server: FaultServer, study: Study, seed: int, losses: Losses) -> None:
    """Compare what the server made for a study with what the study has."""
    records = {r.trial.request.prompt: r for r in study.records() if r.status is Status.OK}
    made = [m for m in server.made.values() if m.input["seed"] == seed]
    losses.predictions += len(made)
    for prediction in made:
        found = records.get(prediction.input["prompt"])
        text = json.dumps(prediction.input, sort_keys=True)
        own = picture(text, server.sizes["1:1"], "png")
        if found is None or found.image is None or not _has(study, found.image, own):
            losses.lost += 1
            losses.seen.append(f"lost: {prediction.id} of study {seed}")
        if server.created(prediction.input) > 1:
            losses.paid_twice += 1
            losses.seen.append(f"paid twice: {prediction.id} of study {seed}")
    losses.never_made += TRIALS - len({m.input["prompt"] for m in made})


def _has(study: Study, digest: str, data: bytes) -> bool:
    """Whether the study's image of that name is there and is this one."""
    try:
        return study.image_path(digest).read_bytes() == data
    except StoreError:
        return False


def _figures(
    wanted: int, kills: Kills, losses: Losses, studies: int, ambiguous: int
) -> list[Figure]:
    stages = [
        Figure(name=f"kills after which there was: {stage}", value=count)
        for stage, count in sorted(kills.left.items())
    ]
    return [
        Figure(name=KILLED, value=kills.done, least=wanted),
        Figure(name="studies", value=studies),
        Figure(name="predictions made by the server", value=losses.predictions, least=1),
        Figure(name="predictions paid for twice", value=losses.paid_twice, most=0, out_of=KILLED),
        Figure(name="finished predictions lost", value=losses.lost, most=0, out_of=KILLED),
        Figure(name="trials without an image in the end", value=losses.never_made, most=0),
        *stages,
        Figure(name="files with a torn last line", value=kills.torn),
        Figure(name="trials left ambiguous, then resubmitted", value=ambiguous),
    ]


@contextlib.contextmanager
def _limits_of(root: Path) -> Iterator[None]:
    """Give each study a limiter of its own: clients before it are none of its business."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = f"{root.resolve() / 'state'}"
    try:
        yield
    finally:
        del os.environ["XDG_STATE_HOME"]
        if before is not None:
            os.environ["XDG_STATE_HOME"] = before


CLIENT_KILLS = Experiment(
    name="client-kills",
    title="A client killed at random points",
    did=(
        f"A client process (`HostedService.run`, what `sd35bench run backend=eachlabs` runs after"
        f" reading its command line) works on studies of {TRIALS} predictions, the first two alone,"
        f" the others at once. It is sent SIGKILL after a time drawn evenly from 0 to {LIFE_S:g} s"
        f" and started again, until the study is complete or {MOST_KILLS} clients were killed,"
        " after which one is left alone; then comes the next study. The server counts"
        f" creates by their input, and delays each by up to {WAY_S * 1000:g} ms before reading and"
        " again before answering, so that kills meet creates on their way."
    ),
    fails_if=(
        "a create with the same input was accepted more than once; a prediction that the server"
        " finished has no OK record whose file is, byte for byte, what the server made of that"
        " input; a study is not complete in the end."
    ),
    shows_not=(
        "Power cuts: fsync is called, but a killed process leaves the page cache alive. Services"
        " that list a prediction late or never: what is not listed stays ambiguous, and paying"
        " again is the user's word."
    ),
    run=run,
)
