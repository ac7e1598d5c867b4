"""Triton kernels compiled for named GPUs on a machine without one, and what their code is made of.

    python -m tests.kernels.ahead      compile what `compiled.json` does not have yet, and write it

A launch is recorded instead of made: the wrappers run on tensors without memory, in the shapes of
SD3.5-Medium, and Triton's own binder derives types, constants and divisibility from the arguments
as it does on a GPU. `ptxas` and `cuobjdump` come with Triton. Compiling takes 1 to 10 s a kernel
and chip, so what was found is kept in `compiled.json` under a digest of the kernel's source, its
specialisation, the chip and Triton's version; whatever has another digest is compiled on the spot.
"""

import functools
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sd35_kernels.norms.gpu import gpu_gated_norm, gpu_joint_heads, gpu_modulated_norm
from sd35_kernels.w8a8.gpu import (
    CHUNK,
    gpu_gelu_requantised,
    gpu_quantize_rows,
    gpu_scaled_product,
)

KEPT = Path(__file__).with_name("compiled.json")
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Chips by compute capability, and the shared memory that one block may have there.

Source: NVIDIA, CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
"""
FP8_FROM = 89
WIDTH, HEADS, HEAD = 1536, 24, 64
PARTS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "pipeline": r"cp\.async\.(?:ca|cg|bulk)",
    "wide": r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64",
}
"""What is looked for in the code: products by kind, copies beside them, loads of 16 bytes."""


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch."""

    name: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def chips(self) -> list[int]:
        """The chips that it can run on: 8-bit floats need an Ada or later."""
        fp8 = any(getattr(arg, "dtype", None) == torch.float8_e4m3fn for arg in self.args)
        return [chip for chip in SHARED if chip >= FP8_FROM or not fp8]


def launches(*, every: bool) -> list[Launch]:
    """The launches of SD3.5-Medium at 1024 px and a batch of two: one a kernel, or `every` kind."""
    found: dict[str, Callable[[], object]] = {}
    for dtype in (torch.int8, torch.float8_e4m3fn):
        kind = "int8" if dtype == torch.int8 else "fp8"
        for rows in (8192, 154, 2) if every else (8192,):
            found[f"matmul-{kind}-{rows}"] = functools.partial(_matmul, rows, dtype)
            found[f"gelu-{kind}-{rows}"] = functools.partial(_gelu, rows, dtype)
            found[f"chunked-{kind}-{rows}"] = functools.partial(_chunked, rows, dtype)
        if every or dtype == torch.int8:
            found[f"quantise-{kind}"] = lambda dtype=dtype: gpu_quantize_rows(_x(8192), dtype)
    for quantised in (None, torch.int8, torch.float8_e4m3fn) if every else (None, torch.int8):
        name = "plain" if quantised is None else str(quantised).split(".")[1]
        found[f"norm-{name}"] = functools.partial(_norm, quantised, gated=False)
        found[f"gated-{name}"] = functools.partial(_norm, quantised, gated=True)
    found["heads-joint"] = lambda: _heads(333)
    found["heads-alone"] = lambda: _heads(None)
    return [launch for name, run in found.items() for launch in record(name, run)]


def record(name: str, run: Callable[[], object]) -> list[Launch]:
    """Return the launches that `run` would make."""
    kept: list[Launch] = []

    def instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del grid, warmup
        kept.append(Launch(name, kernel, args, options))

    launch = JITFunction.run
    JITFunction.run = instead  # pyright: ignore[reportAttributeAccessIssue]
    try:
        run()
    finally:
        JITFunction.run = launch
    return kept


def examine(launch: Launch, chip: int, *, divisible: bool = True) -> dict[str, Any]:
    """What the code of a launch is made of; kept under its digest.

    `divisible`: with what Triton sees of the arguments' divisibility by 16, else without.
    """
    digest = digest_of(launch, chip, divisible)
    known = kept_results()
    return known[digest]["found"] if digest in known else compile_for(launch, chip, divisible)


