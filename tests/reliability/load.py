"""Two hundred clients at once for three minutes: does each get its own image, does memory stay?

The server is `sd35bench serve` itself, a process of its own with its worker. A client creates,
polls each second as the vendor's page does, fetches, compares every pixel, and begins again. The
comparison is with what its request must give, computed here: an image of somebody else's request
differs in almost every pixel.
"""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
import psutil

from sd35bench.config.serve import compose_serve, freeze_serve
from sd35bench.server.settings import ServedModel
from tests.reliability.answers import body_of, is_own_image
from tests.reliability.experiment import Experiment, Figure

__all__ = ["LOAD", "Heard", "serving", "slope_of"]

CLIENTS = 200
SPAN_S = 180.0
"""A minute is too short to tell memory that fills up (SQLite's page cache takes 3,000 predictions)
from memory that leaks."""
SETTLED_S = 10.0
POLL_S = 1.0
SAMPLE_S = 0.5
BLOCK_S = 5.0
MOST_GROWTH_MB = 16.0
MOST_LATE_GROWTH_MB = 3.0
WAIT_S = 60.0
MB = 1e6
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}
"""Student's t, two-sided 95 %, by degrees of freedom."""
OPTIONS = ("backend=fake", "no_auth=true", "port=0", "threads=1")
FREE = ("requests_per_minute=null", "concurrency=null")
ROOT = Path(__file__).parents[2]


@dataclass(slots=True, kw_only=True)
class Heard:
    """What the clients got."""

    images: int = 0
    wrong: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    poll_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    requests: int = 0
    seen: list[str] = field(default_factory=list)

    def failed(self, what: str, text: str) -> None:
        self.statuses[what] += 1
        self.seen.append(f"{what}: {text}")


def run(scale: float, folder: Path) -> tuple[Sequence[Figure], Sequence[str]]:
    """Load one server for a while, watch its memory."""
    count, span_s = max(2, round(CLIENTS * scale)), SPAN_S * scale
    overrides = [*OPTIONS, *FREE, f"state_dir={folder / 'state'}"]
    model = freeze_serve(compose_serve(overrides)).model
    heard = Heard()
    others = round(os.getloadavg()[0], 1)
    with serving(folder, overrides) as (url, pid):
        started = time.monotonic()
        sizes = asyncio.run(_all(url, count, span_s, model, heard, psutil.Process(pid)))
        wall_s = time.monotonic() - started
    settled = [(at, size) for at, size in sizes if at >= min(SETTLED_S, span_s / 6)]
    busy = Figure(name="load average of the machine before it began", value=others)
    return [*_figures(count, wall_s, heard, settled), busy], heard.seen


@contextlib.contextmanager
def serving(folder: Path, overrides: Sequence[str]) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "sd35bench", "serve", "--json", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=log, env=environment
        )
    assert server.stdout is not None
    with server.stdout:
        try:
            line = server.stdout.readline()
            assert line, (folder / "log").read_text()[-2000:]
            said = json.loads(line)
            yield said["url"], said["pid"]
        finally:
            server.terminate()
            server.wait(WAIT_S)


async def _all(
    url: str, count: int, span_s: float, model: ServedModel, heard: Heard, server: psutil.Process
) -> list[tuple[float, float]]:
    """Run the clients; returns (seconds, bytes) of the server and its worker meanwhile."""
    started = time.monotonic()
    sizes: list[tuple[float, float]] = []

    async def watch() -> None:
        while True:
            together = [server, *server.children(recursive=True)]
            size = sum(process.memory_info().rss for process in together)
            sizes.append((time.monotonic() - started, size))
            await asyncio.sleep(SAMPLE_S)

    limits = httpx2.Limits(max_connections=count, max_keepalive_connections=count)
    watching = asyncio.create_task(watch())
    async with httpx2.AsyncClient(
        base_url=url, timeout=WAIT_S, limits=limits, trust_env=False
    ) as client:

        async def one(number: int) -> None:
            await asyncio.sleep(POLL_S * number / count)  # or all would poll at the same moments
            turn = 0
            while time.monotonic() - started < span_s:
                try:
                    await _one_image(client, number, turn, model, heard)
                except httpx2.HTTPError as exc:
                    heard.failed(type(exc).__name__, str(exc))
                turn += 1

        await asyncio.gather(*(one(number) for number in range(count)))
    watching.cancel()
    return sizes


