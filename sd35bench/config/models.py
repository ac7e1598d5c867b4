"""Everything that a command line can say, typed once: pydantic models with ranges and meanings.

What is asked for an image comes from `sd35bench.fields`; the rest of a run is here. A field that
was made by `known` is a name of the command line: help and refusals read what is said of it. `None`
means "the model's own" or "not given". What depends on the model (sizes, aspect ratios, token
lengths) or on the prompts is checked in `freeze`, where these are known.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from annotated_types import Interval, doc
from omegaconf import DictConfig, OmegaConf
from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
)

from sd35bench.errors import ConfigError, nearest
from sd35bench.evaluations import SAMPLERS
from sd35bench.fields import FIELDS as REQUEST_FIELDS
from sd35bench.fields import MOST_SEED, OF_MODEL, allowed
from sd35bench.remote.inputs import Kind
from sd35bench.types import Scalar, Task

SWEEPER_MODULE = "hydra_plugins.sd35bench_sweeper"
"""Hydra takes plugins only from modules under this package; `sweeper` puts itself there."""
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _as_text(value: Any) -> Any:
    """A study may be called 2026; YAML takes that for a number."""
    return f"{value}" if isinstance(value, int | float) and value is not True else value


def _workers_count(value: Any) -> Any:
    if isinstance(value, int) and not 1 <= value <= 1024:
        raise ValueError("must be from 1 to 1024")
    return value


def _plain_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a null character")
    return value


def _some_text(value: str) -> str:
    if not value:
        raise ValueError("empty")
    return value


def _colour(value: str) -> str:
    ImageColor.getrgb(value)  # as in CSS; raises ValueError
    return value


def _study_name(value: str) -> str:
    if _STUDY_NAME.fullmatch(value) is None or value.endswith((".", ".tmp")):
        raise ValueError("not the name of a folder")
    return value


def _no_minus_zero(value: float) -> float:
    return value + 0.0  # -0.0 would be another trial than 0.0


AnyText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_plain_text), doc("text")]
Text = Annotated[AnyText, AfterValidator(_some_text)]
StudyName = Annotated[
    Text, AfterValidator(_study_name), doc("letters, digits, . _ - (at most 100)")
]


def known(default: Any, means: str, said: str | None = None, *, axis: bool = False) -> Any:
    """A field that the command line knows: its default, what it means, its default in words."""
    plain = "none" if default is None else str(default).lower()
    words = {"said": plain if said is None else said, "axis": axis}
    return Field(default, description=means, json_schema_extra=words)


class Conf(BaseModel):
    """A node of the configuration: no other fields, no values of another type."""

    model_config = _STRICT


def _like(name: str) -> AfterValidator:
    """A model's own default of a request field is in that field's range."""

    def check(value: Any) -> Any:
        try:
            return check_field(name, value)
        except ConfigError as exc:
            raise ValueError(str(exc)) from exc

    return AfterValidator(check)


class SkipLayersConf(Conf):
    """A preset of skip-layer guidance; `start` and `stop` are fractions of the steps."""

    layers: list[int]
    scale: float
    start: float
    stop: float


class InputConf(Conf):
    """One field of a hosted model's input, under its wire name: `sd35bench.remote.inputs`.

    `field` is the field of ours that it comes from; ``None`` is `extra.` and the wire name.
    """

    type: Kind
    field: Text | None = None
    default: Scalar = None
    range: list[int | float] = []
    choices: list[Scalar] = []
    words: dict[str, str] = {}
    needs: Text | None = None
    required: bool = False
    drawn: Scalar = None
    local: Scalar = None


class ModelConf(Conf):
    """A model: where its weights are, its sizes, and its own defaults.

    `gated` models need an accepted licence. `samplers` are those that its scheduler allows, its
    default first. No preset in `skip_layer_guidance` means that no layers can be left out.
    `hosted_only` says why a model has no local pipeline; `hosted` is what each provider calls it,
    `inputs` what it takes there (none: what Stable Diffusion 3.5 takes), `usd_per_image` what an
    image costs at each provider, where that is known and not the backend's own.
    `text_encoders` acts with `weights=random` only: a checkpoint has its own.
    """

    name: Text
    path: Text | None = known(
        None,
        "the weights: a folder in diffusers' format, or one .safetensors file",
        "the package's, or the Hub's cache",
    )
    hub_id: str | None = None
    gated: bool = False
    family: str = "sd3"
    tasks: list[str] = [str(task) for task in Task]
    samplers: list[str] = list(SAMPLERS)
    weights: Literal["checkpoint", "random"] = known(
        "checkpoint",
        "random: the true shapes with seeded noise for weights, no download, no quality",
    )
    layers: Annotated[int, Interval(ge=1, le=1000)] | None = known(
        None, "with random weights: this many transformer blocks of true width", "the model's"
    )
    text_encoders: bool = known(
        False, "with random weights: build the text encoders too, instead of random embeddings"
    )
    components: Text | None = known(
        None, "with model.path=FILE.safetensors: the folder with what the file lacks"
    )
    lora: Text | None = known(
        None, "LoRA files to merge into the weights: FILE[:weight][,FILE[:weight]...]"
    )
    transformer: Text | None = known(
        None,
        "another denoiser: its folder in diffusers' format, or one file (.gguf too)",
        "its own",
    )
    vae: Text | None = known(
        None, "another autoencoder: its folder in diffusers' format, or one file", "its own"
    )
    variant: Literal["fp16", "bf16", "fp32"] | None = known(
        None, "which of a folder's weight files, as in model.fp16.safetensors", "the plain ones"
    )
    hosted_only: str | None = None
    hosted: dict[str, str] = {}
    inputs: dict[str, InputConf] = {}
    usd_per_image: dict[str, float] = {}
    size_multiple: int
    max_side_px: int
    width: int
    height: int
    aspect_ratios: dict[str, list[int]] = {}
    max_sequence_length: int
    target_latency_s: Annotated[float, Interval(gt=0, le=1e6)] | None = known(
        None, "latency that the report holds others against", "the model's"
    )
    steps: Annotated[int, _like("steps")]
    cfg: Annotated[float, _like("cfg")]
    prompt_strength: Annotated[float, _like("prompt_strength")]
    shift: float | None = None
    skip_layer_guidance: dict[str, SkipLayersConf] = {}


class BackendConf(Conf):
    """A backend variant: the module that implements it (`kind`), and its options.

    `tasks`, `samplers` and `skip_layers` are what it can do, whatever the model; `families` are
    the models that it can run.

    `allowed` gives each option's choices, or its type as one word (int, float, text, bool). On
    the command line `backend.dtype=bf16` is short for `backend.options.dtype=bf16`. `requires`
    names packages of an optional extra: an experiment's `optional_backends` join its `backend`
    axis where theirs can be imported.
    """

    name: Text
    kind: str
    needs_weights: bool = True
    requires: list[str] = []
    usd_per_image: float = 0.0
    tasks: list[str] = [str(task) for task in Task]
    samplers: list[str] = list(SAMPLERS)
    skip_layers: bool = True
    families: list[str] = ["sd3", "sana", "pixart"]
    options: dict[str, Any] = {}
    allowed: dict[str, Any] = {}


class ColumnsConf(Conf):
    """A prompt file's own column names."""

    prompt: Text = known("prompt", "a file's column name")
    negative_prompt: Text = known("negative_prompt", "a file's column name")
    init_image: Text = known("init_image", "a file's column name")
    id: Text = known("id", "a file's column name")
    prompt_2: Text = known("prompt_2", "a file's column name")
    prompt_3: Text = known("prompt_3", "a file's column name")
    prompt_weights: Text = known("prompt_weights", "a file's column name")


