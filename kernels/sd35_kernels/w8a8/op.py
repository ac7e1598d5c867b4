"""`sd35::w8a8_linear`: one operation, a kernel per device, nothing in between.

torch.compile captures a call without a break. On CUDA it stays one node (shapes come from the
fake implementation); on a CPU the compiler is given the same arithmetic in torch's operations
(`cpu.fused_w8a8_linear`), so that it can join them to their neighbours. Dispatch looks at the
tensors' device and dtypes only:

| device | int8 weights | fp8 e4m3 weights |
| --- | --- | --- |
| CPU with VNNI | `torch._int_mm` | refused |
| CPU without | refused | refused |
| CUDA | Triton, compute capability 8.0 | Triton, compute capability 8.9 |
| other | refused | refused |
"""

import torch

from sd35_kernels.w8a8.cpu import EXACT, cpu_w8a8_linear, fused_w8a8_linear
from sd35_kernels.w8a8.errors import KernelUnavailable
from sd35_kernels.w8a8.quantize import LIMITS, MAX_K

__all__ = ["OUT_DTYPES", "check_available", "w8a8_linear"]

OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITIES = {torch.int8: (8, 0), torch.float8_e4m3fn: (8, 9)}


def w8a8_linear(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Compute ``x Wᵀ + bias`` with `x` quantised per row on the fly.

    `x`: [..., K] in fp32, bf16 or fp16, any strides. `weight_q` [N, K] (int8 or float8_e4m3fn,
    contiguous) and `weight_scale` [N] (float32) come from `quantize_weight`. `bias`: [N], floating
    point. `out_dtype`: fp32, bf16 or fp16; that of `x` where ``None``. Returns [..., N].
    A row of `x` with a NaN or an infinity gives a row without a finite value.

    Raises: ValueError for shapes or dtypes that do not fit; KernelUnavailable where the device has
    no kernel for them.
    """
    dtype = x.dtype if out_dtype is None else out_dtype
    _check(x, weight_q, weight_scale, bias, dtype)
    if x.device.type not in ("cpu", "cuda", "meta"):
        raise KernelUnavailable(f"w8a8_linear has no kernel for {x.device.type}; use cpu or cuda")
    rows = x.reshape(-1, x.shape[-1])
    if _fusible(x, weight_q):
        out = fused_w8a8_linear(rows, weight_q, weight_scale, bias, dtype)
    else:
        out = torch.ops.sd35.w8a8_linear(rows, weight_q, weight_scale, bias, dtype)
    return out.reshape(*x.shape[:-1], weight_q.shape[0])


def check_available(device: torch.device, dtype: torch.dtype = torch.int8) -> str:
    """Return which kernel runs for weights of `dtype` on `device`.

    Raises: KernelUnavailable where none does, with the remedy.
    """
    if dtype not in LIMITS:
        raise KernelUnavailable(f"w8a8_linear has no kernel for weights of {dtype}")
    if device.type == "cpu":
        if dtype != torch.int8:
            raise KernelUnavailable(
                "w8a8_linear on a CPU needs int8 weights, not fp8; quantise with dtype=torch.int8"
            )
        if not EXACT:
            raise KernelUnavailable(
                "w8a8_linear on a CPU needs VNNI: without it oneDNN's int8 products saturate and "
                "are wrong; use a CPU with avx512_vnni or avx_vnni, or leave the weights in float "
                "(and ONEDNN_MAX_CPU_ISA unset)"
            )
        return "torch._int_mm"
    if device.type != "cuda":
        raise KernelUnavailable(f"w8a8_linear has no kernel for {device.type}; use cpu or cuda")
    if not torch.cuda.is_available():
        raise KernelUnavailable("w8a8_linear on CUDA: torch sees no CUDA device; use the CPU")
    needs, has = CAPABILITIES[dtype], torch.cuda.get_device_capability(device)
    if has < needs:
        raise KernelUnavailable(
            f"w8a8_linear with {dtype} weights needs compute capability {needs[0]}.{needs[1]}, "
            f"this GPU has {has[0]}.{has[1]}"
        )
    _gpu_module()
    return f"triton, {str(dtype).removeprefix('torch.')}"


@torch.library.custom_op("sd35::w8a8_linear", mutates_args=(), device_types="cpu")
def _on_cpu(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_available(x.device, weight_q.dtype)
    if x.shape[0] == 0:
        return x.new_empty((0, weight_q.shape[0]), dtype=out_dtype)
    return cpu_w8a8_linear(x, weight_q, weight_scale, bias, out_dtype)


@_on_cpu.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    check_available(x.device, weight_q.dtype)
    if x.shape[0] == 0:
        return x.new_empty((0, weight_q.shape[0]), dtype=out_dtype)
    return _gpu_module().gpu_w8a8_linear(x, weight_q, weight_scale, bias, out_dtype)


@_on_cpu.register_fake
def _shape(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight_q.shape[0]), dtype=out_dtype)


def _fusible(x: torch.Tensor, weight_q: torch.Tensor) -> bool:
    """Whether a compiler is looking that can fuse the arithmetic; an export keeps the operation."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    return EXACT and x.device.type == "cpu" and weight_q.dtype == torch.int8 and x.numel() > 0


def _gpu_module():
    """Import the Triton kernels, which no CPU needs.

    Raises: KernelUnavailable without Triton.
    """
    try:
        from sd35_kernels.w8a8 import gpu
    except ImportError as exc:
        raise KernelUnavailable(
            f"w8a8_linear on CUDA needs Triton: {exc}; pip install triton"
        ) from exc
    return gpu


def _check(
    x: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse what does not fit together, before a kernel reads past an end.

    Raises: ValueError.
    """
    if x.dim() < 1 or x.dtype not in OUT_DTYPES:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: must be fp32, bf16 or fp16 [..., K]")
    if weight_q.dim() != 2 or weight_q.dtype not in LIMITS or not weight_q.is_contiguous():
        raise ValueError(
            f"weight_q is {weight_q.dtype} {list(weight_q.shape)}: must be contiguous int8 or "
            "float8_e4m3fn [N, K], as quantize_weight returns it"
        )
    n, k = weight_q.shape
    if x.shape[-1] != k or k < 1 or n < 1 or k > MAX_K:
        raise ValueError(
            f"x {list(x.shape)} and weight_q {list(weight_q.shape)}: both need the same K, "
            f"from 1 to {MAX_K}"
        )
    if weight_scale.shape != (n,) or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}: "
            f"must be float32 [{n}]"
        )
    if bias is not None and (bias.shape != (n,) or not bias.is_floating_point()):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}: must be floating point [{n}]")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype={out_dtype}: must be fp32, bf16 or fp16")
    strays = {t.device for t in (weight_q, weight_scale, bias) if t is not None} - {x.device}
    if strays:
        raise ValueError(f"x is on {x.device}, its weights on {', '.join(map(str, strays))}")