async def _one_image(
    client: httpx2.AsyncClient, number: int, turn: int, model: ServedModel, heard: Heard
) -> None:
    """Create, poll, fetch, compare."""
    body = body_of(f"client {number}, image {turn}", seed=number)
    began = time.monotonic()
    answer = await client.post("/v1/prediction/", json=body)
    heard.requests += 1
    if answer.status_code != 200:
        return heard.failed(f"create {answer.status_code}", answer.text)
    prediction = answer.json()["predictionID"]
    found = {"status": "created"}
    while found["status"] in ("created", "starting", "processing"):
        await asyncio.sleep(POLL_S)
        asked = time.monotonic()
        answer = await client.get(f"/v1/prediction/{prediction}")
        heard.poll_s.append(time.monotonic() - asked)
        heard.requests += 1
        if answer.status_code != 200:
            return heard.failed(f"poll {answer.status_code}", answer.text)
        found = answer.json()
    if found["status"] != "success":
        return heard.failed(found["status"], str(found["output"]))
    data = await client.get(found["output"])
    heard.requests += 1
    heard.total_s.append(time.monotonic() - began)
    is_own = found["id"] == prediction and is_own_image(data.content, body, model)
    heard.images += 1
    heard.wrong += not is_own
    return None


def slope_of(sizes: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Bytes a second with a 95 % interval, by least squares over means of blocks of 5 s.

    Samples half a second apart resemble each other; blocks do so less.
    """
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at, size in sizes:
        blocks.setdefault(int(at // BLOCK_S), []).append((at, size))
    points = np.array([np.mean(block, axis=0) for block in blocks.values()])
    free = len(points) - 2
    if free < 1:
        return math.nan, math.nan, math.nan
    at, size = points.T
    spread = ((at - at.mean()) ** 2).sum()
    slope = ((at - at.mean()) * (size - size.mean())).sum() / spread
    left = size - size.mean() - slope * (at - at.mean())
    half = T_95[min(free, max(T_95))] * math.sqrt((left**2).sum() / free / spread)
    return float(slope), float(slope - half), float(slope + half)


def _figures(
    count: int, wall_s: float, heard: Heard, sizes: Sequence[tuple[float, float]]
) -> list[Figure]:
    first, last = sizes[0][1], sizes[-1][1]
    later = [(at, size) for at, size in sizes if at >= sizes[-1][0] / 2]
    failed = heard.statuses.total()
    return [
        Figure(name="clients at once", value=count),
        Figure(name="seconds, the last images included", value=round(wall_s, 1)),
        Figure(name="images fetched and compared", value=heard.images, least=count),
        Figure(name="images that were not the client's own", value=heard.wrong, most=0),
        Figure(name="requests or predictions that failed", value=failed, most=0),
        Figure(name="requests a second", value=round(heard.requests / wall_s, 1)),
        Figure(name="images a second", value=round(heard.images / wall_s, 1)),
        Figure(name="poll, p50 (ms)", value=_ms(heard.poll_s, 50)),
        Figure(name="poll, p99 (ms)", value=_ms(heard.poll_s, 99)),
        Figure(name="create to image, p50 (ms)", value=_ms(heard.total_s, 50)),
        Figure(name="create to image, p99 (ms)", value=_ms(heard.total_s, 99)),
        Figure(name=f"resident set at {sizes[0][0]:.0f} s (MB)", value=round(first / MB, 1)),
        Figure(name="resident set at the end (MB)", value=round(last / MB, 1)),
        Figure(
            name="growth between the two (MB)",
            value=round((last - first) / MB, 1),
            most=MOST_GROWTH_MB,
        ),
        Figure(
            name="growth in the second half (MB)",
            value=round((later[-1][1] - later[0][1]) / MB, 2),
            most=MOST_LATE_GROWTH_MB,
        ),
        Figure(name="slope (MB a minute), 95 % interval", value=_slope(sizes)),
        Figure(name="slope of the second half alone (MB a minute)", value=_slope(later)),
    ]


def _slope(sizes: Sequence[tuple[float, float]]) -> str:
    slope, low, high = (round(60 * value / MB, 2) for value in slope_of(sizes))
    return f"{slope} ({low} to {high})"


def _ms(seconds: Sequence[float], percentile: float) -> float:
    return round(1000 * float(np.percentile(seconds, percentile)), 1) if seconds else math.nan


LOAD = Experiment(
    name="load",
    title="Many clients at once",
    did=(
        f"`sd35bench serve {' '.join((*OPTIONS, *FREE))}`, a process of its own with its worker,"
        f" and {CLIENTS} clients in another process for {SPAN_S:g} s: each creates, polls every"
        f" {POLL_S:g} s, fetches the PNG, compares it, and begins again. The resident sets of"
        f" server and worker are read every {SAMPLE_S:g} s; the slope is a least-squares line"
        f" through the means of {BLOCK_S:g} s from {SETTLED_S:g} s on."
    ),
    fails_if=(
        "an image is not, pixel by pixel, the one that its client's request must give; any answer"
        " is not 200, any prediction does not succeed, any connection breaks; the resident sets"
        f" grow by more than {MOST_GROWTH_MB:g} MB from {SETTLED_S:g} s to the end, or by more than"
        f" {MOST_LATE_GROWTH_MB:g} MB in the second half."
    ),
    shows_not=(
        "Hours: a leak below the slope's interval is not seen. Speed on other machines: server,"
        " worker and all clients share this one's cores. A model's images: the fake backend makes"
        " noise, so what is measured is everything around the model."
    ),
    run=run,
    parallel=False,
)
