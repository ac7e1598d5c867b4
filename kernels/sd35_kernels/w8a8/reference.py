"""The W8A8 linear in plain PyTorch: what every kernel is held against.

Products of 8-bit integers are summed in int64 (exact for any K), products of fp8 values in
float64 (exact: 8 significant bits, and 2^53 holds the sum), so the reference has no rounding but
quantisation and the final scaling. It is slow and meant to be read.
"""

import torch
from torch.nn import functional as F

from sd35_kernels.w8a8.quantize import quantize_rows

__all__ = ["reference_gelu_requantised", "reference_w8a8_linear"]


def reference_w8a8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute ``quantised(x) · weightᵀ + bias`` with exact sums; see `op.w8a8_linear`."""
    rows = x.reshape(-1, x.shape[-1])
    x_q, x_scale = quantize_rows(rows, weight_q.dtype)
    exact = torch.int64 if weight_q.dtype == torch.int8 else torch.float64
    total = x_q.to(exact) @ weight_q.to(exact).t()
    out = total.float() * weight_scale * x_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype if out_dtype is None else out_dtype).reshape(*x.shape[:-1], -1)


def reference_gelu_requantised(
    product: torch.Tensor, dtype: torch.dtype, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply GELU (tanh) to `product` [M, N], then quantise each `chunk` channels of a row alone.

    Returns [M, N] of `dtype` and scales [N / chunk, M], the last chunk as long as it comes.
    """
    parts = F.gelu(product.float(), approximate="tanh").split(chunk, dim=1)
    quantised = [quantize_rows(part, dtype) for part in parts]
    return torch.cat([q for q, _ in quantised], 1), torch.cat([s for _, s in quantised], 1).t()
