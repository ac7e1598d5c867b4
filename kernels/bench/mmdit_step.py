"""Time one MMDiT-X block, or nano's whole step, on this CPU against every peer, in one process.

    python kernels/bench/mmdit_step.py [--case block|block-1024px|nano] [--threads N] [--rounds N]
                                       [--peers NAME,…] [--without NAME,…] [--markdown FILE]

All variants compute the same function on the same weights and inputs: patch embedding, the blocks
of the case, final layer. `block` is SD3.5-Medium's first block (1536 wide, 24 heads, dual
attention) at 1024 image and 154 text tokens, `block-1024px` the same at 4,096 and 333, `nano` the
embedded model's six blocks at a batch of two. In each round every variant runs once, in a new
random order, and loops of multiply-adds on registers run beside; figures are medians over rounds
of ratios within a round, with the order-statistics interval of that median. CPU seconds (all
threads of the process) are kept too: on a machine shared with other work they repeat better.

The error is that of the update: ‖out − eager‖ / ‖eager − the same without blocks‖, eager in
float64 for nano and float32 for a block. A speed at a large error is no peer. Random weights, so
NNCF's int8 error says nothing of its quality on a trained model.

Then each of our tiers is run a few times on one thread with the executor's clock on: CPU seconds of
each part of the step, its operations, and which fraction of the register loop's rate they reach,
that loop timed right before. With more threads the first one's clock says little on a shared
machine, where the others do its work while it waits for a core. The last line is one JSON document.
"""

import argparse
import copy
import functools
import importlib
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from sd35_kernels import reference
from sd35_kernels.cpu.build import cpu_flags
from sd35_kernels.mmdit import Executor, KernelUnavailable, load, peak_rate

WIDE: dict[str, Any] = {
    "layers": 2,
    "heads": 24,
    "head_dim": 64,
    "width": 1536,
    "dual": (0,),
    "patch": 2,
    "in_channels": 16,
    "out_channels": 16,
    "qk_norm": True,
    "eps": 1e-6,
}
NANO = WIDE | {"layers": 6, "heads": 6, "head_dim": 32, "width": 192, "dual": (0, 1), "patch": 1}
CASES: dict[str, tuple[dict[str, Any], int, int, int, tuple[int, ...]]] = {
    "block": (WIDE, 1, 64, 154, (1,)),
    "block-1024px": (WIDE, 1, 128, 333, (1,)),
    "nano": (NANO, 2, 8, 32, ()),
}
"""Model, batch, side of the latents, text tokens, layers left out."""
OURS = ("exact", "int8")
PROFILED, LONG_PROFILE_S = 7, 10.0
"""Runs with the clock on, medians count; three where that takes so long."""
FLOAT_PARTS = ("embed", "final")
"""Parts that every tier computes in float32."""
Run = Callable[[], torch.Tensor]


