"""Compiled regions prove every call; the backend's images stay eager's.

Most tests run what Dynamo captured without generating code (`aot_eager`), which proves the same
bookkeeping in a second; those with inductor say so.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo

from sd35bench.backends import compile as compiled
from sd35bench.backends.compile import CompileBackend, CompiledRegion, HowToCompile, cache_folder
from sd35bench.backends.eager import EagerBackend
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Request, SkipLayerGuidance
from tests.backends.conftest import captured_only, make_load, make_request, untraced
from tests.studies.tiny_families import write_tiny

SAMPLER_OF = {"sana": "euler", "pixart": "dpmpp_2m"}
SKIPPING = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.0, stop=0.5)


def how(folder: Path = Path("none"), **changes: Any) -> HowToCompile:
    fields: dict[str, Any] = {
        "compiler": "aot_eager",
        "mode": "default",
        "fullgraph": True,
        "dynamic": False,
        "cuda_graphs": False,
        "cache_dir": folder,
    }
    return HowToCompile(**{**fields, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "inductor"


def wave(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2


def broken_wave(x: torch.Tensor) -> torch.Tensor:
    y = torch.sin(x)
    torch._dynamo.graph_break()
    return y * 2


def test_region_runs_one_graph_per_call_and_one_per_shape(folder: Path) -> None:
    part = CompiledRegion("part", wave, how(folder))
    for size in (4, 4, 6, 6, 4):
        x = torch.arange(float(size))
        torch.testing.assert_close(part(x), wave(x))
    assert (part.counts.calls, part.counts.runs, part.counts.graphs) == (5, 5, 2)
    assert part.counts.compile_s > 0
    assert part.take_faults() == []


def test_region_with_dynamic_shapes_compiles_once(folder: Path) -> None:
    part = CompiledRegion("part", wave, how(folder, dynamic=True))
    part(torch.ones(4))
    part.sealed = True
    part(torch.ones(6))
    assert part.counts.graphs == 1
    assert part.take_faults() == []


def stance() -> AbstractContextManager[Any]:
    return torch.compiler.set_stance("force_eager")


def switched_off() -> AbstractContextManager[Any]:
    return torch._dynamo.config.patch(disable=True)


@pytest.mark.parametrize("mutant", [stance, switched_off])
def test_region_notices_that_nothing_was_compiled(
    folder: Path, mutant: Callable[[], AbstractContextManager[Any]]
) -> None:
    part = CompiledRegion("part", wave, how(folder, fullgraph=False))
    with mutant():
        torch.testing.assert_close(part(torch.ones(4)), wave(torch.ones(4)))
    assert "part ran eager" in part.take_faults()[0]


def test_region_with_fullgraph_refuses_to_run_eager(folder: Path) -> None:
    part = CompiledRegion("part", wave, how(folder))
    with switched_off(), pytest.raises(OptimizationNotApplied, match="part ran eager"):
        part(torch.ones(4))


def test_region_notices_a_suppressed_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> Any:
        raise RuntimeError("no code for this")

    monkeypatch.setattr(compiled, "lookup_backend", fail)
    part = CompiledRegion("part", wave, how(folder, fullgraph=False))
    with torch._dynamo.config.patch(suppress_errors=True):
        part(torch.ones(4))
    assert "suppress_errors" in part.take_faults()[0]


def test_region_notices_the_recompile_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "RECOMPILE_LIMIT", 2)
    part = CompiledRegion("part", wave, how(folder, fullgraph=False))
    for size in range(2, 5):
        part(torch.ones(size))
    assert "part ran eager" in part.take_faults()[0]
    strict = CompiledRegion("part", wave, how(folder))
    for size in range(2, 4):
        strict(torch.ones(size))
    with pytest.raises(OptimizationNotApplied, match="part cannot be compiled"):
        strict(torch.ones(4))


def test_region_counts_graph_breaks_and_fullgraph_refuses_them(folder: Path) -> None:
    part = CompiledRegion("part", broken_wave, how(folder, fullgraph=False))
    part(torch.ones(4))
    part(torch.ones(4))
    assert (part.counts.graphs, part.counts.graph_breaks) == (2, 1)
    assert part.take_faults() == []
    strict = CompiledRegion("part", broken_wave, how(folder))
    with pytest.raises(OptimizationNotApplied, match="fullgraph=false"):
        strict(torch.ones(4))


def test_region_notices_a_recompilation_for_the_same_arguments(folder: Path) -> None:
    factor = [2.0]
    part = CompiledRegion("part", lambda x: torch.sin(x) * factor[0], how(folder))
    part(torch.ones(4))
    factor[0] = 3.0
    part(torch.ones(4))
    assert part.counts.recompiles == 1
    assert "had a graph already" in part.take_faults()[0]


def test_sealed_region_says_which_shape_came_late(folder: Path) -> None:
    part = CompiledRegion("part", wave, how(folder))
    part(torch.ones(4))
    part.sealed = True
    part(torch.ones(2, 6))
    fault = part.take_faults()[0]
    assert "2×6" in fault
    assert "not in the warm-up" in fault
    part(torch.ones(2, 6))
    assert part.take_faults() == []


def test_region_keeps_outputs_that_a_cuda_graph_would_overwrite(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a CUDA graph, this compiler writes every result into the same memory."""
    memory = torch.zeros(4)

    def replaying(_name: str) -> Callable[..., Any]:
        return lambda graph, _inputs: lambda *args: (memory.copy_(graph(*args)[0]),)

    monkeypatch.setattr(compiled, "lookup_backend", replaying)
    part = CompiledRegion("part", wave, how(folder, cuda_graphs=True))
    first = part(torch.ones(4))
    part(torch.zeros(4))
    torch.testing.assert_close(first, wave(torch.ones(4)))
    # Warming up, recording, one replay: then every call is the steady state.
    assert (part.counts.graphs, part.counts.calls, part.counts.runs) == (1, 2, 4)
    assert part.take_faults() == []


