"""What a comparison of a million records costs: time and memory of the gate's analysis.

    python -m tests.analysis.bench_compare [RECORDS]

Two sides of half the records each, 4 seeds per prompt, 5 metrics with intervals, latency, memory
and failures; from columns, as a study or a baseline file gives them. The last line is JSON.
"""

import json
import resource
import sys
import time

import numpy as np

from sd35bench.analysis.grouping import setting_fields
from sd35bench.gate.judge import compare_sides
from sd35bench.gate.policy import as_policy
from sd35bench.gate.sides import Side, Start
from tests.studies.memory import record

METRICS = ("prompt_accuracy", "clip_score_nano", "init_kept", "sharpness", "contrast")
SEEDS = 4
POLICY = {
    "dimensions": {
        "latency": {"start_spread": 0.15, "margins": {"p50": 1.05, "p95": 1.1}},
        "memory": {"margins": {"peak_rss_bytes": 1.05}},
        "failures": {"required": True, "margins": {"failed": 0.01}},
        "quality": {"required": True, "margins": dict.fromkeys(METRICS, 0.05)},
    }
}


def make_side(records: int, seed: int) -> Side:
    """One side of random columns, on the pairs of every other seed, in an order of its own."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(records).astype(np.uint64)
    starts = tuple(
        Start(id=str(i), started_at=f"2026-01-01T{2 * i + seed:02}:00:00", peak_rss_bytes=10**9)
        for i in range(5)
    )
    return Side(
        study=f"side-{seed}",
        setting=setting_fields(record()),
        environment={},
        pairs=order * np.uint64(2654435761),
        prompts=order // np.uint64(SEEDS),
        failed=rng.random(records) < 0.001,
        latency_s=np.exp(0.03 * rng.standard_normal(records)),
        start=np.sort(rng.integers(0, 5, records)),
        starts=starts,
        metrics={name: rng.random(records) for name in METRICS},
        images=(None,) * records,
    )


def measure(records: int) -> dict[str, float]:
    """Compare two sides of `records` / 2 each; seconds, and this process's peak in bytes."""
    sides = [make_side(records // 2, seed) for seed in (0, 1)]
    started = time.perf_counter()
    document = compare_sides(
        sides[:1], sides[1:], as_policy("bench", POLICY), lambda _a, _b, _m: "no images"
    )
    seconds = time.perf_counter() - started
    assert document["n_pairs"] == records // 2
    assert document["dimensions"]["quality"]["verdict"] == "pass"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"records": records, "metrics": len(METRICS), "seconds": seconds, "peak_bytes": peak}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)))