@functools.cache
def kept_results() -> dict[str, Any]:
    """Read `compiled.json`."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def digest_of(launch: Launch, chip: int, divisible: bool) -> str:
    """A digest of all that the code depends on."""
    function, fields = launch.kernel.fn, _specialise(launch, chip, divisible)
    names = function.__code__.co_names
    constants = {n: repr(v) for n, v in function.__globals__.items() if n in names and _constant(v)}
    options = {n: launch.options.get(n) for n in ("num_warps", "num_stages")}
    parts = [launch.kernel.src, constants, *fields[1:], options, chip, triton.__version__]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def compile_for(launch: Launch, chip: int, divisible: bool) -> dict[str, Any]:
    """Compile a launch for a chip and look at its code."""
    options, signature, constants, attributes = _specialise(launch, chip, divisible)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", chip, 32)
    built = triton.compile(source, target=target, options=options.__dict__)
    ptx = built.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PARTS.items()}
    return {"shared": built.metadata.shared, **_resources(built.asm["cubin"]), **counts}


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory of a thread, by NVIDIA's own tool."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found is not None, said
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def _specialise(launch: Launch, chip: int, divisible: bool) -> tuple[Any, ...]:
    """Options, signature, constants and attributes, as `JITFunction.run` derives them."""
    backend = make_backend(GPUTarget("cuda", chip, 32))
    kernel = launch.kernel
    given = {**launch.options, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*launch.args, **given)
    options, signature, constants, attributes = kernel._pack_args(
        backend, given, bound, specialisation, None
    )
    return options, signature, constants, attributes if divisible else {}


def _constant(value: object) -> bool:
    return isinstance(value, tl.constexpr)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _x(rows: int, width: int = WIDTH) -> torch.Tensor:
    return _empty(rows, width)


def _layer(columns: int, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (
        _empty(columns, length, dtype=dtype),
        _empty(columns, dtype=torch.float32),
        _empty(columns),
    )


def _matmul(rows: int, dtype: torch.dtype) -> object:
    x, scale = _empty(rows, WIDTH, dtype=dtype), _empty(rows, dtype=torch.float32)
    weight, scales, bias = _layer(3 * WIDTH, WIDTH, dtype)
    return gpu_scaled_product(x, scale, weight, scales, bias, torch.bfloat16)


def _gelu(rows: int, dtype: torch.dtype) -> object:
    x, scale = _empty(rows, WIDTH, dtype=dtype), _empty(rows, dtype=torch.float32)
    weight, scales, bias = _layer(4 * WIDTH, WIDTH, dtype)
    return gpu_gelu_requantised(x, scale, weight, scales, bias)


def _chunked(rows: int, dtype: torch.dtype) -> object:
    x, scale = (
        _empty(rows, 4 * WIDTH, dtype=dtype),
        _empty(4 * WIDTH // CHUNK, rows, dtype=torch.float32),
    )
    weight, scales, bias = _layer(WIDTH, 4 * WIDTH, dtype)
    return gpu_scaled_product(x, scale, weight, scales, bias, torch.bfloat16)


def _norm(quantised: torch.dtype | None, *, gated: bool) -> object:
    x = _empty(2, 4096, WIDTH)
    gate, scale, shift = _empty(2, 90 * WIDTH)[:, : 3 * WIDTH].split(WIDTH, 1)
    if gated:
        return gpu_gated_norm(x, x, (gate, scale, shift), 1e-6, quantised)
    return gpu_modulated_norm(x, scale, shift, 1e-6, quantised)


def _heads(texts: int | None) -> object:
    image = _empty(2, 4096, 3 * WIDTH)
    text = None if texts is None else _empty(2, texts, 3 * WIDTH)
    gains = tuple(_empty(HEAD) for _ in range(4))
    return gpu_joint_heads(image, text, gains, HEADS, 1e-6)


def everything() -> Iterator[tuple[Launch, int, bool]]:
    """Each launch, chip, and whether divisibility is seen: without it `_matmul` alone."""
    for launch in launches(every=True):
        for chip in launch.chips():
            yield launch, chip, True
            if launch.name == "matmul-int8-8192":
                yield launch, chip, False


def main() -> None:
    """Compile what is not kept yet, and keep what was found; what is stale goes."""
    found: dict[str, Any] = {}
    for launch, chip, divisible in everything():
        entry = {"launch": launch.name, "chip": chip, "divisible": divisible}
        digest = digest_of(launch, chip, divisible)
        if digest not in kept_results():
            made = compile_for(launch, chip, divisible)
            print(entry, made, flush=True)
            kept_results()[digest] = entry | {"found": made}
            _write(kept_results())
        found[digest] = kept_results()[digest]
    _write(found)


def _write(results: dict[str, Any]) -> None:
    rows = [f"{json.dumps(digest)}: {json.dumps(entry)}" for digest, entry in results.items()]
    whole = KEPT.with_suffix(".tmp")
    whole.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    whole.replace(KEPT)  # who ends it half-way loses nothing


if __name__ == "__main__":
    main()
