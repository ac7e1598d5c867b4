"""The compiled core (`sd35bench.core`) as a backend: SD3 and SD3.5 at the speed of the machine.

It takes the parts that diffusers loaded, fuses the denoiser's weights, and makes images by its own
loop. In float32 its final latents are the eager backend's to 1e-4, on the same seeds, in everything
that the eager backend can do. Which executor runs a step is asked for and proven: one that cannot
be had is refused, never replaced.
"""

import gc
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from sd35_kernels import KernelUnavailable
from sd35_kernels.mmdit import check_level
from sd35bench.backends.base import Generation, Probe
from sd35bench.backends.compile import CompiledRegion, HowToCompile, cache_folder, silence_dynamo
from sd35bench.backends.families import text_of
from sd35bench.backends.packed import (
    LAYERS,
    facts_of,
    find_packed,
    keep,
    read_embedders,
    recipe_of,
    stand_in,
)
from sd35bench.backends.pipeline import (
    DiffusersBackend,
    choice,
    foreign_errors,
    on_host,
    refuse_not_finite,
)
from sd35bench.backends.probes import probe_compiler
from sd35bench.backends.samplers import own_shift
from sd35bench.core.executors import EXECUTORS, Compile, build, pick
from sd35bench.core.generate import Ask, Core, generate
from sd35bench.core.model import Config, Embedder, Executor, Weights
from sd35bench.core.schedule import TRAIN_STEPS
from sd35bench.core.text import CachedText, DiskCache, SD3Text
from sd35bench.core.vae import CHOOSE, WAYS, Choices, Vae
from sd35bench.core.weights import config_of_diffusers, fuse
from sd35bench.errors import BackendError, OptimizationNotApplied, UnsupportedRequest
from sd35bench.evaluations import guidance_of, sampler_order
from sd35bench.export import artifact
from sd35bench.export.artifact import Artifact
from sd35bench.loading.sources import DTYPES, load_model
from sd35bench.machine.measure import DeviceClock
from sd35bench.types import Load, Request, Scalar, content_hash

QUANTISATIONS = {"none": "exact", "int8": "int8"}
"""Options, and the executor's tier that each asks for."""
VAE_WAYS = (*CHOOSE, *WAYS)
TEXT_CACHES = ("negative", "all", "disk")
PLAIN_SCHEDULE = {
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
    "invert_sigmas": False,
    "shift_terminal": None,
    "num_train_timesteps": TRAIN_STEPS,
}
"""What the core's schedules assume of the model's own scheduler."""


