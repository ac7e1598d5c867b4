"""Run every benchmark of the compiled core on this machine, and write the page that they make.

    python kernels/bench/core_page.py [--page results/tables/core.md] [--only NAME,…]

Each part is a program of its own, run one after the other: one block of SD3.5-Medium's width at two
sizes and nano's step (`mmdit_step.py`), nano's whole images, the 8-bit linear, and the true width;
the last two kinds of images are studies, whose backends run in processes that hold nothing else.
Before and after each part the canary is read, a fixed loop whose speed says how much of the machine
was ours.

What a part gave is kept in a file of its own, with its time and its commit, and the page is written
anew after each: parts may be run one at a time (`--only`), and one that fails or is interrupted
costs only itself. The page begins with the environment and ends with the targets; a target that was
missed, or could not be measured, is said so. The last line printed is one JSON document with all of
it; the exit code is 1 where a part failed.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from sd35_kernels import canary
from sd35_kernels.cpu.build import pick_level
from sd35bench.disk import write_atomic
from sd35bench.machine.measure import environment

HERE = Path(__file__).parent
CASES = ("block", "block-1024px", "nano")
STUDIES: dict[str, tuple[str, ...]] = {
    "nano-images": (
        *("model=nano", "prompts=nano", "prompts.split=heldout", "prompts.limit=16"),
        *("steps=28", "cfg=4", "starts=2", "backend=eager,onnx,onnx-int8,core,core-int8"),
    ),
    "true-width": (
        *("experiment=true-width", "prompts.limit=4", "contention=warn"),
        "backend=eager,core,core-int8,openvino,onnx",
    ),
}
"""What `run -m` is told. Retiming what the host disturbed would double the true width's minutes."""
LINEAR = "w8a8_linear"
PARTS = (*CASES, "nano-images", LINEAR, "true-width")
MINUTES = {
    "block": 4,
    "block-1024px": 6,
    "nano": 3,
    "nano-images": 4,
    LINEAR: 2,
    "true-width": 20,
}
"""About what each takes on two cores of a Cascade Lake; 3 more where nothing was run before."""
MOST_ROUNDS = {"block-1024px": 7}
LEFT_OUT = {"block-1024px": ("compile-tuned",)}
"""Peers that take minutes to build; the page names them."""
PEERS = ("onnxruntime", "openvino", "nncf", "onnx")
READINGS = 21

FLOAT_PEERS = ("eager", "compile", "compile-tuned", "onnxruntime", "openvino")
BLOCK_TARGETS = {"amx": (2.0, 6.5, 1.4), "vnni": (1.15, 4.2, 1.1)}
"""By instructions, of a block at both sizes: int8 over OpenVINO's, int8 over eager, exact over the
best float32 peer."""
WIDE_TARGETS = {"amx": (6.0, 3.5), "vnni": (4.0, 2.8)}
"""Of the true width, int8 over eager: the denoiser alone, and the image with its decoding."""
NANO_LOSSY = {"amx": 7.0, "vnni": 6.0}
MOST_RSS, MOST_START = 0.4, 1.5
UNLIKE = "the machine ran at another speed under one of both"
Row = dict[str, Any]