class PromptsConf(Conf):
    """Which prompts to load."""

    kind: str
    path: Text | None = known(None, "the file of a prompt set")
    split: Literal["tune", "heldout", "all"] | None = known(
        None, "which part of the set", "the set's; tune of a file of 32 prompts or more"
    )
    task: Literal["t2i", "edit", "overlap", "relation"] = known(
        "t2i", "nano: text-to-image, edits of init images, or scenes of one level alone"
    )
    limit: Annotated[int, Interval(ge=1)] | None = known(
        None, "the first so many prompts", "the set's"
    )
    seed: Annotated[int, Interval(ge=0, le=MOST_SEED)] = known(0, "seed of a generated set")
    texts: list[AnyText] = []
    skip_empty: bool = known(
        False, "leave out a file's rows without a prompt, in place of refusing"
    )
    first_frame: bool = known(False, "take an animation's first frame for an init image")
    init_background: (
        Annotated[Text, AfterValidator(_colour), doc("a colour: grey or '#808080'")] | None
    ) = known(None, "what is behind a transparent init image", "white")
    columns: ColumnsConf = ColumnsConf()


class RemoteConf(Conf):
    """How hosted services are called, and what that may cost; backends that run here ignore it.

    `base_url`, `slug` and `usd_per_image` None mean the provider's own; at a loopback address the
    price is 0 and the slug the model's name. The key itself is never in here.
    """

    base_url: (
        Annotated[Text, doc("https://HOST, or http://127.0.0.1:PORT with remote.allow_loopback")]
        | None
    ) = known(None, "where the hosted protocol is spoken", "the provider's")
    slug: Text | None = known(None, "the model's name there", "the model's hosted name")
    key_file: Text | None = known(
        None, "a file that holds the key, instead of the environment variable"
    )
    auth: Literal["x-api-key", "bearer"] = known(
        "x-api-key", "eachlabs: the header that carries the key"
    )
    allow_loopback: bool = known(False, "let base_url and downloads be plain http on this machine")
    concurrency: Annotated[int, Interval(ge=1, le=100)] = known(
        10, "predictions in flight at once; the first timed_limit prompts run at 1, for latency"
    )
    requests_per_minute: Annotated[int, Interval(ge=1, le=1_000_000)] = known(
        60, "creates and polls in any 60 s, over all processes of this machine"
    )
    timeout_s: Annotated[float, Interval(gt=0, le=1e6)] = known(
        300.0, "seconds that one prediction may take in all", "300"
    )
    max_cost_usd: Annotated[float, Interval(ge=0, le=1e9)] | None = known(
        None, "a study's budget: pauses before it is passed"
    )
    confirm_above_usd: Annotated[float, Interval(ge=0, le=1e9)] = known(
        1.0, "a bill above this asks for --yes", "1"
    )
    usd_per_image: Annotated[float, Interval(ge=0, le=1e6)] | None = known(
        None, "the price that budgets count with", "the listed one; 0 on loopback"
    )
    on_ambiguous: Literal["keep", "resubmit"] = known(
        "keep",
        "a create whose answer was lost and that the service does not list: keep it so, or create"
        " (and perhaps pay) again",
    )
    init_image_url: Text | None = known(
        None, "where the service finds init_image, instead of an upload"
    )
    expected_latency_s: Annotated[float, Interval(gt=0, le=1e6)] | None = known(
        None, "when to poll first; adapts to what is seen", "the model's target latency"
    )
    output_hosts: Text | None = known(
        None, "further hosts that outputs may come from, between spaces; .HOST: its subdomains too"
    )
    accept_size: Annotated[Text, doc("WIDTHxHEIGHT in px")] | None = known(
        None, "a size that is taken for the one that was asked for"
    )


