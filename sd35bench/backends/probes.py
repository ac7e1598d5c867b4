"""What a machine offers to the backends that run on torch: tried, without a model."""

import functools
import logging
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping

import torch

from sd35bench.backends.base import Probe
from sd35bench.types import Scalar

# Names in torch.cpu.get_capabilities(), in the order in which a reader wants them.
FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")

SOURCE = "#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n"
BUILD_TIMEOUT_S = 20.0


def silence_cuda_remark() -> None:
    """Drop what torch's extension builder says where it finds CUDA's tools and no GPU.

    inductor and optimum-quanto import it.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_no_cuda_remark)


def _is_no_cuda_remark(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def probe_device(options: Mapping[str, Scalar]) -> Probe:
    """Look for the device and for hardware of the dtype in a backend's options."""
    asked, dtype = str(options["device"]), str(options["dtype"])
    if asked != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if dtype == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Probe(
                ok=None, detail=f"{name} has no bf16", remedy="use backend.dtype=fp16 or fp32"
            )
        return Probe(ok=True, detail=f"{name}, {dtype}")
    if asked == "cuda":
        return Probe(
            ok=None,
            detail=f"asks for CUDA; torch {torch.__version__} sees no CUDA device",
            remedy="use backend.device=cpu, or a machine with a GPU and a CUDA build of torch",
        )
    features = cpu_features()
    if dtype == "bf16" and not {"avx512_bf16", "amx_bf16"} & set(features):
        return Probe(ok=True, detail="CPU, bf16 without hardware for it: runs, but slowly")
    if dtype == "fp16":
        return Probe(
            ok=True, detail="CPU, fp16: runs, but slowly; bf16 is the CPU's half precision"
        )
    return Probe(ok=True, detail=f"CPU, {dtype}")


def probe_compiler(device: str) -> Probe:
    """Look for what inductor hands its code to: Triton on CUDA, a C++ compiler on the CPU.

    `device`: "auto", "cpu" or "cuda".
    """
    if device != "cpu" and torch.cuda.is_available():
        return _probe_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        chosen = os.environ.get("CXX")
        return Probe(
            ok=False,
            detail="no C++ compiler that inductor can use"
            + ("" if chosen is None else f" (CXX={chosen})"),
            remedy="apt install g++ (or set CXX to a C++17 compiler)",
        )
    trouble = _build_trouble(compiler)
    if trouble is not None:
        return Probe(
            ok=False,
            detail=f"{compiler} cannot build an extension: {trouble}",
            remedy="apt install g++ python3-dev (headers of the Python that runs this)",
        )
    return Probe(ok=True, detail=f"inductor compiles with {compiler}")


def cpu_features() -> list[str]:
    """Return the vector extensions of this CPU that decide which arithmetic is fast."""
    found = torch.cpu.get_capabilities()
    return [name for name in FEATURES if found.get(name) is True]


@functools.cache
def _build_trouble(compiler: str) -> str | None:
    """Build what inductor's kernels need, a shared library on Python's headers and OpenMP.

    Returns the compiler's first error, or None where it succeeds (0.2 s).
    """
    headers = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-fopenmp", "-shared", "-fPIC", f"-I{headers}", "-x", "c++", "-"]
        try:
            built = subprocess.run(
                [*command, "-o", f"{folder}/probe.so"],
                input=SOURCE,
                capture_output=True,
                text=True,
                timeout=BUILD_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            return str(exc)
    if built.returncode == 0:
        return None
    lines = [line for line in built.stderr.splitlines() if "error" in line]
    return lines[0].strip() if lines else f"exit code {built.returncode}"


def _probe_triton() -> Probe:
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return Probe(
            ok=None,
            detail=f"inductor's Triton needs compute capability 7.0, this GPU has {major}.{minor}",
            remedy="use backend=eager, or backend.compiler=aot_eager",
        )
    try:
        import triton
    except ImportError:
        return Probe(ok=False, detail="Triton is not installed", remedy="pip install triton")
    return Probe(ok=True, detail=f"inductor compiles with Triton {triton.__version__}")
