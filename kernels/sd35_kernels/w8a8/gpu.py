"""The W8A8 linear on a GPU, in Triton: rows quantised in one kernel, the product in another.

`_quantize_rows`: one program per row, which reads its K values twice (the second time from cache)
and writes K bytes and one scale. `_matmul`: tiles of BLOCK_M × BLOCK_N; each step loads
(BLOCK_M + BLOCK_N)·BLOCK_K bytes and multiplies on the tensor cores, int8 into int32 or fp8 e4m3
into float32; the epilogue applies both scales and the bias in registers and writes M·N outputs
once, so the int32 sums never reach memory. At 128 × 128 tiles that is 64 operations a byte from
the second-level cache. Neighbouring programs share rows of x (`GROUP`), which keeps one of the two
operands in that cache.

An MLP needs no pass between its products (`gpu_w8a8_mlp`): the first one's epilogue applies GELU
and leaves its tile in 8 bits, with a scale for every `CHUNK` channels of a row, since a program
sees no more of it; the second multiplies each chunk by its scale, one multiply-add for 128
products. That saves 5 bytes a hidden value (written in 2, read twice to be quantised): at
8,192 × 6,144 values 250 MB, 58 us at 4.3 TB/s beside two products of some 130 us.

Both run in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors, which is how they are tested
without a GPU.
"""

import torch
import triton
import triton.language as tl

from sd35_kernels.w8a8.quantize import LIMITS, TINY

# pyright: reportArgumentType=false, reportAssignmentType=false
# Triton turns plain arguments into its constexpr at launch, which its types do not say.
GROUP = 8
CHUNK = 128
"""Hidden channels of a row that share a scale."""
# Adding and subtracting 1.5 * 2^23 rounds a float32 below 2^22 to an integer, ties to even, in two
# instructions that the interpreter has too.
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def _quantize_rows(
    x, q, scale, K, stride_m, stride_k, LIMIT: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    not_finite = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_m + k * stride_k, mask=k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        not_finite += value * 0.0  # 0, or NaN for a NaN or an infinity, which maxima may drop
    maximum = tl.maximum(tl.max(largest, 0), TINY)
    factor = tl.div_rn(LIMIT + 0.0 * maximum, maximum)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride_m + k * stride_k, mask=k < K, other=0.0).to(tl.float32)
        scaled = value * factor
        if q.dtype.element_ty == tl.int8:
            scaled = (scaled + ROUNDING) - ROUNDING
        tl.store(q + row * K + k, scaled.to(q.dtype.element_ty), mask=k < K)
    tl.store(scale + row, maximum / LIMIT + tl.sum(not_finite, 0))