class RayConf(Conf):
    """Where the Ray cluster is; `init` and `actor` are options of Ray's own, by its names.

    On the command line `ray.init.NAME=` and `ray.actor.NAME=` set any of them.
    """

    address: Text | None = known(
        None,
        "the cluster: auto (the one on this machine) or HOST:PORT of its head; ray.init.NAME= and"
        " ray.actor.NAME= set Ray's own options",
        "started here",
    )
    init: dict[str, Any] = {}
    actor: dict[str, Any] = {}


class AxesConf(Conf):
    """Values to sweep, a list for each axis; an empty list is no axis. See `RUN`."""

    extra: dict[str, list[Scalar]] = {}
    images: dict[str, list[Text]] = {}


class LoadConf(Conf):
    """What a worker process holds, and its bounds: the part that `run` and `serve` share."""

    model: ModelConf
    backend: BackendConf
    prompts: PromptsConf
    threads: Annotated[int, Interval(ge=1, le=1024)] | None = known(
        None, "CPU threads of the worker", "all cores", axis=True
    )
    deadline_s: Annotated[float, Interval(gt=0, le=1e6)] | None = known(
        None,
        "seconds until a batch counts as hung; ten times that to load and warm up",
        "20 x its warm-up, >= 120; 1800 to start",
    )
    memory_limit_gb: Annotated[float, Interval(gt=0, le=1e5)] | None = known(
        None, "GB (1e9 bytes) of memory (RSS) that the worker process may hold"
    )

    @property
    def memory_limit_bytes(self) -> int | None:
        """The limit of memory in bytes."""
        return None if self.memory_limit_gb is None else round(self.memory_limit_gb * 1e9)


