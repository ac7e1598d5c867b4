"""Symmetric 8-bit quantisation by rows, shared by the reference and every kernel.

``scale = absmax / limit`` and ``q = round(x · (limit / absmax))`` with ties to even, in float32
whatever x is. `limit` is 127 for int8 (−128 is never used, so that negation is exact and
u8·s8 tricks of CPU kernels cannot overflow) and 448 for fp8 e4m3. A zero row gets the scale of the
smallest row that is still told apart, `TINY`, and zeros. A row with a NaN or an infinity gets a
scale that is neither finite nor zero, so that whatever its integers became, the product is
not finite either.
"""

import torch

__all__ = ["LIMITS", "MAX_K", "TINY", "quantize_rows", "quantize_weight"]

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Quantised dtype -> its largest magnitude in use."""
TINY = 1e-30
"""Rows below this magnitude are quantised as if this were their maximum: limit / TINY is finite."""
MAX_K = (2**31 - 1) // (127 * 128)
"""The longest sum that int32 holds whatever the values: 132,104 products."""


def quantize_rows(
    x: torch.Tensor, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `x` [M, K] by its own maximum.

    Returns `q` [M, K] of `dtype` (int8 or float8_e4m3fn) and `scale` [M, 1] in float32 with
    ``q · scale ≈ x``.

    Raises: ValueError for another dtype.
    """
    if dtype not in LIMITS:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(map(str, LIMITS))}")
    limit = LIMITS[dtype]
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True).clamp_min(TINY)
    scaled = wide * (limit / largest)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.to(dtype), largest / limit


def quantize_weight(
    weight: torch.Tensor, dtype: torch.dtype = torch.int8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `weight` [N, K] with one scale per output channel.

    Returns `weight_q` [N, K] of `dtype`, contiguous, and `weight_scale` [N] in float32.

    Raises: ValueError for a weight that is not a matrix, not floating point, not finite, or longer
    than an int32 sum can hold.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight is {weight.dtype} {list(weight.shape)}: must be floating point [N, K]"
        )
    if weight.shape[1] > MAX_K:
        raise ValueError(f"weight has K={weight.shape[1]}: int32 sums hold K up to {MAX_K}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight has NaN or infinite values: nothing to scale them by")
    quantized, scale = quantize_rows(weight.detach(), dtype)
    return quantized.contiguous(), scale.squeeze(1).contiguous()
