"""A drop-in for `torch.nn.Linear` in inference, with 8-bit weights."""

import torch
from torch import nn

from sd35_kernels.w8a8.op import check_available, w8a8_linear
from sd35_kernels.w8a8.quantize import quantize_weight

__all__ = ["W8A8Linear"]


class W8A8Linear(nn.Module):
    """``y = x Wᵀ + b`` on `w8a8_linear`; buffers `weight_q` [N, K], `weight_scale` [N], `bias` [N].

    Buffers, not parameters: there is nothing to train. ``.to(dtype)`` leaves the int8 weights alone
    and must not round the scales, which therefore stay float32.
    """

    weight_q: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, weight_q: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Wrap what `quantize_weight` returned."""
        super().__init__()
        self.out_features, self.in_features = weight_q.shape
        self.register_buffer("weight_q", weight_q)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype = torch.int8) -> "W8A8Linear":
        """Quantise a linear layer's weights; the bias is kept as it is.

        Raises: ValueError for weights that are not finite; KernelUnavailable where the layer's
        device has no kernel for `dtype` (int8 or float8_e4m3fn).
        """
        check_available(linear.weight.device, dtype)
        weight_q, weight_scale = quantize_weight(linear.weight, dtype)
        bias = None if linear.bias is None else linear.bias.detach()
        return cls(weight_q, weight_scale, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `x` [..., K] to [..., N] of the same dtype."""
        return w8a8_linear(x, self.weight_q, self.weight_scale, self.bias)

    def extra_repr(self) -> str:
        """Say the shape and the quantised dtype."""
        has_bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, {self.weight_q.dtype}"

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but keep the scales in float32 under ``.to(dtype)``."""
        exact = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = exact.to(self.weight_scale.device)
        if self.weight_q.dtype.is_floating_point:
            raise_if_widened(self.weight_q)
        return self


def raise_if_widened(weight_q: torch.Tensor) -> None:
    """Refuse a ``.to(dtype)`` that undid fp8 quantisation.

    Raises: TypeError.
    """
    if weight_q.dtype != torch.float8_e4m3fn:
        raise TypeError(f"fp8 weights cannot be cast to {weight_q.dtype}; move them by device only")