class RunConf(LoadConf):
    """Everything that `sd35bench run` takes, but for the fields of a request: see `RUN`."""

    aspect_ratio: Text | None = known(
        None, "instead of width and height: 1:1, 16:9, 9:16 ...", axis=True
    )
    skip_layer_scale: Annotated[float, Interval(gt=0, le=100)] | None = known(
        None, "another scale than the preset's", "the preset's", axis=True
    )
    batch_size: Annotated[int, Interval(ge=1, le=1024)] = known(
        1,
        "images made together; latency is that of batch 1, throughput that of each size",
        axis=True,
    )
    timed_limit: Annotated[int, Interval(ge=0, le=1_000_000)] | None = known(
        None,
        "for latencies: with batch_size > 1, prompts that run once more at batch 1; with a"
        " hosted backend, images of each setting that run alone",
        "8",
    )
    order_seed: Annotated[int, Interval(ge=0, le=MOST_SEED)] = known(
        0, "seed of the order in which trials run"
    )
    starts: Annotated[int, Interval(ge=1, le=100)] = known(
        1, "worker processes that share the trials, one after the other"
    )
    workers: (
        Annotated[
            int | Literal["auto"],
            BeforeValidator(_workers_count),
            doc("auto, or an integer from 1 to 1024"),
        ]
        | None
    ) = known(
        None,
        "worker processes at once, each on a GPU or on `threads` cores of its own; auto: as many"
        " as fit",
        "1; with engine=ray auto",
    )
    engine: Literal["processes", "ray"] = known(
        "processes", "where workers run: processes of this machine, or actors of a Ray cluster"
    )
    max_failures: Annotated[int, Interval(ge=1, le=1_000_000)] = known(
        3, "worker deaths of one backend after which its remaining trials are skipped"
    )
    keep_latents: bool = known(
        False, "keep latents after the first and the last step, for their relative error"
    )
    contention: Literal["retime", "warn", "error"] = known(
        "retime",
        "timed images that other work disturbed: make up to half as many again, only say so, or"
        " count them as failed",
    )
    noise_floor: Text | None = known(
        None, "a backend to run again with another batch size and thread count, for drift"
    )
    study: StudyName = known("default", "name under which results are kept")
    results_dir: Text = known("results", "folder of the studies")
    axes: AxesConf = AxesConf()
    extra: dict[str, Scalar] = {}
    images: dict[str, Text] = {}
    remote: RemoteConf = RemoteConf()
    ray: RayConf = RayConf()
    optional_backends: list[str] = []
    models_with_images: list[str] = []
    companions: list[str] = []
    nano_companions: list[str] = []


# Made from the table of fields ------------------------------------------------------------------

_NULL_IN_LISTS = (*OF_MODEL, "skip_layer_scale")
"""Axes on which null, the model's own, may stand beside other values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A name of the command line: what it takes, in words and as an annotation; what it means."""

    name: str
    takes: Any
    means: str
    default: str
    axis: bool
    nullable: bool

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        return allowed(self.takes)

    @property
    def is_text(self) -> bool:
        """Whether it is free text, in which a comma may stand."""
        return get_args(self.takes)[:1] == (str,)


