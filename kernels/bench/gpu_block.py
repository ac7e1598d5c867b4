"""Time the fused Triton passes on a GPU against what inductor makes of the same arithmetic.

    python kernels/bench/gpu_block.py [--rounds N] [--rehearse]

The shapes are those of one block of SD3.5-Medium with dual attention at 1024 px: a batch of two,
4,096 image and 333 text tokens, bf16. Each operation runs as our Triton kernel, as torch.compile of
its reference and as the reference itself, in a new random order in every round; figures are medians
of GPU time by events, with the order-statistics interval of the ratio's median. `of limit` is the
bytes that the operation must move over the copy rate, or its operations over the product rate, both
measured here, over the time taken.

An operation earns its place by 5 % of a block: `saves` is what its uses in a block save against
inductor, over the compiled block's time. The last line is one JSON document. `--rehearse` runs the
same program on any machine: small shapes, Triton's interpreter, no compiler; times mean nothing.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from sd35_kernels import quantize_weight, reference  # noqa: E402
from sd35_kernels.norms import reference as norms  # noqa: E402
from sd35_kernels.norms.gpu import (  # noqa: E402
    gpu_gated_norm,
    gpu_joint_heads,
    gpu_modulated_norm,
)
from sd35_kernels.w8a8.gpu import (  # noqa: E402
    gpu_w8a8_linear,
    gpu_w8a8_mlp,
)

EPS, EARNS = 1e-6, 0.05
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The block that operations are taken from."""

    batch: int
    tokens: int
    texts: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str

    @property
    def width(self) -> int:
        """Channels of both streams."""
        return self.heads * self.head_dim

    def random(self, *shape: int) -> torch.Tensor:
        """Normal values where the operations run."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation, three ways; `uses` in a block with dual attention."""

    name: str
    ours: Run
    reference: Run
    uses: int
    bytes: int
    operations: int = 0


TRUE = Shape(
    batch=2, tokens=4096, texts=333, heads=24, head_dim=64, dtype=torch.bfloat16, device="cuda"
)
SMALL = Shape(
    batch=2, tokens=6, texts=3, heads=2, head_dim=16, dtype=torch.float32, device="cpu"
)  # fmt: skip


def passes(shape: Shape) -> list[Operation]:
    """The norms and the heads; bytes: each input read once, each output written once."""
    d, size = shape.width, shape.dtype.itemsize
    x, update = (shape.random(shape.batch, shape.tokens, d) for _ in range(2))
    gate, scale, shift = shape.random(shape.batch, 3 * d).split(d, 1)
    image = shape.random(shape.batch, shape.tokens, 3 * d)
    text = shape.random(shape.batch, shape.texts, 3 * d)
    gains = tuple(shape.random(shape.head_dim) for _ in range(4))
    stream, joint = x.numel() * size, (image.numel() + text.numel()) * size

    def heads(text: torch.Tensor | None) -> dict[str, Any]:
        return {
            "ours": lambda: gpu_joint_heads(image, text, gains, shape.heads, EPS),
            "reference": lambda: norms.joint_heads(image, text, gains, shape.heads, EPS),
        }

    return [
        Operation(
            name="modulated norm",
            ours=lambda: gpu_modulated_norm(x, scale, shift, EPS),
            reference=lambda: norms.modulated_norm(x, scale, shift, EPS),
            uses=2,
            bytes=2 * stream,
        ),
        Operation(
            name="gated norm",
            ours=lambda: gpu_gated_norm(x, update, (gate, scale, shift), EPS),
            reference=lambda: norms.gated_norm(x, update, gate, scale, shift, EPS),
            uses=1,
            bytes=4 * stream,
        ),
        Operation(name="joint heads", **heads(text), uses=1, bytes=2 * joint),
        Operation(
            name="second heads", **heads(None), uses=1, bytes=2 * image.numel() * size * 2 // 3
        ),
    ]


def products(shape: Shape, kinds: list[torch.dtype]) -> list[Operation]:
    """The MLP on 8 bits, from the residual stream to its update."""
    d, rows = shape.width, shape.batch * shape.tokens
    x = shape.random(shape.batch, shape.tokens, d)
    scale, shift = shape.random(shape.batch, 2 * d).split(d, 1)
    found = []
    for kind in kinds:
        up, down = (
            (*quantize_weight(torch.randn(n, k, device=shape.device), kind), shape.random(n))
            for n, k in ((4 * d, d), (d, 4 * d))
        )

        def ours(up: Any = up, down: Any = down, kind: torch.dtype = kind) -> object:
            x_q, x_scale = gpu_modulated_norm(x, scale, shift, EPS, kind)
            assert x_scale is not None
            return gpu_w8a8_mlp(x_q.view(rows, d), x_scale, up, down, shape.dtype)

        def plain(up: Any = up, down: Any = down) -> object:
            normed = norms.modulated_norm(x, scale, shift, EPS).view(rows, d)
            hidden = gpu_w8a8_linear(normed, up[0], up[1], up[2], shape.dtype)
            hidden = F.gelu(hidden, approximate="tanh")
            return gpu_w8a8_linear(hidden, down[0], down[1], down[2], shape.dtype)

        found.append(
            Operation(
                name=f"norm and MLP, {str(kind).removeprefix('torch.')}",
                ours=ours,
                reference=plain,
                uses=1,
                bytes=2 * x.numel() * shape.dtype.itemsize + 8 * d * d,
                operations=2 * rows * 8 * d * d,
            )
        )
    return found