def main() -> int:
    """Run the parts, write the page after each, print the JSON."""
    arguments = parse()
    reader = canary.load(arguments.threads)
    wanted = [part for part in PARTS if part in arguments.only.split(",")]
    print(f"about {sum(MINUTES[part] for part in wanted)} minutes", flush=True)
    interrupted = False
    for part in wanted:
        try:
            keep(arguments.kept, part, run_part(part, arguments, reader))
        except (Exception, SystemExit, KeyboardInterrupt) as exc:
            # Whatever ended one part, the others' figures and the page are not lost with it.
            interrupted = isinstance(exc, KeyboardInterrupt)
            why = "interrupted" if interrupted else str(exc) or type(exc).__name__
            keep(arguments.kept, part, {"failed": {"why": why, "at": now()}})
        write_page(arguments)
        if interrupted:
            break
    document = write_page(arguments)
    print(json.dumps(document))
    if interrupted:
        return 130
    return int(any("failed" in document["parts"].get(part, {}) for part in wanted))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--page", type=Path, default=Path("results/tables/core.md"))
    parser.add_argument(
        "--kept", type=Path, default=Path("results/core-page"), help="where parts are kept"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - set(PARTS):
        parser.error(f"--only={arguments.only}: no {', '.join(sorted(unknown))}")
    return arguments


def now() -> str:
    """The time, to the minute."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


# Running and keeping --------------------------------------------------------------------------


def run_part(part: str, arguments: argparse.Namespace, reader: canary.Canary) -> Row:
    """Run one part. Raises: SystemExit where its program failed."""
    started, before = time.monotonic(), read(reader)
    if part in STUDIES:
        document, body = run_study(part, fresh=finished(arguments.kept, part))
    else:
        document, body = run_bench(part, arguments)
    where = environment(threads=arguments.threads)
    return {
        "made_at": now(),
        "commit": where["commit"],
        "dirty": where["dirty"],
        "took_s": round(time.monotonic() - started, 1),
        "canary": {"kind": reader.kind, "before": before, "after": read(reader)},
        "document": document,
        "body": body,
    }


def read(reader: canary.Canary) -> float:
    """The canary's median of some readings, in 1e9 operations a second."""
    return round(median(reader.read() for _ in range(READINGS)), 1)


def run_bench(part: str, arguments: argparse.Namespace) -> tuple[Row, str]:
    """Run one of the benchmarks beside this file: its document, and its table as Markdown."""
    threads, n = ["--threads", str(arguments.threads)], arguments.rounds
    if part == LINEAR:
        command = [str(HERE / "w8a8_linear.py"), *threads, "--repeats", str(n)]
    else:
        command = [str(HERE / "mmdit_step.py"), "--case", part, *threads]
        command += ["--rounds", str(min(n, MOST_ROUNDS.get(part, n)))]
        command += ["--without", ",".join(LEFT_OUT.get(part, ()))]
    lines = follow([sys.executable, *command])
    # NNCF writes its progress to the same stream, above the table.
    start = next((i for i, line in enumerate(lines) if line.startswith("## ")), 0)
    body = "\n".join(lines[start:-1])
    if part == LINEAR:
        body = f"## The 8-bit linear layer alone\n\n```\n{body}\n```\n"
    return json.loads(lines[-1]), body


def run_study(part: str, *, fresh: bool) -> tuple[Row, str]:
    """Run a study, and return what `show` says of it.

    `fresh`: remove what an earlier run made; else one that was interrupted goes on.
    """
    program = [sys.executable, "-m", "sd35bench"]
    study = f"bench-{part}"
    if fresh:
        with contextlib.suppress(SystemExit):  # somebody may have removed it
            follow([*program, "rm", study, "--yes"], quiet=True)
    follow([*program, "run", "-m", *STUDIES[part], f"study={study}"])
    shown = follow([*program, "show", study, "--markdown"], quiet=True)
    document = follow([*program, "show", study, "--json"], quiet=True)
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
        shown = " ".join(Path(word).name if "/" in word else word for word in command)
        raise SystemExit(f"{shown} ended with {running.returncode}")
    while lines and not lines[-1]:
        lines.pop()
    return lines


def keep(folder: Path, part: str, found: Row) -> None:
    """Keep what a part gave; a failure is put beside the figures of an earlier run."""
    if "failed" in found:
        found = kept(folder).get(part, {}) | found
    write_atomic(folder / f"{part}.json", json.dumps(found).encode())


def kept(folder: Path) -> dict[str, Row]:
    """Read what is kept, in the parts' order; a file that is no JSON counts as none."""
    found = {}
    for part in PARTS:
        with contextlib.suppress(OSError, ValueError):
            found[part] = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
    return found


def finished(folder: Path, part: str) -> bool:
    """Whether the part's last run came to its end."""
    return "failed" not in kept(folder).get(part, {"failed": None})


def write_page(arguments: argparse.Namespace) -> Row:
    """Write the page from all that is kept; returns the JSON document."""
    parts = kept(arguments.kept)
    documents = {part: found["document"] for part, found in parts.items() if "document" in found}
    document = {
        "environment": surroundings(arguments.threads),
        "targets": list(judge(documents, column())),
        "parts": parts,
    }
    bodies = [found["body"] for found in parts.values() if "body" in found]
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    page = "\n".join([render(document), *bodies, verdicts(document["targets"])])
    arguments.page.write_text(page, encoding="utf-8")
    for found in parts.values():
        found.pop("body", None)
    return document


def surroundings(threads: int) -> Row:
    """Where the figures come from: machine, instructions, and everybody's version."""
    found: Row = dict(environment(threads=threads))
    found["instructions"] = pick_level()
    found["compiler"] = _first_line([os.environ.get("CXX", "g++"), "--version"])
    distributions = _distributions()
    for name in PEERS:
        for distribution in distributions.get(name, ())[:1]:
            found[name] = importlib.metadata.version(distribution)
    return found


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    """Distributions by module, as onnxruntime has several names; 1 s, hence once a process."""
    return importlib.metadata.packages_distributions()


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0]


