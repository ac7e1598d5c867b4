"""Run as a program with TRITON_INTERPRET=1: the Triton kernels on CPU tensors, checked.

Prints one JSON document: each case's largest error in units of its tolerance, the same of mutants
(references that are wrong in one part), and what became of rows that are not finite. The
interpreter must be chosen before Triton is imported, hence a process of its own. It casts float32
to bf16 by cutting bits off where a GPU rounds to nearest, so the tolerance is a whole unit in the
last place; products are held against the exact product of what the kernel itself quantised.
"""

import json
import sys

import torch

from sd35_kernels import quantize_rows, quantize_weight
from sd35_kernels.norms import reference
from sd35_kernels.norms.gpu import gpu_gated_norm, gpu_joint_heads, gpu_modulated_norm
from sd35_kernels.w8a8.gpu import (
    CHUNK,
    gpu_gelu_requantised,
    gpu_quantize_rows,
    gpu_scaled_product,
    gpu_w8a8_linear,
    gpu_w8a8_mlp,
)
from sd35_kernels.w8a8.reference import reference_gelu_requantised
from tests.kernels.cases import EPS, make_case, scaled, tolerance

FEW = [
    (7, 33, 5, torch.float32),
    (18, 64, 20, torch.bfloat16),
    (3, 200, 70, torch.float16),
]
CASES = [*FEW, (40, 64, 48, torch.bfloat16), (1, 16, 16, torch.float32), (33, 24, 1, torch.float32)]
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


def norms(
    batch: int, tokens: int, width: int, dtype: torch.dtype, quantised: torch.dtype | None
) -> list[dict[str, object]]:
    """Errors of both norms, and of mutants of what they are held against."""
    g = torch.Generator().manual_seed(width)
    x, update = (torch.randn(batch, tokens, width, generator=g).to(dtype) for _ in range(2))
    rows = (0.7 + torch.rand(batch, 4 * width, generator=g)).to(dtype)
    gate, scale, shift = rows[:, width:].split(width, 1)  # strided, as rows of the table are
    wide = [t.double() for t in (x, update, gate, scale, shift)]
    before, normed = reference.gated_norm(*wide, 1e-6)
    total, out, out_scale = gpu_gated_norm(x, update, (gate, scale, shift), 1e-6, quantised)
    plain = reference.modulated_norm(wide[0], *wide[3:], 1e-6)
    found = [
        {
            "case": f"sum {width} {dtype}",
            "error": _error(total, before, dtype),
            "mutants": {
                "no gate": _error(total, wide[0] + wide[1], dtype),
                "another sample's gate": _error(total, before.roll(1, 0), dtype),
            },
        },
        {
            "case": f"gated {width} {dtype} {quantised}",
            "error": _error(out, normed, dtype, out_scale),
            "mutants": {
                "no shift": _error(out, normed - wide[4][:, None], dtype, out_scale),
                "eps": _error(out, reference.gated_norm(*wide, 0.1)[1], dtype, out_scale),
                "of x": _error(out, plain, dtype, out_scale),
            },
        },
    ]
    out, out_scale = gpu_modulated_norm(x, scale, shift, 1e-6, quantised)
    scaled_by = reference.modulated_norm(wide[0], wide[2], wide[4], 1e-6)
    mutants = {"gate as scale": _error(out, scaled_by, dtype, out_scale)}
    error = _error(out, plain, dtype, out_scale)
    return [
        *found,
        {"case": f"norm {width} {dtype} {quantised}", "error": error, "mutants": mutants},
    ]


def heads(
    batch: int, tokens: int, texts: int | None, count: int, dim: int, dtype: torch.dtype
) -> list[dict[str, object]]:
    """Errors of q, k and v in their places, and of mutants of what they are held against."""
    g = torch.Generator().manual_seed(dim)
    image = torch.randn(batch, tokens, 3 * count * dim, generator=g).to(dtype)
    text = None
    if texts is not None:
        text = torch.randn(batch, texts, 3 * count * dim, generator=g).to(dtype)
    gains = tuple((0.5 + torch.rand(dim, generator=g)).to(dtype) for _ in range(4))
    got = torch.stack(gpu_joint_heads(image, text, gains, count, 1e-6))

    def error(*order: int, streams: tuple = (image, text), eps: float = 1e-6) -> float:
        wide = [None if stream is None else stream.double() for stream in streams]
        turned = tuple(gains[i].double() for i in order)
        expected = reference.joint_heads(wide[0], wide[1], turned, count, eps)
        return _error(got, torch.stack(expected), dtype)

    mutants = {"gains of k on q": error(1, 0, 3, 2), "eps": error(0, 1, 2, 3, eps=0.1)}
    mutants["heads as rows"] = error(0, 1, 2, 3, streams=(image.roll(dim, 2), text))
    if text is not None:
        mutants["gains of the other stream"] = error(2, 3, 0, 1)
        mutants["text first"] = error(2, 3, 0, 1, streams=(text, image))
    case = f"heads {tokens} {texts} {count}x{dim} {dtype}"
    return [{"case": case, "error": error(0, 1, 2, 3), "mutants": mutants}]


