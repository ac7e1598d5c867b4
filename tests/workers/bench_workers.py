"""What two workers of one thread make beside one of two threads, on nano: for a quiet machine.

    python -m tests.workers.bench_workers [--backend eager] [--rounds 4] [--prompts 24] [--steps 8]

Rounds alternate (one, two, two, one, ...) in a study of each arm, so that a machine that slows down
slows both. Images/s run from the first trial's start to the last one's end, without composing,
starting and loading, which `command_s` has. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from sd35bench.study.store import Study

ARMS = {"one": ("workers=1", "threads=2"), "two": ("workers=2", "threads=1")}


def run(arm: str, seed: int, root: Path, asked: argparse.Namespace) -> float:
    """Make a round's images; seconds of the whole command."""
    command = [
        *(sys.executable, "-m", "sd35bench", "run", f"study={arm}", f"results_dir={root}"),
        *(f"backend={asked.backend}", f"steps={asked.steps}", f"prompts.limit={asked.prompts}"),
        *(f"seed={seed}", "contention=warn", *ARMS[arm]),
    ]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def figures(arm: str, seed: int, root: Path) -> tuple[float, float]:
    """Images a second of a round, and its median latency in seconds."""
    timed = [
        (datetime.fromisoformat(record.started_at).timestamp(), record.timings.latency_s)
        for record in Study.open(root, arm).records()
        if record.trial.request.seed == seed and record.timings is not None
    ]
    span_s = max(at + took for at, took in timed) - min(at for at, _ in timed)
    return len(timed) / span_s, statistics.median(took for _, took in timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed")
    found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.rounds):
            for arm in list(ARMS)[:: 1 if seed % 2 == 0 else -1]:
                command_s = run(arm, seed, Path(folder), asked)
                rate, latency_s = figures(arm, seed, Path(folder))
                found[arm].append((rate, latency_s, command_s))
                print(
                    f"round {seed} {' '.join(ARMS[arm])}: {rate:.3f} images/s,"
                    f" p50 {latency_s:.3f} s, command {command_s:.1f} s",
                    flush=True,
                )
    ratios = [two[0] / one[0] for one, two in zip(found["one"], found["two"], strict=True)]
    said = {
        arm: {
            name: statistics.median(row[place] for row in rows)
            for place, name in enumerate(("images_per_s", "latency_p50_s", "command_s"))
        }
        for arm, rows in found.items()
    }
    print(
        f"2 workers x 1 thread make {statistics.median(ratios):.2f} times the images of 1 worker x"
        f" 2 threads (median of {len(ratios)} rounds; {min(ratios):.2f} to {max(ratios):.2f})"
    )
    print(json.dumps({**said, "ratios": ratios, **vars(asked)}))


if __name__ == "__main__":
    main()
