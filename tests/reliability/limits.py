"""Three processes, one service: do they keep its limits together? Counted where they arrive."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.reliability.experiment import Experiment, Figure
from tests.remote.fault_server import FaultServer, serving

__all__ = ["LIMITS", "figures_of"]

PROCESSES = 3
PER_MINUTE = 60
IN_FLIGHT = 10
WINDOW_S = 60.0
SPAN_S = 190.0
"""Three windows: the edges between them are where a limiter that counts by the minute bursts."""
PREDICTION_S = 20.0
"""So long that ten in flight are reached although each takes some of sixty requests a minute."""
TIMEOUT_S = 300
TRIALS = 60
ROUTES = ("create", "poll", "list")
ROOT = Path(__file__).parents[2]


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Let three clients go for a while, each with more trials than the limits let through."""
    environment = {**os.environ, "XDG_STATE_HOME": f"{folder.resolve() / 'state'}"}
    with serving(seconds=PREDICTION_S) as server:
        clients = [
            subprocess.Popen(_command(folder / f"{n}", server.url, n), cwd=ROOT, env=environment)
            for n in range(PROCESSES)
        ]
        try:
            until = time.monotonic() + SPAN_S * scale
            while time.monotonic() < until and all(c.poll() is None for c in clients):
                time.sleep(0.5)
            ended = sum(client.poll() is not None for client in clients)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        span_s = server.seen[-1].at - server.seen[0].at
        return figures_of(server, span_s, ended), []


def figures_of(server: FaultServer, span_s: float, ended: int) -> list[Figure]:
    """What the server saw, against both limits; and whether they were reached at all."""
    requests = sum(server.count(route) for route in ROUTES)
    most = server.most_in(WINDOW_S, ROUTES)
    return [
        Figure(name="client processes", value=PROCESSES),
        Figure(name="seconds from the first request to the last", value=round(span_s, 1)),
        Figure(name="creates, polls and listings", value=requests),
        Figure(name="predictions created", value=len(server.made)),
        Figure(
            name=f"most requests in any {WINDOW_S:g} s",
            value=most,
            least=0.9 * PER_MINUTE,
            most=PER_MINUTE,
        ),
        Figure(
            name="most predictions in flight",
            value=server.most_in_flight,
            least=0.9 * IN_FLIGHT,
            most=IN_FLIGHT,
        ),
        Figure(name="most creates of one input", value=max(server.creates.values()), most=1),
        Figure(name="clients that ended before their time", value=ended, most=0),
    ]


def _command(root: Path, url: str, seed: int) -> list[str]:
    options = [f"requests_per_minute={PER_MINUTE}", f"concurrency={IN_FLIGHT}", "single_stream=0"]
    options += [f"timeout_s={TIMEOUT_S}"]
    command = [sys.executable, "-m", "tests.reliability.client", f"{root}", url]
    return [*command, f"{TRIALS}", f"{seed}", *options]


LIMITS = Experiment(
    name="limits",
    title="Rate and concurrency over three processes",
    did=(
        f"{PROCESSES} client processes with {TRIALS} trials each call one service with one key at"
        f" the defaults, {PER_MINUTE} requests a minute and {IN_FLIGHT} in flight, as fast as they"
        f" may, for {SPAN_S:g} s; a prediction takes {PREDICTION_S:g} s. Nothing is scaled down:"
        " the minute is a minute. The server notes when each request's head had arrived."
    ),
    fails_if=(
        "more requests arrive in any window than the limit, or more predictions are open at once"
        " than may be; or the limits are not reached, which would show nothing."
    ),
    shows_not=(
        "Clients on several machines, which share no file; a network that delays one request by"
        " more than the limiter's margin of a second over another."
    ),
    run=run,
    sleeps=True,
)
