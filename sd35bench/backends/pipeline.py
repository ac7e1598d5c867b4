"""What every diffusers-based backend shares: load, prove, call, time, check.

The images are diffusers' own: one call of `StableDiffusion3Pipeline` (or its image-to-image twin
on the same components) per batch, with one CPU generator per image. Subclasses change the loaded
pipeline in `prepare` (compile, quantise, replace the denoiser) and add to `prove`; everything
else, the refusals included, stays the same, so that backends differ in nothing but speed.

Starting noise is float32 on the CPU for every dtype: torch draws half-precision noise of 16 or
more values as rounded float32 (held by a test), and latents have 16 channels.
"""

import contextlib
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import (
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from sd35bench.backends.base import Backend, Generation
from sd35bench.backends.checkpoint import (
    DTYPES,
    hush_truncation_warnings,
    load_pipeline,
    prove_device,
    prove_dtypes,
)
from sd35bench.backends.stages import DECODE, DENOISER, TEXT, StageMeter
from sd35bench.errors import (
    BackendError,
    InvalidImage,
    OptimizationNotApplied,
    OutOfMemory,
    UnsupportedRequest,
)
from sd35bench.measure import DeviceClock
from sd35bench.types import Load, Request, Scalar, Task

__all__ = ["SAMPLERS", "DiffusersBackend", "generator"]

DEVICES = ("auto", "cpu", "cuda")
SAMPLERS = {"euler": FlowMatchEulerDiscreteScheduler}


class DiffusersBackend(Backend):
    """An SD3 pipeline of diffusers, loaded once; subclasses say how it is made fast."""

    options: ClassVar[Mapping[str, Scalar]] = MappingProxyType({"dtype": "fp32", "device": "auto"})
    """Options that this backend knows, with their defaults."""

    def __init__(self, load: Load) -> None:
        """Load the model, prepare it and prove what is in force.

        Raises: BackendError for a missing or broken model folder or an unknown option;
        OptimizationNotApplied where the device or dtype asked for cannot be had.
        """
        asked = self._read_options(load)
        self._load = load
        self._dtype = _choice("dtype", asked["dtype"], DTYPES)
        self.device = _device(asked["device"])
        torch.set_num_threads(load.threads)
        pipe = load_pipeline(Path(load.model.path), DTYPES[self._dtype])
        if self.device.type == "cuda":
            with foreign_errors():
                pipe.to(self.device)
        self._own_scheduler: Any = pipe.scheduler
        self._schedulers: dict[tuple[str, float | None], Any] = {("euler", None): pipe.scheduler}
        self.prepare(pipe)
        self._decoded: list[torch.Tensor] = []
        self._meter = StageMeter(DeviceClock(str(self.device)))
        self._pipes: dict[Task, Any] = self._install(pipe)
        self.in_force = self.prove(pipe)

    def prepare(self, pipe: Any) -> None:
        """Change the loaded pipeline before its first call; the base leaves it alone."""

    def prove(self, pipe: Any) -> dict[str, Any]:
        """Look at what is loaded and say what is in force.

        Raises: OptimizationNotApplied where that is not what was asked for.
        """
        dtypes = prove_dtypes(pipe, self._dtype)
        if torch.get_num_threads() != self._load.threads:
            raise OptimizationNotApplied(
                f"threads={self._load.threads} asked, torch uses {torch.get_num_threads()}"
            )
        processors = {type(p).__name__ for p in pipe.transformer.attn_processors.values()}
        return {
            "dtype": self._dtype,
            "component_dtypes": dtypes,
            "device": prove_device(pipe, self.device),
            "threads": torch.get_num_threads(),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "attention": "+".join(sorted(processors)),
            "scheduler": type(pipe.scheduler).__name__,
            "shift": float(pipe.scheduler.config.shift),
        }

    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make one image per request in one diffusers call.

        `evaluations` counts every call of the denoiser, skip-layer guidance's extra ones included.

        Raises: UnsupportedRequest, OutOfMemory, InvalidImage (NaN or infinite latents),
        BackendError.
        """
        first = requests[0]
        self._refuse(requests, inits)
        pipe = self._pipes[first.task]
        scheduler = self._scheduler(first)
        if pipe.scheduler is not scheduler:
            pipe.scheduler = scheduler
        last: dict[str, torch.Tensor] = {}

        def step_ended(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict:
            self._meter.step_ended()
            last.update(tensors)  # only the last step's latents stay
            return {}

        self._decoded.clear()
        self._meter.begin()
        with foreign_errors():
            pixels = pipe(
                **self._arguments(requests, inits), callback_on_step_end=step_ended
            ).images
        stages = self._meter.read()
        refuse_not_finite(last["latents"], self._decoded.pop())
        return Generation(
            images=list((pixels * 255).round().astype("uint8")),  # as diffusers' numpy_to_pil
            evaluations=stages.evaluations,
            effective_steps=len(stages.step_s),
            text_s=stages.text_s,
            denoise_s=stages.denoise_s,
            decode_s=stages.decode_s,
            step_s=stages.step_s,
            truncated_tokens=self._truncated_tokens(pipe, [r.prompt for r in requests]),
        )

    def synchronize(self) -> None:
        """Wait for the GPU's queue; the CPU has none."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Drop the model and give its memory back; safe to call twice."""
        self._meter.release()
        self._pipes = {}
        self._schedulers = {}
        self._own_scheduler = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read_options(self, load: Load) -> dict[str, Scalar]:
        unknown = sorted(set(load.backend.options) - set(self.options))
        if unknown:
            known = ", ".join(sorted(self.options))
            raise BackendError(
                f"backend {load.backend.name!r} has no option {unknown[0]!r}; known: {known}"
            )
        return {**self.options, **load.backend.options}

    def _install(self, pipe: Any) -> dict[Task, Any]:
        """Build the image-to-image pipeline on the same components and watch the stages."""
        twin = StableDiffusion3Img2ImgPipeline(**pipe.components)
        for each in (pipe, twin):
            each.set_progress_bar_config(disable=True)
            self._meter.watch(each, "encode_prompt", TEXT)
        self._meter.watch(pipe.transformer, "forward", DENOISER)
        self._meter.watch(pipe.vae, "decode", DECODE, lambda out: self._decoded.append(out[0]))
        hush_truncation_warnings()
        return {Task.TEXT_TO_IMAGE: pipe, Task.IMAGE_TO_IMAGE: twin}

    def _arguments(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> dict[str, Any]:
        """Keyword arguments of the diffusers call for one batch."""
        first = requests[0]
        arguments: dict[str, Any] = {
            "prompt": [r.prompt for r in requests],
            "negative_prompt": [r.negative_prompt for r in requests],
            "num_inference_steps": first.steps,
            "guidance_scale": first.cfg,
            "height": first.height,
            "width": first.width,
            "max_sequence_length": self._max_sequence_length(first),
            "generator": [generator(r.seed) for r in requests],
            "output_type": "np",
            "callback_on_step_end_tensor_inputs": ["latents"],
        }
        if first.task is Task.IMAGE_TO_IMAGE:
            arguments["image"] = [Image.fromarray(i) for i in inits if i is not None]
            arguments["strength"] = first.prompt_strength
        skipping = first.skip_layer_guidance
        if skipping is not None:
            arguments["skip_guidance_layers"] = list(skipping.layers)
            arguments["skip_layer_guidance_scale"] = skipping.scale
            arguments["skip_layer_guidance_start"] = skipping.start
            arguments["skip_layer_guidance_stop"] = skipping.stop
        return arguments

    def _max_sequence_length(self, request: Request) -> int:
        if request.max_sequence_length is not None:
            return request.max_sequence_length
        return self._load.model.max_sequence_length

    def _scheduler(self, request: Request) -> Any:
        """Return the model's own scheduler, or one rebuilt with the request's shift."""
        key = (request.sampler, request.shift)
        if key not in self._schedulers:
            config = self._own_scheduler.config
            self._schedulers[key] = SAMPLERS[request.sampler].from_config(
                config, shift=request.shift
            )
        return self._schedulers[key]

    def _refuse(self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]) -> None:
        """Refuse what diffusers cannot do, before anything runs.

        Raises: UnsupportedRequest; BackendError after `close`.
        """
        if not self._pipes:
            raise BackendError("this backend is closed; load it again")
        first = requests[0]
        pipe = self._pipes[Task.TEXT_TO_IMAGE]
        if any(_setting(r) != _setting(first) for r in requests):
            raise UnsupportedRequest("a batch must share one setting and one size")
        if any((r.init_image is None) != (i is None) for r, i in zip(requests, inits, strict=True)):
            raise UnsupportedRequest(
                "each request with an init image needs its pixels, others none"
            )
        if first.task is Task.IMAGE_TO_IMAGE and first.prompt_strength is None:
            raise UnsupportedRequest("image-to-image needs prompt_strength in (0, 1]")
        if first.sampler not in SAMPLERS:
            known = ", ".join(SAMPLERS)
            raise UnsupportedRequest(f"sampler={first.sampler!r} does not stand yet; use {known}")
        if first.shift is not None and self._own_scheduler.config.use_dynamic_shifting:
            raise UnsupportedRequest("shift acts on no model with dynamic shifting; leave it out")
        _refuse_size(first, pipe)
        _refuse_skip_layers(first, len(pipe.transformer.transformer_blocks))

    def _truncated_tokens(self, pipe: Any, prompts: list[str]) -> tuple[int, ...]:
        """Per prompt, CLIP tokens beyond the limit: the worse of the two tokenizers."""
        limit = pipe.tokenizer_max_length  # diffusers cuts both tokenizers at the first one's
        ids = [tokenizer(prompts).input_ids for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
        return tuple(
            max(0, max(len(a), len(b)) - limit) for a, b in zip(ids[0], ids[1], strict=True)
        )


def generator(seed: int) -> torch.Generator:
    """Return the source of one image's noise: on the CPU, so that a seed means one noise."""
    return torch.Generator("cpu").manual_seed(seed)


def refuse_not_finite(latents: torch.Tensor, decoded: torch.Tensor) -> None:
    """Look for NaN before diffusers' clamp and the cast to uint8 hide it.

    `latents`: [B, 16, H/8, W/8] after the last step; `decoded`: the VAE's [B, 3, H, W].

    Raises: InvalidImage for NaN or infinite values.
    """
    for what, values in (("latents after the last step", latents), ("decoded pixels", decoded)):
        if not bool(torch.isfinite(values).all()):
            raise InvalidImage(f"{what} are NaN or infinite; try backend.dtype=fp32")


@contextlib.contextmanager
def foreign_errors() -> Iterator[None]:
    """Turn torch's and diffusers' errors into ours; anything else is a bug and propagates.

    Raises: OutOfMemory, UnsupportedRequest (a ValueError of diffusers' input check),
    BackendError.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise OutOfMemory(f"{exc}; use a smaller batch, size or dtype") from exc
    except ValueError as exc:
        raise UnsupportedRequest(f"diffusers refused: {exc}") from exc
    except RuntimeError as exc:
        # The CPU allocator has no exception of its own.
        if "allocate memory" in str(exc):
            raise OutOfMemory(f"{exc}; use a smaller batch, size or dtype") from exc
        raise BackendError(f"torch failed: {exc}") from exc


def _choice(name: str, value: Scalar, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise BackendError(f"backend.{name}={value!r} is unknown; known: {', '.join(known)}")
    return value


def _device(asked: Scalar) -> torch.device:
    """Return the device asked for; "auto" prefers CUDA.

    Raises: OptimizationNotApplied where CUDA is asked for and there is none.
    """
    name = _choice("device", asked, DEVICES)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OptimizationNotApplied(
            "backend.device=cuda asked, but torch sees no CUDA device here; "
            "use backend.device=cpu, or a machine with a GPU and a CUDA build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _setting(request: Request) -> tuple[Any, ...]:
    """Return what all requests of a batch must share."""
    return (
        request.task,
        request.steps,
        request.cfg,
        request.prompt_strength,
        request.sampler,
        request.shift,
        request.skip_layer_guidance,
        request.max_sequence_length,
        request.width,
        request.height,
    )


def _refuse_size(request: Request, pipe: Any) -> None:
    multiple = pipe.vae_scale_factor * pipe.patch_size
    largest = pipe.transformer.config.pos_embed_max_size * multiple
    for name, value_px in (("width", request.width), ("height", request.height)):
        if value_px < multiple or value_px % multiple or value_px > largest:
            raise UnsupportedRequest(
                f"{name}={value_px}: this model makes multiples of {multiple} up to {largest} px"
            )


def _refuse_skip_layers(request: Request, layers: int) -> None:
    """Refuse skip-layer guidance where it cannot act: diffusers would fail or ignore it."""
    skipping = request.skip_layer_guidance
    if skipping is None:
        return
    if request.task is Task.IMAGE_TO_IMAGE:
        raise UnsupportedRequest("skip_layer_guidance exists only in text-to-image")
    if request.cfg <= 1:
        raise UnsupportedRequest(f"skip_layer_guidance acts only with cfg > 1, not {request.cfg}")
    outside = [layer for layer in skipping.layers if not 0 <= layer < layers]
    if outside or not skipping.layers:
        raise UnsupportedRequest(
            f"skip_layer_guidance layers {list(skipping.layers)}: this model has 0 to {layers - 1}"
        )
