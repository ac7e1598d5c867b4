"""The page of the core's benchmarks: what is kept, what is judged, and what a failure costs."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


def script(name: str) -> ModuleType:
    """A benchmark's module: its folder is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


page = script("core_page")
step = script("mmdit_step")


def block(**ratios: float) -> dict[str, Any]:
    """A document of `mmdit_step.py`: seconds of each peer over ours, with an interval round it."""
    rows = {
        name: {f"over_{tier}_wall": [x, x - 0.1, x + 0.1] for tier in ("exact", "int8")}
        | {"error": 0.01}
        for name, x in {"exact": 1.0, "int8": 1.0, **ratios}.items()
    }
    return {"n": 7, "rows": rows, "missing": {"openvino-int8": "No module named 'openvino'"}}


def setting(backend: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A setting of a `show` document."""
    speedup = {"value": 4.0 / seconds, "ci95": [1.0, 9.0], "n": 16}
    return {
        "backend": backend,
        "speedup": None if backend == "eager" else speedup,
        "latency_s": {"p50": seconds, "n": 16},
        "stage_s": {"denoise_s": seconds / 2},
        "load_s": 10.0,
        "first_call_s": seconds,
        "peak_rss_bytes": int(seconds * 1000),
        "metrics": {"prompt_accuracy": {"value": 0.69, "n": 16}},
    } | changes


def judged(documents: dict[str, Any], column: str = "vnni") -> dict[tuple[str, str, float], Any]:
    found = page.judge(documents, column)
    return {(row["case"], row["tier"], row["wanted"]): row for row in found}


def test_the_fastest_peer_is_the_one_that_counts() -> None:
    found = judged({"block": block(eager=1.3, compile=1.05, openvino=1.2)})["block", "exact", 1.1]
    assert (found["peer"], found["ratio"][0], found["met"]) == ("compile", 1.05, False)
    assert judged({"block": block(eager=4.2)})["block", "int8", 4.2]["met"] is True


def test_what_was_not_measured_is_a_target_with_its_reason() -> None:
    found = judged({"block": block(eager=4.2)})
    absent = found["block", "int8", 1.15]
    assert absent["met"] is None
    assert "No module named 'openvino'" in absent["note"]
    assert found["nano", "exact", 3.5]["note"] == "this part was not run"
    text = page.verdicts(list(found.values()))
    assert text.count("not measured") == len(found) - 2


def test_the_other_instructions_have_other_targets() -> None:
    amx, vnni = (list(page.judge({}, column)) for column in ("amx", "vnni"))
    assert [row["case"] for row in amx] == [row["case"] for row in vnni]
    assert amx[0]["wanted"] == 2.0
    assert vnni[0]["wanted"] == 1.15


def test_whole_images_are_held_against_eager_and_onnx() -> None:
    show = {"settings": [setting("eager", 4.0), setting("core", 1.0), setting("onnx", 2.0)]}
    found = judged({"nano-images": show})
    case = "nano, whole image"
    assert found[case, "core", 3.5]["ratio"] == [4.0, 1.0, 9.0]
    assert found[case, "core", 1.6]["ratio"] == [2.0, None, None]
    assert "0.69 (n = 16)" in found[case, "core", 3.5]["note"]
    assert found[case, "core-int8", 6.0]["met"] is None
    start = found["nano, load and first image", "core", 1.5]
    assert start["ratio"][0] == pytest.approx(11 / 14)
    assert (start["at_most"], start["met"]) == (True, True)


def test_a_machine_that_changed_leaves_no_ratio() -> None:
    show = {"settings": [setting("eager", 4.0), setting("core", 2.0, speedup=None)]}
    found = judged({"nano-images": show})["nano, whole image", "core", 3.5]
    assert (found["ratio"], found["met"]) == (None, None)
    assert "another speed" in found["note"]


def test_the_true_width_has_denoiser_image_and_memory() -> None:
    settings = [setting("eager", 4.0), setting("openvino", 1.5), setting("core-int8", 1.0)]
    found = judged({"true-width": {"settings": settings}})
    assert found["true width, denoiser", "core-int8", 1.8]["ratio"][0] == 1.5
    assert found["true width, denoiser", "core-int8", 1.8]["met"] is False
    assert found["true width, denoiser", "core-int8", 4.0]["ratio"][0] == 4.0
    assert found["true width, with decoding", "core-int8", 2.8]["met"] is True
    rss = found["true width, peak RSS", "core-int8", 0.4]
    assert (rss["ratio"][0], rss["met"]) == (0.25, True)


@pytest.mark.parametrize("unlike", ["core", "core-int8", "openvino"])
def test_seconds_have_no_ratio_where_the_machine_changed_and_bytes_have(unlike: str) -> None:
    """A neighbour took the machine to 0.39 of its best; two quotients of means were judged."""
    backends = {"eager": 4.0, "core": 2.0, "core-int8": 1.0, "openvino": 1.5}
    rows = [
        setting(b, s, **({"speedup": None} if b == unlike else {})) for b, s in backends.items()
    ]
    found = judged({"true-width": {"settings": rows}, "nano-images": {"settings": rows}})
    asked = {
        ("true width, denoiser", "core-int8", 4.0): {"core-int8"},
        ("true width, denoiser", "core-int8", 1.8): {"core-int8", "openvino"},
        ("nano, load and first image", "core", 1.5): {"core"},
    }
    for target, needs in asked.items():
        assert (found[target]["ratio"] is None) is (unlike in needs), target
    assert found["true width, peak RSS", "core-int8", 0.4]["met"] is True


# What is kept ---------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        page=tmp_path / "core.md",
        kept=tmp_path / "kept",
        only="block,nano",
        threads=1,
        rounds=3,
    )


def part(document: Any, body: str) -> dict[str, Any]:
    return {
        "made_at": "2026-01-01 00:00 UTC",
        "commit": "c" * 40,
        "dirty": False,
        "took_s": 90.0,
        "canary": {"kind": "x", "before": 100.0, "after": 90.0},
        "document": document,
        "body": body,
    }


def test_a_part_that_fails_costs_only_itself(arguments, monkeypatch, capsys) -> None:
    def run(name: str, *_: Any) -> dict[str, Any]:
        if name == "nano":
            raise SystemExit("mmdit_step.py ended with 1")
        return part(block(eager=4.2), "## block\n")

    monkeypatch.setattr(page, "parse", lambda: arguments)
    monkeypatch.setattr(page, "run_part", run)
    monkeypatch.setattr(page.canary, "load", lambda threads: None)
    assert page.main() == 1
    written = arguments.page.read_text()
    assert "## block" in written
    assert "mmdit_step.py ended with 1" in written
    assert "never run" in written
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parts"]["block"]["document"]["n"] == 7
    assert last["parts"]["nano"]["failed"]["why"] == "mmdit_step.py ended with 1"


def test_an_interrupt_writes_the_page_and_ends(arguments, monkeypatch) -> None:
    def run(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "parse", lambda: arguments)
    monkeypatch.setattr(page, "run_part", run)
    monkeypatch.setattr(page.canary, "load", lambda threads: None)
    assert page.main() == 130
    assert "interrupted" in arguments.page.read_text()
    assert list(page.kept(arguments.kept)) == ["block"]


def test_a_failure_leaves_the_earlier_figures_and_a_success_ends_it(arguments) -> None:
    page.keep(arguments.kept, "block", part(block(eager=4.2), "## block\n"))
    assert page.finished(arguments.kept, "block")
    page.keep(arguments.kept, "block", {"failed": {"why": "killed", "at": "now"}})
    assert not page.finished(arguments.kept, "block")
    page.write_page(arguments)
    assert "killed; the figures are an earlier run's" in arguments.page.read_text()
    page.keep(arguments.kept, "block", part(block(eager=4.2), "## block\n"))
    page.write_page(arguments)
    assert "killed" not in arguments.page.read_text()
    (arguments.kept / "block.json").write_text('{"cut')
    assert page.kept(arguments.kept) == {}


# The profile ----------------------------------------------------------------------------------

CONFIG = {
    "layers": 2,
    "width": 64,
    "dual": (0,),
    "patch": 2,
    "in_channels": 16,
    "out_channels": 16,
}


def test_operations_are_those_of_each_layer() -> None:
    """By hand: 3 images of 10 tokens beside 5 of text, one dual block and the last, no text out."""
    found = step.operations(CONFIG, 3, 10, 5, ())
    square = 2 * 3 * 64 * 64
    assert found["qkv"] == square * (3 * 10 + 3 * 10 + 3 * 5 + 3 * 10 + 2 * 5)
    assert found["out"] == square * (10 + 10 + 5 + 10)
    assert found["up"] == found["down"] == 4 * square * (10 + 5 + 10)
    assert found["attention"] == 4 * 3 * 64 * (15 * 15 + 10 * 10 + 10 * 15)
    assert found["embed"] == found["final"] == 2 * 3 * 10 * 64 * 64
    one = step.operations(CONFIG, 3, 10, 5, (0,))
    assert one["out"] == square * 10


def test_parts_are_held_against_the_loop_of_their_precision() -> None:
    runs = [{"embed": 1.0, "norm": 1.0, "qkv": s} for s in (2.0, 3.0, 9.0)]
    found = step.parts_of(runs, {"embed": 10, "qkv": 90}, {"exact": 20.0, "int8": 60.0}, "int8")
    assert found["qkv"] == {"s": 3.0, "share": 0.6, "operations": 90, "of_limit": 0.5}
    assert found["embed"]["of_limit"] == 0.5
    assert "of_limit" not in found["norm"]
    text = step.render_profile({"int8": found})
    assert "| qkv | 3000.0 (50%) | 60% |" in text
    assert "| norm | 1000.0 | 20% |" in text
