"""The real thing: a run beside a CPU hog says so, or its figures are those of a quiet machine."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sd35bench.analysis.summary import show_document
from sd35bench.study.store import Study

POINT = ("model=nano", "backend=eager", "steps=4", "cfg=4", "prompts.limit=12", "threads=1")


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep what is started meanwhile to one core, which is then easily disturbed."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def hog() -> Iterator[None]:
    """A process that does nothing but compute."""
    running = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        running.kill()
        running.wait()


def run(study: str, results: Path, *more: str) -> tuple[int, dict]:
    variables = {k: v for k, v in os.environ.items() if k != "SD35BENCH_CANARY"}
    command = [sys.executable, "-m", "sd35bench", "run", *POINT, f"study={study}"]
    done = subprocess.run(
        [*command, f"results_dir={results}", *more, "--json"],
        env=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.returncode, json.loads(done.stdout)


def shown(study: str, results: Path) -> dict:
    return show_document(Study.open(results, study))


def refused(document: dict) -> bool:
    """Whether the document says that its latencies are not those of a quiet machine."""
    (row,) = document["settings"]
    marked = row["contention"]["counted"] or row["latency_s"]["p50"] is None
    return marked or any("of its best" in text for text in document["warnings"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned")
def test_beside_a_hog_figures_are_the_idle_ones_or_refused(tmp_path):
    with one_core():
        code, summary = run("idle", tmp_path)
        assert (code, summary["done"]) == (0, 12)
        with hog():
            code, summary = run("busy", tmp_path)
            strict, counted = run("strict", tmp_path, "contention=error")
    assert code == 0
    assert summary["retimed"] <= summary["timed"] / 2
    assert strict == (3 if counted["failed"] else 0)
    idle, busy = shown("idle", tmp_path), shown("busy", tmp_path)
    print(idle["clock"], busy["clock"], summary, counted)
    assert refused(busy) or summary["disturbed"] + summary["retimed"] > 0
    if not refused(busy) and not refused(idle):  # what is busy already has no idle figures
        p50 = [found["settings"][0]["latency_s"]["p50"] for found in (idle, busy)]
        assert p50[1] == pytest.approx(p50[0], rel=0.15)