def test_region_passes_on_that_memory_ran_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_name: str) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compiled, "lookup_backend", fail)
    with pytest.raises(torch.OutOfMemoryError):
        CompiledRegion("part", wave, how(folder))(torch.ones(4))


def test_inductor_cold_then_warm(folder: Path) -> None:
    """Real code generation: the second region finds the first one's code on disk.

    A product alone needs no C++: g++ takes 14 s, and the slow tests have it.
    """

    def gate(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    x = torch.linspace(-2, 2, 100).reshape(10, 10)
    cold = CompiledRegion("part", gate, how(folder, compiler="inductor"))
    warm = CompiledRegion("part", gate, how(folder, compiler="inductor"))
    for part in (cold, warm):
        torch.testing.assert_close(part(x), gate(x))
        assert part.take_faults() == []
    assert (cold.counts.cache_hits, cold.counts.cache_misses) == (0, 1)
    assert (warm.counts.cache_hits, warm.counts.cache_misses) == (1, 0)
    assert any(folder.rglob("*.py"))
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


@pytest.fixture(scope="module")
def made(tiny_path: Path) -> Iterator[CompileBackend]:
    with captured_only():
        backend = CompileBackend(make_load(tiny_path, "compile", compiler="aot_eager"))
        yield backend
        backend.close()


@pytest.fixture(scope="module")
def warmed(tiny_path: Path) -> Iterator[CompileBackend]:
    """A backend that was warmed up with one shape.

    The tests share it, and look at what they add to the counts.
    """
    with untraced():
        backend = CompileBackend(make_load(tiny_path, "compile", compiler="aot_eager"))
    backend.generate([make_request()], [None])
    backend.settle()
    settled.append(copy.deepcopy(backend.in_force["compile"]))
    yield backend
    backend.close()


settled: list[dict[str, Any]] = []
"""What the shared backend said when its warm-up ended."""


REQUESTS = {
    "guided": make_request(),
    "unguided": make_request(cfg=1.0),
    "skip-layer": make_request(skip_layer_guidance=SKIPPING),
    "dpmpp_2m": make_request(sampler="dpmpp_2m"),
}
TRACED = ("guided",)
"""Dynamo takes 2 to 9 s for each way through the transformer; the others are in the slow tests."""


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(request, id=name, marks=[] if name in TRACED else pytest.mark.slow)
        for name, request in REQUESTS.items()
    ],
)
def test_compiled_images_are_eagers(
    made: CompileBackend, eager: EagerBackend, request_: Request
) -> None:
    ours, theirs = (b.generate([request_], [None]).images[0] for b in (made, eager))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_guidance_off_and_skip_layer_guidance_have_their_own_graphs(tiny_path: Path) -> None:
    with untraced():
        made = CompileBackend(make_load(tiny_path, "compile", compiler="aot_eager"))
    for request in REQUESTS.values():
        made.generate([request], [None])
    parts = {name: region.counts.graphs for name, region in made._regions.items()}
    made.close()
    # DPM++ hands its latents over with other strides than Euler: a graph of its own as well.
    assert parts == {"transformer": len(REQUESTS), "vae_decoder": 1}


def test_settle_reports_what_was_compiled(warmed: CompileBackend) -> None:
    report = settled[-1]
    assert report["graphs_by_part"] == {"transformer": 1, "vae_decoder": 1}
    assert (report["graphs"], report["graph_breaks"], report["recompiles"]) == (2, 0, 0)
    assert report["compile_s"] >= 0  # nothing was traced: see the regions' own tests
    assert (report["cache"], report["inductor_backend"]) == ("off", None)
    warmed.generate([make_request(seed=7, steps=6, cfg=2.0)], [None])
    assert warmed.in_force["compile"]["recompiles"] == report["recompiles"]


def test_stage_stamps_lie_outside_the_graphs(warmed: CompileBackend) -> None:
    before = warmed._regions["transformer"].counts.runs
    generation = warmed.generate([make_request()], [None])
    assert generation.evaluations == warmed._regions["transformer"].counts.runs - before
    assert generation.denoise_s is not None
    assert generation.decode_s is not None


