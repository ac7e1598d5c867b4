"""SIGKILL the server again and again while it takes predictions: what it accepted is accounted for.

Accepted is what a client was told: an id in an answer that arrived whole. Each life of the server
is cut at a random time, one in four while it is still starting. Its worker dies with it. The last
life is left alone until the queue is empty; then every accepted prediction is asked after.
"""

import asyncio
import contextlib
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.reliability.answers import body_of, is_own_image
from tests.reliability.experiment import Experiment, Figure
from tests.server.live import MODEL

__all__ = ["SERVER_KILLS", "Fates", "Told", "fates_of", "listed"]

KILLS = 100
CLIENTS = 4
MOST_EACH = 4
"""Creates of one client in one life: 16 at most, about what a life has time to make."""
LIFE_S = 0.8
"""A life that was ready ends after a time drawn evenly from 0 to this."""
START_S = 1.5
"""One that is cut while starting ends after a time drawn evenly from 0 to this."""
EARLY = 0.25
DELAY_S = 0.02
WAIT_S = 120.0
PAGE = 100
CYCLES = "kill and restart cycles"
OVER = ("success", "error", "cancelled")
ROOT = Path(__file__).parents[2]


@dataclass(slots=True, kw_only=True)
class Fates:
    """What became of the accepted predictions, and of creates that nobody was told about."""

    ended: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    wrong: int = 0
    not_once: int = 0
    silent: int = 0
    seen: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Told:
    """What the clients know: every create that was sent, and the ids that came back."""

    sent: dict[str, dict[str, Any]] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    unanswered: int = 0
    refused: list[str] = field(default_factory=list)


class Life:
    """One life of the server."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.reliability.server", f"{folder}", f"{DELAY_S}"]
        self._log = open(folder.with_suffix(".log"), "ab")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def url(self, wait_s: float) -> str | None:
        """Where it listens, or nothing if it does not within `wait_s`."""
        try:
            found = self._lines.get(timeout=wait_s)
        except queue.Empty:
            return None
        assert found, "the server ended before it was ready"
        return found

    def kill_after(self, seconds: float) -> None:
        threading.Timer(seconds, self._process.kill).start()

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        self._process.send_signal(how)
        self._process.wait(WAIT_S)
        self._reader.join()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self._lines.put(lines.readline().strip())
            for _ in lines:
                pass


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Kill servers, let the last one finish, count."""
    wanted = round(KILLS * scale)
    state, told, draw = folder / "state", Told(), random.Random()
    state.mkdir()
    early = 0
    for life in range(wanted):
        early += not _one_life(state, life, told, draw)
    with _living(state) as url, httpx2.Client(base_url=url, timeout=WAIT_S) as client:
        _drain(client)
        rows, fates = listed(client), Fates()
        fates_of(told, rows, client, fates)
    return _figures(wanted, early, told, fates, rows), [*fates.seen, *told.refused]


def _one_life(state: Path, number: int, told: Told, draw: random.Random) -> bool:
    """Start, take predictions, kill; returns whether it came to be ready."""
    is_early = draw.random() < EARLY
    life = Life(state)
    try:
        url = life.url(draw.uniform(0, START_S) if is_early else WAIT_S)
        if url is None:
            assert is_early, "the server did not get ready"
            return False
        life.kill_after(draw.uniform(0, LIFE_S))
        asyncio.run(_clients(url, number, told))
        return True
    finally:
        life.end()


async def _clients(url: str, life: int, told: Told) -> None:
    async def one(number: int) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=WAIT_S, trust_env=False) as client:
            for i in range(MOST_EACH):
                prompt = f"life {life}, client {number}, create {i}"
                told.sent[prompt] = body_of(prompt, seed=i)
                try:
                    answer = await client.post("/v1/prediction", json=told.sent[prompt])
                except httpx2.TransportError:
                    told.unanswered += 1
                    return
                if answer.status_code != 200:
                    told.refused.append(f"{prompt}: {answer.status_code} {answer.text}")
                    return
                told.accepted[answer.json()["predictionID"]] = prompt
            # Hold the connection until the kill: polls of what is being made meanwhile.
            with contextlib.suppress(httpx2.TransportError):
                while True:
                    await client.get("/healthz")
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(one(number) for number in range(CLIENTS)))


@contextlib.contextmanager
def _living(state: Path) -> Iterator[str]:
    life = Life(state)
    try:
        url = life.url(WAIT_S)
        assert url is not None, "the server did not get ready"
        yield url
    finally:
        life.end(signal.SIGTERM)


