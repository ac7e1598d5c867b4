"""The fused passes in Triton: a program a row, which it keeps in registers from load to store.

`_norm_rows`: mean and variance over D in float32, two reductions in registers; at D = 1536 a thread
of 128 holds 16 values. With `GATED` the residual stream is updated on the way, with `QUANTISED` the
row leaves in 8 bits with its scale, which takes one more reduction and no more bytes.
`_joint_heads`: a program a token, all its heads; q, k and v are written as [3, B, N + T, heads, D],
in runs of a whole row, and returned as the [B, heads, N + T, D] views that attention takes.

Both run in Triton's interpreter (TRITON_INTERPRET=1) on CPU tensors.
"""

import torch
import triton
import triton.language as tl

from sd35_kernels.w8a8.gpu import ROUNDING
from sd35_kernels.w8a8.quantize import LIMITS, TINY

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton turns plain arguments into its constexpr at launch, which its types do not say.

LARGEST_ROW = 8192
"""Values of a row: more would spill out of 128 threads' registers."""


@triton.jit
def _norm_rows(
    x, update, gate, scale, shift, total, out, out_scale, N, D, stride_b,
    EPS: tl.constexpr, LIMIT: tl.constexpr, TINY: tl.constexpr,
    GATED: tl.constexpr, QUANTISED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample = row // N
    d = tl.arange(0, BLOCK)
    inside = d < D
    value = tl.load(x + row * D + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        change = tl.load(update + row * D + d, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(gate + sample * stride_b + d, mask=inside, other=0.0).to(tl.float32)
        value += gates * change
        tl.store(total + row * D + d, value.to(total.dtype.element_ty), mask=inside)
    centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + EPS)
    scales = tl.load(scale + sample * stride_b + d, mask=inside, other=0.0).to(tl.float32)
    shifts = tl.load(shift + sample * stride_b + d, mask=inside, other=0.0).to(tl.float32)
    result = normed * scales + shifts
    if QUANTISED:
        maximum = tl.maximum(tl.max(tl.abs(result), 0), TINY)
        not_finite = tl.sum(result * 0.0, 0)  # 0, or NaN, which maxima may drop
        tl.store(out_scale + row, maximum / LIMIT + not_finite)
        result *= tl.div_rn(LIMIT + 0.0 * maximum, maximum)
        if out.dtype.element_ty == tl.int8:
            result = (result + ROUNDING) - ROUNDING
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _joint_heads(
    image, text, image_q, image_k, text_q, text_k, out, N, T, H,
    EPS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    ours = token < N
    row = tl.where(ours, sample * N + token, sample * T + token - N)
    source = tl.where(ours, image, text) + row * (3 * H * DIM)
    target = out + (sample * (N + T) + token) * (H * DIM)
    part_size = tl.num_programs(1).to(tl.int64) * (N + T) * (H * DIM)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)
    at, inside = h * DIM + d[None, :], (h < H) & (d[None, :] < DIM)
    for part in tl.static_range(PARTS):
        value = tl.load(source + part * H * DIM + at, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            if part == 0:
                gain = tl.load(tl.where(ours, image_q, text_q) + d)
            else:
                gain = tl.load(tl.where(ours, image_k, text_k) + d)
            mean = tl.sum(value * value, 1) / DIM
            value = value * tl.rsqrt(mean + EPS)[:, None] * gain.to(tl.float32)[None, :]
        tl.store(target + part * part_size + at, value.to(out.dtype.element_ty), mask=inside)


def gpu_modulated_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    quantised: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.modulated_norm`; with `quantised` (int8, float8_e4m3fn) in 8 bits, scales [B N].

    `x`: [B, N, D], contiguous; `scale`, `shift`: [B, D], rows of one stride.

    Raises: ValueError for rows that are too long or do not lie so.
    """
    _, out, out_scale = _normed(x, None, (scale, scale, shift), eps, quantised)
    return out, out_scale


def gpu_gated_norm(
    x: torch.Tensor,
    update: torch.Tensor,
    modulation: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    eps: float,
    quantised: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`reference.gated_norm` with `modulation` gate, scale, shift: the sum, its norm, its scales.

    Raises: ValueError for rows that are too long or do not lie as they must.
    """
    return _normed(x, update, modulation, eps, quantised)


def _normed(
    x: torch.Tensor,
    update: torch.Tensor | None,
    modulation: tuple[torch.Tensor, ...],
    eps: float,
    quantised: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    batch, tokens, width = x.shape
    gate, scale, shift = modulation
    strides = {each.stride() for each in modulation}
    if width > LARGEST_ROW or not x.is_contiguous():
        raise ValueError(f"x {list(x.shape)}: must be contiguous, rows up to {LARGEST_ROW} values")
    if len(strides) > 1 or scale.stride(1) != 1 or scale.shape != (batch, width):
        raise ValueError(f"modulation of strides {strides}: must be [{batch}, {width}] of one row")
    if update is not None and (update.shape != x.shape or not update.is_contiguous()):
        raise ValueError(f"update {list(update.shape)}: must be as x and contiguous")
    total = x if update is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=quantised or x.dtype)
    out_scale = None if quantised is None else x.new_empty(batch * tokens, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _norm_rows[(batch * tokens,)](
        x, x if update is None else update, gate, scale, shift, total, out,
        out if out_scale is None else out_scale, tokens, width, scale.stride(0),
        EPS=eps, LIMIT=LIMITS.get(quantised, 0.0), TINY=TINY, GATED=update is not None,
        QUANTISED=quantised is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return total, out, out_scale


def gpu_joint_heads(
    image: torch.Tensor,
    text: torch.Tensor | None,
    gains: tuple[torch.Tensor, ...],
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.joint_heads`; heads of 16, 32, 64 or 128. Without text v is a view of `image`.

    Raises: ValueError for other heads, or streams that are not contiguous.
    """
    batch, tokens, wide = image.shape
    dim = wide // (3 * heads)
    if dim not in (16, 32, 64, 128) or wide % (3 * heads):
        raise ValueError(f"{heads} heads in rows of {wide}: heads must be 16, 32, 64 or 128 wide")
    if not image.is_contiguous() or (text is not None and not text.is_contiguous()):
        raise ValueError("image and text must be contiguous")
    texts, parts = (0, 2) if text is None else (text.shape[1], 3)
    out = image.new_empty(parts, batch, tokens + texts, heads, dim)
    image_q, image_k, text_q, text_k = gains if text is not None else (*gains[:2], *gains[:2])
    _joint_heads[(tokens + texts, batch)](
        image, image if text is None else text, image_q, image_k, text_q, text_k, out,
        tokens, texts, heads, EPS=eps, PARTS=parts, DIM=dim,
        HEADS=triton.next_power_of_2(heads), num_warps=4,
    )  # fmt: skip
    views = [part.transpose(1, 2) for part in out]
    if text is None:
        views.append(image.unflatten(-1, (3, heads, dim))[:, :, 2].transpose(1, 2))
    q, k, v = views
    return q, k, v
