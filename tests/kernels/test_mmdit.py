"""The CPU executor against its reference in float64, and that a fault of any part would be seen."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sd35_kernels import reference
from sd35_kernels.cpu import build
from sd35_kernels.mmdit import Executor, KernelUnavailable, Stored, load

TINY = {
    "layers": 3,
    "heads": 2,
    "head_dim": 16,
    "width": 32,
    "dual": (0,),
    "patch": 2,
    "in_channels": 16,
    "out_channels": 16,
    "qk_norm": True,
    "eps": 1e-6,
}
NANO = TINY | {"heads": 6, "head_dim": 32, "width": 192, "patch": 1, "dual": (0, 1)}
WIDE = TINY | {"layers": 2, "heads": 4, "head_dim": 64, "width": 256}
TRUE = TINY | {"layers": 2, "heads": 24, "head_dim": 64, "width": 1536}
TOLERANCE = {"exact": 2e-6, "int8": 0.05}
"""Relative to the largest value. Float32: 16 roundings of 2^-23; PyTorch's own comes to 3e-7.
Int8: two roundings of 0.7 % a product, through three layers."""

CASES = [
    pytest.param(TINY, 1, (6, 10), 7, id="tiny-odd"),
    pytest.param(TINY, 3, (2, 2), 1, id="one-token-each"),
    pytest.param(TINY | {"qk_norm": False}, 2, (8, 8), 24, id="no-qk-norm"),
    pytest.param(NANO, 2, (8, 8), 24, id="nano"),
    pytest.param(NANO, 1, (6, 11), 16, id="nano-wide-image"),
    pytest.param(WIDE, 1, (44, 26), 33, id="heads-of-64-and-319-tokens"),
]


def level_or_skip() -> str:
    try:
        return build.pick_level()
    except KernelUnavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(params=sorted(TOLERANCE))
def tier(request: pytest.FixtureRequest) -> str:
    if request.param == "int8" and level_or_skip() in ("avx2", "avx512"):
        pytest.skip("no VNNI")
    return request.param


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("config", "batch", "size", "text"), CASES)
def test_step_equals_float64_reference(config, batch, size, text, tier):
    level_or_skip()
    weights = reference.random_weights(config)
    inputs = reference.random_inputs(config, batch, size, text)
    expected = reference.velocity(config, wide(weights), **wide(inputs))
    step = load(config, weights, tier, threads=2).step(**inputs)
    assert not weights, "packed weights are dropped one by one"
    assert error(step, expected) < TOLERANCE[tier]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1024, 4096], ids=["512px", "1024px"])
def test_step_at_true_width_equals_reference(tokens, tier):
    level_or_skip()
    side = 2 * round(tokens**0.5)
    weights = reference.random_weights(TRUE)
    inputs = reference.random_inputs(TRUE, 1, (side, side), 154 if tokens == 1024 else 333)
    expected = reference.velocity(TRUE, weights, **inputs)
    step = load(TRUE, weights, tier, threads=2).step(**inputs)
    assert error(step, expected) < TOLERANCE[tier]


@pytest.mark.parametrize("skip", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_skipped_layers_are_left_out(skip):
    level_or_skip()
    weights = reference.random_weights(TINY)
    inputs = reference.random_inputs(TINY, 2, (4, 6), 5)
    expected = reference.velocity(TINY, wide(weights), **wide(inputs), skip=skip)
    step = load(TINY, weights, "exact", threads=1).step(**inputs, skip=skip)
    assert error(step, expected) < TOLERANCE["exact"]


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_any_number_of_threads_gives_the_same_bits(threads, tier):
    level_or_skip()
    inputs = reference.random_inputs(TINY, 2, (6, 6), 9)
    executor = load(TINY, reference.random_weights(TINY), tier, threads=1)
    assert torch.equal(executor.step(**inputs, threads=threads), executor.step(**inputs))


def test_batch_rows_do_not_depend_on_each_other(tier):
    level_or_skip()
    executor = load(NANO, reference.random_weights(NANO), tier, threads=2)
    inputs = reference.random_inputs(NANO, 3, (6, 6), 9)
    both = executor.step(**inputs)
    for row in range(3):
        alone = {
            name: tensor if name == "position" else tensor[row : row + 1].contiguous()
            for name, tensor in inputs.items()
        }
        assert error(executor.step(**alone), both[row : row + 1]) < 1e-5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", ["latents", "context", "modulation"])
def test_a_fault_ends_and_is_seen_and_stays_in_its_image(name, value, tier):
    level_or_skip()
    executor = load(TINY, reference.random_weights(TINY), tier, threads=2)
    inputs = reference.random_inputs(TINY, 2, (4, 4), 5)
    clean = executor.step(**inputs)
    inputs[name][1].view(-1)[3] = value
    out = executor.step(**inputs)
    assert not torch.isfinite(out[1]).all()
    assert torch.equal(out[0], clean[0])


def test_outlier_channels_cost_int8_little():
    """One channel 30 times the others: scales are per row, so the others lose 5 of their 7 bits."""
    if level_or_skip() in ("avx2", "avx512"):
        pytest.skip("no VNNI")
    weights = reference.random_weights(WIDE)
    inputs = reference.random_inputs(WIDE, 1, (8, 8), 9)
    inputs["modulation"][:, WIDE["width"] + 5] = 30.0  # image's scale, block 0
    expected = reference.velocity(WIDE, weights, **inputs)
    step = load(WIDE, weights, "int8", threads=2).step(**inputs)
    assert error(step, expected) < 3 * TOLERANCE["int8"]


def drop(name: str):
    def mutant(weights, inputs):
        weights[name] = torch.ones_like(weights[name]) if "norm" in name else weights[name] * 0

    return mutant


def swap_streams(weights, inputs):
    weights["blocks.0.image.qkv.weight"] = weights["blocks.0.text.qkv.weight"]


def move_position(weights, inputs):
    inputs["position"] = inputs["position"].roll(1, 0)


def shift_modulation(weights, inputs):
    inputs["modulation"] = inputs["modulation"].roll(1, 1)


MUTANTS = {
    "no-q-norm": drop("blocks.0.image.q_norm"),
    "no-text-k-norm": drop("blocks.2.text.k_norm"),
    "no-dual": drop("blocks.0.dual.out.weight"),
    "no-bias": drop("blocks.1.text.down.bias"),
    "no-final-bias": drop("final.bias"),
    "swapped-streams": swap_streams,
    "moved-position": move_position,
    "shifted-modulation": shift_modulation,
}


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_the_tolerance_sees_a_fault_in_any_part(mutant):
    """The mutant is in the reference's inputs: an executor that ignored that part would pass it."""
    level_or_skip()
    weights, inputs = reference.random_weights(TINY), reference.random_inputs(TINY, 1, (4, 6), 5)
    step = load(TINY, dict(weights), "exact", threads=1).step(**inputs)
    mutant(weights, inputs)
    wrong = reference.velocity(TINY, wide(weights), **wide(inputs))
    assert error(step, wrong) > 100 * TOLERANCE["exact"]


