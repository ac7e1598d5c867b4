"""Run as a program with TRITON_INTERPRET=1: the Triton kernels on CPU tensors, checked.

Prints one JSON document: each case's largest error in units of its tolerance, and what became of
rows that are not finite. The interpreter must be chosen before Triton is imported, hence a process
of its own. It casts float32 to bf16 by cutting bits off where a GPU rounds to nearest, so the
tolerance is a whole unit in the last place; products are held against the exact product of what
the kernel itself quantised.
"""

import json

import torch

from sd35_kernels import quantize_rows, quantize_weight
from sd35_kernels.w8a8.gpu import gpu_quantize_rows, gpu_scaled_product, gpu_w8a8_linear
from tests.kernels.cases import EPS, make_case, scaled, tolerance

CASES = [
    (1, 16, 16, torch.float32),
    (7, 33, 5, torch.float32),
    (40, 64, 48, torch.bfloat16),
    (3, 200, 70, torch.float16),
    (33, 24, 1, torch.float32),
]
# Relative to a value, and to its row's scale: half of int8's step. The interpreter loses the carry
# of an fp8 mantissa that rounds up to a power of two, which halves the value; all others must be
# torch's, so their share is counted too.
ROUNDINGS = {torch.int8: (0.0, 0.5), torch.float8_e4m3fn: (0.5, 2.0**-9)}


def compare(weight_dtype: torch.dtype, case: tuple) -> dict[str, object]:
    """Errors of the two kernels in units of their tolerances."""
    rows, length, columns, dtype = case
    x, weight, bias = make_case(rows, length, columns, dtype)
    weight_q, scale = quantize_weight(weight, weight_dtype)
    x_q, x_scale = gpu_quantize_rows(x, weight_dtype)
    relative, absolute = ROUNDINGS[weight_dtype]
    step = (relative * x.float().abs() + absolute * x_scale[:, None]) * (1 + 1e-5)
    moved = (x_q.float() * x_scale[:, None] - x.float()).abs() / step
    got, wrong = (
        gpu_scaled_product(x_q, x_scale, weight_q, given, bias, dtype)
        for given in (scale, scale * 1.02)
    )
    expected = scaled(x_q, x_scale[:, None], weight_q, scale, bias)
    allowed = tolerance(expected, EPS[dtype], length, x.float().abs() @ weight.abs().t())
    whole = gpu_w8a8_linear(x, weight_q, scale, bias, dtype)
    return {
        "case": f"{rows}x{length}x{columns} {dtype} {weight_dtype}",
        "quantised": moved.max().item(),
        "as_torch": (x_q.float() == quantize_rows(x, weight_dtype)[0].float())
        .float()
        .mean()
        .item(),
        "product": ((got.float() - expected).abs() / allowed).max().item(),
        "mutant": ((wrong.float() - expected).abs() / allowed).max().item(),
        "composed": torch.equal(whole, got),
    }


def special_rows() -> dict[str, object]:
    """What rows with a NaN (1), an infinity (2) and zeros (3) become."""
    x, weight, bias = make_case(4, 32, 16)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("-inf"), 0
    weight_q, scale = quantize_weight(weight)
    got = gpu_w8a8_linear(x, weight_q, scale, bias, torch.float32)
    return {
        "any_finite": torch.isfinite(got).any(1).tolist(),
        "all_finite": torch.isfinite(got).all(1).tolist(),
        "zero_row": torch.equal(got[3], bias),
    }


def main() -> None:
    """Compare every case for both weight dtypes."""
    dtypes = (torch.int8, torch.float8_e4m3fn)
    found = [compare(dtype, case) for dtype in dtypes for case in CASES]
    print(json.dumps({"cases": found, "special": special_rows()}))


if __name__ == "__main__":
    main()
