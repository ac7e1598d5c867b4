"""The W8A8 linear on a CPU: oneDNN's int8 product (VNNI) between two passes over memory.

`torch._int_mm` sums int8 products in int32 exactly where there is VNNI, 4 products an instruction
and lane. Without it oneDNN adds pairs of products in int16, which saturates on large values and
says nothing (seen with ONEDNN_MAX_CPU_ISA=AVX2 and AVX512_CORE), so the largest values are tried
once, `EXACT`, and a machine that gets them wrong is refused. oneDNN lays the weights out anew in
each call (N·K bytes, under a tenth of the time at M = 1024).

Two forms of the same arithmetic. `cpu_w8a8_linear` is the operation's kernel: it quantises and
scales in blocks that fit the second-level cache and writes the result over the int32 sums, so that
a call takes M·N·4 + M·K fresh bytes and not thrice that (page faults cost as much as the
arithmetic here). `fused_w8a8_linear` is what torch.compile traces instead of the call, whole rows
at a time: inductor joins the quantisation to what produced x and the scaling to what follows, 15 %
of a block of SD3.5-Medium's width.
"""

import torch

from sd35_kernels.w8a8.quantize import quantize_rows

__all__ = ["EXACT", "cpu_w8a8_linear", "fused_w8a8_linear"]

BLOCK = 128 * 1024
"""Elements worked on at a time: 512 KiB of int32, half of a 1 MiB second-level cache."""


def fused_w8a8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`x` [M, K], `weight_q` int8 [N, K]; returns [M, N] of `out_dtype`, for the compiler."""
    x_q, x_scale = quantize_rows(x)
    scaled = torch.ops.aten._int_mm(x_q, weight_q.t()).float() * weight_scale * x_scale
    return (scaled if bias is None else scaled + bias.float()).to(out_dtype)


def cpu_w8a8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`x` [M, K] with M ≥ 1, `weight_q` int8 [N, K]; returns [M, N] of `out_dtype`."""
    x_q, x_scale = _quantize_in_blocks(x)
    total = torch.ops.aten._int_mm(x_q, weight_q.t())
    offset = torch.zeros_like(weight_scale) if bias is None else bias.float()
    inplace = out_dtype == torch.float32
    out = total.view(torch.float32) if inplace else total.new_empty(total.shape, dtype=out_dtype)
    step = max(1, BLOCK // total.shape[1])
    for start in range(0, total.shape[0], step):
        rows = slice(start, start + step)
        scaled = total[rows].float().mul_(weight_scale)
        if inplace:
            torch.addcmul(offset, scaled, x_scale[rows], out=out[rows])
        else:
            out[rows] = torch.addcmul(offset, scaled, x_scale[rows])
    return out


def _quantize_in_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, length = x.shape
    step = max(1, BLOCK // length)
    if rows <= step:
        return quantize_rows(x)
    x_q = torch.empty((rows, length), dtype=torch.int8)
    x_scale = torch.empty((rows, 1), dtype=torch.float32)
    for start in range(0, rows, step):
        block = slice(start, start + step)
        x_q[block], x_scale[block] = quantize_rows(x[block])
    return x_q, x_scale


def _products_are_exact() -> bool:
    """Multiply the largest values of both signs, where pairs overflow int16."""
    a = torch.full((16, 256), 127, dtype=torch.int8)
    b = torch.full((32, 256), -127, dtype=torch.int8)
    b[::2] = 127
    got = torch.ops.aten._int_mm(a, b.t())
    return torch.equal(got.long(), a.long() @ b.long().t())


EXACT = _products_are_exact()
"""Whether this CPU multiplies int8 without saturating; a constant that the compiler can read."""