def test_a_size_that_was_not_warmed_up_fails_its_trial_once(warmed: CompileBackend) -> None:
    before = warmed.in_force["compile"]["recompiles"]
    late = make_request(width=48, height=48)
    with pytest.raises(OptimizationNotApplied, match="not in the warm-up") as refused:
        warmed.generate([late], [None])
    assert "2×16×6×6" in str(refused.value)  # the denoiser's latents
    assert "vae_decoder" in str(refused.value)  # both parts are ready for the next image
    assert warmed.in_force["compile"]["recompiles"] == before + 2
    assert warmed.generate([late], [None]).images[0].shape == (48, 48, 3)


def test_a_batch_whose_time_does_not_count_may_compile(warmed: CompileBackend) -> None:
    before = warmed.in_force["compile"]["recompiles"]
    warmed.timed = False
    try:
        warmed.generate([make_request(), make_request(seed=1)], [None, None])
    finally:
        warmed.timed = True
    assert warmed.in_force["compile"]["recompiles"] == before


@pytest.mark.parametrize(
    ("family", "vae"),
    [("sana", False), ("pixart", False), pytest.param("sana", True, marks=pytest.mark.slow)],
)
def test_other_families_compile_without_a_break(family: str, vae: bool, tmp_path: Path) -> None:
    options = {"compiler": "aot_eager", "vae": vae}
    load = make_load(write_tiny(family, tmp_path / family), "compile", **options)
    load = replace(load, model=replace(load.model, family=family))
    sampler = SAMPLER_OF[family]
    backend = CompileBackend(load)
    with captured_only():
        backend.generate([make_request(width=64, height=64, sampler=sampler)], [None])
    backend.settle()
    report = backend.in_force["compile"]
    parts = {"transformer": 1, "vae_decoder": 1} if options["vae"] else {"transformer": 1}
    assert report["graphs_by_part"] == parts
    assert (report["vae"], report["graph_breaks"]) == (options["vae"], 0)
    backend.close()


def test_a_compile_that_never_compiles_is_refused(tiny_path: Path) -> None:
    backend = CompileBackend(make_load(tiny_path, "compile", compiler="aot_eager"))
    with switched_off(), pytest.raises(OptimizationNotApplied, match="transformer ran eager"):
        backend.generate([make_request()], [None])
    with pytest.raises(OptimizationNotApplied, match="transformer: never compiled"):
        backend.settle()
    backend.close()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"mode": "reduce-overhead"}, OptimizationNotApplied, "CUDA graphs"),
        ({"mode": "fast"}, BackendError, "known: default"),
        ({"compiler": "aot_eager", "mode": "max-autotune-no-cudagraphs"}, BackendError, "inductor"),
        ({"fullgraph": "yes"}, BackendError, "must be true or false"),
        ({"cache": "none"}, BackendError, "known: keep, fresh"),
    ],
    ids=["cuda-graphs", "mode", "compiler", "fullgraph", "cache"],
)
def test_options_that_cannot_be_are_refused(
    tiny_path: Path, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        CompileBackend(make_load(tiny_path, "compile", device="cpu", **options))


def test_fresh_cache_is_temporary(tiny_path: Path) -> None:
    backend = CompileBackend(make_load(tiny_path, "compile", compiler="aot_eager", cache="fresh"))
    folder = backend._how_compiled.cache_dir
    assert folder.is_dir()
    assert folder != cache_folder()
    backend.close()
    assert not folder.exists()


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sd35bench" / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch._inductor.runtime.cache_dir_utils.cache_dir()  # sets the variable to torch's default
    assert cache_folder() == tmp_path / "sd35bench" / "inductor"


def test_probe_names_a_missing_compiler() -> None:
    assert CompileBackend.probe({"device": "cpu"}).ok is True
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        found = CompileBackend.probe({"device": "cpu"})
        eager = CompileBackend.probe({"device": "cpu", "compiler": "aot_eager"})
    assert found.ok is False
    assert "g++" in str(found.remedy)
    assert eager.ok is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_probe_names_a_missing_gpu() -> None:
    found = CompileBackend.probe({"device": "cuda"})
    assert found.ok is None
    assert "device=cpu" in str(found.remedy)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_inductor_images_are_eagers_cold_and_warm(
    tiny_path: Path,
    eager: EagerBackend,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Generated code: one cold start, one warm, both within two levels of eager's image."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected = eager.generate([make_request()], [None]).images[0].astype(int)
    states = []
    for _ in range(2):
        backend = CompileBackend(make_load(tiny_path, "compile", channels_last=channels_last))
        image = backend.generate([make_request()], [None]).images[0]
        backend.settle()
        states.append(backend.in_force["compile"]["cache"])
        backend.close()
        assert np.abs(image - expected).max() <= 2
    assert states == ["cold", "warm"]
