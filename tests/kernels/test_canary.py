"""The canary: a fixed loop that runs on this machine, and sees a hog on its core."""

import os
import subprocess
import sys
from statistics import median

import pytest

from sd35_kernels import canary
from sd35_kernels.cpu import build
from sd35_kernels.w8a8.errors import KernelUnavailable


@pytest.fixture
def compiled() -> canary.Canary:
    try:
        return canary.Loop(1)
    except KernelUnavailable as exc:
        pytest.skip(str(exc))


def test_loop_says_its_kind_and_counts_its_operations(compiled):
    assert compiled.kind.removesuffix("+tiles") == build.pick_level()
    # Two vectors of 16 at 5 GHz are 320 a second; a debugger's pace would be below 0.1.
    assert 0.1 < compiled.read() < 2000.0


def test_without_a_compiler_torch_stands_in_and_says_so(monkeypatch):
    def refuse(*_):
        raise KernelUnavailable("no compiler")

    monkeypatch.setattr(canary, "library", refuse)
    found = canary.load(1)
    assert found.kind == "torch"
    assert found.read() > 0.0


HOG = "import os; os.sched_setaffinity(0, {%d})\nwhile True: pass"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned")
def test_loop_slows_down_beside_a_hog_on_its_core(compiled):
    before, core = os.sched_getaffinity(0), min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    try:
        idle = max(compiled.read() for _ in range(40))
        hog = subprocess.Popen([sys.executable, "-c", HOG % core])
        try:
            beside = median(compiled.read() for _ in range(80))
        finally:
            hog.kill()
            hog.wait()
    finally:
        os.sched_setaffinity(0, before)
    assert beside < 0.8 * idle
