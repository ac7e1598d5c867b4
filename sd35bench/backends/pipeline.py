"""What every diffusers-based backend shares: load, prove, call, time, check.

The images are diffusers' own: one call of the model family's pipeline (`families`) per batch, with
one CPU generator per image. Subclasses change the loaded pipeline in `prepare` (compile, quantise,
replace the denoiser) and add to `prove`; everything else, the refusals included, stays the same,
so that backends differ in nothing but speed.

Starting noise is float32 on the CPU for every dtype: torch draws half-precision noise of 16 or
more values as rounded float32 (held by a test), and latents of an image have at least 16.
"""

import contextlib
import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch

from sd35bench.backends.base import Backend, Generation, Probe
from sd35bench.backends.families import Family, family_of, text_of
from sd35bench.backends.flops import image_flops
from sd35bench.backends.guided import guided, is_plain
from sd35bench.backends.probes import probe_device
from sd35bench.backends.samplers import own_shift
from sd35bench.backends.stages import StageMeter
from sd35bench.errors import (
    BackendError,
    InvalidImage,
    OptimizationNotApplied,
    OutOfMemory,
    UnsupportedRequest,
)
from sd35bench.evaluations import SAMPLERS, sampler_order
from sd35bench.evaluations import evaluations as count_evaluations
from sd35bench.fields import setting_identity
from sd35bench.loading.sources import DTYPES, load_model, prove_device, prove_dtypes
from sd35bench.machine.measure import DeviceClock
from sd35bench.types import Flops, Load, Request, Scalar, Task

DEVICES = ("auto", "cpu", "cuda")


class DiffusersBackend(Backend):
    """A diffusers pipeline, loaded once; subclasses say how it is made fast.

    `samplers`, `tasks` and `skip_layers` are narrowed by a subclass that can do less than its
    model's family.
    """

    options: ClassVar[Mapping[str, Scalar]] = MappingProxyType({"dtype": "fp32", "device": "auto"})
    """Options that this backend knows, with their defaults."""
    samplers: ClassVar[tuple[str, ...]] = SAMPLERS
    tasks: ClassVar[tuple[Task, ...]] = tuple(Task)
    skip_layers: ClassVar[bool] = True

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Look for the device asked for, and for hardware of the dtype."""
        return probe_device({**cls.options, **options})

    def __init__(self, load: Load) -> None:
        """Load the model, prepare it and prove what is in force.

        Raises: BackendError for a missing or broken model or an unknown option;
        OptimizationNotApplied where the device or dtype asked for cannot be had.
        """
        self.asked = _read_options(load, self.options)
        self._load = load
        self._dtype = choice("dtype", self.asked["dtype"], DTYPES)
        self.device = _device(self.asked["device"])
        torch.set_num_threads(load.threads)
        pipe = self.load_pipe(load, DTYPES[self._dtype])
        self._components = _configurations(pipe)
        self._schedulers: dict[tuple[str, float | None], Any] = {}
        self.prepare(pipe)
        self._decoded: list[torch.Tensor] = []
        self._meter = StageMeter(DeviceClock(str(self.device)))
        self.family: Family = family_of(load.model.family, pipe)
        self.family.watch(self._meter, lambda out: self._decoded.append(out[0]))
        self._pipes: dict[Task, Any] = self.family.pipes
        self.in_force = self.prove(pipe)

    def load_pipe(self, load: Load, dtype: torch.dtype) -> Any:
        """Load the model and move it to the device. Raises: BackendError, OutOfMemory."""
        return self.place(load_model(load.model, dtype, self.device))

    def place(self, pipe: Any) -> Any:
        """Move a loaded pipeline to the device. Raises: OutOfMemory, BackendError."""
        if self.device.type == "cuda":
            with foreign_errors():
                pipe.to(self.device)
        return pipe

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
            **getattr(pipe, "facts", {}),
            "dtype": self._dtype,
            "component_dtypes": dtypes,
            "device": self.prove_place(pipe),
            "threads": torch.get_num_threads(),
            "float32_matmul": torch.get_float32_matmul_precision(),
            "attention": "+".join(sorted(processors)),
            "scheduler": type(pipe.scheduler).__name__,
            "shift": own_shift(pipe.scheduler),
        }

    def prove_place(self, pipe: Any) -> str:
        """Return the device that holds every parameter.

        Raises: OptimizationNotApplied where one lies elsewhere.
        """
        return prove_device(pipe, self.device)

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
        order = sampler_order(first.sampler)
        latents = _Latents(order, keep_first=self.keep_latents)

        def ended(index: int, after: torch.Tensor) -> None:
            self._meter.step_ended()
            latents.see(index, after)

        self._decoded.clear()
        self._meter.begin()
        how = (
            contextlib.nullcontext()
            if is_plain(first)
            else guided(pipe, first, self._meter.loop_began)
        )
        with foreign_errors(), how:
            pixels = pipe(**self._arguments(requests, inits), **self.family.listen(ended)).images
        stages = self._meter.read(order)
        refuse_not_finite(latents.last, self._decoded.pop())
        return Generation(
            images=list((pixels * 255).round().astype("uint8")),  # as diffusers' numpy_to_pil
            effective_steps=len(stages.step_s),
            **asdict(stages),
            truncated_tokens=self.family.truncated_tokens(
                [text_of(r) for r in requests], self._max_sequence_length(first)
            ),
            latents_first=on_host(latents.first) if self.keep_latents else None,
            latents_last=on_host(latents.last) if self.keep_latents else None,
        )

    def flops(self, request: Request, evaluations: int | None) -> Flops | None:
        """Count one image's operations from the parts' configurations; SD3's family only."""
        if self._load.model.family != "sd3":
            return None
        whole = replace(request, max_sequence_length=self._max_sequence_length(request))
        calls = count_evaluations(request) if evaluations is None else evaluations
        return image_flops(self._components, whole, calls)

    def synchronize(self) -> None:
        """Wait for the GPU's queue; the CPU has none."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Drop the model and give its memory back; safe to call twice."""
        self._meter.release()
        self._pipes = {}
        self._schedulers = {}
        if hasattr(self, "family"):  # it holds the model too
            del self.family
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _arguments(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> dict[str, Any]:
        """Keyword arguments of the diffusers call for one batch, callbacks left out."""
        tokens = self._max_sequence_length(requests[0])
        return {
            **self.family.arguments(requests, inits, tokens),
            "generator": [generator(r.seed) for r in requests],
        }

    def _max_sequence_length(self, request: Request) -> int:
        if request.max_sequence_length is not None:
            return request.max_sequence_length
        return self._load.model.max_sequence_length

    def _scheduler(self, request: Request) -> Any:
        """Return the request's scheduler, built once for each sampler and shift.

        Raises: UnsupportedRequest for what the model's own schedule does not allow.
        """
        key = (request.sampler, request.shift)
        if key not in self._schedulers:
            self._schedulers[key] = self.family.scheduler(request)
        return self._schedulers[key]

    def _refuse(self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]) -> None:
        """Refuse what diffusers cannot do, before anything runs.

        Raises: UnsupportedRequest; BackendError after `close`.
        """
        if not self._pipes:
            raise BackendError("this backend is closed; load it again")
        first = requests[0]
        if len({setting_identity(r) for r in requests}) > 1:
            raise UnsupportedRequest("a batch must share one setting and one size")
        if any((r.init_image is None) != (i is None) for r, i in zip(requests, inits, strict=True)):
            raise UnsupportedRequest(
                "each request with an init image needs its pixels, others none"
            )
        if first.task is Task.IMAGE_TO_IMAGE and first.prompt_strength is None:
            raise UnsupportedRequest("image-to-image needs prompt_strength in (0, 1]")
        self._refuse_beyond_backend(first)
        self.family.refuse(first)
        for request in requests:
            self.family.refuse_texts(request)

    def _refuse_beyond_backend(self, request: Request) -> None:
        name = self._load.backend.name
        if request.task not in self.tasks:
            raise UnsupportedRequest(f"backend {name} does {', '.join(self.tasks)} only")
        if request.sampler not in self.samplers:
            known = ", ".join(self.samplers)
            raise UnsupportedRequest(f"sampler={request.sampler!r}: backend {name} has {known}")
        if request.skip_layer_guidance is not None and not self.skip_layers:
            raise UnsupportedRequest(f"skip_layer_guidance: backend {name} leaves no layers out")


