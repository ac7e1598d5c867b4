"""The structures that cross the border to C++, field by field as csrc/mmdit.h has them."""

import contextlib
import ctypes
import mmap
from ctypes import POINTER, c_double, c_int64, c_void_p

import torch

FP32, INT8, BF16 = 0, 1, 2
PARTS = ("embed", "norm", "qkv", "attention", "quantise", "out", "up", "down", "final")
"""Parts of a step whose times the library can keep, in its order."""


class Linear(ctypes.Structure):
    """A packed linear layer; the pointers are those of a `PackedLinear`."""

    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("start", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("chunk", c_int64),
        ("kind", c_int64),
    )


class Projections(ctypes.Structure):
    """The linear layers of one attention."""

    _fields_ = (("qkv", Linear), ("out", Linear), ("q_norm", c_void_p), ("k_norm", c_void_p))


class Stream(ctypes.Structure):
    """One stream's layers in a block."""

    _fields_ = (("attention", Projections), ("up", Linear), ("down", Linear))


class Block(ctypes.Structure):
    """One MMDiT-X block."""

    _fields_ = (
        ("image", Stream),
        ("text", Stream),
        ("dual", Projections),
        ("has_dual", c_int64),
        ("last", c_int64),
    )


class Model(ctypes.Structure):
    """The whole denoiser."""

    _fields_ = (
        ("layers", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("width", c_int64),
        ("patch", c_int64),
        ("in_channels", c_int64),
        ("out_channels", c_int64),
        ("hidden_chunk", c_int64),
        ("kind", c_int64),
        ("blocks", POINTER(Block)),
        ("embed", Linear),
        ("final", Linear),
        ("eps", c_double),
    )


class Step(ctypes.Structure):
    """One call: inputs, output and scratch."""

    _fields_ = (
        ("latents", c_void_p),
        ("context", c_void_p),
        ("modulation", c_void_p),
        ("position", c_void_p),
        ("velocity", c_void_p),
        ("skip", c_void_p),
        ("scratch", c_void_p),
        ("nanoseconds", c_void_p),
        ("batch", c_int64),
        ("h", c_int64),
        ("w", c_int64),
        ("text", c_int64),
        ("modulation_width", c_int64),
        ("threads", c_int64),
    )


SIZED = (Linear, Block, Model, Step)
"""Those whose sizes the library states, in its order."""


def check_sizes(library: ctypes.CDLL) -> None:
    """Compare the structures' sizes with the library's. Raises: RuntimeError where they differ."""
    sizes = (c_int64 * len(SIZED))()
    library.sd35_sizes(sizes)
    expected = [ctypes.sizeof(structure) for structure in SIZED]
    if list(sizes) != expected:
        raise RuntimeError(f"structures of {list(sizes)} bytes in C++, {expected} in Python")


class Memory:
    """Tensors cut from slabs of huge pages, zero at first; a slab lives while a tensor of it does.

    The pages decide: with pages of 4 KB the products' strided rows miss the TLB, and the same loops
    ran 15 % (float32) to 50 % (int8) slower. Pages that are never touched take no memory.
    """

    PAGE = 2 << 20
    SLAB = 64 << 20

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of `count` elements that begins on a cache line."""
        size = count * dtype.itemsize
        start = -(-self._used // 64) * 64
        if start + size > self._slab.nbytes:
            self._slab, start = self._new_slab(max(size, self.SLAB)), 0
        self._used = start + size
        return self._slab[start : start + size].view(dtype)

    def _new_slab(self, size: int) -> torch.Tensor:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory gets no huge pages
        region = mmap.mmap(-1, size + self.PAGE, flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                region.madvise(mmap.MADV_HUGEPAGE)
        slab = torch.frombuffer(region, dtype=torch.uint8)
        return slab[-slab.data_ptr() % self.PAGE :]
