"""Speed columns of `show` on planted figures: every one has a known right answer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sd35bench.analysis.speed import TOLERANCE, LoneImage, log_ratio
from sd35bench.analysis.summary import show_document
from sd35bench.machine.measure import RATE_FIELDS
from sd35bench.types import BackendSpec, Flops, GpuState, Status, Timings
from tests.studies.memory import LOAD, MemoryStudy, record, session

FLOPS = Flops(text=0.5e12, denoise=3e12, decode=0.5e12)
FAST = replace(LOAD, backend=BackendSpec(name="compile", kind="compile"))


def took(seconds: float) -> Timings:
    return Timings(generate_s=seconds, encode_s=0.0)


def machine(device: str = "cpu", *, cpu: str | None = None, **rates: float) -> dict[str, Any]:
    """One measurement on the machine of `synthetic.session`, whose environment names nothing."""
    where = dict.fromkeys(RATE_FIELDS) | {"cpu_model": cpu}
    return {
        "key": f"{device}-{cpu}-{rates}",
        "device": device,
        "threads": 2,
        "environment": where,
        "measured_at": "2026-01-01T00:00:00",
        "rates": {
            name: {"best": best, "median": best * 0.9, "n": 5, "unit": "TFLOP/s"}
            for name, best in rates.items()
        },
    }


def lone_images(tmp_path, seconds: float, in_force: dict | None = None, **fields) -> MemoryStudy:
    life = session() if in_force is None else replace(session(), in_force=in_force)
    study = MemoryStudy(tmp_path, lives={"s": life})
    for p in range(4):
        study.add(record(p, timings=took(seconds), flops=FLOPS, **fields))
    return study.touch_images()


def only_row(study: MemoryStudy) -> dict[str, Any]:
    (row,) = show_document(study)["settings"]
    return row


def test_achieved_rate_is_operations_over_time_and_the_fraction_is_of_its_dtypes_limit(tmp_path):
    study = lone_images(tmp_path, 10.0)
    study.machines = [machine(fp32=2.0, bf16=8.0, copy=20.0)]
    row = only_row(study)
    assert row["flops"] == {
        "text": 0.5e12,
        "encode": 0.0,
        "denoise": 3e12,
        "decode": 0.5e12,
        "total": 4e12,
    }
    assert row["achieved_tflops"] == pytest.approx(0.4)
    assert (row["limit_tflops"], row["limit_precision"]) == (2.0, "fp32")
    assert row["limit_fraction"] == pytest.approx(0.2)
    assert row["warnings"] == []


@pytest.mark.parametrize(
    ("in_force", "limit"),
    [
        ({"dtype": "bf16", "device": "cpu"}, 8.0),
        ({"dtype": "bf16", "device": "cpu", "quantised": {"layers": 3}}, 16.0),
        ({"dtype": "fp32", "quantised": {}}, 2.0),
        ({"dtype": "fp32", "quantised": {"layers": 3, "activations": "none"}}, 2.0),
        ({"dtype": "fp32", "quantised": {"layers": 3, "activations": "int8, per row"}}, 16.0),
        ({"dtype": "fp32", "core": {"tier": "exact"}}, 2.0),
        ({"dtype": "fp32", "core": {"tier": "int8"}}, 16.0),
        ({"dtype": "bf16", "core": {"tier": "bf16"}}, 8.0),
        ({"dtype": "bf16", "device": "cuda:0"}, 700.0),
        ({"dtype": "bf16", "providers": ["CUDAExecutionProvider"]}, 700.0),
        ({"dtype": "fp32", "device": "cuda:0", "providers": ["CPUExecutionProvider"]}, 2.0),
        ({"dtype": "fp32", "inference_precision": "bf16", "providers": ["CPU"]}, 8.0),
        ({"dtype": "fp32", "inference_precision": "f32", "providers": ["CPU"]}, 2.0),
        ({"dtype": "fp8"}, None),
        ({}, None),
    ],
    ids=[
        "bf16",
        "quantised",
        "nothing-quantised",
        "int8-weights-alone",
        "int8-products",
        "core",
        "core-int8",
        "core-bf16",
        "cuda",
        "onnx-cuda",
        "onnx-cpu",
        "openvino-bf16",
        "openvino-fp32",
        "unknown",
        "silent",
    ],
)
def test_limit_is_that_of_the_precision_and_the_device_in_force(tmp_path, in_force, limit):
    study = lone_images(tmp_path, 10.0, in_force)
    study.machines = [machine(fp32=2.0, bf16=8.0, int8=16.0), machine("cuda", bf16=700.0)]
    assert only_row(study)["limit_tflops"] == limit


def test_another_machines_limit_is_not_used(tmp_path):
    study = lone_images(tmp_path, 10.0)
    study.machines = [machine(cpu="another", fp32=2.0)]
    row = only_row(study)
    assert (row["limit_tflops"], row["limit_fraction"]) == (None, None)
    assert row["achieved_tflops"] is not None


def test_unknown_operations_are_null_never_zero(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0))
    row = only_row(study.touch_images())
    for name in ("flops", "achieved_tflops", "limit_tflops", "limit_fraction", "gpu", "speedup"):
        assert row[name] is None
    assert (row["cold_compile_s"], row["warm_compile_s"], row["start_spread"]) == (None,) * 3
    assert show_document(study)["machine"] == []


# 4 TFLOP at 2 TFLOP/s cannot take less than 2 s.
@pytest.mark.parametrize(
    ("seconds", "impossible"),
    [(2.0, False), (2.0 / TOLERANCE * 1.01, False), (2.0 / TOLERANCE * 0.99, True)],
)
def test_a_latency_that_the_arithmetic_cannot_allow_is_called_impossible(
    tmp_path, seconds, impossible
):
    study = lone_images(tmp_path, seconds)
    study.machines = [machine(fp32=2.0, bf16=8.0)]
    assert any(w.startswith("impossible") for w in only_row(study)["warnings"]) is impossible


def test_a_slow_bf16_unit_makes_nobody_impossible_who_ran_parts_in_fp32(tmp_path):
    study = lone_images(tmp_path, 3.0, {"dtype": "bf16"})
    study.machines = [machine(fp32=2.0, bf16=0.5)]
    row = only_row(study)
    assert row["limit_fraction"] > TOLERANCE
    assert row["warnings"] == []


def batches(study: MemoryStudy, size: int, seconds: list[float], filled: int | None = None):
    """Batches of `size`, each on prompts of its own; `filled` is how many images ran in each."""
    for number, spent in enumerate(seconds):
        for i in range(size if filled is None else filled):
            study.add(
                record(
                    number * size + i,
                    batch_size=size,
                    batch_actual=size if filled is None else filled,
                    timings=took(spent),
                    started_at=f"2026-01-01T00:00:{number:02d}",
                )
            )


def test_throughput_counts_each_whole_batch_once(tmp_path):
    study = MemoryStudy(tmp_path)
    for p in range(6):
        study.add(record(p, timings=took(1.0)))
    batches(study, 4, [2.0, 2.0, 2.5, 1.9])
    batches(study, 8, [16.0], filled=3)
    found = only_row(study.touch_images())["throughput"]
    assert [(t["batch_size"], t["n"]) for t in found] == [(1, 6), (4, 4)]
    assert found[0]["images_per_s"] == pytest.approx(1.0)
    assert found[1]["images_per_s"] == pytest.approx(2.0)
    low, high = found[1]["ci95"]
    assert low < 4 / 2.5 < 4 / 1.9 < high  # four batches: the range of what was seen is too narrow


def test_throughput_of_one_batch_has_no_interval(tmp_path):
    study = MemoryStudy(tmp_path)
    batches(study, 2, [0.5])
    (found,) = only_row(study.touch_images())["throughput"]
    assert found == {"batch_size": 2, "images_per_s": pytest.approx(4.0), "ci95": None, "n": 1}


def test_compile_times_of_cold_and_warm_starts_are_kept_apart(tmp_path):
    def life(name: str, cache: str, seconds: float | None) -> Any:
        compiled = {"compile": {"cache": cache, "compile_s": seconds}}
        first_s = 0.5 if seconds is None else seconds + 0.5
        return replace(session(name, load=FAST), in_force=compiled, first_call_s=first_s)

    lives = {
        "a": life("a", "cold", 40.0),
        "b": life("b", "warm", 3.0),
        "c": life("c", "warm", 5.0),
        "d": life("d", "mixed", 20.0),
        "e": life("e", "off", None),
        "f": replace(life("f", "cold", 999.0), load=LOAD),
        "g": replace(life("g", "cold", 999.0), environment_id="0" * 64),
    }
    study = MemoryStudy(tmp_path, lives=lives)
    study.add(record(0, load=FAST, session_id="b"))
    row = only_row(study.touch_images())
    assert (row["cold_compile_s"], row["warm_compile_s"]) == (40.0, 4.0)
    assert (row["cold_first_call_s"], row["warm_first_call_s"]) == (40.5, 4.5)


def test_spread_between_starts_is_the_slowest_median_over_the_fastest(tmp_path):
    study = MemoryStudy(tmp_path, lives={n: session(n) for n in "stu"})
    for p in range(3):
        study.add(record(p, timings=took((1.0, 1.1, 9.0)[p])))
        study.add(record(p + 3, session_id="t", timings=took(1.32)))
    study.add(record(9, session_id="u", timings=took(50.0)))  # one image says nothing of a start
    row = only_row(study.touch_images())
    assert row["start_spread"] == pytest.approx(1.2)
    assert row["starts"] == 3


def test_one_start_has_no_spread(tmp_path):
    assert only_row(lone_images(tmp_path, 1.0))["start_spread"] is None


def test_speedup_is_paired_with_eager_fp32_on_the_same_prompts(tmp_path):
    slow = replace(LOAD, backend=replace(LOAD.backend, name="e16", options={"dtype": "bf16"}))
    one_thread = replace(FAST, threads=1)
    study = MemoryStudy(tmp_path)
    for p in range(8):
        difficulty = 1.0 + p  # prompts differ far more than backends: only pairs can tell
        study.add(record(p, timings=took(2.0 * difficulty)))
        study.add(record(p, load=FAST, timings=took((0.9 + 0.2 * (p % 2)) * difficulty)))
        study.add(record(p, load=slow, timings=took(4.0 * difficulty)))
        study.add(record(p, load=one_thread, timings=took(1.0)))
    rows = show_document(study.touch_images())["settings"]
    by_backend = {(r["backend"], r["threads"]): r for r in rows}
    reference = by_backend["eager", 2]
    assert reference["speedup"] is None
    fast = by_backend["compile", 2]["speedup"]
    assert fast["value"] == pytest.approx(2.0 / (0.9 * 1.1) ** 0.5)
    assert 1.4 < fast["ci95"][0] < 1.8 < fast["value"] < 2.25 < fast["ci95"][1] < 2.8
    assert fast["starts"] == 1
    assert (fast["n"], fast["reference"]) == (8, reference["id"])
    assert by_backend["e16", 2]["speedup"]["value"] == pytest.approx(0.5)
    assert by_backend["compile", 1]["speedup"] is None  # nothing alike ran eagerly


def test_speedup_over_two_starts_a_side_has_the_spread_between_them(tmp_path):
    """Starts 10 % apart; the mutant, 16 unrelated pairs, says 1.95 to 2.05."""
    lives = {f"{side}{i}": session(f"{side}{i}") for side in "ab" for i in range(2)}
    study = MemoryStudy(tmp_path, lives=lives)
    for p in range(16):
        start, wobble = p // 8, 1.0 + 0.01 * (p % 3)
        at = f"2026-01-01T00:0{start}:{p:02d}"
        slow, fast = took(2.0 * wobble * (1.0 + 0.1 * start)), took(wobble)
        study.add(record(p, timings=slow, session_id=f"a{start}", started_at=at))
        study.add(record(p, load=FAST, timings=fast, session_id=f"b{start}", started_at=at))
    rows = show_document(study.touch_images())["settings"]
    found = next(r for r in rows if r["backend"] == "compile")
    low, high = found["speedup"]["ci95"]
    assert (found["speedup"]["starts"], found["latency_s"]["starts"]) == (2, 2)
    assert found["speedup"]["value"] == pytest.approx(2.0 * 1.1**0.5, rel=0.01)
    assert low < 1.85
    assert high > 2.35


def test_settings_of_the_same_starts_are_compared_within_them():
    """Both 20 % slower in the second start, which cancels."""
    images = [
        {
            (p,): LoneImage(base * (1.2 if p > 7 else 1.0) * (1 + p % 3 / 100), f"s{p > 7}", "")
            for p in range(16)
        }
        for base in (3.0, 1.0)
    ]
    found = log_ratio(images[0], images[1])
    assert found.value == pytest.approx(np.log(3.0))
    assert found.clusters == 2
    assert found.high - found.low < 1e-6
    assert log_ratio(images[0], {}) is None
    assert log_ratio(dict(list(images[0].items())[:3]), images[1]).ci95 is None


def test_tails_are_told_from_as_many_images_as_have_one_beyond_them(tmp_path):
    for n, told in ((2, (False, False)), (10, (True, False)), (100, (True, True))):
        study = MemoryStudy(tmp_path)
        for p in range(n):
            study.add(record(p, timings=took(1.0 + p / n)))
        latency = only_row(study)["latency_s"]
        assert (latency["p90"] is not None, latency["p99"] is not None) == told


def test_speedup_without_a_shared_pair_is_null(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0))
    study.add(record(1, load=FAST))
    assert [r["speedup"] for r in show_document(study.touch_images())["settings"]] == [None, None]


def gpu(clock: int | None, *reasons: str) -> GpuState:
    return GpuState(
        sm_clock_mhz=clock,
        memory_clock_mhz=2600,
        power_w=None if clock is None else clock / 3,
        temperature_c=60,
        throttled=reasons,
    )


def test_gpu_columns_are_of_lone_images_on_the_gpu(tmp_path):
    life = replace(session(), in_force={"device": "cuda:0"})
    study = MemoryStudy(tmp_path, lives={"s": life})
    for p, state in enumerate([gpu(1800), gpu(1500, "power-cap"), gpu(1950), gpu(None)]):
        study.add(record(p, gpu=state))
    study.add(record(9, gpu=gpu(100, "thermal-slowdown"), batch_size=4, batch_actual=1))
    row = only_row(study.touch_images())
    assert row["gpu"] == {
        "sm_clock_mhz": {"min": 1500, "median": 1800},
        "power_w": 600.0,
        "throttled_share": 0.25,
        "throttled": ["power-cap"],
        "n": 4,
    }


def test_an_idle_gpu_says_nothing_about_a_cpu_backend(tmp_path):
    study = MemoryStudy(tmp_path, lives={"s": replace(session(), in_force={"device": "cpu"})})
    study.add(record(0, gpu=gpu(200)))
    assert only_row(study.touch_images())["gpu"] is None


def test_machine_document_shows_the_latest_of_each_and_failed_ones(tmp_path):
    study = lone_images(tmp_path, 10.0)
    first, second = machine(fp32=1.0), machine(fp32=1.0)
    second["measured_at"] = "2026-02-01T00:00:00"
    failed = machine("cuda") | {"error": "no driver"}
    study.machines = [first, second, failed]
    found = show_document(study)["machine"]
    assert [m["measured_at"][:7] for m in found] == ["2026-02", "2026-01"]
    assert found[1]["error"] == "no driver"


def test_failed_records_have_no_throughput(tmp_path):
    study = MemoryStudy(tmp_path)
    study.add(record(0, status=Status.OUT_OF_MEMORY, batch_size=2, batch_actual=2))
    assert only_row(study.touch_images())["throughput"] == []
