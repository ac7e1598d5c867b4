import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from sd35_kernels import (
    KernelUnavailable,
    W8A8Linear,
    check_available,
    quantize_rows,
    quantize_weight,
    reference_w8a8_linear,
    w8a8_linear,
)
from sd35_kernels.w8a8 import op
from sd35_kernels.w8a8.cpu import EXACT
from tests.kernels.cases import EPS, make_case, scaled, tolerance

SHAPES = [(1, 64, 32), (7, 13, 5), (333, 50, 31), (2, 1, 1), (154, 136, 97), (257, 1030, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not EXACT, reason="this CPU's int8 products saturate: no VNNI")


def error(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Largest error of `got` in units of the tolerance; the exact product by another way."""
    weight_q, scale = quantize_weight(weight)
    rows = x.reshape(-1, x.shape[-1])
    expected = scaled(*quantize_rows(rows), weight_q, scale, bias)
    magnitudes = rows.float().abs() @ weight.abs().t()
    # Half a unit: rounding to nearest.
    allowed = tolerance(expected, EPS[got.dtype] / 2 * 1.001, x.shape[-1], magnitudes)
    return ((got.reshape(expected.shape).double() - expected).abs() / allowed).max().item()


@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype"),
    [
        *((shape, dtype, dtype) for shape in SHAPES for dtype in DTYPES),
        *((SHAPES[1], a, b) for a in DTYPES for b in DTYPES if a != b),
    ],
    ids=str,
)
def test_result_is_the_exact_products_but_for_rounding(
    shape: tuple[int, int, int], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    x, weight, bias = make_case(*shape, dtype)
    weight_q, scale = quantize_weight(weight)
    got = w8a8_linear(x, weight_q, scale, bias, out_dtype)
    assert got.dtype == out_dtype
    assert got.shape == (shape[0], shape[2])
    assert error(got, x, weight, bias) <= 1
    assert error(reference_w8a8_linear(x, weight_q, scale, bias, out_dtype), x, weight, bias) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mutants_fail(dtype: torch.dtype) -> None:
    x, weight, bias = make_case(64, 96, 96, dtype)
    weight_q, scale = quantize_weight(weight)
    mutants = {
        "none": w8a8_linear(x, weight_q, scale, bias),
        "scale off by 2 %": w8a8_linear(x, weight_q, scale * 1.02, bias),
        "transposed weight": w8a8_linear(x, weight_q.t().contiguous(), scale, bias),
        "no bias": w8a8_linear(x, weight_q, scale),
        "scales of other channels": w8a8_linear(x, weight_q, scale.roll(1), bias),
        "one scale for all rows": w8a8_linear(x / 2, weight_q, scale * 2, bias * 1.01),
    }
    errors = {name: error(got, x, weight, bias) for name, got in mutants.items()}
    assert errors.pop("none") <= 1
    assert min(errors.values()) > 1, errors


def test_quantised_layer_is_close_to_the_float_one() -> None:
    x, weight, bias = make_case(200, 512, 300)
    exact = x @ weight.t() + bias
    got = w8a8_linear(x, *quantize_weight(weight), bias)
    # Steps of about 4 sigma / 127 on each side: 0.9 % of a sigma each.
    assert ((got - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("length", [64, 16384])
def test_sums_of_extreme_values_are_exact(length: int) -> None:
    # Without VNNI, u8·s8 instructions saturate at int16 on such values.
    signs = torch.ones(16, length)
    signs[1::2] = -1
    weight_q = torch.full((8, length), 127, dtype=torch.int8)
    weight_q[4:] = -127
    got = w8a8_linear(signs * 3.0, weight_q, torch.ones(8))
    expected = signs[:, :1] * 3.0 * 127 * length * torch.tensor([1.0] * 4 + [-1.0] * 4)
    torch.testing.assert_close(got, expected, rtol=4 * EPS[torch.float32], atol=0)


def test_zero_rows_give_the_bias_and_zero_channels_nothing() -> None:
    x, weight, bias = make_case(5, 24, 7)
    x[2], weight[3] = 0, 0
    got = w8a8_linear(x, *quantize_weight(weight), bias)
    assert torch.equal(got[2], bias)
    assert torch.equal(got[:, 3], bias[3].expand(5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rows", [4, 4096])
def test_what_is_not_finite_stays_so_and_in_its_row(value: float, rows: int) -> None:
    x, weight, bias = make_case(rows, 40, 9)
    x[1, 17] = value
    for function in (w8a8_linear, reference_w8a8_linear):
        got = function(x, *quantize_weight(weight), bias)
        assert not torch.isfinite(got[1]).any()
        assert torch.isfinite(got[[0, *range(2, rows)]]).all()


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30])
def test_tiny_and_huge_rows_keep_their_sign_and_size(size: float) -> None:
    x, weight, _ = make_case(6, 32, 4)
    got = w8a8_linear(x * size, *quantize_weight(weight))
    exact = (x.double() * size) @ weight.double().t()
    # Below TINY a row is rounded to zero: absolutely still right.
    assert (got.double() - exact).abs().max() <= 0.05 * max(size, 1e-30) * 32**0.5 * 4


def test_strides_and_leading_dimensions_do_not_matter() -> None:
    x, weight, bias = make_case(24, 64, 10)
    q = quantize_weight(weight)
    whole = w8a8_linear(x, *q, bias)
    wide = torch.zeros(24, 128)
    wide[:, ::2] = x
    assert torch.equal(w8a8_linear(wide[:, ::2], *q, bias), whole)
    assert torch.equal(w8a8_linear(x.t().contiguous().t(), *q, bias), whole)
    assert torch.equal(w8a8_linear(x.reshape(2, 3, 4, 64), *q, bias), whole.reshape(2, 3, 4, 10))
    assert torch.equal(w8a8_linear(x[0], *q, bias), whole[0])
    assert w8a8_linear(x[:0], *q, bias).shape == (0, 10)


def test_blocks_do_not_change_the_result() -> None:
    x, weight, bias = make_case(700, 300, 257)  # several blocks on both sides
    got = w8a8_linear(x, *quantize_weight(weight), bias)
    assert error(got, x, weight, bias) <= 1
    assert torch.equal(got[650:], w8a8_linear(x[650:], *quantize_weight(weight), bias))


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.zeros(3, 8)},
        {"x": torch.zeros(3, 16, dtype=torch.float64)},
        {"weight_q": torch.zeros(4, 16)},
        {"weight_q": torch.zeros(16, 4, dtype=torch.int8).t()},
        {"weight_scale": torch.ones(3)},
        {"weight_scale": torch.ones(4, dtype=torch.bfloat16)},
        {"bias": torch.ones(1, 4)},
        {"bias": torch.ones(4, dtype=torch.int32)},
        {"out_dtype": torch.int32},
    ],
    ids=lambda c: "-".join(f"{k}" for k in c),
)
def test_wrong_input_is_refused(changes: dict[str, Any]) -> None:
    given = {
        "x": torch.zeros(3, 16),
        "weight_q": torch.zeros(4, 16, dtype=torch.int8),
        "weight_scale": torch.ones(4),
        "bias": None,
    }
    w8a8_linear(**given)
    with pytest.raises(ValueError, match=next(iter(changes)).split("_q")[0]):
        w8a8_linear(**{**given, **changes})


def test_weights_that_cannot_be_quantised_are_refused() -> None:
    for weight in (torch.full((2, 2), float("nan")), torch.zeros(2), torch.zeros(1, 132_105)):
        with pytest.raises(ValueError, match="weight"):
            quantize_weight(weight)


def test_no_kernel_means_refusal_not_fallback() -> None:
    x, weight, bias = make_case(4, 16, 8)
    fp8 = quantize_weight(weight, torch.float8_e4m3fn)
    with pytest.raises(KernelUnavailable, match="int8"):
        w8a8_linear(x, *fp8, bias)
    with pytest.raises(KernelUnavailable, match="int8"):
        W8A8Linear.from_linear(torch.nn.Linear(4, 4), torch.float8_e4m3fn)
    with pytest.raises(KernelUnavailable, match="xpu"):
        check_available(torch.device("xpu"))
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="no CUDA"):
            check_available(torch.device("cuda"))
    assert "_int_mm" in check_available(torch.device("cpu"))


def test_operation_is_registered_soundly() -> None:
    x, weight, bias = make_case(5, 16, 8)
    weight_q, scale = quantize_weight(weight)
    operation = torch.ops.sd35.w8a8_linear.default
    for arguments in (
        (x, weight_q, scale, bias, torch.float32),
        (x, weight_q, scale, None, torch.bfloat16),
    ):
        torch.library.opcheck(operation, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiler_sees_no_break_and_the_same_result(dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = W8A8Linear.from_linear(torch.nn.Linear(48, 40))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9):
        x = torch.randn(2, rows, 48)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)


def test_export_keeps_the_operation() -> None:
    layer = W8A8Linear.from_linear(torch.nn.Linear(48, 40))
    program = torch.export.export(layer, (torch.randn(6, 48),))
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.sd35.w8a8_linear.default in called


@pytest.mark.slow
def test_inductor_gives_the_same_result() -> None:
    torch._dynamo.reset()
    layer = W8A8Linear.from_linear(torch.nn.Linear(96, 80))
    x = torch.randn(3, 50, 96)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_layer_survives_casts_and_its_own_state() -> None:
    linear = torch.nn.Linear(32, 24)
    layer = W8A8Linear.from_linear(linear)
    x = torch.randn(5, 32)
    before = layer(x)
    again = W8A8Linear.from_linear(torch.nn.Linear(32, 24))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), before)
    half = layer.to(torch.bfloat16)
    assert half.weight_q.dtype == torch.int8
    assert half.weight_scale.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert list(half.parameters()) == []


def test_cpu_whose_products_are_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "EXACT", False)
    with pytest.raises(KernelUnavailable, match="VNNI"):
        check_available(torch.device("cpu"))


@pytest.mark.slow  # a process that loads torch: 7 s of CPU
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_cpu_without_vnni_is_refused_or_exact(isa: str) -> None:
    code = (
        "import torch, sd35_kernels as k\n"
        "layer = k.W8A8Linear.from_linear(torch.nn.Linear(64, 32))\n"
        "x = torch.randn(8, 64)\n"
        "r = k.reference_w8a8_linear(x, layer.weight_q, layer.weight_scale, layer.bias)\n"
        "torch.testing.assert_close(layer(x), r)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0 or "KernelUnavailable" in done.stderr, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1024, 1536, 6144)], ids=str)
def test_gpu_agrees_with_the_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    try:
        check_available(torch.device("cuda"), weight_dtype)
    except KernelUnavailable as exc:
        pytest.skip(str(exc))
    x, weight, bias = (t.cuda() for t in make_case(*shape, dtype))
    weight_q, scale = quantize_weight(weight, weight_dtype)
    got = w8a8_linear(x, weight_q, scale, bias)
    expected = reference_w8a8_linear(x, weight_q, scale, bias, torch.float32).double()
    magnitudes = x.float().abs() @ weight.abs().t()
    allowed = tolerance(expected, EPS[dtype], shape[1], magnitudes)
    # A value on a rounding's edge may fall on the other side: one int8 step of one product.
    edge = magnitudes.max() / shape[1] * 2.0**-6
    assert ((got.double() - expected).abs() <= allowed + edge).all()
