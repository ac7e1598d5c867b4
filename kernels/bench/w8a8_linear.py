"""Time `w8a8_linear` against float linears on SD3.5-Medium's shapes, in one run on one machine.

    python kernels/bench/w8a8_linear.py [--threads N] [--repeats N] [--device D] [--no-compile]

Each variant takes the activations it would get in a model (fp32, or bf16 for the bf16 linear) and
the W8A8 ones include quantising them. Variants take turns, so that a machine that slows down slows
all of them; the figure is the median with a 95 % interval of the median (order statistics).
`limit` is the larger of operations over the best integer (or float) product rate and bytes over
the copy rate, both measured here, in this run; `of limit` is that time over the measured one.
The last line is one JSON document.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from sd35_kernels import KernelUnavailable, W8A8Linear, check_available

SHAPES = {
    "mlp up, 512 px": (1024, 1536, 6144),
    "mlp down, 512 px": (1024, 6144, 1536),
    "attention, 1024 px": (4096, 1536, 1536),
    "mlp up, text": (154, 1536, 6144),
    "adaLN, batch 2": (2, 1536, 13824),
}
Variant = Callable[[], torch.Tensor]


def main() -> None:
    """Measure, print a table, then the same as JSON."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    limits = measure_limits(device, arguments.repeats)
    print(" · ".join(f"{name} {value / 1e9:.0f} G/s" for name, value in limits.items()))
    rows = [
        row
        for name, shape in SHAPES.items()
        for row in bench_shape(name, shape, device, arguments, limits)
    ]
    document = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": check_available(device),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "limits": limits,
        "rows": rows,
    }
    print(json.dumps(document))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    return parser.parse_args()


def bench_shape(
    name: str,
    shape: tuple[int, int, int],
    device: torch.device,
    arguments: argparse.Namespace,
    limits: dict[str, float],
) -> list[dict[str, object]]:
    """Time every variant of one shape; prints a line each and returns the same as JSON."""
    m, k, n = shape
    variants, work = make_variants(shape, device, compiled=not arguments.no_compile)
    with torch.inference_mode():
        samples = interleave(variants, arguments.repeats, device)
    base = median(samples["fp32"])
    print(f"\n{name}: {m} x {k} x {n}, {2 * m * n * k / 1e9:.1f} G operations")
    rows: list[dict[str, object]] = []
    for variant, seconds in samples.items():
        kind, bytes_moved = work[variant]
        took, (low, high) = median(seconds), interval(seconds)
        limit = max(2 * m * n * k / limits[kind], bytes_moved / limits["copy_bytes"])
        rows.append(
            {
                "shape": [m, k, n],
                "variant": variant,
                "median_s": took,
                "ci95_s": [low, high],
                "n": len(seconds),
                "operations": 2 * m * n * k,
                "bytes": bytes_moved,
                "operations_per_s": 2 * m * n * k / took,
                "of_limit": limit / took,
                "speedup_over_fp32": base / took,
            }
        )
        print(
            f"  {variant:17} {took * 1e3:8.3f} ms"
            f" [{low * 1e3:.3f}, {high * 1e3:.3f}] n={len(seconds)}"
            f"  {2 * m * n * k / took / 1e9:8.0f} GOP/s  {bytes_moved / 1e6:7.1f} MB"
            f"  {limit / took:5.0%} of limit  {base / took:5.2f}x fp32"
        )
    return rows


def make_variants(
    shape: tuple[int, int, int], device: torch.device, compiled: bool
) -> tuple[dict[str, Variant], dict[str, tuple[str, int]]]:
    """Return functions to time, and for each which rate bounds it and how many bytes it must move.

    Bytes are compulsory ones: activations and weights read once, the result written once.
    """
    m, k, n = shape
    linear = torch.nn.Linear(k, n, device=device)
    half = torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16)
    layer = W8A8Linear.from_linear(linear)
    x = torch.randn(m, k, device=device)
    x_half = x.bfloat16()
    wide, narrow = 4 * (m * k + m * n), 2 * (m * k + m * n)
    variants: dict[str, Variant] = {
        "fp32": lambda: F.linear(x, linear.weight, linear.bias),
        "bf16": lambda: F.linear(x_half, half.weight, half.bias),
        "w8a8": lambda: layer(x),
        "w8a8, bf16 in/out": lambda: layer(x_half),
    }
    work = {
        "fp32": ("fp32_ops", wide + 4 * n * k),
        "bf16": ("bf16_ops", narrow + 2 * n * k),
        "w8a8": ("int8_ops", wide + n * k),
        "w8a8, bf16 in/out": ("int8_ops", narrow + n * k),
    }
    if compiled:
        torch._dynamo.reset()
        fast_linear = torch.compile(linear, fullgraph=True, dynamic=False)
        fast_layer = torch.compile(layer, fullgraph=True, dynamic=False)
        variants["fp32 compiled"] = lambda: fast_linear(x)
        variants["w8a8 compiled"] = lambda: fast_layer(x)
        work["fp32 compiled"], work["w8a8 compiled"] = work["fp32"], work["w8a8"]
    add_fp8(variants, work, linear, x_half)
    return variants, work


def add_fp8(
    variants: dict[str, Variant],
    work: dict[str, tuple[str, int]],
    linear: torch.nn.Linear,
    x: torch.Tensor,
) -> None:
    """Add the fp8 variant where the device has a kernel for it."""
    try:
        fp8 = W8A8Linear.from_linear(linear, torch.float8_e4m3fn)
    except KernelUnavailable as exc:
        if x.device.type == "cuda":
            print(f"no fp8: {exc}")
        return
    variants["fp8, bf16 in/out"] = lambda: fp8(x)
    work["fp8, bf16 in/out"] = ("int8_ops", work["w8a8, bf16 in/out"][1])  # same peak rate


def measure_limits(device: torch.device, repeats: int) -> dict[str, float]:
    """Measure the best product rates (operations/s) and the copy rate (bytes read + written/s).

    Products of 2048³, large enough that no overhead shows; the copy is of 256 MiB, beyond caches.
    """
    size = 2048
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    a8 = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
    b8 = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8).t()
    a16, b16 = a.bfloat16(), b.bfloat16()
    source = torch.zeros(64 * 2**20, device=device)
    target = torch.zeros_like(source)
    functions: dict[str, Variant] = {
        "fp32_ops": lambda: a @ b,
        "bf16_ops": lambda: a16 @ b16,
        "int8_ops": lambda: torch.ops.aten._int_mm(a8, b8),
        "copy_bytes": lambda: target.copy_(source),
    }
    with torch.inference_mode():
        samples = interleave(functions, max(3, repeats // 3), device)
    # The best, not the median: a limit is what the machine can do.
    best = {name: min(seconds) for name, seconds in samples.items()}
    work = dict.fromkeys(functions, 2.0 * size**3) | {"copy_bytes": 2.0 * source.nbytes}
    return {name: work[name] / seconds for name, seconds in best.items()}


def interleave(
    functions: dict[str, Variant], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the functions in turns, after two calls of each that are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 2:
                samples[name].append(time.perf_counter() - started)
    return samples


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: list[float]) -> float:
    """Return the middle value, or the mean of the middle two."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def interval(values: list[float]) -> tuple[float, float]:
    """Return a 95 % interval of the median: order statistics n/2 ± 0.98·√n."""
    ordered, n = sorted(values), len(values)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    high = min(n - 1, math.ceil(n / 2 + 0.98 * math.sqrt(n)) - 1)
    return ordered[low], ordered[high]


if __name__ == "__main__":
    main()