class Step(nn.Module):
    """The reference as a module, for compilers and exporters."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], skip: tuple[int, ...]
    ) -> None:
        """Hold `weights` as parameters."""
        super().__init__()
        self.config, self.skip, self.names = config, skip, list(weights)
        self.values = nn.ParameterList(
            nn.Parameter(w, requires_grad=False) for w in weights.values()
        )

    def forward(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """One velocity."""
        weights = dict(zip(self.names, self.values, strict=True))
        return reference.velocity(
            self.config, weights, latents, context, modulation, position, self.skip
        )


class Case:
    """Weights, inputs and the variants that run them."""

    def __init__(self, name: str, threads: int) -> None:
        """Make the case `name` of `CASES`."""
        self.config, batch, side, text, self.skip = CASES[name]
        self.threads = threads
        self.weights = reference.random_weights(self.config)
        self.inputs = reference.random_inputs(self.config, batch, (side, side), text)
        self.module = Step(self.config, self.weights, self.skip).eval()
        self.executors: dict[str, Executor] = {}
        exact = torch.float64 if name == "nano" else torch.float32
        with torch.inference_mode():
            self.expected, self.without = (
                self._reference(exact, skip)
                for skip in (self.skip, tuple(range(self.config["layers"])))
            )

    def _reference(self, dtype: torch.dtype, skip: tuple[int, ...]) -> torch.Tensor:
        weights = {name: tensor.to(dtype) for name, tensor in self.weights.items()}
        inputs = {name: tensor.to(dtype) for name, tensor in self.inputs.items()}
        return reference.velocity(self.config, weights, skip=skip, **inputs)

    def error(self, out: torch.Tensor) -> float:
        """Error of the update of all blocks."""
        return ((out - self.expected).norm() / (self.expected - self.without).norm()).item()

    def ours(self, tier: str) -> Run:
        """Our executor."""
        executor = load(self.config, dict(self.weights), tier, self.threads)
        self.executors[tier] = executor
        return functools.partial(executor.step, **self.inputs, skip=self.skip)

    def eager(self) -> Run:
        """PyTorch, float32."""
        return lambda: self.module(**self.inputs)

    def compile(self, *, tuned: bool = False, dtype: torch.dtype = torch.float32) -> Run:
        """torch.compile with frozen weights; `tuned`: the fastest of its products, by timing."""
        options: dict[str, Any] = {"freezing": True}
        if tuned:
            options |= {"max_autotune": True, "max_autotune_gemm_backends": "ATEN,CPP"}
        module = self.module if dtype == torch.float32 else copy.deepcopy(self.module).to(dtype)
        inputs = {name: tensor.to(dtype) for name, tensor in self.inputs.items()}
        compiled = torch.compile(module, fullgraph=True, dynamic=False, options=options)
        return lambda: compiled(**inputs).float()

    def compile_bf16(self) -> Run:
        """The same in bf16, tuned. Raises: KernelUnavailable on a CPU without its products."""
        need_bf16()
        return self.compile(tuned=True, dtype=torch.bfloat16)

    @functools.cached_property
    def onnx(self) -> Path:
        """The module as an ONNX file."""
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "step.onnx"
        torch.onnx.export(
            self.module,
            kwargs=self.inputs,
            f=str(path),
            input_names=list(self.inputs),
            external_data=True,
            verbose=False,
        )
        return path

    def onnxruntime(self) -> Run:
        """ONNX Runtime, float32."""
        ort = importlib.import_module("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = ort.InferenceSession(str(self.onnx), options, providers=["CPUExecutionProvider"])
        feed = {name: tensor.numpy() for name, tensor in self.inputs.items()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    def openvino(self) -> Run:
        """OpenVINO, float32."""
        return self._openvino(importlib.import_module("openvino").Core().read_model(self.onnx))

    def openvino_bf16(self) -> Run:
        """OpenVINO, bf16. Raises: KernelUnavailable on a CPU without its products."""
        need_bf16()
        model = importlib.import_module("openvino").Core().read_model(self.onnx)
        return self._openvino(model, "bf16")

    def openvino_int8(self) -> Run:
        """OpenVINO on NNCF's post-training int8, calibrated on four random inputs and this one."""
        nncf = importlib.import_module("nncf")
        model = importlib.import_module("openvino").Core().read_model(self.onnx)
        feeds = [{name: tensor.numpy() for name, tensor in self.inputs.items()}]
        batch, text = self.inputs["context"].shape[:2]
        size = tuple(self.inputs["latents"].shape[2:])
        for seed in range(2, 6):
            made = reference.random_inputs(self.config, batch, (size[0], size[1]), text, seed)
            feeds.append({name: tensor.numpy() for name, tensor in made.items()})
        kind = nncf.ModelType.TRANSFORMER
        return self._openvino(nncf.quantize(model, nncf.Dataset(feeds), model_type=kind))

    def _openvino(self, model: Any, precision: str = "f32") -> Run:
        core = importlib.import_module("openvino").Core()
        settings = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": precision}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        feed = {name: tensor.numpy() for name, tensor in self.inputs.items()}
        return lambda: torch.from_numpy(request.infer(feed)[0])


PEERS: dict[str, Callable[[Case], Run]] = {
    "exact": lambda case: case.ours("exact"),
    "int8": lambda case: case.ours("int8"),
    "eager": Case.eager,
    "compile": Case.compile,
    "compile-tuned": lambda case: case.compile(tuned=True),
    "compile-bf16": Case.compile_bf16,
    "onnxruntime": Case.onnxruntime,
    "openvino": Case.openvino,
    "openvino-bf16": Case.openvino_bf16,
    "openvino-int8": Case.openvino_int8,
}