def test_exact_gelu_is_the_tanh_form(monkeypatch):
    level_or_skip()
    weights, inputs = reference.random_weights(TINY), reference.random_inputs(TINY, 1, (4, 6), 5)
    step = load(TINY, dict(weights), "exact", threads=1).step(**inputs)
    tanh = torch.nn.functional.gelu
    monkeypatch.setattr(reference.F, "gelu", lambda x, approximate: tanh(x))
    wrong = reference.velocity(TINY, wide(weights), **wide(inputs))
    assert error(step, wrong) > TOLERANCE["exact"]


@pytest.mark.parametrize(
    ("config", "tier", "words"),
    [
        pytest.param(
            TINY | {"width": 40, "heads": 2, "head_dim": 20}, "exact", "width", id="width"
        ),
        pytest.param(TINY, "fp8", "tier", id="tier"),
        pytest.param(TINY | {"out_channels": 3}, "exact", "patch", id="patch"),
    ],
)
def test_what_it_cannot_do_is_refused(config, tier, words):
    level_or_skip()
    with pytest.raises(KernelUnavailable, match=words):
        load(config, {}, tier, threads=1)


def test_inputs_that_do_not_fit_are_refused():
    level_or_skip()
    executor = load(TINY, reference.random_weights(TINY), "exact", threads=1)
    inputs = reference.random_inputs(TINY, 1, (4, 6), 5)
    for name, tensor in inputs.items():
        with pytest.raises(ValueError, match=name):
            executor.step(**inputs | {name: tensor.double()})
        with pytest.raises(ValueError, match=name):
            executor.step(**inputs | {name: tensor[..., ::2]})
    with pytest.raises(ValueError, match="skip"):
        executor.step(**inputs, skip=(3,))


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ({"avx2", "fma", "bmi2", "f16c"}, "avx2"),
        ({*build.LEVELS["avx512"][0], "avx2", "fma", "bmi2", "f16c"}, "avx512"),
        ({"avx512_vnni"}, "avx512_vnni"),
        ({"avx512_vnni", "avx512_bf16"}, "avx512_bf16"),
        ({"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}, "amx"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_best_level_of_a_cpu_is_picked(flags, level, monkeypatch):
    monkeypatch.delenv("SD35_KERNELS_ISA", raising=False)
    assert build.pick_level(frozenset(flags)) == level


def test_a_cpu_without_avx2_and_a_level_it_lacks_are_refused(monkeypatch):
    with pytest.raises(KernelUnavailable, match="AVX2"):
        build.pick_level(frozenset({"sse2"}))
    monkeypatch.setenv("SD35_KERNELS_ISA", "amx")
    with pytest.raises(KernelUnavailable, match="this CPU has avx2"):
        build.pick_level(build.LEVELS["avx2"][0])


def test_a_missing_compiler_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("SD35_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build._compiler.cache_clear()
    with pytest.raises(KernelUnavailable, match="no-such-compiler"):
        build.library.__wrapped__("avx2")
    build._compiler.cache_clear()


def test_avx2_runs_the_exact_tier_and_refuses_int8(monkeypatch):
    level_or_skip()
    monkeypatch.setenv("SD35_KERNELS_ISA", "avx2")
    weights, inputs = reference.random_weights(NANO), reference.random_inputs(NANO, 2, (6, 6), 9)
    expected = reference.velocity(NANO, weights, **inputs)
    executor = load(NANO, dict(weights), "exact", threads=2)
    assert executor.facts["isa"] == "avx2"
    assert error(executor.step(**inputs), expected) < 2e-6
    with pytest.raises(KernelUnavailable, match="VNNI"):
        load(NANO, weights, "int8", threads=1)


def test_amx_tiles_give_what_vnni_gives(monkeypatch):
    """Packing, ends of rows and epilogues of the tiles, on any VNNI CPU.

    Integer sums are the same; a fused multiply-add more or less flips a rounding to 8 bits here and
    there: 2e-3, against 1e-2 of the tier. A row or channel out of place comes to about 1.
    """
    if level_or_skip() in ("avx2", "avx512"):
        pytest.skip("no VNNI")
    small = NANO | {"layers": 2, "dual": (0,)}
    inputs = reference.random_inputs(small, 1, (5, 7), 3)
    outs = []
    for level in ("amx_emulated", "avx512_vnni"):
        monkeypatch.setenv("SD35_KERNELS_ISA", level)
        executor = load(small, reference.random_weights(small), "int8", threads=2)
        assert executor.facts["isa"] == level
        outs.append(executor.step(**inputs).clone())
    assert error(outs[0], outs[1]) < 2e-3


@pytest.mark.parametrize("level", ["bf16_emulated", "amx_emulated"])
def test_bf16_rounds_both_operands_and_nothing_else(level, monkeypatch):
    """Both loops of bf16, on any VNNI CPU: instructions taken apart, and tiles in plain C++.

    Held against float64 on the same rounded weights: what is left is the rounding of activations,
    2^-9 a value, which a product of 192 averages. The mutant is bf16 without rounding to nearest:
    weights cut off where they are not.
    """
    if level_or_skip() in ("avx2", "avx512"):
        pytest.skip("no VNNI")
    monkeypatch.setenv("SD35_KERNELS_ISA", level)
    small = NANO | {"layers": 2, "dual": (0,)}
    inputs = reference.random_inputs(small, 1, (5, 7), 3)
    exact = reference.random_weights(small)
    blocks = [n for n in exact if n.startswith("blocks.") and n.endswith(".weight")]
    rounded = exact | {name: exact[name].bfloat16().float() for name in blocks}
    cut = exact | {n: (exact[n].view(torch.int32) & -65536).view(torch.float32) for n in blocks}
    executor = load(small, dict(exact), "bf16", threads=2)
    assert (executor.facts["isa"], executor.facts["tier"]) == (level, "bf16")
    step = executor.step(**inputs)
    expected, wrong = (
        reference.velocity(small, wide(each), **wide(inputs)) for each in (rounded, cut)
    )
    assert error(step, expected) < 4e-3
    assert error(step, wrong) > error(step, expected) * 2


def test_bf16_is_refused_where_it_would_be_slow(monkeypatch):
    """On Intel's cores without tiles bf16 is half as fast as float32."""
    level_or_skip()
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx512_vnni"}))
    monkeypatch.delenv("SD35_KERNELS_ISA", raising=False)
    with pytest.raises(KernelUnavailable, match="AVX-512 BF16"):
        load(TINY, {}, "bf16", threads=1)


def test_stored_weights_give_the_same_bits_and_a_short_file_is_seen(tier, tmp_path):
    level_or_skip()
    inputs = reference.random_inputs(TINY, 2, (4, 6), 5)
    executor = load(TINY, reference.random_weights(TINY), tier, threads=1)
    executor.store(tmp_path / "packed")
    again = load(TINY, Stored(tmp_path / "packed"), tier, threads=1)
    assert torch.equal(again.step(**inputs), executor.step(**inputs))
    assert again.facts == executor.facts
    whole = (tmp_path / "packed").read_bytes()
    (tmp_path / "packed").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="ends before"):
        load(TINY, Stored(tmp_path / "packed"), tier, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("level", [*build.LEVELS, *build.BY_NAME])
def test_every_level_compiles_on_any_machine(level, monkeypatch, tmp_path):
    level_or_skip()
    build._compile(tmp_path / "library.so", level, build.SOURCES / "api.cpp")
    assert (tmp_path / "library.so").exists()


def test_threads_are_torchs_own():
    """One OpenMP runtime in the process: the library found the one that torch had loaded."""
    level_or_skip()
    load(TINY, reference.random_weights(TINY), "exact", threads=2)
    with open("/proc/self/maps", encoding="ascii") as maps:
        found = {line.split()[-1] for line in maps if "libgomp" in line}
    # Two packages bring runtimes of their own, which are there where another test used them.
    ours = {path for path in found if not re.search("sentencepiece|flip_evaluator", path)}
    assert len(ours) == 1, found


def test_steps_from_two_threads_do_not_mix():
    level_or_skip()
    executor = load(TINY, reference.random_weights(TINY), "exact", threads=1)
    inputs = [reference.random_inputs(TINY, 1, (6, 6), 9, seed=seed) for seed in range(4)]
    alone = [executor.step(**each) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: _twice(executor, each), inputs))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def _twice(executor: Executor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    executor.step(**inputs)
    return executor.step(**inputs)


def test_queries_of_nothing_weigh_all_keys_alike(tier):
    """All scores are 0 then, and those beyond the last key count for nothing all the same."""
    level_or_skip()
    weights, inputs = reference.random_weights(TINY), reference.random_inputs(TINY, 1, (6, 10), 7)
    for stream in ("image", "text", "dual"):
        weights[f"blocks.0.{stream}.q_norm"] *= 0
    expected = reference.velocity(TINY, wide(weights), **wide(inputs))
    step = load(TINY, weights, tier, threads=1).step(**inputs)
    assert error(step, expected) < TOLERANCE[tier]