class CoreBackend(DiffusersBackend):
    """SD3's denoiser on fused weights in a loop of our own.

    Options: `dtype` (fp32, bf16), `device`, `executor` (cpp, compile, torch; auto: the fastest for
    the device), `vae` (contiguous, channels_last, compiled; auto: the faster layout by timing;
    tuned: the fastest of all), `text_cache` (negative: only negative prompts are kept, so that an
    image's time is that of a new prompt; all: prompts too; disk: for later starts as well). Lossy,
    off by default: `quantisation` (int8: 8-bit products, C++ only).
    """

    options = MappingProxyType(
        {
            **DiffusersBackend.options,
            "executor": "auto",
            "quantisation": "none",
            "vae": "auto",
            "text_cache": "negative",
        }
    )

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Look for the device, the instructions, and the compiler that the code goes through."""
        base = super().probe(options)
        asked = {**cls.options, **options}
        if base.ok is not True or asked["executor"] == "torch":
            return base
        found = probe_compiler(str(asked["device"]))
        on_cpu = asked["device"] == "cpu" or not torch.cuda.is_available()
        if found.ok and on_cpu and asked["executor"] != "compile":
            quantised = QUANTISATIONS[str(asked["quantisation"])]
            tier = "bf16" if asked["dtype"] == "bf16" else quantised
            try:
                detail = f"{base.detail}; {check_level(tier)} instructions; {found.detail}"
            except KernelUnavailable as exc:
                remedy = "use backend=eager or compile"
                return Probe(ok=None, detail=f"{base.detail}; {exc}", remedy=remedy)
            return Probe(ok=True, detail=detail)
        return Probe(ok=found.ok, detail=f"{base.detail}; {found.detail}", remedy=found.remedy)

    def load_pipe(self, load: Load, dtype: torch.dtype) -> Any:
        """Load the model; where its packed denoiser is kept, without reading that again.

        Raises: BackendError, OutOfMemory.
        """
        self._tier = QUANTISATIONS[
            choice("quantisation", self.asked["quantisation"], QUANTISATIONS)
        ]
        self._name = pick(choice("executor", self.asked["executor"], EXECUTORS), self.device)
        if self._name == "cpp" and (self._dtype, self._tier) == ("bf16", "exact"):
            self._tier = "bf16"
        packs = self._name == "cpp" and self.device.type == "cpu"
        self._recipe = recipe_of(load, self._dtype, self._tier) if packs else None
        found = find_packed(self._recipe)
        self._packed: Artifact | str | None = found
        if found is None:
            return super().load_pipe(load, dtype)
        instead = {"transformer": stand_in(found)}
        return self.place(load_model(load.model, dtype, self.device, instead=instead))

    def prepare(self, pipe: Any) -> None:
        """Fuse the denoiser's weights and put the core together.

        Raises: UnsupportedRequest for a model of another family; BackendError for a schedule that
        the core does not have; OptimizationNotApplied where the executor cannot be had.
        """
        if self._load.model.family != "sd3":
            raise UnsupportedRequest(
                f"backend {self._load.backend.name} runs SD3's denoiser; a model of the family"
                f" {self._load.model.family!r} runs on the eager and compile backends"
            )
        self._regions: dict[str, CompiledRegion] = {}
        self._settled = False
        _refuse_other_schedules(pipe.scheduler)
        dtype = DTYPES[self._dtype]
        config = config_of_diffusers(pipe.transformer.config)
        embedder, executor = self._denoiser(pipe, config)
        kept = choice("text_cache", self.asked["text_cache"], TEXT_CACHES)
        way = choice("vae", self.asked["vae"], VAE_WAYS)
        self._core: Core | None = Core(
            config=config,
            embedder=embedder,
            executor=executor,
            text=CachedText(_text(pipe, config), disk=self._disk() if kept == "disk" else None),
            vae=Vae(pipe.vae, way, Choices(self._choices_path()), self._compile("vae_decoder")),
            device=self.device,
            dtype=dtype,
            spatial=pipe.vae_scale_factor,
            keep_prompts=kept != "negative",
        )
        self._clock = DeviceClock(str(self.device))
        self._shift = own_shift(pipe.scheduler)

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Say which executor runs, as it says itself."""
        assert self._core is not None
        facts = self._core.executor.facts
        proven = {**super().prove(pipe), "core": facts, "attention": facts["executor"]}
        return {**proven, "packed": facts_of(self._packed), **self._seen()}

    def settle(self) -> None:
        """Add what the warm-up chose and kept."""
        super().settle()
        self._settled = True
        self.in_force = {**self.in_force, **self._seen()}

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make one image per request in one pass of the core.

        Raises: UnsupportedRequest, OutOfMemory, InvalidImage, BackendError.
        """
        self._refuse(requests, inits)
        for region in self._regions.values():
            region.sealed = self._settled and self.timed
        core, first = self._core, requests[0]
        assert core is not None
        order, stamp = sampler_order(first.sampler), self._clock.stamp
        ends: list[Any] = []
        stages: dict[str, Any] = {}
        kept: list[torch.Tensor] = []

        def see(e: int, latents: torch.Tensor) -> None:
            ends.append(stamp())
            if self.keep_latents and e < order:
                kept[:] = [latents]

        def stage(name: str) -> None:
            stages[name] = stamp()

        with foreign_errors():
            last, decoded = generate(core, self._ask(requests, inits), see, stage)
            self._take_faults()
            refuse_not_finite(last, decoded)
            pixels = (decoded * 0.5 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            images = list(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        step_ends = [ends[i : i + order][-1] for i in range(0, len(ends), order)]
        seconds = self._clock.seconds
        marks = [stages["denoise"], *step_ends]
        step_s = tuple(seconds(a, b) for a, b in zip(marks, step_ends, strict=False))
        return Generation(
            images=images,
            evaluations=core.evaluations,
            effective_steps=len(step_s),
            text_s=seconds(stages["text"], stages["start"]),
            denoise_s=sum(step_s),
            decode_s=seconds(stages["decode"], stages["end"]),
            step_s=step_s,
            truncated_tokens=self.family.truncated_tokens(
                [text_of(r) for r in requests], self._max_sequence_length(first)
            ),
            latents_first=on_host(kept[0]) if kept else None,
            latents_last=on_host(last) if self.keep_latents else None,
        )

    def close(self) -> None:
        """Drop the core too."""
        self._core, self._regions = None, {}
        super().close()

    def _denoiser(self, pipe: Any, config: Config) -> tuple[Embedder, Executor]:
        """Take the denoiser out of the pipeline, or as it was packed before, and keep it packed."""
        transformer, pipe.transformer = pipe.transformer, _Absent(pipe.transformer)
        dtype = DTYPES[self._dtype]
        steps = torch.float32 if self._name == "cpp" else dtype
        if isinstance(self._packed, Artifact):
            embedder = Embedder(config, read_embedders(self._packed), steps)
            return embedder, self._executor(config, self._packed.folder / LAYERS)
        weights = dict(transformer.state_dict())
        source = dict(transformer.config)
        del transformer
        with foreign_errors():
            fused = fuse(config, weights, dtype)
        gc.collect()
        embedder = Embedder(config, fused, steps)
        executor = self._executor(config, fused)
        if self._recipe is not None:
            self._packed = keep(self._recipe, source, embedder, executor)
        return embedder, executor

    def _executor(self, config: Config, weights: Weights | Path) -> Executor:
        """Build what runs a step; a path is that of packed weights.

        Raises: OptimizationNotApplied where it cannot be had.
        """
        name = self._name
        if name == "cpp" and (
            self.device.type != "cpu" or (self._dtype == "bf16") != (self._tier == "bf16")
        ):
            raise OptimizationNotApplied(
                f"backend.executor=cpp runs in fp32, int8 or bf16 on a CPU, not in {self._dtype}"
                f" with quantisation={self.asked['quantisation']} on {self.device};"
                " use backend.executor=compile"
            )
        try:
            return build(
                name,
                config,
                weights,
                tier=self._tier,
                threads=self._load.threads,
                compiled=self._compile("denoiser"),
            )
        except KernelUnavailable as exc:
            raise OptimizationNotApplied(
                f"backend.executor={name}, quantisation={self.asked['quantisation']}: {exc};"
                " backend.executor=torch runs everywhere"
            ) from exc

    def _compile(self, name: str) -> Compile:
        """Return what compiles a function for each shape: one graph, kept on disk."""

        def compiled(function: Callable[..., torch.Tensor]) -> CompiledRegion:
            silence_dynamo()
            how = HowToCompile(
                compiler="inductor",
                mode="default",
                fullgraph=True,
                dynamic=False,
                cuda_graphs=False,
                cache_dir=cache_folder(),
            )
            self._regions[name] = CompiledRegion(name, function, how)
            return self._regions[name]

        return compiled

    def _take_faults(self) -> None:
        """Refuse an image during which something that is compiled did not run so.

        Raises: OptimizationNotApplied.
        """
        faults = [fault for region in self._regions.values() for fault in region.take_faults()]
        if faults:
            raise OptimizationNotApplied("; ".join(dict.fromkeys(faults)))

    def _disk(self) -> DiskCache:
        """Where embeddings are kept: a folder for each model, dtype and the libraries' versions."""
        versions = [torch.__version__, transformers.__version__]
        model = [self._load.model.weights_digest, str(self._load.model.changes)]
        digest = content_hash([*versions, *model, self._dtype, str(self.device)])[:16]
        return DiskCache(artifact.artifact_root().parent / "text" / digest)

    def _choices_path(self) -> Path:
        """Where what was timed is kept: a file for each model, machine and version of torch."""
        machine = [platform.processor(), torch.backends.cpu.get_cpu_capability(), str(self.device)]
        model = [self._load.model.name, self._load.model.weights_digest, self._load.threads]
        digest = content_hash([*machine, *model, self._dtype, torch.__version__])[:16]
        return artifact.artifact_root().parent / "core" / f"{digest}.json"

    def _ask(self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]) -> Ask:
        first, own = requests[0], self._shift
        assert own is not None
        return Ask(
            prompts=[text_of(r) for r in requests],
            negatives=[r.negative_prompt for r in requests],
            seeds=[r.seed for r in requests],
            height=first.height,
            width=first.width,
            steps=first.steps,
            guidance=guidance_of(first),
            sampler=first.sampler,
            shift=own if first.shift is None else first.shift,
            tokens=self._max_sequence_length(first),
            inits=[_fitted(i, first) for i in inits if i is not None],
            strength=first.prompt_strength or 1.0,
        )

    def _seen(self) -> dict[str, Any]:
        core = self._core
        assert core is not None
        return {
            "compile": {name: asdict(region.counts) for name, region in self._regions.items()},
            "vae": dict(core.vae.chosen),
            "text_cache": {
                "kept": self.asked["text_cache"],
                "hits": core.text.hits,
                "read": core.text.read,
                "misses": core.text.misses,
            },
        }


