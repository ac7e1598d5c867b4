"""Operations of the local SD3.5 path, each with a plain reference, a GPU and a CPU kernel.

`w8a8_linear` is the first: a linear layer on 8-bit weights and activations. An operation is
registered with torch once (`torch.ops.sd35.*`), dispatches by device, and raises
`KernelUnavailable` where it has no kernel; it never computes something else instead.
This package imports nothing of sd35bench.
"""

from sd35_kernels.w8a8.errors import KernelUnavailable
from sd35_kernels.w8a8.module import W8A8Linear
from sd35_kernels.w8a8.op import check_available, w8a8_linear
from sd35_kernels.w8a8.quantize import quantize_rows, quantize_weight
from sd35_kernels.w8a8.reference import reference_w8a8_linear

__all__ = [
    "KernelUnavailable",
    "W8A8Linear",
    "check_available",
    "quantize_rows",
    "quantize_weight",
    "reference_w8a8_linear",
    "w8a8_linear",
]
