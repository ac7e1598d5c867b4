"""Compiling the C++ once, for the instructions of this CPU, and loading it.

The idea: one translation unit, compiled by g++ (which torch.compile needs anyway) into a library
that is kept on disk under a digest of sources, compiler, flags and level. ctypes loads it: a warm
start costs one `dlopen` and the digest, about 10 ms, against seconds for torch's extension loader.
The library asks for libgomp.so.1, which torch has loaded already, so its threads are torch's.

Cost: about 8 s of compilation, once per machine and version.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from sd35_kernels.w8a8.errors import KernelUnavailable

SOURCES = Path(__file__).with_name("csrc")
LEVELS: dict[str, tuple[frozenset[str], str]] = {
    "amx": (
        frozenset({"amx_tile", "amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16"}),
        "sapphirerapids",
    ),
    "avx512_bf16": (frozenset({"avx512_vnni", "avx512_bf16"}), "cooperlake"),
    "avx512_vnni": (frozenset({"avx512_vnni"}), "cascadelake"),
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}),
        "skylake-avx512",
    ),
    "avx2": (frozenset({"avx2", "fma", "bmi2", "f16c"}), "haswell"),
}
"""Instruction sets from best to least: the CPU flags that each needs, and g++'s name for it."""
BY_NAME = {
    "amx_emulated": ("avx512_vnni", "-DSD35_AMX_EMULATED"),
    "amx_tiles": ("amx", "-DSD35_AMX_TILES"),
    "bf16_emulated": ("avx512_vnni", "-DSD35_BF16_EMULATED"),
}
"""Levels picked only by name, on CPUs of the level that they are compiled for: AMX's loops with the
tiles in plain C++, for tests, and with the instructions, which no machine has run yet; AVX-512's
bf16 loop with each pair taken apart, for tests."""
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")


def cpu_flags() -> frozenset[str]:
    """Names of this CPU's features as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")),
        frozenset(),
    )


def pick_level(flags: frozenset[str] | None = None) -> str:
    """Return the best of `LEVELS` for `flags` (this CPU's), or what SD35_KERNELS_ISA names.

    Raises: KernelUnavailable for another architecture, a CPU without AVX2, or a level it lacks.
    """
    have = cpu_flags() if flags is None else flags
    can = [name for name, (needs, _) in LEVELS.items() if needs <= have]
    if not can:
        raise KernelUnavailable(
            f"the compiled core needs an x86-64 CPU with AVX2 and FMA under Linux; this is "
            f"{platform.machine()} under {platform.system()}: use backend=eager or compile"
        )
    asked = os.environ.get("SD35_KERNELS_ISA")
    if asked in BY_NAME and BY_NAME[asked][0] in can:
        return asked
    if asked is not None and asked not in can:
        raise KernelUnavailable(f"SD35_KERNELS_ISA={asked!r}: this CPU has {', '.join(can)}")
    return asked or can[0]


def cache_folder() -> Path:
    """Where compiled libraries are kept: SD35_KERNELS_CACHE, else the user's cache."""
    if "SD35_KERNELS_CACHE" in os.environ:
        return Path(os.environ["SD35_KERNELS_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sd35bench" / "kernels"


@functools.lru_cache
def library(level: str, entry: Path = SOURCES / "api.cpp") -> ctypes.CDLL:
    """Return the library for `level`, compiled now if it is not in the cache.

    `entry` is the one file that is compiled; what lies in its folder may be a part of it.

    Raises: KernelUnavailable where there is no compiler or it fails, with its words.
    """
    path = cache_folder() / f"{code_digest(level, entry)}.so"
    if not path.exists():
        _compile(path, level, entry)
    torch.get_num_threads()  # torch first: its OpenMP runtime is the one that the library finds
    return ctypes.CDLL(str(path))


def code_digest(level: str, entry: Path = SOURCES / "api.cpp") -> str:
    """Return a digest of the sources beside `entry`, the compiler and its flags for `level`.

    Raises: KernelUnavailable where there is no compiler.
    """
    digest = hashlib.sha256()
    for part in (*FLAGS, *_target(level), _compiler()[1]):
        digest.update(part.encode() + b"\0")
    for source in sorted(entry.parent.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


@functools.lru_cache
def _compiler() -> tuple[str, str]:
    """The compiler, and what changes when it is replaced: its real path, size and date."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        raise KernelUnavailable(
            f"the compiled core needs a C++ compiler; {name} is not on the PATH"
        )
    real = Path(found).resolve()
    # Asking for --version would cost 5 ms at every start.
    stat = real.stat()
    return found, f"{real} {stat.st_size} {stat.st_mtime_ns}"


def _target(level: str) -> tuple[str, ...]:
    """Flags that say what to compile for."""
    base, *defines = BY_NAME.get(level, (level,))
    return (f"-march={LEVELS[base][1]}", *defines)


def _compile(path: Path, level: str, entry: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved: two processes that compile at once both end with a whole file.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [_compiler()[0], *FLAGS, *_target(level)]
        result = subprocess.run(
            [*command, str(entry), "-o", str(built)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise KernelUnavailable(
                f"{' '.join(command)} failed with {result.returncode}:\n{result.stderr[-2000:]}"
            )
        built.replace(path)
