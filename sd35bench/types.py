"""The nouns of the project as frozen records.

A `Request` is everything asked for one image. A `Load` is what a worker process must hold
(a model on a backend). A `Trial` is one request on one load; its key is a content hash, so a
trial is never done twice and never mistaken for another. A `Record` is what a trial left behind,
success or failure; a `Session` is what one worker's life left behind (load, first call,
environment). Units are suffixes. Unknown is ``None``, never 0.

Records go to disk as JSON through `to_json` and come back through msgspec, which reads these very
dataclasses: a record takes 35 µs instead of 430 µs with a reader of our own.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from sd35bench.errors import StoreError

Scalar = str | int | float | bool | None
NO_WEIGHTS = "none"
"""The digest of what a backend holds that reads no weights."""
T = TypeVar("T")


class Task(StrEnum):
    """What a request does: from noise, or from an init image."""

    TEXT_TO_IMAGE = "text-to-image"
    IMAGE_TO_IMAGE = "image-to-image"


class Status(StrEnum):
    """How a trial ended. Only `OK` has timings and an image; `AMBIGUOUS` may have been billed."""

    OK = "ok"
    ERROR = "error"
    UNSUPPORTED = "unsupported"
    OUT_OF_MEMORY = "out-of-memory"
    INVALID_IMAGE = "invalid-image"
    CRASHED = "crashed"
    TIMED_OUT = "timed-out"
    SKIPPED = "skipped"
    AMBIGUOUS = "ambiguous"


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipLayerGuidance:
    """Skip-layer guidance: which layers, how strong, from and until which fraction of the steps."""

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything asked for one image; what each field decides stands in `fields`.

    `init_image` is the SHA-256 of the init image's file in the study's store; `prompt_strength`
    in (0, 1] acts only with it and is ``None`` without. `shift`, `max_sequence_length` ``None``
    means the model's own. `guidance_interval` is LO-HI, fractions of the steps; `step_cache` is as
    `core.cache.evaluated_steps` takes it. `extra` are inputs that only a hosted model has, `images`
    its input images by role (SHA-256 of the file), both (name, value) in order of name; what is not
    there has the model's default. `prompt_2` and `prompt_3` are what Stable Diffusion 3's second
    CLIP encoder and T5 read in place of the prompt, "" is no text; `prompt_weights` are words of
    these texts and their weights, as ``red cube:1.3; blue:0.5``.
    """

    prompt: str
    steps: int
    cfg: float
    seed: int
    width: int
    height: int
    negative_prompt: str = ""
    init_image: str | None = None
    prompt_strength: float | None = None
    sampler: str = "euler"
    shift: float | None = None
    skip_layer_guidance: SkipLayerGuidance | None = None
    guidance: str = "cfg"
    zero_init_steps: int = 1
    apg_eta: float = 0.0
    apg_norm: float = 0.0
    apg_momentum: float = 0.0
    guidance_interval: str = "0-1"
    step_cache: str = "none"
    max_sequence_length: int | None = None
    output_format: str = "png"
    output_quality: int = 90
    extra: tuple[tuple[str, Scalar], ...] = ()
    images: tuple[tuple[str, str], ...] = ()
    prompt_2: str | None = None
    prompt_3: str | None = None
    prompt_weights: str | None = None

    @property
    def task(self) -> Task:
        """Image-to-image with an init image, text-to-image without."""
        return Task.TEXT_TO_IMAGE if self.init_image is None else Task.IMAGE_TO_IMAGE

    @property
    def effective_steps(self) -> int:
        """Denoising steps that really run.

        Source: diffusers `StableDiffusion3Img2ImgPipeline.get_timesteps`: of N steps at strength s
        the first ``int(N - min(N * s, N))`` are left out.
        """
        if self.prompt_strength is None:
            return self.steps
        return self.steps - int(self.steps - min(self.steps * self.prompt_strength, self.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a user puts on top of a model's weights, or in the place of a part of them.

    `kind`: "lora", "transformer" or "vae". `digest` is the SHA-256 of what lies at `path`;
    `weight` the factor of a LoRA.
    """

    kind: str
    path: str
    digest: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which weights: a name, where they are, and the SHA-256 digest of what is there.

    `family` is the pipeline that runs them: "sd3", "sana", "pixart". `path` is a diffusers folder
    or one safetensors file; `components` the folder that holds what such a file lacks. `weights`
    is "checkpoint" or "random": then the architecture of `name` gets seeded noise for weights,
    `text_encoders` says whether encoders are built too, and `path` is empty. `layers` is the
    number of transformer blocks where it is not the model's own. `revision` is the Hub's commit.
    `changes` are what is put on top; `variant` is the spelling of weight files that was asked for.
    `weights_digest` covers both.
    """

    name: str
    path: str
    weights_digest: str
    max_sequence_length: int
    target_latency_s: float | None = None
    family: str = "sd3"
    weights: str = "checkpoint"
    layers: int | None = None
    text_encoders: bool = True
    components: str | None = None
    revision: str | None = None
    changes: tuple[Change, ...] = ()
    variant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A backend variant: its name, the module that implements it (`kind`), and its options."""

    name: str
    kind: str
    options: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one worker process holds: a model on a backend with so many threads."""

    model: ModelSpec
    backend: BackendSpec
    threads: int

    @property
    def key(self) -> str:
        """Content hash of the model's digest, the backend's options and the thread count."""
        identity = [self.model.name, self.model.weights_digest, to_json(self.backend), self.threads]
        return content_hash(identity)

    @property
    def is_hosted(self) -> bool:
        """Whether a hosted service makes the images; its backends alone have a base URL."""
        return "base_url" in self.backend.options

    def told(self, value: T) -> T | None:
        """A fact of what is loaded here; ``None`` of a hosted service, which does not tell it."""
        return None if self.is_hosted else value

    @property
    def known_digest(self) -> str | None:
        """The digest of the weights, where it is told."""
        return self.told(self.model.weights_digest)

    @property
    def known_threads(self) -> int | None:
        """The threads that made the images, where they are told."""
        return self.told(self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRef:
    """Where a prompt came from: not part of a trial's identity, needed to score it.

    `set` is the prompt set's name ("nano", "geneval", a file's name), `split` its part
    ("tune", "heldout", "all"), `level` a difficulty where the set knows one. `init_prompt` is the
    caption of the init image where the set knows it. `held_out` is how many prompts its file kept
    for a confirmation; `source` has the settings below `prompts.` that read the file again, where
    its name alone does not. `tags` are the file's own columns: name → its values. `init_done` says
    what was done to the init image's own values to show it, as `pictures.Picture` does.
    """

    id: str
    set: str
    split: str = "all"
    level: str | None = None
    init_prompt: str | None = None
    held_out: int | None = None
    source: dict[str, str] = field(default_factory=dict)
    tags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    init_done: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One request on one load; made by `fields.make_trial`, which computes the key."""

    key: str
    load: Load
    request: Request
    batch_size: int
    prompt: PromptRef


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Wall seconds between synchronisations, for one image (batch 1) or one batch.

    `generate_s` runs from the request to pixels on the host (to the file, of a hosted service) and
    contains `text_s`, `denoise_s` and `decode_s`; `encode_s` is the image file's encoding. `step_s`
    has one entry per denoising step. A stage that a backend cannot see is ``None``.
    """

    generate_s: float
    encode_s: float
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    step_s: tuple[float, ...] = ()

    @property
    def latency_s(self) -> float:
        """What a user waits for: generation and the encoding of the file."""
        return self.generate_s + self.encode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """Floating-point operations of one image by stage (a multiply-add is 2); counted, not timed."""

    text: float
    denoise: float
    decode: float
    encode: float = 0.0

    @property
    def total(self) -> float:
        """All stages together."""
        return self.text + self.denoise + self.decode + self.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """What NVML said right after an image; ``None`` is what this driver does not tell.

    `throttled` names the active reasons, empty if there are none. `foreign_processes` counts other
    processes that computed on the device.
    """

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    throttled: tuple[str, ...] | None = ()
    foreign_processes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What else the machine did around a timed trial; ``None`` is unknown.

    `canary_before` and `canary_after` are the speed of a fixed loop right before and after,
    relative to the session's `CanaryFacts.best`. Of trials that share a block only the first has
    one before and the last one after. `cpu_share` is the worker's CPU seconds over wall seconds
    times threads, `switches` how often it was taken off a core. Since the last reading:
    `pressure`, the share of time in which some task waited for a core (PSI), `steal`, the share of
    the machine's time that its host took, and `load_1m`, the load average.
    """

    canary_before: float | None = None
    canary_after: float | None = None
    cpu_share: float | None = None
    switches: int | None = None
    pressure: float | None = None
    steal: float | None = None
    load_1m: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryFacts:
    """A session's canary: which loop on how many threads, the machine's best in 1e9 operations/s.

    `machine` names what a best speed belongs to: hardware, loop and threads.
    """

    kind: str
    threads: int
    best: float
    machine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Peaks of the worker process so far, in bytes; ``None`` where there is no such memory."""

    peak_rss_bytes: int
    peak_vram_bytes: int | None = None
    peak_allocator_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteCall:
    """One prediction of a hosted service: where its seconds went, and what it cost.

    `submit_s` is the create's round trip, after our own waits for the rate limit; `queue_s` what
    the service took beyond `predict_s`, its own inference time; `download_s` the image file's. Its
    end was seen `poll_bound_s` late at most, by which `queue_s` and the latency may be too long.
    `in_flight` is the most predictions that the run had open meanwhile (1: single-stream).
    `resumed` ones were found again after a crash or a lost answer: their times are no measurements.
    `cost_reported`: by the service; else it is the listed price. `unsent` names request fields that
    the protocol cannot carry; `attempts` counts creates, refused ones included. `made_by` is the
    model that made the image, where the server names it: another one may stand in for what was
    asked for (`serve stand_in_for=`).
    """

    provider: str
    prediction_id: str | None
    request_id: str | None
    in_flight: int
    attempts: int
    polls: int
    submit_s: float | None
    queue_s: float | None
    predict_s: float | None
    poll_bound_s: float | None
    download_s: float | None
    cost_usd: float | None
    cost_reported: bool
    unsent: tuple[str, ...] = ()
    resumed: bool = False
    made_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One worker's life: environment, load and first call apart from the steady state.

    `in_force` is what the backend proved about itself; `environment` is a flat mapping
    (versions, device, commit …) and `environment_id` its hash. `first_call_s` is the first image,
    compilation included, `warmup_s` all warm-ups. `start` says which of the run's `starts` this
    worker served, from 0; one that replaced a dead worker has the same number. `canary` is there
    where trials were timed between readings of one.
    """

    id: str
    load: Load
    started_at: str
    environment_id: str
    environment: dict[str, Scalar]
    load_s: float
    first_call_s: float
    warmup_s: float
    in_force: dict[str, Any]
    start: int = 0
    canary: CanaryFacts | None = None


CUT = "were cut: they hold more tokens than a text encoder reads, which sees the first ones only"
"""What is said of prompts whose records have `truncated_tokens`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a trial left behind; `timings` and `image` only if the status is `OK`.

    `image` is the SHA-256 of the image file. `evaluations` counts the denoiser's calls per image,
    guidance's second half of the batch not counted. `truncated_tokens` counts prompt tokens that
    some text encoder (CLIP, T5) did not see. `batch_actual` is how many images ran together.
    `latents` is the SHA-256 of the kept latents (`store.Study.read_latents`), where they were asked
    for; `remote` is there where a hosted service was asked, `surroundings` where the trial was
    timed here.
    """

    trial: Trial
    status: Status
    session_id: str
    started_at: str
    phase: str | None = None
    error: str | None = None
    timings: Timings | None = None
    memory: Memory | None = None
    image: str | None = None
    image_bytes: int | None = None
    effective_steps: int | None = None
    evaluations: int | None = None
    truncated_tokens: int | None = None
    batch_actual: int = 1
    latents: str | None = None
    flops: Flops | None = None
    gpu: GpuState | None = None
    remote: RemoteCall | None = None
    surroundings: Surroundings | None = None

    @property
    def unsent(self) -> tuple[str, ...]:
        """Request fields that the service that made the image has no input for."""
        return () if self.remote is None else self.remote.unsent


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric's value for one trial's image; ``None`` where it does not apply."""

    metric: str
    key: str
    image: str
    value: float | None
    detail: dict[str, Any] = field(default_factory=dict)


_PLAIN = frozenset({str, int, float, bool, type(None)})


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of `value`'s canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(value: Any) -> Any:
    """Turn records into plain JSON values; mappings and scalars pass through."""
    if type(value) in _PLAIN:  # nine of ten values
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {f.name: to_json(getattr(value, f.name)) for f in fields}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[T], data: Any) -> T:
    """Rebuild a record of type `cls` from `to_json`'s output; unknown keys are ignored.

    Raises: StoreError where a required field is missing or a value has another type.
    """
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as exc:
        raise StoreError(f"no {cls.__name__} of this version of sd35bench: {exc}") from exc
