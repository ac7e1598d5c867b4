"""One velocity of MMDiT-X in one call: the CPU executor of the compiled core.

The idea: `load` packs a model's fused weights for the CPU at hand; `Executor.step` hands latents,
text, one row of precomputed modulations and the position table to C++, which runs the patch
embedding, every block and the final layer in one parallel region (cpu/csrc/mmdit.h). Python is
called once a step: for a small model calls cost more than arithmetic.

Cost: 2 (16 N + 12 T) D² + 4 ((N + T)² + N²) D operations a block of width D with dual attention,
N image and T text tokens; weights are read once a step. Scratch: about 60 · B · N · D bytes.
"""

import ctypes
import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sd35_kernels.cpu.build import BY_NAME, code_digest, library, pick_level
from sd35_kernels.cpu.packing import PackedLinear, Stored, pack, write
from sd35_kernels.cpu.structures import (
    BF16,
    FP32,
    INT8,
    PARTS,
    Block,
    Linear,
    Memory,
    Model,
    Projections,
    Step,
    check_sizes,
)
from sd35_kernels.w8a8.errors import KernelUnavailable

KINDS = {"exact": FP32, "int8": INT8, "bf16": BF16}
HEAD_DIMS = (16, 32, 64)


def load(
    config: Mapping[str, Any],
    weights: dict[str, torch.Tensor] | Stored,
    tier: str,
    threads: int,
) -> "Executor":
    """Pack `weights` (emptied on the way, so that both copies are never whole) and return a step.

    `Stored` weights were packed before, by the same code (`layout_digest`), and are only read.

    `config`: layers, heads, head_dim, width, dual (layer indices), patch, in_channels,
    out_channels, qk_norm, eps. `weights`: float32, named as sd35bench/core/weights.py names them.
    `tier`: "exact" (float32), "bf16" (products; sums, attention and the residual stream in float32)
    or "int8" (W8A8, activations quantised per row in the call).

    Raises: KernelUnavailable where this machine or this model has no kernel, and why.
    """
    _check(config, tier)
    return Executor(config, weights, tier, threads)


def layout_digest() -> str:
    """A digest of what packed weights depend on beside the model: this code and this CPU's level.

    Raises: KernelUnavailable where nothing can be packed.
    """
    digest = hashlib.sha256(code_digest(pick_level()).encode())
    for source in ("mmdit.py", "cpu/packing.py", "cpu/structures.py"):
        digest.update((Path(__file__).parent / source).read_bytes())
    return digest.hexdigest()[:24]


def check_level(tier: str) -> str:
    """Return the instructions that a tier runs on here. Raises: KernelUnavailable."""
    level = pick_level()
    if tier not in KINDS:
        raise KernelUnavailable(f"tier {tier!r}: the CPU executor has {', '.join(KINDS)}")
    if tier == "int8" and level in ("avx2", "avx512"):
        raise KernelUnavailable(f"tier int8 needs AVX-512 VNNI; this CPU gives {level}")
    if tier == "bf16" and level not in ("avx512_bf16", *BY_NAME):
        # On Intel a core without tiles multiplies bf16 at half of float32's rate.
        raise KernelUnavailable(
            f"tier bf16 needs AVX-512 BF16 as AMD's Zen 4 has it, or AMX tiles, which are used only"
            f" where SD35_KERNELS_ISA=amx_tiles asks for them; this CPU gives {level}"
        )
    return level


def _check(config: Mapping[str, Any], tier: str) -> None:
    check_level(tier)
    if config["head_dim"] not in HEAD_DIMS or config["width"] % 16:
        raise KernelUnavailable(
            f"width {config['width']} and heads of {config['head_dim']}: the CPU executor has "
            f"widths in sixteens and heads of {HEAD_DIMS}"
        )
    if config["patch"] ** 2 * config["out_channels"] % 16 or (
        config["patch"] ** 2 * config["in_channels"] % 4
    ):
        raise KernelUnavailable(
            "a patch must have 16, 32, … output values and 4, 8, … input values"
        )