class _Absent:
    """Stands where the transformer was: its configuration, for what reads that."""

    attn_processors: Mapping[str, Any] = {}

    def __init__(self, transformer: Any) -> None:
        self.config = transformer.config
        self.dtype: torch.dtype = transformer.dtype
        self.device: torch.device = transformer.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nobody calls it. Raises: BackendError."""
        raise BackendError("the core's weights are fused: diffusers' transformer is gone")


def _text(pipe: Any, config: Config) -> Any:
    """Return what embeds prompts: the model's encoders, or what stands in for them."""
    random_text = getattr(pipe, "random_text", None)
    if random_text is not None:
        return random_text
    return SD3Text(
        [pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3],
        [pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3],
        config.context_width,
    )


def _refuse_other_schedules(scheduler: Any) -> None:
    """Refuse a model whose own schedule is more than a shift. Raises: BackendError."""
    config = scheduler.config
    other = {k: config[k] for k, plain in PLAIN_SCHEDULE.items() if config.get(k, plain) != plain}
    if other or own_shift(scheduler) is None:
        raise BackendError(
            f"model.path: its {type(scheduler).__name__} has {other or 'no fixed shift'}, which the"
            " core does not know; use backend=eager"
        )


def _fitted(image: np.ndarray, request: Request) -> np.ndarray:
    """Return the init image in the request's size, resized as diffusers' image processor does."""
    if image.shape[:2] == (request.height, request.width):
        return image
    size = (request.width, request.height)
    return np.asarray(Image.fromarray(image).resize(size, resample=Image.Resampling.LANCZOS))