def column() -> str:
    """Which column of the targets this machine's instructions stand in."""
    return "amx" if pick_level().startswith("amx") else "vnni"


# Targets --------------------------------------------------------------------------------------


def judge(documents: Mapping[str, Any], column: str) -> Iterator[Row]:
    """Hold what was measured against the targets; what was not is yielded with its reason."""
    over_openvino, over_eager, over_best = BLOCK_TARGETS[column]
    for case in CASES[:2]:
        found = documents.get(case)
        yield of_rounds(found, case, "int8", ("openvino-int8",), over_openvino)
        yield of_rounds(found, case, "int8", ("eager",), over_eager)
        yield of_rounds(found, case, "exact", FLOAT_PEERS, over_best)
    step = documents.get("nano")
    yield of_rounds(step, "nano", "exact", ("eager",), 3.5)
    yield of_rounds(step, "nano", "exact", ("onnxruntime",), 1.6)
    yield from nano_images(by_backend(documents.get("nano-images")), column)
    yield from true_width(by_backend(documents.get("true-width")), column)


def of_rounds(
    found: Mapping[str, Any] | None, case: str, tier: str, peers: tuple[str, ...], wanted: float
) -> Row:
    """A tier's target in an interleaved run: the ratio to the fastest of the peers."""
    target = {"case": case, "tier": tier, "peer": " or ".join(peers), "wanted": wanted}
    rows = {} if found is None else found["rows"]
    there = [peer for peer in peers if peer in rows]
    if found is None or tier not in rows or not there:
        missing = {} if found is None else found["missing"]
        why = [f"{name}: {missing[name]}" for name in (tier, *peers) if name in missing]
        return target | _unknown("; ".join(why) or "this part was not run")
    # The best peer by its own median: the smallest ratio, and the one that counts.
    best = min(there, key=lambda peer: rows[peer][f"over_{tier}_wall"][0])
    note = f"error {rows[tier]['error']:.1e}"
    return (
        target | {"peer": best} | _came(rows[best][f"over_{tier}_wall"], wanted, found["n"], note)
    )


def nano_images(rows: Mapping[str, Row], column: str) -> Iterator[Row]:
    """Targets of nano's whole images, at 28 steps and cfg 4, and of its warm start."""
    case = "nano, whole image"
    yield _image(rows, case, "core", "eager", 3.5)
    yield _image(rows, case, "core", "onnx", 1.6)
    yield _image(rows, case, "core-int8", "eager", NANO_LOSSY[column])
    yield _image(rows, case, "core-int8", "onnx-int8", 1.0)
    yield _quotient(rows, "nano, load and first image", "core", start_s, MOST_START)


