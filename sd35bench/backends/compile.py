"""The `compile` backend: torch.compile of the denoiser and of the VAE's decoder, proven.

What is compiled is the bound `forward`, put back on the module as its own attribute, so that the
stage meter's stamps lie outside the graph. The text encoders, the scheduler and the VAE's encoder
(once per image-to-image image) stay eager. Shapes are static unless `dynamic`: a graph for each
batch size, image size and text length; guidance off (half the batch) and skip-layer guidance (one
more call, of fewer layers) have graphs of their own. Warm-up compiles them all; `settle` closes
the list, and a timed trial that compiles something later fails and says why.

Cost: tracing is seconds per graph and never cached. Code generation is most of a cold start (on a
CPU one run of g++ per kernel) and comes from the persistent cache on the next: `cache` in
`in_force` says which of the two a session saw.

torch.compile can do nothing and not say so: an environment variable, a stance, a suppressed error
or the recompile limit leave the function eager, and the library's own counters are process-wide
and count compilations, not runs. So a `CompiledRegion` is its own Dynamo backend: each captured
graph goes to inductor, and what comes back is counted whenever it runs. With `fullgraph` one call
is one run of one graph. Which call may compile is known as well: the first with a given signature
(shapes, strides, dtypes and plain values of its arguments), and none while `sealed`, because an
image that waited for the compiler has no latency. What breaks this becomes a `fault`. Walking about
ten arguments and reading the clock twice takes 10 to 20 microseconds a call.
"""

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch._dynamo.exc
import torch._dynamo.utils
import torch._inductor
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from sd35bench import disk
from sd35bench.backends.base import Generation, Probe
from sd35bench.backends.pipeline import DiffusersBackend, choice
from sd35bench.backends.probes import probe_compiler, silence_cuda_remark
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Request, Scalar

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
CACHES = ("keep", "fresh")
# aot_eager runs the captured graph operation by operation: no code is generated, so it starts in a
# second and needs no C++ compiler; it shows what capture alone costs and changes.
COMPILERS = ("inductor", "aot_eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Per region. torch's own 8 is less than the sizes of one study; past the limit a region without
# fullgraph would run eager, which is a fault here.
RECOMPILE_LIMIT = 64
NO_FRAMES = "found no compiled frames"  # how torch's own check of fullgraph begins
LOOK_FOR = (
    "look for TORCHDYNAMO_DISABLE, TORCH_COMPILE_DISABLE, a force_eager stance or suppress_errors"
)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# torch counts its two persistent caches by group and key, the outer by what came out of the inner;
# a graph that the outer cannot take may still be in the inner.
OUTER, INNER = ("aot_autograd", "autograd_cache"), ("inductor", "fxgraph_cache")
CACHE_ORDER = ("outer_hit", "inner_hit", "outer_miss", "inner_miss", "inner_bypass", "outer_bypass")


class CompileBackend(DiffusersBackend):
    """A diffusers pipeline whose denoiser and VAE decoder run as compiled graphs, or not at all.

    A subclass that changes the denoiser does so in `prepare`, before calling this one's.
    """

    options = MappingProxyType(
        {
            **DiffusersBackend.options,
            "compiler": "inductor",
            "mode": "default",
            "fullgraph": True,
            "dynamic": False,
            "vae": True,
            "channels_last": False,
            "cache": "keep",
        }
    )

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Look for the device, and for the compiler that inductor hands its code to there."""
        base = super().probe(options)
        asked = {**cls.options, **options}
        if base.ok is not True or asked["compiler"] != "inductor":
            return base
        found = probe_compiler(str(asked["device"]))
        return Probe(ok=found.ok, detail=f"{base.detail}; {found.detail}", remedy=found.remedy)

    def prepare(self, pipe: Any) -> None:
        """Put compiled functions in place of the denoiser's and the decoder's `forward`.

        Raises: BackendError for an option's wrong value; OptimizationNotApplied for CUDA graphs
        on a CPU.
        """
        super().prepare(pipe)
        asked = self.asked
        silence_dynamo()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        how = self._how(asked)
        parts = {"transformer": pipe.transformer}
        if asked["vae"]:
            parts["vae_decoder"] = pipe.vae.decoder
        if asked["channels_last"]:
            pipe.vae.decoder.to(memory_format=torch.channels_last)
        self._regions = {n: CompiledRegion(n, part.forward, how) for n, part in parts.items()}
        for name, part in parts.items():
            part.forward = self._regions[name]
        self._faults: list[str] = []
        self._settled = False
        self._how_compiled = how

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Add what is compiled so far: nothing before warm-up, see `settle`."""
        return {**super().prove(pipe), "compile": self._report()}

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make images, every call of the denoiser and the decoder a run of a compiled graph.

        Raises: OptimizationNotApplied where one was not, or had to be compiled after warm-up; and
        as the base.
        """
        self._take_faults()  # those of a call that failed for another reason
        for region in self._regions.values():
            region.sealed = self._settled and self.timed
        made = super().generate(requests, inits)
        faults = self._take_faults()
        if faults:
            self._faults += faults
            self.in_force = {**self.in_force, "compile": self._report()}
            raise OptimizationNotApplied("; ".join(faults))
        return made

    def settle(self) -> None:
        """Prove the warm-up: all that was called ran compiled, once per call, without recompiling.

        From now on a timed trial that needs a graph compiled fails.

        Raises: OptimizationNotApplied.
        """
        super().settle()
        self._settled = True
        self.in_force = {**self.in_force, "compile": self._report()}
        idle = [n for n, r in self._regions.items() if r.counts.calls and not r.counts.graphs]
        if idle:
            self._faults.append(f"{', '.join(idle)}: never compiled in the warm-up")
        if self._faults:
            raise OptimizationNotApplied("; ".join(self._faults))

    def close(self) -> None:
        """Drop the graphs as well, and a temporary cache."""
        super().close()
        self._regions = {}
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def _how(self, asked: Mapping[str, Scalar]) -> "HowToCompile":
        mode = choice("mode", asked["mode"], MODES)
        compiler = choice("compiler", asked["compiler"], COMPILERS)
        wants_graphs = mode in CUDA_GRAPH_MODES
        if wants_graphs and self.device.type != "cuda":
            raise OptimizationNotApplied(
                f"backend.mode={mode} asks for CUDA graphs and the device is {self.device}; "
                "use backend.mode=default, or max-autotune-no-cudagraphs"
            )
        if compiler != "inductor" and mode != "default":
            raise BackendError(f"backend.mode={mode} is inductor's; backend.compiler={compiler}")
        for name in ("fullgraph", "dynamic", "vae", "channels_last"):
            if not isinstance(asked[name], bool):
                raise BackendError(f"backend.{name}={asked[name]!r}: must be true or false")
        return HowToCompile(
            compiler=compiler,
            mode=mode,
            fullgraph=asked["fullgraph"] is True,
            dynamic=asked["dynamic"] is True,
            cuda_graphs=wants_graphs,
            cache_dir=self._cache(asked["cache"]),
        )

    def _cache(self, asked: Scalar) -> Path:
        if choice("cache", asked, CACHES) == "keep":
            return cache_folder()
        self._temporary = tempfile.TemporaryDirectory(prefix="sd35bench-inductor-")
        return Path(self._temporary.name)

    def _take_faults(self) -> list[str]:
        """Return what was wrong since the last time, each fault once however often it came."""
        faults = [fault for r in self._regions.values() for fault in r.take_faults()]
        skips = sum(r.counts.cuda_graph_skips for r in self._regions.values())
        if self._how_compiled.cuda_graphs and skips:
            faults.append(f"CUDA graphs were asked for and {skips} graphs run without")
        return list(dict.fromkeys(faults))

    def _report(self) -> dict[str, Any]:
        """Say what is compiled so far, as JSON; times in seconds."""
        counts = {name: region.counts for name, region in self._regions.items()}
        hits = sum(c.cache_hits for c in counts.values())
        misses = sum(c.cache_misses for c in counts.values())
        how = self._how_compiled
        triton = self.device.type == "cuda"
        inductor = how.compiler == "inductor"
        return {
            "compiler": how.compiler,
            "inductor_backend": ("triton" if triton else "cpp") if inductor else None,
            "mode": how.mode,
            "fullgraph": how.fullgraph,
            "dynamic": how.dynamic,
            "cuda_graphs": how.cuda_graphs,
            "vae": "vae_decoder" in self._regions,
            "channels_last": self.asked["channels_last"],
            "graphs": sum(c.graphs for c in counts.values()),
            "graphs_by_part": {name: c.graphs for name, c in counts.items()},
            "graph_breaks": sum(c.graph_breaks for c in counts.values()),
            "recompiles": sum(c.recompiles for c in counts.values()),
            "compile_s": round(sum(c.compile_s for c in counts.values()), 3),
            "cache": _cache_state(hits, misses),
            "fx_cache_hits": hits,
            "fx_cache_misses": misses,
            "fx_cache_bypasses": sum(c.cache_bypasses for c in counts.values()),
        }


def cache_folder() -> Path:
    """Return the folder of inductor's persistent cache.

    TORCHINDUCTOR_CACHE_DIR where it is set, else a folder of ours under the user's cache. torch
    sets the variable itself, to its default, as soon as anything asks it for the folder: that is
    no wish of the user's.
    """
    own = os.environ.get(CACHE_VARIABLE)
    if own and Path(own) != Path(default_cache_dir()).absolute():
        return Path(own)
    return disk.cache_folder("inductor")


def _cache_state(hits: int, misses: int) -> str:
    if hits and misses:
        return "mixed"
    if hits:
        return "warm"
    return "cold" if misses else "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class HowToCompile:
    """What torch.compile is asked for, and the folder of inductor's persistent cache."""

    compiler: str
    mode: str
    fullgraph: bool
    dynamic: bool
    cuda_graphs: bool
    cache_dir: Path


@dataclass(slots=True)
class CompileCounts:
    """What was seen in one region so far.

    `graphs`: compiled; `runs`: of compiled graphs, in `calls` of the region. `recompiles`: graphs
    compiled for arguments that already had one, or while `sealed`. `compile_s`: wall seconds of
    calls that compiled, less the graph's own run. `cache_*`: graphs that inductor's persistent
    cache held, lacked, or could not take. `cuda_graph_skips`: graphs that inductor ran without
    CUDA graphs though they were asked for.
    """

    calls: int = 0
    runs: int = 0
    graphs: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    compile_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bypasses: int = 0
    cuda_graph_skips: int = 0


class CompiledRegion:
    """A function compiled on its first call with each signature; call it like the function.

    While `sealed` every compilation is a fault: the warm-up is over and the call is timed.
    """

    def __init__(self, name: str, function: Callable[..., Any], how: HowToCompile) -> None:
        """`name` appears in messages ("transformer")."""
        self.name = name
        self.counts = CompileCounts()
        self.faults: list[str] = []
        self._how = how
        self._options = torch._inductor.list_mode_options(how.mode)
        self._signatures: set[Any] = set()
        self.sealed = False
        self._run_s = 0.0
        asked: dict[str, Any] = {
            "fullgraph": how.fullgraph,
            "dynamic": how.dynamic,
            "backend": self._compile_graph,
            "recompile_limit": RECOMPILE_LIMIT,
            "isolate_recompiles": True,
        }
        self._compiled = torch.compile(function, **asked)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled function; what was wrong with it is added to `faults`.

        Raises: OptimizationNotApplied where it cannot be compiled.
        """
        counts, signature = self.counts, (_signature(args), _signature(kwargs))
        counts.calls += 1
        graphs, runs, self._run_s = counts.graphs, counts.runs, 0.0
        skips, breaks = _counted("inductor", "cudagraph_skips"), _counted("graph_break")
        started = time.perf_counter()
        result = self._call(args, kwargs)
        elapsed_s = time.perf_counter() - started
        compiled = counts.graphs - graphs
        if compiled:
            counts.compile_s += elapsed_s - self._run_s
            counts.cuda_graph_skips += _counted("inductor", "cudagraph_skips") - skips
            counts.graph_breaks += max(compiled - 1, _counted("graph_break") - breaks)
        self._judge(signature, compiled, counts.runs - runs)
        if compiled and self._how.cuda_graphs:
            # A CUDA graph's first run warms up and its second records; the third is the steady
            # state, which a decoder that runs once per image would reach only when timed.
            for _ in range(2):
                result = self._call(args, kwargs)
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._how.cuda_graphs:
            with _compiler_errors(self.name):
                return self._compiled(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        with _compiler_errors(self.name):
            result = self._compiled(*args, **kwargs)
        return _cloned(result)  # the next replay overwrites the graph's own output

    def take_faults(self) -> list[str]:
        """Return what was wrong since the last call, and forget it."""
        faults, self.faults = self.faults, []
        return faults

    def _compile_graph(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Dynamo's backend: compile one captured graph with inductor and count its runs."""
        before = _cache_counters()
        with _cache_in(self._how.cache_dir):
            if self._how.compiler == "inductor":
                compiled = torch._inductor.compile(graph, inputs, options=dict(self._options))
            else:
                compiled = lookup_backend(self._how.compiler)(graph, inputs)
        self.counts.graphs += 1
        self._count_cache(before, _cache_counters())
        if not callable(compiled):
            raise TypeError(f"inductor returned {type(compiled).__name__}, not a function")

        def run(*args: Any) -> Any:
            started = time.perf_counter()
            result = compiled(*args)
            self.counts.runs += 1
            self._run_s += time.perf_counter() - started
            return result

        return run

    def _count_cache(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        grown = {key: after[key] - before[key] for key in after}
        known = [key.partition("_")[2] for key in CACHE_ORDER if grown[key] > 0]
        counts, outcome = self.counts, known[0] if known else None
        counts.cache_hits += outcome == "hit"
        counts.cache_misses += outcome == "miss"
        counts.cache_bypasses += outcome == "bypass"

    def _judge(self, signature: Any, graphs: int, runs: int) -> None:
        """Hold one call against what it may do: `graphs` it compiled, `runs` of graphs in it."""
        known = signature in self._signatures
        self._signatures.add(signature)
        if runs == 0:
            self.faults.append(
                f"{self.name} ran eager: no compiled graph ran in the call; {LOOK_FOR}"
            )
        elif self._how.fullgraph and runs != 1:
            self.faults.append(
                f"{self.name} ran {runs} graphs in one call though fullgraph was asked; "
                "use backend.fullgraph=false to allow graph breaks"
            )
        if graphs and (known or self.sealed):
            self.counts.recompiles += graphs
            why = "had a graph already" if known else "were not in the warm-up"
            self.faults.append(
                f"{self.name} was compiled while an image waited: arguments {_readable(signature)} "
                f"{why}; run the trial again (it is retried, and its shape warmed up first), "
                "or use backend.dynamic=true for one graph for all sizes"
            )


def silence_dynamo() -> None:
    """Drop remarks that no user can act on: Dynamo traces diffusers' cached version checks."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    silence_cuda_remark()


@contextlib.contextmanager
def _compiler_errors(name: str) -> Iterator[None]:
    """Turn the compiler's errors into ours; those of the function itself pass.

    Where code generation is switched off altogether, torch raises a bare RuntimeError.

    Raises: OptimizationNotApplied.
    """
    exc_types = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
    try:
        yield
    except exc_types as exc:
        inner = getattr(exc, "inner_exception", None)
        if isinstance(inner, torch.OutOfMemoryError | MemoryError):
            raise inner from exc
        lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
        said = " ".join(lines[:3])
        raise OptimizationNotApplied(
            f"{name} cannot be compiled: {type(exc).__name__}: {said}; sd35bench doctor tests the "
            "compiler, backend.fullgraph=false allows graph breaks, backend=eager needs neither"
        ) from exc
    except RuntimeError as exc:
        if NO_FRAMES not in str(exc):
            raise
        first = str(exc).partition("\n")[0]
        raise OptimizationNotApplied(f"{name} ran eager: {first}; {LOOK_FOR}") from exc


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Have inductor keep its cache in `folder` for the duration of one compilation."""
    folder.mkdir(parents=True, exist_ok=True)
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CACHE_VARIABLE, None)
        else:
            os.environ[CACHE_VARIABLE] = before


def _cache_counters() -> dict[str, int]:
    counters: Mapping[str, Mapping[str, int]] = torch._dynamo.utils.counters
    return {
        f"{side}_{outcome}": counters[group][f"{prefix}_{outcome}"]
        for side, (group, prefix) in (("outer", OUTER), ("inner", INNER))
        for outcome in ("hit", "miss", "bypass")
    }


def _counted(group: str, key: str | None = None) -> int:
    """Read one of torch's process-wide counters, or the sum of a group."""
    counters: Mapping[str, int] = torch._dynamo.utils.counters[group]
    return sum(counters.values()) if key is None else counters[key]


def _signature(value: Any) -> Any:
    """What torch.compile may specialise on, of one argument: hashable and small."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, Mapping):
        return tuple((key, _signature(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_signature(each) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__qualname__


def _readable(signature: Any) -> str:
    """The shapes in a signature, as a person would write them."""
    if isinstance(signature, tuple) and signature and signature[0] == "tensor":
        return "×".join(map(str, signature[1])) if signature[1] else "scalar"
    if isinstance(signature, tuple):
        parts = [_readable(each) for each in signature]
        return " ".join(part for part in parts if part)
    return signature if isinstance(signature, str) else ""


def _cloned(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.clone()
    if isinstance(result, tuple):
        return tuple(_cloned(each) for each in result)
    return result
