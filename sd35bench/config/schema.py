"""Hydra's schema: mutable dataclasses, every field typed, so that OmegaConf refuses a wrong type.

`None` means "the model's own" or "not given". Ranges are in `fields`; what depends on the model
or on the prompts is checked in `freeze`.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from sd35bench.evaluations import SAMPLERS
from sd35bench.types import Task

__all__ = [
    "SWEEPER_MODULE",
    "AxesConf",
    "BackendConf",
    "ModelConf",
    "PromptsConf",
    "RemoteConf",
    "RunConf",
    "register",
]


@dataclass
class SkipLayersConf:
    """A preset of skip-layer guidance; `start` and `stop` are fractions of the steps."""

    layers: list[int] = MISSING
    scale: float = MISSING
    start: float = MISSING
    stop: float = MISSING


@dataclass
class ModelConf:
    """A model: where its weights are, its sizes, and its own defaults.

    `gated` models need an accepted licence. `samplers` are those that its scheduler allows, its
    default first. No preset in `skip_layer_guidance` means that no layers can be left out.
    `hosted_only` says why a model has no local pipeline; `hosted` is what each provider calls it.
    `text_encoders` acts with
    `weights=random` only: a checkpoint has its own.
    """

    name: str = MISSING
    path: str | None = None
    hub_id: str | None = None
    gated: bool = False
    family: str = "sd3"
    tasks: list[str] = field(default_factory=lambda: [str(task) for task in Task])
    samplers: list[str] = field(default_factory=lambda: [*SAMPLERS])
    weights: str = "checkpoint"
    layers: int | None = None
    text_encoders: bool = False
    components: str | None = None
    hosted_only: str | None = None
    hosted: dict[str, str] = field(default_factory=dict)
    size_multiple: int = MISSING
    max_side_px: int = MISSING
    width: int = MISSING
    height: int = MISSING
    aspect_ratios: dict[str, list[int]] = field(default_factory=dict)
    max_sequence_length: int = MISSING
    target_latency_s: float | None = None
    steps: int = MISSING
    cfg: float = MISSING
    prompt_strength: float = MISSING
    shift: float | None = None
    skip_layer_guidance: dict[str, SkipLayersConf] = field(default_factory=dict)


@dataclass
class BackendConf:
    """A backend variant: the module that implements it (`kind`), and its options.

    `tasks`, `samplers` and `skip_layers` are what it can do, whatever the model; `families` are
    the models that it can run.

    `allowed` gives each option's choices, or its type as one word (int, float, text, bool). On
    the command line `backend.dtype=bf16` is short for `backend.options.dtype=bf16`. `requires`
    names packages of an optional extra: an experiment's `optional_backends` join its `backend`
    axis where theirs can be imported.
    """

    name: str = MISSING
    kind: str = MISSING
    needs_weights: bool = True
    requires: list[str] = field(default_factory=list)
    usd_per_image: float = 0.0
    tasks: list[str] = field(default_factory=lambda: [str(task) for task in Task])
    samplers: list[str] = field(default_factory=lambda: [*SAMPLERS])
    skip_layers: bool = True
    families: list[str] = field(default_factory=lambda: ["sd3", "sana", "pixart"])
    options: dict[str, Any] = field(default_factory=dict)
    allowed: dict[str, Any] = field(default_factory=dict)


@dataclass
class ColumnsConf:
    """A prompt file's own column names."""

    prompt: str = "prompt"
    negative_prompt: str = "negative_prompt"
    init_image: str = "init_image"
    id: str = "id"


@dataclass
class PromptsConf:
    """Which prompts to load."""

    kind: str = MISSING
    path: str | None = None
    split: str = "all"
    task: str = "t2i"
    limit: int | None = None
    seed: int = 0
    columns: ColumnsConf = field(default_factory=ColumnsConf)


@dataclass
class RemoteConf:
    """How hosted services are called, and what that may cost; backends that run here ignore it.

    `base_url`, `slug` and `usd_per_image` None mean the provider's own; at a loopback address the
    price is 0 and the slug the model's name. The key itself is never in here.
    """

    base_url: str | None = None
    slug: str | None = None
    key_file: str | None = None
    auth: str = "x-api-key"
    allow_loopback: bool = False
    concurrency: int = 10
    requests_per_minute: int = 60
    timeout_s: float = 300.0
    max_cost_usd: float | None = None
    confirm_above_usd: float = 1.0
    usd_per_image: float | None = None
    on_ambiguous: str = "keep"
    init_image_url: str | None = None
    expected_latency_s: float | None = None


@dataclass
class AxesConf:
    """Values to sweep; an empty list is no axis."""

    model: list[str] = field(default_factory=list)
    backend: list[str] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    cfg: list[float] = field(default_factory=list)
    prompt_strength: list[float] = field(default_factory=list)
    seed: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    aspect_ratio: list[str] = field(default_factory=list)
    sampler: list[str] = field(default_factory=list)
    shift: list[float | None] = field(default_factory=list)
    max_sequence_length: list[int] = field(default_factory=list)
    negative_prompt: list[str] = field(default_factory=list)
    skip_layer_guidance: list[str] = field(default_factory=list)
    skip_layer_scale: list[float | None] = field(default_factory=list)
    batch_size: list[int] = field(default_factory=list)
    output_format: list[str] = field(default_factory=list)
    output_quality: list[int] = field(default_factory=list)


@dataclass
class RunConf:
    """Everything that `sd35bench run` takes."""

    model: ModelConf = MISSING
    backend: BackendConf = MISSING
    prompts: PromptsConf = MISSING
    axes: AxesConf = field(default_factory=AxesConf)
    remote: RemoteConf = field(default_factory=RemoteConf)
    study: str = "default"
    results_dir: str = "results"
    steps: int | None = None
    cfg: float | None = None
    prompt_strength: float | None = None
    seed: int = 0
    width: int | None = None
    height: int | None = None
    aspect_ratio: str | None = None
    sampler: str | None = None
    shift: float | None = None
    max_sequence_length: int | None = None
    negative_prompt: str = ""
    init_image: str | None = None
    skip_layer_guidance: str = "none"
    skip_layer_scale: float | None = None
    batch_size: int = 1
    timed_limit: int | None = None
    output_format: str = "png"
    output_quality: int = 90
    threads: int | None = None
    order_seed: int = 0
    starts: int = 1
    deadline_s: float | None = None
    memory_limit_gb: float | None = None
    max_failures: int = 3
    keep_latents: bool = False
    noise_floor: str | None = None
    optional_backends: list[str] = field(default_factory=list)
    companions: list[str] = field(default_factory=list)
    nano_companions: list[str] = field(default_factory=list)


SWEEPER_MODULE = "hydra_plugins.sd35bench_sweeper"
"""Hydra takes plugins only from modules under this package; `sweeper` puts itself there."""


def register() -> None:
    """Put the schema where run.yaml's defaults list finds it."""
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConf)
    store.store(group="model", name="schema", node=ModelConf)
    store.store(group="backend", name="schema", node=BackendConf)
    store.store(group="prompts", name="schema", node=PromptsConf)
    node = {"_target_": f"{SWEEPER_MODULE}.GroupingSweeper"}
    store.store(group="hydra/sweeper", name="grouping", node=node, provider="sd35bench")