def names_of(model: type[BaseModel], prefix: str = "") -> Iterator[Known]:
    """Names of the command line in a model and in its nodes."""
    hints = get_type_hints(model, include_extras=True)
    for name, info in model.model_fields.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            yield from names_of(hint, f"{prefix}{name}.")
        elif info.description is not None:
            extra: Any = info.json_schema_extra
            nullable = type(None) in get_args(hint)
            yield Known(
                name=prefix + name,
                takes=get_args(hint)[0] if nullable else hint,
                means=info.description,
                default=extra["said"],
                axis=extra["axis"],
                nullable=nullable,
            )


def _typed(field: Any) -> Any:
    """A request field's annotation as pydantic is to read it."""
    takes, unasked = field.takes, field.unasked
    if field.reads is not None:
        return Annotated[takes, BeforeValidator(field.reads)]
    if takes is str:
        return AnyText if unasked == "" else Text
    is_float = get_args(takes)[:1] == (float,)
    return Annotated[takes, AfterValidator(_no_minus_zero)] if is_float else takes


def _asked() -> dict[str, Any]:
    """The fields of a request: name → (annotation, default)."""
    found = {}
    for name, field in REQUEST_FIELDS.items():
        if field.typed:
            takes = _typed(field)
            default = known(field.unasked, field.means, field.default, axis=field.axis)
            found[name] = (takes | None if field.nullable else takes, default)
    return found


_ASKED = create_model("AskedConf", __base__=Conf, **_asked())
_OWN = {own.name: own for model in (_ASKED, RunConf) for own in names_of(model)}
_AXES: dict[str, Any] = {"model": str, "backend": str} | {
    name: own.takes | None if name in _NULL_IN_LISTS else own.takes
    for name, own in _OWN.items()
    if own.axis
}
_LISTS: dict[str, Any] = {name: (list[takes], []) for name, takes in _AXES.items()}
AXES_CONF: Any = create_model("AxesConf", __base__=AxesConf, **_LISTS)
_BASES: Any = (RunConf, _ASKED)
RUN: Any = create_model("RunConf", __base__=_BASES, axes=(AXES_CONF, AXES_CONF()))
"""`RunConf` with every field of a request, and an axis for each that can be swept."""

FIELDS: dict[str, Known] = _OWN
"""Every name of `run`'s command line."""
AXES = tuple(_AXES)
"""Every name that can be swept."""


def defaults_of(model: type[BaseModel]) -> dict[str, Any]:
    """What Hydra starts from: every field that has a default, nodes as mappings."""
    found = {name: info for name, info in model.model_fields.items() if not info.is_required()}
    plain = model.model_construct(**{name: info.get_default() for name, info in found.items()})
    return plain.model_dump(include=set(found))


# Reading -----------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def read(model: type[M], config: DictConfig) -> M:
    """Check a composed configuration against its model.

    Raises: ConfigError, one line, naming field, value and what is allowed.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    try:
        return model.model_validate(plain)
    except ValidationError as exc:
        raise ConfigError(_sentence(exc.errors(include_url=False)[0])) from exc


def check_field(name: str, value: Any) -> Scalar:
    """Return the value as the field's type.

    Raises: ConfigError naming field, value and what is allowed.
    """
    if value is None and FIELDS[name].nullable:
        return None
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as exc:
        raise ConfigError(_must_be(name, value, FIELDS[name])) from exc


RANDOM_SEED = (
    "; none is drawn at random, so that a run can be repeated: choose one, or several with -m"
    " seed=0,1,2"
)
"""What is said of -1, which asks other tools for a random seed."""


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(FIELDS[name].takes, config=_STRICT)


def _must_be(name: str, value: Any, field: Known) -> str:
    said = f"{name}={'null' if value is None else value}: must be {field.allowed}"
    return said + RANDOM_SEED if name == "seed" and value == -1 else said


def _sentence(error: Any) -> str:
    """One refusal of pydantic's in our words."""
    path = [part for part in error["loc"] if isinstance(part, str)]
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown field{nearest(path[-1], FIELDS)}"
    if error["type"] == "missing":
        return f"{name}: is missing"
    bare = name.removeprefix("axes.")
    field = FIELDS.get(bare, FIELDS.get(name.removeprefix("model.")))
    if field is not None:
        return _must_be(bare, error["input"], field)
    return f"{name}={error['input']}: {error['msg'].replace('Input should be', 'must be')}"
