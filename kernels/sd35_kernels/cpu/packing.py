"""Weights as the products read them: panels of 64 output channels, in float32 or int8.

Cost: one pass over the weights at load; float32 packed weights are as large as plain ones (but for
channels padded to 64), int8 ones a quarter.
"""

import ctypes
from dataclasses import dataclass

import torch

from sd35_kernels.cpu.structures import FP32, INT8, Linear, Memory

PANEL = 64


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
    if kind == FP32:
        packed = memory.empty(columns * k, torch.float32)
        library.sd35_pack_float(_at(weight), *_ints(n, k), _at(packed))
        layer = Linear(packed.data_ptr(), padded_bias.data_ptr(), None, None, n, k, k, FP32)
        return PackedLinear(layer, (packed, padded_bias))
    if k % 4:
        raise ValueError(f"int8 weights need K in fours, not {k}")
    chunk = chunk or k
    packed = memory.empty(columns * k, torch.int8)
    scale = memory.empty(columns, torch.float32)
    start = memory.empty(-(-k // chunk) * columns, torch.int32)
    library.sd35_pack_int8(_at(weight), *_ints(n, k, chunk), *map(_at, (packed, scale, start)))
    layer = Linear(*map(_at, (packed, padded_bias, scale, start)), n, k, chunk, INT8)
    return PackedLinear(layer, (packed, padded_bias, scale, start))


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _ints(*values: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, values))
