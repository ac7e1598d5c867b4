"""What a backend is: something that turns requests into images, one method plus `close`.

A backend holds one loaded model and answers one batch at a time. It never times itself as a
whole (the worker does, between synchronisations) but reports the stages that only it can see.
Modules register by *kind* in `KINDS` and are imported only when loaded, so that naming a backend
costs nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sd35bench import plugins
from sd35bench.types import Flops, Load, Request, Scalar

KINDS = {
    "compile": "sd35bench.backends.compile:CompileBackend",
    "core": "sd35bench.backends.core:CoreBackend",
    "eager": "sd35bench.backends.eager:EagerBackend",
    "fake": "sd35bench.backends.fake:FakeBackend",
    "int8": "sd35bench.backends.int8:Int8Backend",
    "onnx": "sd35bench.backends.onnx_runtime:OnnxBackend",
    "openvino": "sd35bench.backends.openvino_runtime:OpenVinoBackend",
    "w8a8": "sd35bench.backends.w8a8:W8A8Backend",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One batch of images and what was seen while making it.

    `images`: uint8 RGB [H, W, 3], one per request. `evaluations`: denoiser calls per image, as
    counted; guidance's second half of the batch is not counted. Stages are wall seconds of the
    whole batch, ``None`` where the backend cannot see them; `step_s` has one entry per step.
    `truncated_tokens`: per request, prompt tokens that did not fit. `latents_first` and
    `latents_last`: float32 [B, C, h, w] after the first and the last step, where the backend was
    told to keep them.
    """

    images: list[np.ndarray]
    evaluations: int | None = None
    effective_steps: int | None = None
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    step_s: tuple[float, ...] = ()
    truncated_tokens: tuple[int, ...] = field(default=())
    latents_first: np.ndarray | None = None
    latents_last: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a backend can run on this machine, tried without a model.

    `ok`: ``True`` it can; ``False`` it cannot, though everything that the package itself brings
    is expected to be there; ``None`` it cannot, for want of something optional (an extra, a GPU).
    `detail` says what was found, `remedy` what to do: ``None`` where there is nothing to do.
    """

    ok: bool | None
    detail: str
    remedy: str | None = None


class Backend(ABC):
    """One loaded model that turns requests into images.

    `in_force` is what the backend proved about itself (dtype, device, attention, providers …),
    not what it was asked for; it is read after loading and again after `settle`. `keep_latents`
    asks `generate` for the latents after the first and the last step; `timed` says whether the next
    call's time counts, so that one that had to compile something can refuse to be a measurement.
    """

    in_force: dict[str, Any]
    keep_latents: bool = False
    timed: bool = True

    @classmethod
    def probe(cls, options: Mapping[str, Scalar]) -> Probe:
        """Try cheaply (well under a second beyond imports) whether a load could work here.

        `options`: those of the backend's YAML. Called only once the module could be imported, so
        a module imports optional libraries where it uses them, and its probe tries those imports.
        """
        return Probe(ok=True, detail="needs nothing more than the package")

    @abstractmethod
    def generate(
        self, requests: Sequence[Request], inits: Sequence[np.ndarray | None]
    ) -> Generation:
        """Make one image per request; all requests share setting and size, each has its own seed.

        `inits`: uint8 RGB [H, W, 3] where the request has an init image, else ``None``.
        Raises: BackendError (a subclass says which).
        """

    def settle(self) -> None:  # noqa: B027 - most backends have proven themselves by loading
        """Prove what only warm-up can show (graphs compiled, caches hit); called once after it.

        Raises: OptimizationNotApplied.
        """

    def flops(self, request: Request, evaluations: int | None) -> Flops | None:
        """Count one image's floating-point operations, from the configuration alone."""
        return None

    def synchronize(self) -> None:  # noqa: B027 - a backend without a device queue has nothing to do
        """Wait until the device has finished what was queued."""

    def close(self) -> None:  # noqa: B027 - most backends end with their process
        """Release what was loaded; safe to call twice."""


def backend_class(kind: str) -> type[Backend]:
    """Import a kind's module, a plug-in's too, and return its backend class.

    Raises: ConfigError for an unknown kind and for a plug-in that cannot be had, ImportError where
    a module of ours cannot be imported.
    """
    return plugins.load_own("backends", kind, Backend, KINDS)


def load_backend(load: Load) -> Backend:
    """Import the backend's module and load the model into it.

    Raises: ConfigError for an unknown kind, BackendError where loading fails.
    """
    constructor: Any = backend_class(load.backend.kind)
    return constructor(load)
