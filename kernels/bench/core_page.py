"""Run every benchmark of the compiled core on this machine, and write the page that they make.

    python kernels/bench/core_page.py [--page results/tables/core.md] [--only NAME,…]

Each part is a program of its own, run one after the other: the 8-bit linear, one block of
SD3.5-Medium's width at two sizes and nano's step (`mmdit_step.py`), and the study `true-width`,
whose backends run in processes that hold nothing else. Between the parts the canary is read, a
fixed loop whose speed says how much of the machine was ours. The page begins with the environment
and ends with the targets; a target that was missed is said so. The last line printed is one JSON
document with all of it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from sd35_kernels import canary
from sd35_kernels.cpu.build import pick_level
from sd35bench.measure import environment

HERE = Path(__file__).parent
CASES = ("block", "block-1024px", "nano")
STUDY = "true-width"
PARTS = ("w8a8_linear", *CASES, STUDY)
PEERS = ("onnxruntime", "openvino", "nncf", "onnx")
READINGS = 21
FLOAT_PEERS = ("eager", "compile", "compile-tuned", "onnxruntime", "openvino")
TARGETS: dict[str, list[tuple[str, str, tuple[str, ...], float]]] = {
    "amx": [
        *((case, "int8", ("openvino-int8",), 2.0) for case in CASES[:2]),
        *((case, "int8", ("eager",), 6.5) for case in CASES[:2]),
        *((case, "exact", FLOAT_PEERS, 1.4) for case in CASES[:2]),
    ],
    "vnni": [
        *((case, "int8", ("openvino-int8",), 1.15) for case in CASES[:2]),
        *((case, "int8", ("eager",), 4.2) for case in CASES[:2]),
        *((case, "exact", FLOAT_PEERS, 1.1) for case in CASES[:2]),
    ],
}
"""By instructions: case, our tier, the peers of which the fastest counts, and how many times."""
NANO_TARGETS = [("nano", "exact", ("eager",), 3.5), ("nano", "exact", ("onnxruntime",), 1.6)]


def main() -> None:
    """Run the parts, write the page, print the JSON."""
    arguments = parse()
    wanted = arguments.only.split(",")
    reader = canary.load(arguments.threads)
    readings = {"before": read(reader)}
    documents: dict[str, Any] = {}
    bodies: list[str] = []
    for part in (part for part in PARTS if part in wanted):
        documents[part], body = run_study() if part == STUDY else run_bench(part, arguments)
        bodies.append(body)
        readings[f"after {part}"] = read(reader)
    document = {
        "environment": surroundings(arguments.threads),
        "canary": {"kind": reader.kind, "g_operations_per_s": readings},
        "targets": list(judge(documents)),
        "parts": documents,
    }
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text("\n".join([render(document), *bodies, verdicts(document)]))
    print(json.dumps(document))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--page", type=Path, default=Path("results/tables/core.md"))
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def read(reader: canary.Canary) -> float:
    """The canary's median of some readings, in 1e9 operations a second."""
    return round(median(reader.read() for _ in range(READINGS)), 1)