@triton.jit
def _matmul(
    x, w, x_scale, w_scale, bias, out, out_scale, M, N, K,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, CHUNKED: tl.constexpr,
    REQUANTISED: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * across)
    height = min(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    block_m = group * GROUP + (program % (GROUP * across)) % height
    block_n = (program % (GROUP * across)) // height
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x + m[:, None].to(tl.int64) * K + k[None, :]
    w_at = w + n[None, :].to(tl.int64) * K + k[:, None]
    integers: tl.constexpr = x.dtype.element_ty == tl.int8
    sums: tl.constexpr = tl.int32 if integers else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if CHUNKED else sums)
    for start in range(0, K, BLOCK_K):
        left = K - start
        a = tl.load(x_at, mask=(m[:, None] < M) & (k[None, :] < left), other=0.0)
        b = tl.load(w_at, mask=(n[None, :] < N) & (k[:, None] < left), other=0.0)
        if CHUNKED:
            chunk = tl.load(x_scale + (start // BLOCK_K) * M + m, mask=m < M, other=0.0)
            total += tl.dot(a, b, out_dtype=sums).to(tl.float32) * chunk[:, None]
        else:
            total = tl.dot(a, b, total, out_dtype=sums)
        x_at += BLOCK_K
        w_at += BLOCK_K
    columns = tl.load(w_scale + n, mask=n < N, other=0.0)
    result = total.to(tl.float32) * columns[None, :]
    if not CHUNKED:
        result *= tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if REQUANTISED:
        # GELU's tanh form: x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
        cubic = result + 0.044715 * result * result * result
        result = result * tl.sigmoid(1.5957691216057308 * cubic)
        result = tl.where(n[None, :] < N, result, 0.0)
        not_finite = tl.sum(result * 0.0, 1)
        maximum = tl.maximum(tl.max(tl.abs(result), 1), TINY)
        tl.store(out_scale + block_n * M + m, maximum / LIMIT + not_finite, mask=m < M)
        result *= tl.div_rn(LIMIT + 0.0 * maximum, maximum)[:, None]
        if integers:
            result = (result + ROUNDING) - ROUNDING
    out_at = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_at, result.to(out.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def gpu_w8a8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`x` [M, K] with M ≥ 1, `weight_q` int8 or float8_e4m3fn [N, K]; returns [M, N]."""
    x_q, x_scale = gpu_quantize_rows(x, weight_q.dtype)
    return gpu_scaled_product(x_q, x_scale, weight_q, weight_scale, bias, out_dtype)


def gpu_quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `x` [M, K] to `dtype`; returns [M, K] and float32 scales [M]."""
    rows, length = x.shape
    x_q = torch.empty((rows, length), dtype=dtype, device=x.device)
    x_scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _quantize_rows[(rows,)](
        x, x_q, x_scale, length, x.stride(0), x.stride(1),
        LIMIT=LIMITS[dtype], TINY=TINY,
        BLOCK=min(4096, triton.next_power_of_2(length)),
    )  # fmt: skip
    return x_q, x_scale


def gpu_w8a8_mlp(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    up: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    down: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply by `up`, apply GELU (tanh), multiply by `down`; the hidden layer stays in 8 bits.

    `x_q` [M, K] and `x_scale` [M] as `gpu_quantize_rows` returns them; `up`, `down`: weights,
    scales and bias as `gpu_scaled_product` takes them. Returns [M, N] of `out_dtype`.
    """
    hidden, scale = gpu_gelu_requantised(x_q, x_scale, *up)
    return gpu_scaled_product(hidden, scale, *down, out_dtype)


def gpu_gelu_requantised(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply, apply GELU and quantise; returns [M, N] in 8 bits and scales [N / CHUNK, M]."""
    chunks = triton.cdiv(weight_q.shape[0], CHUNK)
    scale = torch.empty((chunks, x_q.shape[0]), dtype=torch.float32, device=x_q.device)
    return _multiply(x_q, x_scale, weight_q, weight_scale, bias, x_q.dtype, scale), scale


def gpu_scaled_product(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply quantised [M, K] and [N, K], scale and add `bias` [N]; returns [M, N].

    `x_scale`: [M], or [K / CHUNK, M].
    """
    return _multiply(x_q, x_scale, weight_q, weight_scale, bias, out_dtype, None)


def _multiply(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    out_scale: torch.Tensor | None,
) -> torch.Tensor:
    (rows, length), columns = x_q.shape, weight_q.shape[0]
    out = torch.empty((rows, columns), dtype=out_dtype, device=x_q.device)
    chunked = x_scale.dim() > 1
    tile = tile_of(rows, requantised=out_scale is not None, chunked=chunked)
    programs = triton.cdiv(rows, tile["BLOCK_M"]) * triton.cdiv(columns, tile["BLOCK_N"])
    _matmul[(programs,)](
        x_q, weight_q, x_scale, weight_scale, weight_scale if bias is None else bias, out,
        weight_scale if out_scale is None else out_scale, rows, columns, length,
        HAS_BIAS=bias is not None, GROUP=GROUP, CHUNKED=chunked,
        REQUANTISED=out_scale is not None, LIMIT=LIMITS[x_q.dtype], TINY=TINY, **tile,
    )  # fmt: skip
    return out


def tile_of(rows: int, *, requantised: bool = False, chunked: bool = False) -> dict[str, int]:
    """Return the tile for `rows`: flat where there are few (adaLN has one row per image).

    A chunk of what is requantised is as wide as a tile, and the next product's step along K, whose
    second set of sums makes 4 warps spill on Ada.
    """
    wide = {"BLOCK_N": CHUNK, "BLOCK_K": CHUNK}
    if rows <= 32:
        few = {"BLOCK_M": 16, **wide, "num_warps": 4, "num_stages": 4}
        return few if requantised else {**few, "BLOCK_N": 64}
    if rows <= 256:
        return {"BLOCK_M": 64, **wide, "num_warps": 8 if chunked else 4, "num_stages": 3}
    return {"BLOCK_M": 128, **wide, "num_warps": 8, "num_stages": 3}