class Executor:
    """A packed model; `step` computes one velocity."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, torch.Tensor] | Stored,
        tier: str,
        threads: int,
    ) -> None:
        """Pack `weights`, which is emptied, or read them back."""
        level = pick_level()
        self._library = library(level)
        check_sizes(self._library)
        self._library.sd35_scratch_bytes.restype = ctypes.c_int64
        self._kind = KINDS[tier]
        if self._kind != FP32 and not self._library.sd35_tiles_ready():
            raise KernelUnavailable(
                "the system keeps AMX tiles back; SD35_KERNELS_ISA=avx512_vnni runs without them"
            )
        self._memory = Memory()
        self._kept: list[torch.Tensor] = []
        self._layers: list[Linear] = []
        self._lock = threading.Lock()
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._threads = threads
        self.config = dict(config)
        self._model = self._build(weights)
        self.facts: dict[str, str | int | float] = {
            "executor": "sd35_kernels.mmdit",
            "isa": level,
            "tier": tier,
            "threads": threads,
            "weight_bytes": sum(tensor.nbytes for tensor in self._kept),
        }

    def step(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        position: torch.Tensor,
        skip: tuple[int, ...] = (),
        threads: int | None = None,
        profile: dict[str, float] | None = None,
    ) -> torch.Tensor:
        """Return the velocity [B, Cout, H, W] of `latents` [B, C, H, W], all float32, contiguous.

        `context`: embedded text [B, T, D]. `modulation`: [B, M], a row of the table that
        sd35bench/core/model.py describes. `position`: [N, D]. `skip`: layers left out. `profile`
        gets the first thread's seconds on a core in each of `PARTS` added.

        Raises: ValueError for shapes or dtypes that do not fit.
        """
        patch, layers = self.config["patch"], self.config["layers"]
        batch, _, height, width = latents.shape
        tokens = (height // patch, width // patch)
        self._check_inputs(latents, context, modulation, position, skip)
        velocity = torch.empty(batch, self.config["out_channels"], height, width)
        skipped = (ctypes.c_uint8 * layers)(*(i in skip for i in range(layers)))
        times = (ctypes.c_int64 * len(PARTS))()
        call = Step(
            latents.data_ptr(),
            context.data_ptr(),
            modulation.data_ptr(),
            position.data_ptr(),
            velocity.data_ptr(),
            ctypes.cast(skipped, ctypes.c_void_p),
            None,
            None if profile is None else ctypes.cast(times, ctypes.c_void_p),
            batch,
            *tokens,
            context.shape[1],
            modulation.shape[1],
            threads or self._threads,
        )
        with self._lock:
            needed = self._library.sd35_scratch_bytes(ctypes.byref(self._model), ctypes.byref(call))
            if self._scratch.nbytes < needed:
                self._scratch = Memory().empty(needed, torch.uint8)
            call.scratch = self._scratch.data_ptr()
            self._library.sd35_step(ctypes.byref(self._model), ctypes.byref(call))
        if profile is not None:
            for part, nanoseconds in zip(PARTS, times, strict=True):
                profile[part] = profile.get(part, 0.0) + nanoseconds / 1e9
        return velocity

    def _check_inputs(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        position: torch.Tensor,
        skip: tuple[int, ...],
    ) -> None:
        batch, _, height, width = latents.shape
        patch, d = self.config["patch"], self.config["width"]
        tokens = height // patch * (width // patch)
        expected = {
            "latents": (latents, (batch, self.config["in_channels"], height, width)),
            "context": (context, (batch, context.shape[1], d)),
            "modulation": (modulation, (batch, self.modulation_width)),
            "position": (position, (tokens, d)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}"
                )
            if not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(f"{name} must be contiguous and on the CPU")
        if height % patch or width % patch or not batch or not tokens or not context.shape[1]:
            raise ValueError(f"latents of {height} x {width} do not cut into patches of {patch}")
        if any(not 0 <= layer < self.config["layers"] for layer in skip):
            raise ValueError(f"skip {skip}: this model has layers 0 to {self.config['layers'] - 1}")

    @property
    def modulation_width(self) -> int:
        """Length of a modulation row."""
        layers, dual = self.config["layers"], len(self.config["dual"])
        return self.config["width"] * (12 * layers + 3 * dual - 4 + 2)

    def store(self, path: Path) -> None:
        """Write the packed weights, for `Stored`. Raises: OSError."""
        write(path, self._kept, self._layers)

    def _build(self, weights: dict[str, torch.Tensor] | Stored) -> Model:
        config = self.config
        layers, width = config["layers"], config["width"]
        self._blocks = (Block * layers)()
        for i in range(layers):
            self._fill(self._blocks[i], weights, i)
        return Model(
            layers,
            config["heads"],
            config["head_dim"],
            width,
            config["patch"],
            config["in_channels"],
            config["out_channels"],
            hidden_chunk(4 * width),
            self._kind,
            self._blocks,
            self._pack(weights, "patch", kind=FP32).layer,
            self._pack(weights, "final", kind=FP32).layer,
            config["eps"],
        )

    def _fill(self, block: Block, weights: dict[str, torch.Tensor] | Stored, i: int) -> None:
        block.has_dual = i in self.config["dual"]
        block.last = i == self.config["layers"] - 1
        for name in ("image", "text"):
            stream, prefix = getattr(block, name), f"blocks.{i}.{name}"
            ends = name == "text" and block.last
            self._attention(stream.attention, weights, prefix, keys_only=bool(ends))
            if not ends:
                stream.up = self._pack(weights, f"{prefix}.up").layer
                chunk = hidden_chunk(4 * self.config["width"])
                stream.down = self._pack(weights, f"{prefix}.down", chunk=chunk).layer
        if block.has_dual:
            self._attention(block.dual, weights, f"blocks.{i}.dual")

    def _attention(
        self,
        target: Projections,
        weights: dict[str, torch.Tensor] | Stored,
        prefix: str,
        keys_only: bool = False,
    ) -> None:
        """Fill one attention. `keys_only`: no queries and no output, as the last block's text."""
        first = self.config["width"] if keys_only else 0
        target.qkv = self._pack(weights, f"{prefix}.qkv", first=first).layer
        if not keys_only:
            target.out = self._pack(weights, f"{prefix}.out").layer
        if self.config["qk_norm"]:
            for part in ("q_norm", "k_norm"):
                if isinstance(weights, Stored):
                    norm = weights.tensor(self._memory)
                else:
                    norm = weights.pop(f"{prefix}.{part}").detach().float().contiguous().clone()
                self._kept.append(norm)
                setattr(target, part, norm.data_ptr())

    def _pack(
        self,
        weights: dict[str, torch.Tensor] | Stored,
        prefix: str,
        kind: int | None = None,
        chunk: int | None = None,
        first: int = 0,
    ) -> PackedLinear:
        if isinstance(weights, Stored):
            packed = weights.linear(self._memory)
        else:
            weight, bias = weights.pop(f"{prefix}.weight"), weights.pop(f"{prefix}.bias")
            kind = self._kind if kind is None else kind
            packed = pack(self._library, weight[first:], bias[first:], kind, self._memory, chunk)
        self._kept.extend(packed.tensors)
        self._layers.append(packed.layer)
        return packed


def peak_rate(tier: str, threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time a loop of multiply-adds on registers: the machine's operations a second, now."""
    loop = library(pick_level()).sd35_peak
    loop.restype = ctypes.c_double
    started = clock()
    operations = loop(ctypes.c_int64(KINDS[tier]), ctypes.c_int64(threads))
    return operations / (clock() - started)


def hidden_chunk(hidden: int) -> int:
    """Channels of the MLP's hidden layer that share a scale: 256 where that divides it."""
    return next(chunk for chunk in (256, 128, 64, 32, 16) if hidden % chunk == 0)


__all__ = [
    "Executor",
    "KernelUnavailable",
    "Stored",
    "check_level",
    "layout_digest",
    "load",
    "peak_rate",
]