def run_bench(part: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Run one of the benchmarks beside this file: its document, and its table as Markdown."""
    threads = ["--threads", str(arguments.threads)]
    if part == "w8a8_linear":
        command = [str(HERE / "w8a8_linear.py"), *threads, "--repeats", str(arguments.rounds)]
    else:
        rounds = ["--rounds", str(arguments.rounds)]
        command = [str(HERE / "mmdit_step.py"), "--case", part, *threads, *rounds]
    lines = follow([sys.executable, *command])
    # NNCF writes its progress to the same stream, above the table.
    start = next((n for n, line in enumerate(lines) if line.startswith("## ")), 0)
    body = "\n".join(lines[start:-1])
    if part == "w8a8_linear":
        body = f"## The 8-bit linear layer alone\n\n```\n{body}\n```\n"
    return json.loads(lines[-1]), body


def run_study() -> tuple[dict[str, Any], str]:
    """Run the study of the true width, and return what `show` says of it."""
    program = [sys.executable, "-m", "sd35bench"]
    follow([*program, "run", f"experiment={STUDY}"])
    shown = follow([*program, "show", STUDY, "--markdown"], quiet=True)
    document = follow([*program, "show", STUDY, "--json"], quiet=True)
    body = "\n".join(shown).replace("\n## ", "\n### ").replace("# Study", "## Study", 1)
    return json.loads("\n".join(document)), body + "\n"


def follow(command: list[str], *, quiet: bool = False) -> list[str]:
    """Run a command, show its lines as they come, and return them. Raises: SystemExit."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            lines.append(line.rstrip("\n"))
            if not quiet and not line.startswith("{"):
                print(line, end="", flush=True)
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def surroundings(threads: int) -> dict[str, Any]:
    """Where the figures come from: machine, instructions, commit, and everybody's version."""
    found: dict[str, Any] = dict(environment(threads=threads))
    found["instructions"] = pick_level()
    found["compiler"] = _first_line([os.environ.get("CXX", "g++"), "--version"])
    found["made_on"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0]


def judge(documents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Hold what was measured against the targets of this machine's instructions."""
    column = "amx" if pick_level().startswith("amx") else "vnni"
    for case, tier, peers, wanted in [*TARGETS[column], *NANO_TARGETS]:
        rows = documents.get(case, {}).get("rows", {})
        there = [peer for peer in peers if peer in rows]
        if tier not in rows or not there:
            continue
        # The best peer by its own median: the smallest ratio, and the one that counts.
        best = min(there, key=lambda peer: rows[peer][f"over_{tier}_wall"][0])
        ratio = rows[best][f"over_{tier}_wall"]
        yield {
            "case": case,
            "tier": tier,
            "peer": best,
            "wanted": wanted,
            "ratio": ratio,
            "met": ratio[0] >= wanted,
            "n": documents[case]["n"],
            "error": rows[tier]["error"],
        }


def render(document: dict[str, Any]) -> str:
    """The page's head: what this is, and where its figures come from."""
    env, readings = document["environment"], document["canary"]
    commit = "no commit" if env["commit"] is None else env["commit"][:12]
    versions = (
        f"{name} {env[name]}"
        for name in ("python", "torch", "diffusers", *PEERS)
        if env.get(name) is not None
    )
    speeds = (f"{rate:.0f} {when}" for when, rate in readings["g_operations_per_s"].items())
    return (
        "# The compiled core on this machine\n\n"
        "Written by `make bench`. Figures are of this machine and this commit alone; ratios are "
        "medians over rounds of one interleaved run, with 95 % intervals of that median. The study "
        "at the end runs one process a backend.\n\n"
        "| | |\n| --- | --- |\n"
        f"| made | {env['made_on']}, commit {commit}{', changed' if env['dirty'] else ''} |\n"
        f"| processor | {env['cpu_model']}, {env['cpu_count']} cores in sight, "
        f"{env['threads']} threads, {env['ram_bytes'] / 2**30:.0f} GiB |\n"
        f"| instructions | {env['instructions']} |\n"
        f"| system | {env['os']}, {env['compiler']} |\n"
        f"| versions | {', '.join(versions)} |\n"
        f"| canary ({readings['kind']}) | G operations/s: {', '.join(speeds)} |\n"
    )


def verdicts(document: dict[str, Any]) -> str:
    """The page's end: targets, and what came."""
    lines = [
        "## Targets\n",
        "Ratios of wall time to the best of the peers named; the other instruction set's column "
        "cannot be measured here.\n",
        "| case | tier | ÷ | target | came | n | error | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in document["targets"]:
        middle, low, high = row["ratio"]
        lines.append(
            f"| {row['case']} | {row['tier']} | {row['peer']} | {row['wanted']:.2f} | "
            f"{middle:.2f} [{low:.2f}, {high:.2f}] | {row['n']} | {row['error']:.1e} | "
            f"{'met' if row['met'] else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