class _Latents:
    """The latents after the last step and, where asked for, after the first."""

    def __init__(self, order: int, *, keep_first: bool) -> None:
        self._order, self._keep_first = order, keep_first
        self.first: torch.Tensor | None = None
        self._last: torch.Tensor | None = None

    def see(self, index: int, latents: torch.Tensor) -> None:
        """Keep what counts of the evaluation `index`; a reference, nothing is copied."""
        self._last = latents
        if self._keep_first and index < self._order:
            self.first = latents

    @property
    def last(self) -> torch.Tensor:
        """After the last step."""
        assert self._last is not None
        return self._last


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


def choice(name: str, value: Scalar, known: Collection[str]) -> str:
    """Return an option's value if it is one of the known words. Raises: BackendError."""
    if not isinstance(value, str) or value not in known:
        raise BackendError(f"backend.{name}={value!r} is unknown; known: {', '.join(known)}")
    return value


def _read_options(load: Load, known: Mapping[str, Scalar]) -> dict[str, Scalar]:
    unknown = sorted(set(load.backend.options) - set(known))
    if unknown:
        raise BackendError(
            f"backend {load.backend.name!r} has no option {unknown[0]!r};"
            f" known: {', '.join(sorted(known))}"
        )
    return {**known, **load.backend.options}


def _device(asked: Scalar) -> torch.device:
    """Return the device asked for; "auto" prefers CUDA.

    Raises: OptimizationNotApplied where CUDA is asked for and there is none.
    """
    name = choice("device", asked, DEVICES)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise OptimizationNotApplied(
            "backend.device=cuda asked, but torch sees no CUDA device here; "
            "use backend.device=cpu, or a machine with a GPU and a CUDA build of torch"
        )
    return torch.device("cuda", torch.cuda.current_device())


def on_host(latents: torch.Tensor | None) -> np.ndarray | None:
    """Copy latents to the CPU, in float32."""
    return None if latents is None else latents.detach().to("cpu", torch.float32).numpy()


def _configurations(pipe: Any) -> dict[str, dict[str, Any]]:
    """Each part's configuration as it was loaded, with its `class_name`, for counting FLOPs."""
    found = {}
    for name, part in pipe.components.items():
        config = getattr(part, "config", None)
        if config is None:
            continue
        plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        found[name] = {**plain, "class_name": type(part).__name__}
    return found
