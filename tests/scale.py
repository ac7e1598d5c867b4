"""A synthetic study of any size, and how long the verbs take on it: figures for docs/scale.md.

    python -m tests.scale --records 1000 10000 100000 1000000 --folder DIR --page docs/scale.md

makes each study once (10 loads x 20 settings x so many prompts; ten records share an image, as
backends do that agree to the bit) and times each verb on it: seconds of wall and CPU, the largest
resident set, the size of the page that it wrote, and the canary: how fast a fixed piece of work ran
right before, by CPU time, relative to the fastest time of this folder. The journal's lines, scores
and images are those of a real study of SD3.5 Medium with CLIP-score; trial keys are made up. The
last command of a size reads it after one more record was appended.

What was measured is kept in DIR/measured.jsonl, and the table in the page is made of the latest of
each command and size: the curve may be made size by size, and verb by verb (`--only`).
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sd35bench.machine.measure import environment
from sd35bench.study.journal import new_shard_id
from sd35bench.study.store import Score, Study
from sd35bench.types import (
    BackendSpec,
    CanaryFacts,
    Flops,
    Load,
    Memory,
    ModelSpec,
    PromptRef,
    Record,
    Request,
    Session,
    Status,
    Surroundings,
    Timings,
    Trial,
    content_hash,
    to_json,
)

LOADS, STARTS = 10, 4
STEPS, CFGS = (4, 8, 16, 28), (1.0, 2.0, 4.0, 5.0, 7.0)
SETTINGS = tuple((steps, cfg) for steps in STEPS for cfg in CFGS)
PER_PROMPT = LOADS * len(SETTINGS)
METRIC = "clip_score_ViT-B-32_openai"
FAILED_EVERY = 211
SIDE_PX = 64
ENVIRONMENT = {"sd35bench": "0.0", "torch": "2.9", "cpu_model": "synthetic", "gpu_name": "H200"}


def load_of(number: int) -> Load:
    """One of the backends; the first is what the others' speed is held against."""
    kind = "eager" if number == 0 else "compile"
    return Load(
        model=ModelSpec(
            name="sd35-medium",
            path="sd35",
            weights_digest="ab" * 32,
            max_sequence_length=256,
            target_latency_s=8.0,
        ),
        backend=BackendSpec(name=f"variant-{number}", kind=kind, options={"mode": number}),
        threads=1,
    )