def _drain(client: httpx2.Client) -> None:
    until = time.monotonic() + WAIT_S
    while client.get("/healthz").json()["queue"] > 0:
        assert time.monotonic() < until, "the queue does not get empty"
        time.sleep(0.05)


def listed(client: httpx2.Client) -> list[dict[str, Any]]:
    """Every prediction that the server lists."""
    rows: list[dict[str, Any]] = []
    while True:
        query = {"limit": PAGE, "offset": len(rows)}
        page = client.get("/v1/executions", params=query).json()
        rows += page["executions"]
        if not page["executions"]:
            assert len(rows) == page["total_count"]
            return rows


def fates_of(told: Told, rows: list[dict[str, Any]], client: httpx2.Client, fates: Fates) -> None:
    """Ask after each accepted prediction: listed once, over, and with its own image or a reason."""
    ids = Counter(row["id"] for row in rows)
    prompts = Counter(row["input"]["prompt"] for row in rows)
    for prediction, prompt in told.accepted.items():
        answer = client.get(f"/v1/prediction/{prediction}")
        found = answer.json()
        if answer.status_code != 200 or found["status"] not in OVER:
            fates.lost += 1
            fates.seen.append(f"lost: {prompt}: {answer.status_code} {answer.text}")
            continue
        fates.ended[found["status"]] += 1
        if ids[prediction] != 1:
            fates.not_once += 1
            fates.seen.append(f"listed {ids[prediction]} times: {prompt}")
        if found["status"] == "success":
            data = client.get(found["output"]).content
            if found["input"]["prompt"] != prompt or not is_own_image(
                data, told.sent[prompt], MODEL
            ):
                fates.wrong += 1
                fates.seen.append(f"not its own image: {prompt}")
        elif not (isinstance(found["output"], dict) and found["output"]["error_message"]):
            fates.silent += 1
            fates.seen.append(f"ended as {found['status']} without a reason: {prompt}")
    for prompt, count in prompts.items():
        if count > 1 or prompt not in told.sent:
            fates.not_once += 1
            fates.seen.append(f"stored {count} times: {prompt}")


def _figures(
    wanted: int, early: int, told: Told, fates: Fates, rows: list[dict[str, Any]]
) -> list[Figure]:
    unknown = sum(row["id"] not in told.accepted for row in rows)
    return [
        Figure(name=CYCLES, value=wanted, least=wanted),
        Figure(name="of them killed while starting", value=early),
        Figure(name="creates sent", value=len(told.sent)),
        Figure(name="predictions accepted", value=len(told.accepted), least=wanted),
        Figure(name="accepted ones lost or never over", value=fates.lost, most=0, out_of=CYCLES),
        Figure(name="accepted ones not listed exactly once", value=fates.not_once, most=0),
        Figure(name="images that are not their own", value=fates.wrong, most=0),
        Figure(name="ends without an image and without a reason", value=fates.silent, most=0),
        Figure(name="accepted ones that ended in success", value=fates.ended["success"]),
        Figure(name="accepted ones that ended in a said failure", value=fates.ended["error"]),
        Figure(name="creates that a kill left without an answer", value=told.unanswered),
        Figure(name="of these, stored and made all the same", value=unknown),
        Figure(name="creates refused", value=len(told.refused), most=0),
    ]


SERVER_KILLS = Experiment(
    name="server-kills",
    title="A server killed and restarted",
    did=(
        "A server process (`serving.serve`, what `sd35bench serve` runs after reading its command"
        f" line) over the fake backend, {DELAY_S * 1000:g} ms an image, takes creates from"
        f" {CLIENTS} clients and is sent SIGKILL after a time drawn evenly from 0 to {LIFE_S:g} s;"
        f" one life in {round(1 / EARLY)} is cut earlier, 0 to {START_S:g} s after its process was"
        " started. The next life opens the same folder. The last one is left alone until its queue"
        " is empty, and every prediction that was ever accepted is then polled, listed and fetched."
    ),
    fails_if=(
        "an accepted prediction is unknown, never over, over without an image and without a reason,"
        " not listed exactly once, or its image is not, pixel by pixel, the one that its request"
        " must give; one create is stored twice."
    ),
    shows_not=(
        "Power cuts (SQLite is synchronous=FULL, but a killed process leaves the page cache alive),"
        " a disk that loses what it confirmed, expiry of outputs during an outage."
    ),
    run=run,
)