def need_bf16() -> None:
    """Look for products of bf16. Raises: KernelUnavailable where they would be emulated."""
    if not {"avx512_bf16", "amx_bf16"} & cpu_flags():
        raise KernelUnavailable("this CPU multiplies no bf16: it would be emulated in fp32")


def main() -> None:
    """Measure one case, print its table and its JSON."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    case, runs, errors, missing = Case(arguments.case, arguments.threads), {}, {}, {}
    for name in (peer for peer in arguments.peers.split(",") if peer not in arguments.without):
        try:
            run = PEERS[name](case)
            with torch.inference_mode():
                errors[name] = case.error(run())
        except Exception as exc:  # a peer that cannot be built is named, and the others measured
            if name in OURS and not isinstance(exc, KernelUnavailable):
                raise
            missing[name] = (str(exc) or type(exc).__name__).splitlines()[0]
        else:
            runs[name] = run
    with torch.inference_mode():
        rounds = measure(runs, arguments.rounds, arguments.threads)
        profiles = {tier: profile(case, tier) for tier in case.executors}
    document = summarise(arguments, rounds, errors, missing) | {"profile": profiles}
    table = render(document)
    print(table)
    if arguments.markdown:
        with open(arguments.markdown, "a", encoding="utf-8") as file:
            file.write(table + "\n")
    print(json.dumps(document))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="block")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--without", default=(), type=lambda text: text.split(","))
    parser.add_argument("--markdown", help="append the table to this file")
    return parser.parse_args()


def measure(runs: dict[str, Run], rounds: int, threads: int) -> list[dict[str, dict[str, float]]]:
    """Return per round and variant wall and CPU seconds, and the register loops' rates."""
    order, generator, result = list(runs), random.Random(0), []
    for number in range(rounds + 2):
        one: dict[str, dict[str, float]] = {
            "peak": {tier: peak_rate(tier, threads) for tier in OURS if tier in runs}
        }
        generator.shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            one[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if number >= 2:
            result.append(one)
    return result


def operations(
    config: Mapping[str, Any], batch: int, image: int, text: int, skip: tuple[int, ...]
) -> dict[str, int]:
    """Operations of a step's parts, a multiply-add counted as two; norms count as none."""
    d, patch = config["width"], config["patch"] ** 2
    rows = {"qkv": 0, "out": 0, "up": 0}  # in units of D² multiply-adds
    scores = 0
    for i in (i for i in range(config["layers"]) if i not in skip):
        streams, last = 1 + (i in config["dual"]), i == config["layers"] - 1
        asking = 0 if last else text  # the last block's text gives keys and values only
        rows["qkv"] += 3 * streams * image + (2 if last else 3) * text
        rows["out"] += streams * image + asking
        rows["up"] += 4 * (image + asking)
        scores += (image + asking) * (image + text) + (streams - 1) * image**2
    found = {part: 2 * batch * d * d * count for part, count in rows.items()}
    ends = {
        "embed": 2 * batch * image * d * patch * config["in_channels"],
        "final": 2 * batch * image * d * patch * config["out_channels"],
    }
    return found | {"down": found["up"], "attention": 4 * batch * d * scores} | ends


def profile(case: Case, tier: str) -> dict[str, dict[str, float]]:
    """CPU seconds of each part of one of our tiers on one thread, share, and fraction of the limit.

    Parts without products have no `of_limit`.
    """
    batch, text = case.inputs["context"].shape[:2]
    work = operations(case.config, batch, case.inputs["position"].shape[0], text, case.skip)
    runs: list[dict[str, float]] = []
    rates: dict[str, list[float]] = {"exact": [], tier: []}
    started = time.perf_counter()
    while len(runs) < 3 or (
        len(runs) < PROFILED and time.perf_counter() - started < LONG_PROFILE_S
    ):
        for kind in rates:
            rates[kind].append(peak_rate(kind, 1, clock=time.process_time))
        times: dict[str, float] = {}
        case.executors[tier].step(**case.inputs, skip=case.skip, threads=1, profile=times)
        runs.append(times)
    return parts_of(runs, work, {kind: median(found) for kind, found in rates.items()}, tier)


def parts_of(
    runs: list[dict[str, float]], work: Mapping[str, int], rates: Mapping[str, float], tier: str
) -> dict[str, dict[str, float]]:
    """Summarise profiles: `work` in operations, `rates` of the register loops a second."""
    seconds = {part: median([times[part] for times in runs]) for part in runs[0]}
    whole = sum(seconds.values())
    found: dict[str, dict[str, float]] = {}
    for part, took in seconds.items():
        found[part] = {"s": took, "share": took / whole}
        if part in work and took:
            rate = rates["exact" if part in FLOAT_PARTS else tier]
            found[part] |= {"operations": work[part], "of_limit": work[part] / took / rate}
    return found


def summarise(
    arguments: argparse.Namespace,
    rounds: list[dict[str, dict[str, float]]],
    errors: dict[str, float],
    missing: dict[str, str],
) -> dict[str, Any]:
    """Return medians, best times and ratios of every variant to each of ours."""
    rows = {}
    for name, error in errors.items():
        wall = [one[name]["wall"] for one in rounds]
        row: dict[str, Any] = {
            "median_s": median(wall),
            "best_s": min(wall),
            "cpu_s": median([one[name]["cpu"] for one in rounds]),
            "error": error,
        }
        for tier in (tier for tier in OURS if tier in errors):
            for clock in ("wall", "cpu"):
                ratios = [one[name][clock] / one[tier][clock] for one in rounds]
                row[f"over_{tier}_{clock}"] = [median(ratios), *interval(ratios)]
        rows[name] = row
    return {
        "case": arguments.case,
        "n": len(rounds),
        "threads": arguments.threads,
        "cpu": cpu_name(),
        "load_1min": os.getloadavg()[0],
        "torch": torch.__version__,
        "peak_median": {
            tier: median([one["peak"][tier] for one in rounds]) for tier in rounds[0]["peak"]
        },
        "missing": missing,
        "rows": rows,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median: order statistics n/2 ± 0.98·√n."""
    ordered, n = sorted(values), len(values)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    high = min(n - 1, math.ceil(n / 2 + 0.98 * math.sqrt(n)) - 1)
    return ordered[low], ordered[high]


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def render(document: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    tiers = [tier for tier in OURS if tier in document["rows"]]
    peak = ", ".join(f"{k} {v / 1e9:.0f} G/s" for k, v in document["peak_median"].items())
    lines = [
        f"## {document['case']}",
        "",
        f"{document['cpu']}, {document['threads']} threads, n = {document['n']} rounds, torch "
        f"{document['torch']}, load {document['load_1min']:.1f}; register loops beside: {peak}.",
        "",
        "| variant | wall ms, median (best) | CPU ms | "
        + " | ".join(f"÷ {tier}, wall | ÷ {tier}, CPU" for tier in tiers)
        + " | error |",
        "| --- " * (4 + 2 * len(tiers)) + "|",
    ]
    for name, row in document["rows"].items():
        ratios = [row[f"over_{tier}_{clock}"] for tier in tiers for clock in ("wall", "cpu")]
        cells = [f"{mid:.2f} [{low:.2f}, {high:.2f}]" for mid, low, high in ratios]
        lines.append(
            f"| {name} | {row['median_s'] * 1e3:.1f} ({row['best_s'] * 1e3:.1f}) | "
            f"{row['cpu_s'] * 1e3:.1f} | " + " | ".join(cells) + f" | {row['error']:.1e} |"
        )
    lines += [f"\n{name} is missing: {why}" for name, why in document["missing"].items()]
    return "\n".join(lines) + "\n" + render_profile(document["profile"])


def render_profile(profiles: dict[str, dict[str, dict[str, float]]]) -> str:
    """Where the time goes: parts of a step, a column group for each tier."""
    if not profiles:
        return ""
    lines = [
        "",
        "Where the time goes: CPU time of one thread, in brackets the fraction of the register "
        "loop's rate that the part's products reach.",
        "",
        "| part | " + " | ".join(f"{tier}, ms | share" for tier in profiles) + " |",
        "| --- " + "| ---: | ---: " * len(profiles) + "|",
    ]
    for part in next(iter(profiles.values())):
        cells = []
        for found in (parts[part] for parts in profiles.values()):
            limit = f" ({found['of_limit']:.0%})" if "of_limit" in found else ""
            cells.append(f"{found['s'] * 1e3:.1f}{limit} | {found['share']:.0%}")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