def block(shape: Shape) -> Run:
    """A whole block with dual attention in PyTorch, by the kernels' own reference."""
    config = {"layers": 2, "heads": shape.heads, "head_dim": shape.head_dim, "eps": EPS}
    config |= {"width": shape.width, "dual": (0,), "patch": 2, "qk_norm": True}
    config |= {"in_channels": 16, "out_channels": 16}
    place: dict[str, Any] = {"device": shape.device, "dtype": shape.dtype}
    weights = {n: w.to(**place) for n, w in reference.random_weights(config).items()}
    x = shape.random(shape.batch, shape.tokens, shape.width)
    text = shape.random(shape.batch, shape.texts, shape.width)
    rows = [shape.random(shape.batch, shape.width) for _ in range(15)]
    return lambda: reference.block(config, weights, 0, x, text, rows[:9], rows[9:])


def measure(runs: dict[str, Run], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant, a round at a time, each round in an order of its own."""
    generator, order = random.Random(0), list(runs)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        generator.shuffle(order)
        for name in order:
            seconds = clock(runs[name], device)
            if number >= 2:
                taken[name].append(seconds)
    return taken


def clock(run: Run, device: str) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def limits(shape: Shape, rounds: int) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and operations a second of 8-bit products."""
    side = 256 if shape.device == "cpu" else 8192
    source = torch.zeros(side, side, device=shape.device)
    target = torch.empty_like(source)
    a = torch.ones(side, side, device=shape.device, dtype=torch.int8)
    runs: dict[str, Run] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.ops.aten._int_mm(a, a.t()),
    }
    best = {name: min(taken) for name, taken in measure(runs, rounds, shape.device).items()}
    return 2 * source.nbytes / best["copy"], 2 * side**3 / best["product"]


def judge(
    operation: Operation, shape: Shape, rounds: int, block_s: float, rates: tuple[float, float]
) -> dict[str, Any]:
    """Measure one operation, and what its uses in a block save."""
    runs = {"ours": operation.ours, "eager": operation.reference}
    runs["inductor"] = operation.reference if REHEARSAL else torch.compile(operation.reference)
    taken = measure(runs, rounds, shape.device)
    medians = {name: median(seconds) for name, seconds in taken.items()}
    ratios = [a / b for a, b in zip(taken["inductor"], taken["ours"], strict=True)]
    limit = max(operation.bytes / rates[0], operation.operations / rates[1])
    saves = operation.uses * (medians["inductor"] - medians["ours"]) / block_s
    return {
        "operation": operation.name,
        "median_s": medians,
        "inductor_over_ours": [median(ratios), *interval(ratios)],
        "n": rounds,
        "bytes": operation.bytes,
        "operations": operation.operations,
        "of_limit": limit / medians["ours"],
        "saves": saves,
        "earns_its_place": saves >= EARNS,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median: order statistics n/2 ± 0.98·√n."""
    ordered, n = sorted(values), len(values)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    high = min(n - 1, math.ceil(n / 2 + 0.98 * math.sqrt(n)) - 1)
    return ordered[low], ordered[high]


def main() -> None:
    """Measure every operation, print a line each, then the JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2 if REHEARSAL else 31)
    parser.add_argument("--rehearse", action="store_true", help="any machine, no meaning")
    rounds, shape = parser.parse_args().rounds, SMALL if REHEARSAL else TRUE
    kinds = [torch.int8]
    if REHEARSAL or torch.cuda.get_device_capability() >= (8, 9):
        kinds.append(torch.float8_e4m3fn)
    with torch.inference_mode():
        whole = block(shape)
        runs = {"compiled": whole if REHEARSAL else torch.compile(whole), "eager": whole}
        blocks = {n: median(s) for n, s in measure(runs, rounds, shape.device).items()}
        rates = limits(shape, rounds)
        rows = [
            judge(operation, shape, rounds, blocks["compiled"], rates)
            for operation in (*passes(shape), *products(shape, kinds))
        ]
    print(
        f"block: compiled {blocks['compiled'] * 1e3:.3f} ms, eager {blocks['eager'] * 1e3:.3f} ms"
    )
    for row in rows:
        middle, low, high = row["inductor_over_ours"]
        print(
            f"{row['operation']:28} {row['median_s']['ours'] * 1e6:9.1f} us, inductor / ours "
            f"{middle:.2f} [{low:.2f}, {high:.2f}], {row['of_limit']:.0%} of limit, saves "
            f"{row['saves']:+.1%} of a block: {'stays' if row['earns_its_place'] else 'goes'}"
        )
    name = "rehearsal" if REHEARSAL else torch.cuda.get_device_name()
    document = {"device": name, "torch": torch.__version__, "block_s": blocks, "rows": rows}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