def make_study(root: Path, name: str, records: int) -> Study:
    """Write a study of `records` records, a multiple of 200, and a tenth as many images."""
    prompts = records // PER_PROMPT
    study = Study.open(root, name, create=True)
    images = [_write_image(study.path / "images", i) for i in range(prompts * len(SETTINGS))]
    for number in range(LOADS):
        edges = [prompts * i // STARTS for i in range(STARTS + 1)]
        for start in range(STARTS):
            _write_start(study, number, start, range(edges[start], edges[start + 1]), images)
    return study


def _write_image(folder: Path, number: int) -> str:
    """A small PNG of its own; returns its digest."""
    rows = b"".join(
        b"\0" + hashlib.sha256(b"%d-%d" % (number, y)).digest() * 6 for y in range(SIDE_PX)
    )
    head = struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest[:2] / f"{digest}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return digest


def _write_start(study: Study, number: int, start: int, prompts: range, images: list[str]) -> None:
    """One process start's shard, and the scores of its images."""
    shard, load, rng = study.new_shard_id(), load_of(number), random.Random(f"{number} {start}")
    session = Session(
        id=shard,
        load=load,
        started_at=f"2026-11-30T{number:02d}:{start:02d}:00.000000+00:00",
        environment_id=content_hash(ENVIRONMENT),
        environment=dict(ENVIRONMENT),
        load_s=12.0,
        first_call_s=3.0,
        warmup_s=5.0,
        in_force={"device": "cuda", "dtype": "bf16"},
        start=start,
        canary=CanaryFacts(kind="integer", threads=1, best=2.0, machine="synthetic"),
    )
    lines = [json.dumps({"kind": "session", **to_json(session)}, separators=(",", ":"))]
    scores: dict[str, list[str]] = {"guard": [], METRIC: []}
    templates = [_template(load, shard, *setting) for setting in SETTINGS]
    score_lines = {name: _score_template(name) for name in scores}
    for prompt in prompts:
        for place, (steps, cfg) in enumerate(SETTINGS):
            values = _values(rng, number, prompt, place, images[prompt * len(SETTINGS) + place])
            ok, failed = templates[place]
            if int(str(values["@serial"])) % FAILED_EVERY == 0:
                lines.append(failed % values)
                continue
            lines.append(ok % values)
            quality = 24.0 + 3.0 * (1 - 3.0 / steps) - 0.3 * abs(cfg - 4) + rng.gauss(0, 1.5)
            for name, value in (("guard", 1.0), (METRIC, round(quality, 4))):
                scores[name].append(score_lines[name] % {**values, "@value": value})
    _write(study.path / "journal" / f"{shard}.jsonl", lines)
    for name, rows in scores.items():
        folder = study.path / "scores"
        _write(folder / f"{new_shard_id(folder)}-{name}.jsonl", rows)


def _write(path: Path, lines: list[str]) -> None:
    if lines:
        path.write_text("\n".join(lines) + "\n")


def _values(
    rng: random.Random, number: int, prompt: int, place: int, image: str
) -> dict[str, object]:
    """What tells one record from the others of its setting."""
    steps, cfg = SETTINGS[place]
    step_s = (0.05 if cfg > 1 else 0.03) * (1.0 - 0.04 * number)
    seconds = [round(step_s * rng.uniform(0.95, 1.05), 6) for _ in range(steps)]
    serial = (prompt * len(SETTINGS) + place) * LOADS + number
    minute, second = divmod(prompt * len(SETTINGS) + place, 60)
    hour, minute = divmod(minute, 60)
    day, hour = divmod(hour, 24)
    return {
        "@serial": serial,
        "@key": hashlib.sha256(b"%d" % serial).hexdigest()[:20],
        "@prompt": prompt,
        "@image": image,
        "@steps": ",".join(map(str, seconds)),
        "@denoise": sum(seconds),
        "@total": sum(seconds) + 0.06 + rng.uniform(0.0, 0.01),
        "@started": f"2026-12-{1 + day:02d}T{hour:02d}:{minute:02d}:{second:02d}.{number:06d}",
        "@canary": round(rng.uniform(0.97, 1.0), 4),
        "@share": round(rng.uniform(0.97, 1.0), 4),
    }


def _template(load: Load, session: str, steps: int, cfg: float) -> tuple[str, str]:
    """A record's line as a format string: of one that went well, and of one that failed."""
    request = Request(
        prompt="a synthetic photograph, number @prompt, with a tree, a house and two boats",
        steps=steps, cfg=cfg, seed=0, width=SIDE_PX, height=SIDE_PX,
    )  # fmt: skip
    trial = Trial(
        key="@key",
        load=load,
        request=request,
        batch_size=1,
        prompt=PromptRef(id="p@prompt", set="synthetic.txt", split="tune"),
    )
    memory = Memory(peak_rss_bytes=3 << 30, peak_vram_bytes=9 << 30)
    record = Record(
        trial=trial,
        status=Status.OK,
        session_id=session,
        started_at="@started+00:00",
        timings=Timings(
            generate_s=-1.0, encode_s=0.004, text_s=0.03, denoise_s=-2.0, decode_s=0.02,
            step_s=(-3.0,),
        ),
        memory=memory,
        image="@image",
        image_bytes=2000,
        effective_steps=steps,
        evaluations=steps,
        truncated_tokens=0,
        flops=Flops(text=1e11, denoise=steps * 2e12, decode=2.5e12),
        surroundings=Surroundings(
            canary_before=-4.0, canary_after=-4.0, cpu_share=-5.0, switches=1
        ),
    )  # fmt: skip
    failed = Record(
        trial=trial,
        status=Status.OUT_OF_MEMORY,
        session_id=session,
        started_at="@started+00:00",
        phase="generate",
        error="CUDA out of memory",
        memory=memory,
    )
    return _format(record), _format(failed)


def _format(record: Record) -> str:
    text = json.dumps({"kind": "record", **to_json(record)}, separators=(",", ":"))
    for number, name in (("-1.0", "total"), ("-2.0", "denoise"), ("-4.0", "canary")):
        text = text.replace(number, f"@{name}")
    text = text.replace("-3.0", "@steps").replace("-5.0", "@share")
    return _filled(text)


def _score_template(name: str) -> str:
    detail = {} if name == "guard" else {"features": "ViT-B-32_openai"}
    score = Score(metric=name, key="@key", image="@image", value=-1.0, detail=detail)
    return _filled(json.dumps(to_json(score)).replace("-1.0", "@value"))


def _filled(text: str) -> str:
    for name in ("key", "prompt", "image", "steps", "denoise", "total", "started", "canary"):
        text = text.replace(f"@{name}", f"%(@{name})s")
    return text.replace("@share", "%(@share)s").replace("@value", "%(@value)s")


# Measuring ------------------------------------------------------------------------------------

_RESUME = (
    "import sys; from pathlib import Path; from sd35bench.study.store import Study;"
    " p = Path(sys.argv[1]); print(len(Study.open(p.parent, p.name).done_keys()))"
)


def commands(path: Path) -> dict[str, list[str]]:
    """What is timed on one study, each in a process of its own."""
    verb = [sys.executable, "-m", "sd35bench"]
    where = ["--results-dir", str(path.parent)]
    show = [*verb, "show", path.name, *where, "--json"]
    return {
        "first reading": [sys.executable, "-c", _RESUME, str(path)],
        "first show": show,
        "resume scan": [sys.executable, "-c", _RESUME, str(path)],
        "show": show,
        "show, not kept": [*show, "--pool-hosts"],
        "recommend": [*verb, "recommend", path.name, *where, "--json"],
        "report": [*verb, "report", path.name, *where],
        "report, linked": [*verb, "report", path.name, *where, "--images", "link"],
        "verify": [*verb, "verify", path.name, *where],
        "show, 1 added": show,
    }


PAGES = {"report": "report.html", "report, linked": "report/index.html"}


def append_one(path: Path) -> None:
    """Time one trial again: a shard of its own with the first shard's session and record."""
    first = min((path / "journal").glob("*.jsonl"))
    with first.open() as file:
        lines = [next(file), next(file)]
    shard = Study.open(path.parent, path.name).new_shard_id()
    (path / "journal" / f"{shard}.jsonl").write_text("".join(lines))


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Run a command; seconds of wall and CPU, peak resident MB. Raises: RuntimeError.

    One thread, and bytecode is kept in the folder, as that of an installed package is.
    """
    own = {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | own
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}: {process.returncode}: {said.decode()[-2000:]}")
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
    }


TARGETS_S = {"resume scan": 10, "show": 5, "recommend": 30, "report": 30, "report, linked": 30}
"""At 1,000,000 records."""
KEPT = "measured.jsonl"
MARKS = "<!-- measured -->\n", "<!-- /measured -->"


def canary() -> float:
    """How often a fixed piece of work fits into a second of CPU time now."""
    values = np.random.default_rng(0).integers(0, 1 << 40, 1 << 20)
    started = time.process_time()
    for _ in range(4):
        np.sort(values, kind="stable")
        sum(range(200_000))
    return 4 / (time.process_time() - started)


def measure_all(folder: Path, sizes: list[int], only: list[str]) -> Iterator[dict[str, Any]]:
    """What each command took on each size."""
    about = {"commit": commit(), "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime())}
    for size in sizes:
        path = folder / f"n{size}"
        if not (path / "study.json").exists():
            make_study(folder, path.name, size)
        for name, command in commands(path).items():
            if only and name not in only:
                continue
            if name == "first reading":
                shutil.rmtree(path / "view", ignore_errors=True)
            if name == "show, 1 added":
                append_one(path)
            speed, load = canary(), os.getloadavg()[0]
            found = measure(command, folder)
            page = path / PAGES[name] if name in PAGES else None
            page_mb = None if page is None else page.stat().st_size / 1e6
            yield {
                **about, "records": size, "command": name, **found, "page_mb": page_mb,
                "canary": speed, "load": load,
            }  # fmt: skip


def table(kept: list[dict[str, Any]]) -> str:
    """The latest measurement of each command and size, by size, with what it was measured on."""
    latest = {(found["records"], found["command"]): found for found in kept}
    order = list(commands(Path()))
    shown = sorted(latest.values(), key=lambda f: (f["records"], order.index(f["command"])))
    best = max(found["canary"] for found in kept)
    lines = [
        "| records | command | wall (s) | CPU (s) | peak (MB) | page (MB) | canary | target |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for found in shown:
        page = "" if found["page_mb"] is None else f"{found['page_mb']:.1f}"
        lines.append(
            f"| {found['records']:,} | {found['command']} | {found['wall_s']:.1f}"
            f" | {found['cpu_s']:.1f} | {found['peak_mb']:,.0f} | {page}"
            f" | {found['canary'] / best:.2f} | {_verdict(found)} |"
        )
    loads, dates = [f["load"] for f in shown], [f["at"] for f in shown]
    commits = ", ".join(dict.fromkeys(found["commit"] for found in shown))
    about = environment()
    lines += [
        "",
        f"{about['cpu_model']}, {about['cpu_count']} cores, load {min(loads):.1f} to"
        f" {max(loads):.1f}; {min(dates)} to {max(dates)} UTC; commit {commits}; one thread, n = 1"
        " run of each command.",
        "",
    ]
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> str:
    target = TARGETS_S.get(found["command"])
    if target is None or found["records"] != 1_000_000:
        return ""
    if found["wall_s"] <= target:
        return f"{target} s: kept"
    return f"{target} s: {'kept by CPU seconds' if found['cpu_s'] <= target else 'missed'}"


def commit() -> str:
    """What is measured."""
    found = environment()
    return f"{found['commit'] or 'unknown'}"[:7] + (" and changes" if found["dirty"] else "")


def main(write: Callable[[str], object] = print) -> int:
    """Make what is missing, measure, and print the table of all that was kept."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--records", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, required=True, help="where studies are, or go")
    parser.add_argument("--only", nargs="+", default=[], metavar="VERB", help="these verbs alone")
    parser.add_argument("--page", type=Path, help="a page whose table is made anew")
    found = parser.parse_args()
    found.folder.mkdir(parents=True, exist_ok=True)
    log = found.folder / KEPT
    for each in measure_all(found.folder, found.records, found.only):
        with log.open("a") as file:
            file.write(json.dumps(each) + "\n")
    text = table([json.loads(line) for line in log.read_text().splitlines()])
    write(text)
    if found.page is not None:
        page = found.page.read_text()
        before, rest = page.split(MARKS[0])
        found.page.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
