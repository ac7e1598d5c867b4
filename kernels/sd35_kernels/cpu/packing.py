"""Weights as the products read them: panels of 64 output channels, in float32, bf16 or int8.

Cost: one pass over the weights at load; float32 packed weights are as large as plain ones (but for
channels padded to 64), bf16 ones half, int8 ones a quarter. `write` keeps what was packed in one
file, `Stored` gives it back in the same order: a copy out of the page cache into huge pages.
"""

import ctypes
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sd35_kernels.cpu.structures import BF16, FP32, INT8, Linear, Memory

PANEL = 64
TOGETHER = {FP32: 1, BF16: 2, INT8: 4}
"""Input channels that lie side by side, as an instruction multiplies them."""


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A packed layer and the tensors that keep its memory alive."""

    layer: Linear
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and bias."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack(
    library: ctypes.CDLL,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: int,
    memory: Memory,
    chunk: int | None = None,
) -> PackedLinear:
    """Pack a layer. `weight`: [N, K]; `chunk`: input channels under one activation scale (K)."""
    n, k = weight.shape
    columns = -(-n // PANEL) * PANEL
    weight = weight.detach().to(torch.float32).contiguous()
    padded_bias = memory.empty(columns, torch.float32).zero_()
    if bias is not None:
        padded_bias[:n] = bias.detach()
    if k % TOGETHER[kind]:
        raise ValueError(f"packed weights need K in multiples of {TOGETHER[kind]}, not {k}")
    if kind != INT8:
        dtype, function = (
            (torch.float32, library.sd35_pack_float)
            if kind == FP32
            else (torch.int16, library.sd35_pack_half)  # bf16's bits
        )
        packed = memory.empty(columns * k, dtype)
        function(_at(weight), *_ints(n, k), _at(packed))
        layer = Linear(packed.data_ptr(), padded_bias.data_ptr(), None, None, n, k, k, kind)
        return PackedLinear(layer, (packed, padded_bias))
    chunk = chunk or k
    packed = memory.empty(columns * k, torch.int8)
    scale = memory.empty(columns, torch.float32)
    start = memory.empty(-(-k // chunk) * columns, torch.int32)
    library.sd35_pack_int8(_at(weight), *_ints(n, k, chunk), *map(_at, (packed, scale, start)))
    layer = Linear(*map(_at, (packed, padded_bias, scale, start)), n, k, chunk, INT8)
    return PackedLinear(layer, (packed, padded_bias, scale, start))


def write(path: Path, tensors: Sequence[torch.Tensor], layers: Sequence[Linear]) -> None:
    """Write the layers' sizes and the tensors' as a line of JSON, then the tensors' bytes.

    Nothing is copied on the way: a second copy of the weights might not fit.
    """
    header = {
        "layers": [[layer.n, layer.k, layer.chunk, layer.kind] for layer in layers],
        "tensors": [[str(t.dtype).removeprefix("torch."), t.numel()] for t in tensors],
    }
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for tensor in tensors:
            file.write(tensor.numpy().data)


class Stored:
    """What `write` wrote, given back one by one in its order; whoever made it checks the bytes."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises: OSError, ValueError."""
        self._file = path.open("rb")
        header = json.loads(self._file.readline())
        self._layers, self._tensors = iter(header["layers"]), iter(header["tensors"])

    def tensor(self, memory: Memory) -> torch.Tensor:
        """Return the next tensor, read into `memory`."""
        name, count = next(self._tensors)
        tensor = memory.empty(count, getattr(torch, name))
        if self._file.readinto(tensor.numpy().data.cast("B")) != tensor.nbytes:
            raise ValueError(f"{self._file.name} ends before its last weights")
        return tensor

    def linear(self, memory: Memory) -> PackedLinear:
        """Return the next layer: weight and bias, and in int8 scales and sums."""
        n, k, chunk, kind = next(self._layers)
        tensors = tuple(self.tensor(memory) for _ in range(4 if kind == INT8 else 2))
        places = [*map(_at, tensors), None, None][:4]
        return PackedLinear(Linear(*places, n, k, chunk, kind), tensors)


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _ints(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))
