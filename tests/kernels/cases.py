"""Inputs, exact results and tolerances that the kernels' tests share."""

import torch

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""One unit in the last place, relative."""


def make_case(
    rows: int, length: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normal `x` [M, K], `weight` [N, K] with output channels of unlike size, `bias` [N]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=g).to(dtype)
    weight = torch.randn(columns, length, generator=g) * (0.1 + torch.rand(columns, 1, generator=g))
    return x, weight, torch.randn(columns, generator=g)


def scaled(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """The product in float64: exact for int8 and fp8 values."""
    total = x_q.double() @ weight_q.double().t()
    return total * x_scale.double() * weight_scale.double() + bias.double()


def tolerance(
    expected: torch.Tensor, eps: float, length: int, magnitudes: torch.Tensor
) -> torch.Tensor:
    """How far outputs may lie from the exact: `eps` for the last rounding, float32 for the rest.

    `magnitudes` [M, N]: the sum of |x·w|. Float32 rounds the sum (once for int8, K times for fp8,
    whose errors grow as √K), both scalings and the bias's addition.
    """
    float32 = EPS[torch.float32]
    return eps * expected.abs() + float32 * (4 + length**0.5) * (magnitudes + expected.abs() + 1)