def mlp(rows: int, length: int, hidden: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """Errors of the hidden layer in 8 bits, and of the product that takes it."""
    x, weight, bias = make_case(rows, length, hidden)
    x_q, x_scale = gpu_quantize_rows(x, dtype)
    up = (*quantize_weight(weight, dtype), bias)
    _, weight, bias = make_case(rows, hidden, 24, seed=1)
    down = (*quantize_weight(weight, dtype), bias)
    got, got_scale = gpu_gelu_requantised(x_q, x_scale, *up)
    product = scaled(x_q, x_scale[:, None], *up)
    wanted = torch.nn.functional.gelu(product, approximate="tanh")

    def error(expected: torch.Tensor, scale: torch.Tensor = got_scale) -> float:
        return _error(got, expected, torch.float32, _spread(scale, hidden))

    mutants = {
        "no GELU": error(product),
        "one scale a row": error(wanted, got_scale[:1].expand_as(got_scale)),
        "no bias": error(torch.nn.functional.gelu(product - up[2], approximate="tanh")),
    }
    as_reference = reference_gelu_requantised(product.float(), dtype, CHUNK)
    same = (got.float() == as_reference[0].float()).float().mean().item()
    out = gpu_w8a8_mlp(x_q, x_scale, up, down, torch.float32)
    values = got.double() * _spread(got_scale, hidden).double()
    exact = scaled(values, torch.ones(rows, 1), *down)
    wrong = scaled(got.double() * got_scale[0][:, None].double(), torch.ones(rows, 1), *down)
    floats = down[0].float().abs() * down[1][:, None]
    allowed = tolerance(exact, EPS[torch.float32], hidden, values.float().abs() @ floats.t())
    off, mutant = (((out - e).abs() / allowed).max().item() for e in (exact, wrong))
    case = f"{rows}x{length}x{hidden} {dtype}"
    return [
        {"case": f"hidden {case}", "error": error(wanted), "mutants": mutants, "same": same},
        {"case": f"mlp {case}", "error": off, "mutants": {"one scale a row": mutant}},
    ]


def _spread(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales [chunks, M] as [M, columns]."""
    return scale.t().repeat_interleave(CHUNK, 1)[:, :columns]


def _error(
    got: torch.Tensor,
    expected: torch.Tensor,
    dtype: torch.dtype,
    scale: torch.Tensor | None = None,
) -> float:
    """Largest error in units of the tolerance: the last rounding, and float32 on the way to it.

    Float32's part is 16 roundings of the largest value. `scale`: of each row, or value, of 8 bits.
    """
    allowed = 16 * EPS[torch.float32] * (expected.abs().amax() + 1)
    value = got.double()
    if scale is None:
        return ((value - expected).abs() / (allowed + EPS[dtype] * expected.abs())).max().item()
    of_row = scale if scale.dim() > 1 else scale.view(*got.shape[:-1], 1)
    relative, absolute = ROUNDINGS[got.dtype]
    step = (relative * expected.abs() + absolute * of_row) * (1 + 1e-5)
    return ((value * of_row - expected).abs() / (allowed + step)).max().item()


def main(cases: list[tuple]) -> None:
    """Compare these cases for both weight dtypes."""
    dtypes = (torch.int8, torch.float8_e4m3fn)
    found = [compare(dtype, case) for dtype in dtypes for case in cases]
    fused = [
        *norms(2, 3, 24, torch.float32, None),
        *norms(2, 1, 33, torch.bfloat16, None),
        *norms(3, 2, 40, torch.float16, torch.int8),
        *norms(2, 2, 100, torch.float32, torch.float8_e4m3fn),
        *heads(2, 3, 2, 3, 16, torch.float32),
        *heads(1, 1, 5, 1, 32, torch.bfloat16),
        *heads(2, 3, None, 2, 64, torch.float16),
        *mlp(7, 33, 200, torch.int8),
        *mlp(5, 16, 200, torch.float8_e4m3fn),
    ]
    print(json.dumps({"cases": found, "fused": fused, "special": special_rows()}))


if __name__ == "__main__":
    main(CASES if "every" in sys.argv else FEW)
