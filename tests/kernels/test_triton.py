"""Every Triton kernel without a GPU: its code for named chips, its values in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from tests.kernels import ahead

ROOT = Path(__file__).parents[2]
QUICK = [(launch, chip) for launch in ahead.launches(every=False) for chip in launch.chips()]
PRODUCTS = ("matmul", "gelu", "chunked")


def faults(launch: ahead.Launch, chip: int, found: dict[str, Any]) -> list[str]:
    """What is wrong with a kernel's code, in words."""
    wrong = []
    if found["stack"] or found["local"]:
        wrong.append(f"spills: {found['stack']} bytes of stack, {found['local']} local")
    if found["shared"] > ahead.SHARED[chip]:
        wrong.append(f"{found['shared']} bytes of shared memory, {ahead.SHARED[chip]} there are")
    if launch.name.startswith(PRODUCTS):
        if not found["pipeline"]:
            wrong.append("its loads wait: no cp.async, no TMA")
        if not any(found[kind] for kind in products(launch, chip)):
            wrong.append(f"no product of {products(launch, chip)}")
    elif not found["wide"]:
        wrong.append("no loads of 16 bytes")
    return wrong


def products(launch: ahead.Launch, chip: int) -> tuple[str, ...]:
    """The instructions that a product must have come to."""
    flat = launch.options["BLOCK_M"] < 64  # wgmma and tcgen05 multiply 64 rows and more
    if chip < 90 or flat:
        return ("mma",)
    return ("wgmma",) if chip == 90 else ("tcgen05", "mma")


@pytest.mark.parametrize(
    ("launch", "chip"), QUICK, ids=[f"{launch.name}-sm_{chip}" for launch, chip in QUICK]
)
def test_code_for_each_chip_is_what_was_meant(launch: ahead.Launch, chip: int) -> None:
    assert faults(launch, chip, ahead.examine(launch, chip)) == []


def test_a_matmul_that_lost_its_divisibility_is_seen() -> None:
    """The mutant: the same kernel told nothing of its arguments. It runs, and loads by the byte."""
    launch = next(launch for launch, _ in QUICK if launch.name == "matmul-int8-8192")
    for chip in launch.chips():
        found = ahead.examine(launch, chip, divisible=False)
        assert any("loads wait" in fault for fault in faults(launch, chip, found)), found


def test_real_arguments_are_seen_as_divisible() -> None:
    """What the binder makes of a launch: pointers and rows of 16, odd rows told apart."""
    launch = next(launch for launch, _ in QUICK if launch.name == "matmul-int8-8192")
    _, signature, _, attributes = ahead._specialise(launch, 90, True)
    numbers = {name: (number,) for number, name in enumerate(signature)}
    assert all(numbers[name] in attributes for name in ("x", "w", "out", "M", "N", "K"))
    odd = ahead.Launch("odd", launch.kernel, (*launch.args[:-1], 1535), launch.options)
    assert numbers["K"] not in {
        place for place, seen in ahead._specialise(odd, 90, True)[3].items() if seen
    }


def test_kept_results_are_compiled_anew() -> None:
    """One of them, the cheapest; the slow test has all."""
    launch = next(launch for launch, _ in QUICK if launch.name == "heads-alone")
    assert ahead.compile_for(launch, 90, True) == ahead.examine(launch, 90)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_tile_of_every_chip_compiles_as_kept() -> None:
    for launch, chip, divisible in ahead.everything():
        found = ahead.compile_for(launch, chip, divisible)
        assert found == ahead.examine(launch, chip, divisible=divisible), launch.name
        assert bool(faults(launch, chip, found)) != divisible, (launch.name, chip, found)


@pytest.fixture(scope="module", params=["few", pytest.param("every", marks=pytest.mark.slow)])
def interpreted(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the interpreter found for kernels and mutants; it takes 4 s to start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted", request.param]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_agree_and_their_mutants_fail_in_the_interpreter(
    interpreted: dict[str, Any],
) -> None:
    """One test, or two workers of the suite would interpret all: 10 s each."""
    products_agree(interpreted)
    mutant_of_the_product_fails(interpreted)
    fused_passes_agree_and_their_mutants_fail(interpreted)


def products_agree(interpreted: dict[str, Any]) -> None:
    for case in interpreted["cases"]:
        assert case["quantised"] <= 1, case
        assert case["as_torch"] >= (0.999 if "int8" in case["case"] else 0.85), case
        assert case["product"] <= 1, case
        assert case["composed"], case
    special = interpreted["special"]
    assert special["any_finite"] == [True, False, False, True]
    assert special["all_finite"] == [True, False, False, True]
    assert special["zero_row"]


def mutant_of_the_product_fails(interpreted: dict[str, Any]) -> None:
    """The mutant: scales of the weights that are 2 % too large."""
    assert min(case["mutant"] for case in interpreted["cases"]) > 1


def fused_passes_agree_and_their_mutants_fail(interpreted: dict[str, Any]) -> None:
    for case in interpreted["fused"]:
        assert case["error"] <= 1, case
        # 8-bit floats: one value in eight is halved by the interpreter, and bounds are as wide.
        lowest = 0.9 if "fp8" in case["case"] or "float8" in case["case"] else 1
        assert min(case["mutants"].values(), default=2) > lowest, case
        assert case.get("same", 1) >= (0.85 if "float8" in case["case"] else 0.99), case
