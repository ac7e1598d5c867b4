"""The `compile` backend: torch.compile of the denoiser and of the VAE's decoder, proven.

What is compiled is the bound `forward`, put back on the module as its own attribute, so that the
stage meter's stamps lie outside the graph. The text encoders, the scheduler and the VAE's encoder
(once per image-to-image image) stay eager. Shapes are static unless `dynamic`: a graph for each
batch size, image size and text length; guidance off (half the batch) and skip-layer guidance (one
more call, of fewer layers) have graphs of their own. Warm-up compiles them all; `settle` closes
the list, and a timed trial that compiles something later fails and says why (see `compiled`).

Cost: tracing is seconds per graph and never cached. Code generation is most of a cold start (on a
CPU one run of g++ per kernel) and comes from the persistent cache on the next: `cache` in
`in_force` says which of the two a session saw.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from sd35bench import disk
from sd35bench.backends.base import Generation, Probe
from sd35bench.backends.compiled import (
    CACHE_VARIABLE,
    COMPILERS,
    MODES,
    CompiledRegion,
    HowToCompile,
    hush_dynamo,
)
from sd35bench.backends.pipeline import DiffusersBackend, choice
from sd35bench.backends.probes import probe_compiler
from sd35bench.errors import BackendError, OptimizationNotApplied
from sd35bench.types import Request, Scalar

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
CACHES = ("keep", "fresh")


class CompileBackend(DiffusersBackend):
    """A diffusers pipeline whose denoiser and VAE decoder run as compiled graphs, or not at all.

    A subclass that changes the denoiser does so in `prepare`, before calling this one's.
    """

    options: ClassVar[Mapping[str, Scalar]] = MappingProxyType(
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
        asked = self._read_options(self._load)
        hush_dynamo()
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
        self._compile_asked = asked
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

    def _how(self, asked: Mapping[str, Scalar]) -> HowToCompile:
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
            "channels_last": self._compile_asked["channels_last"],
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