def true_width(rows: Mapping[str, Row], column: str) -> Iterator[Row]:
    """Targets of the true width at 512 px, one guided step: int8 against eager and OpenVINO."""
    alone, whole = WIDE_TARGETS[column]
    yield _quotient(rows, "true width, denoiser", "core-int8", denoiser_s, alone, faster=True)
    yield _quotient(
        rows, "true width, denoiser", "core-int8", denoiser_s, 1.8, faster=True, peer="openvino"
    )
    yield _image(rows, "true width, with decoding", "core-int8", "eager", whole)
    yield _quotient(rows, "true width, peak RSS", "core-int8", rss_bytes, MOST_RSS)


def by_backend(show: Mapping[str, Any] | None) -> dict[str, Row]:
    """The settings of a `show` document by their backend, one each."""
    return {} if show is None else {row["backend"]: row for row in show["settings"]}


def start_s(row: Mapping[str, Any]) -> float | None:
    """Seconds of loading and the first image; starting Python, alike for all, is not in them."""
    parts = (row["load_s"], row["first_call_s"])
    return None if None in parts else sum(parts)


def denoiser_s(row: Mapping[str, Any]) -> float | None:
    """Mean seconds of an image in the denoiser."""
    return row["stage_s"]["denoise_s"]


def rss_bytes(row: Mapping[str, Any]) -> float | None:
    """The largest resident memory of a process."""
    return row["peak_rss_bytes"]


def _image(rows: Mapping[str, Row], case: str, tier: str, peer: str, wanted: float) -> Row:
    """How many times as fast as a peer a whole image is, by both ratios to eager.

    A study has no ratio where the machine ran at unlike speeds; medians would only repeat that.
    """
    target = {"case": case, "tier": tier, "peer": peer, "wanted": wanted}
    if tier not in rows or peer not in rows:
        return target | _unknown("this part was not run, or without one of both")
    n, note = rows[tier]["latency_s"]["n"], quality(rows[tier])
    ours, theirs = rows[tier]["speedup"], rows[peer]["speedup"]
    if ours is not None and peer == "eager":
        return target | _came([ours["value"], *(ours["ci95"] or (None, None))], wanted, n, note)
    if ours is not None and theirs is not None:
        return target | _came([ours["value"] / theirs["value"], None, None], wanted, n, note)
    return target | _unknown(UNLIKE)


def _alike(rows: Mapping[str, Row], *backends: str) -> bool:
    """Whether the study compares these with eager, which it does at like speeds only."""
    return all(name == "eager" or rows[name]["speedup"] is not None for name in backends)


def quality(row: Mapping[str, Any]) -> str:
    """What a study knows of a setting's prompt accuracy: value, interval, n; else nothing."""
    found = row.get("metrics", {}).get("prompt_accuracy")
    if not found or found.get("value") is None:
        return ""
    return f"prompt accuracy {found['value']:.2f} (n = {found['n']})"


def _quotient(
    rows: Mapping[str, Row],
    case: str,
    tier: str,
    figure: Any,
    wanted: float,
    faster: bool = False,
    peer: str = "eager",
) -> Row:
    """A figure of ours over a peer's, at most `wanted`; `faster`: theirs over ours, at least so.

    Seconds have no ratio where whole images have none; bytes do not depend on the machine's speed.
    """
    target = {"case": case, "tier": tier, "peer": peer, "wanted": wanted}
    if tier not in rows or peer not in rows:
        return target | _unknown("this part was not run, or without one of both", not faster)
    if figure is not rss_bytes and not _alike(rows, tier, peer):
        return target | _unknown(UNLIKE, not faster)
    ours, theirs = figure(rows[tier]), figure(rows[peer])
    if not ours or not theirs:
        return target | _unknown("not in the records", not faster)
    n = rows[tier]["latency_s"]["n"]
    if faster:
        return target | _came([theirs / ours, None, None], wanted, n, "of means")
    return target | _came([ours / theirs, None, None], wanted, n, "", at_most=True)


def _came(
    ratio: list[float | None], wanted: float, n: int, note: str, *, at_most: bool = False
) -> Row:
    value = ratio[0]
    assert value is not None
    met = value <= wanted if at_most else value >= wanted
    return {"ratio": ratio, "n": n, "note": note, "at_most": at_most, "met": met}


def _unknown(why: str, at_most: bool = False) -> Row:
    return {"ratio": None, "n": 0, "note": why, "at_most": at_most, "met": None}


# The page -------------------------------------------------------------------------------------


def render(document: Row) -> str:
    """The page's head: what this is, where its figures come from, and which part is from when."""
    env = document["environment"]
    versions = (
        f"{name} {env[name]}"
        for name in ("python", "torch", "diffusers", *PEERS)
        if env.get(name) is not None
    )
    absent = [name for name in PEERS if env.get(name) is None]
    head = (
        "# The compiled core on this machine\n\n"
        "Written by `make bench`. Figures are of this machine, each part's of the commit that "
        "stands beside it; ratios are medians over rounds of one interleaved run, with 95 % "
        "intervals of that median. The studies run one process a backend.\n\n"
        "| | |\n| --- | --- |\n"
        f"| processor | {env['cpu_model']}, {env['cpu_count']} cores in sight, "
        f"{env['threads']} threads, {env['ram_bytes'] / 2**30:.0f} GiB |\n"
        f"| instructions | {env['instructions']} |\n"
        f"| system | {env['os']}, {env['compiler']} |\n"
        f"| versions | {', '.join(versions)} |\n"
    )
    if absent:
        head += f"| not installed | {', '.join(absent)} |\n"
    return head + "\n" + render_parts(document["parts"])


def render_parts(parts: Mapping[str, Row]) -> str:
    """When and of which commit each part is, how much of the machine was there, and what failed."""
    lines = [
        "| part | made | commit | minutes | canary before, after, G operations/s | |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for part in PARTS:
        found = parts.get(part, {})
        said = "" if part in parts else "never run"
        if "failed" in found:
            said = f"failed at {found['failed']['at']}: {found['failed']['why']}"
            said += "; the figures are an earlier run's" if "document" in found else ""
        elif part in LEFT_OUT:
            said = f"without {', '.join(LEFT_OUT[part])}, which takes minutes to build"
        if "document" not in found:
            lines.append(f"| {part} | | | | | {said} |")
            continue
        commit = "none" if found["commit"] is None else found["commit"][:12]
        speed = found["canary"]
        lines.append(
            f"| {part} | {found['made_at']} | {commit}{', changed' if found['dirty'] else ''} | "
            f"{found['took_s'] / 60:.1f} | {speed['before']:.0f}, {speed['after']:.0f} | {said} |"
        )
    return "\n".join(lines) + "\n"


def verdicts(targets: list[Row]) -> str:
    """The page's end: targets, and what came."""
    lines = [
        "## Targets\n",
        "How many times the peer's time is ours (≥), or how much of the peer's our figure is (≤); "
        "the other instruction set's column cannot be measured here. Where a target is missed, the "
        "profile above says where the time goes.\n",
        "| case | tier | ÷ | target | came | n | | |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in targets:
        sign, state = "≤" if row["at_most"] else "≥", "not measured"
        if row["met"] is not None:
            state = "met" if row["met"] else "missed"
        lines.append(
            f"| {row['case']} | {row['tier']} | {row['peer']} | {sign} {row['wanted']:.2f} | "
            f"{_ratio_text(row['ratio'])} | {row['n']} | {row['note']} | {state} |"
        )
    return "\n".join(lines) + "\n"


def _ratio_text(ratio: list[float | None] | None) -> str:
    if ratio is None:
        return "–"
    middle, low, high = ratio
    return f"{middle:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    sys.exit(main())
