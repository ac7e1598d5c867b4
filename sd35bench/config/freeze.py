"""Validate a composed configuration and freeze it into a `plan.Sweep`.

Cheap checks come first (ranges, sizes, names), then what the model and the backend can do, then the
prompts, then the weights' digest; nothing here imports torch, so a wrong input costs well under a
second. A model's YAML says what its scheduler and denoiser allow, a backend's what it has built; a
sweep must stay inside both.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sd35bench.backends.base import KINDS, backend_class
from sd35bench.config.files import config_dir
from sd35bench.config.model_inputs import inputs_in_force, own_axes, refuse_elsewhere, settle_axes
from sd35bench.config.model_weights import model_notes, model_spec, notes_of
from sd35bench.config.models import AXES, RUN, BackendConf, ModelConf, PromptsConf, RunConf, read
from sd35bench.config.overrides import checked_options
from sd35bench.config.place import place_of
from sd35bench.engine import Engine
from sd35bench.errors import ConfigError, nearest
from sd35bench.evaluations import EVALUATIONS_PER_STEP, SAMPLERS, parse_skip_layers, plugin_sampler
from sd35bench.fields import GUIDES, OF_MODEL, SIZE, value_text
from sd35bench.plan import PAIR_AXES, PNG_QUALITY, SETTING_AXES, AxisValue, Sweep
from sd35bench.prompts import (
    FEWEST_TO_SPLIT,
    PromptItem,
    PromptSpec,
    encoder_fields,
    init_size,
    load_prompts,
    with_init_image,
)
from sd35bench.remote.inputs import Schema
from sd35bench.remote.providers import is_provider, provider_class
from sd35bench.types import BackendSpec, Load, SkipLayerGuidance, Task

DEFAULT_TIMED_LIMIT = 8
FLOW_FAMILIES = ("sd3", "sana")
OFF = "none"
GENEVAL_DRIFT = (
    "GenEval's own detector has drifted from human judgement by up to 17.7 points"
    " (arXiv 2512.16853): do not compare its accuracy across models; a judge reads these prompts"
    " too (`score STUDY --metric judge_vqa`)"
)
WRITTEN = "LAYERS@SCALE:START-STOP (such as 7-8-9@2.5:0.01-0.2)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one engine is to do: a sweep on one load, and where its study is."""

    study: str
    results_dir: Path
    sweep: Sweep
    engine: Engine


def freeze(config: DictConfig) -> Job:
    """Validate everything and return the frozen job.

    Raises: ConfigError, one line, naming field, value and what is allowed.
    """
    return frozen(read(RUN, config))


def frozen(conf: RunConf) -> Job:
    """The job of a checked configuration; what is cheap to refuse is refused first.

    Prompts come after all that needs no file but the YAML, digests of weights last. Raises:
    ConfigError as `freeze` does.
    """
    refuse_elsewhere(conf.model, conf.backend)
    check_backend(conf.backend)
    check_family(conf.model, conf.backend)
    schema = inputs_in_force(conf.model, conf.backend)
    axes = _axes(conf, schema)
    own, files, own_notes = own_axes(conf, schema)
    axes |= own
    settled = settle_axes(conf, schema, axes)
    if not is_provider(conf.backend.kind):
        _refuse_same_noise(axes)
    sizes = _sizes(conf)
    _check_guidance(axes)
    check_guides(conf.model, conf.backend, axes)
    options = checked_options("backend", conf.backend.options, conf.backend.allowed)
    batch_sizes = _values(conf, "batch_size")
    place = place_of(conf, schema, sizes, batch_sizes, _timed_limit(conf))
    prompts = _prompts(conf)
    for task in sorted({_task(item) for item in prompts}):
        check_task(conf.model, conf.backend, task)
    _settle_negatives(axes, prompts)
    _refuse_encoder_fields(conf, prompts)
    _settle_strength(conf, axes, prompts)
    load = Load(
        model=model_spec(conf.model, conf.backend.needs_weights),
        backend=BackendSpec(
            name=conf.backend.name, kind=conf.backend.kind, options={**options, **place.options}
        ),
        threads=place.threads,
    )
    sweep = Sweep(
        load=load,
        prompts=prompts,
        axes=axes,
        sizes=sizes,
        batch_sizes=batch_sizes,
        timed_limit=_timed_limit(conf),
        order_seed=conf.order_seed,
        images=files,
        notes=(
            *place.notes,
            *own_notes,
            *settled,
            *_notes(conf, axes),
            *_split_notes(conf, prompts),
            *notes_of(load.model),
            *_column_notes(prompts),
            *_picture_notes(prompts),
            *_resize_notes(prompts, sizes),
        ),
    )
    return Job(
        study=conf.study, results_dir=Path(conf.results_dir), sweep=sweep, engine=place.engine
    )


def _values(conf: RunConf, name: str) -> tuple[Any, ...]:
    """An axis if it is swept, else the point, else nothing."""
    swept, value = getattr(conf.axes, name), getattr(conf, name)
    return tuple(swept) if swept or value is None else (value,)


def _axes(conf: RunConf, schema: Schema) -> dict[str, tuple[AxisValue, ...]]:
    """Values of every request field but the size; the model's defaults filled in."""
    model = conf.model
    axes: dict[str, tuple[AxisValue, ...]] = {}
    for name in (*SETTING_AXES, *PAIR_AXES):
        values = _values(conf, name) if name in AXES and name != "skip_layer_guidance" else ()
        if values:
            axes[name] = values
    axes["skip_layer_guidance"] = skip_layer_axis(
        model, conf.backend, _values(conf, "skip_layer_guidance"), _values(conf, "skip_layer_scale")
    )
    axes["sampler"] = sampler_axis(model, conf.backend, _values(conf, "sampler"), schema)
    axes.setdefault("steps", (model.steps,))
    axes.setdefault("cfg", (float(model.cfg),))
    for length in axes.get("max_sequence_length", ()):
        if isinstance(length, int) and length > model.max_sequence_length:
            raise ConfigError(
                f"max_sequence_length={length}: {model.name} takes at most"
                f" {model.max_sequence_length}"
            )
    # Asking for what the model does anyway is the same image, and must be the same trial.
    for name in OF_MODEL:
        if name in axes:
            own = getattr(model, name)
            axes[name] = tuple(None if value == own else value for value in axes[name])
    shifts = [f"{shift}" for shift in axes.get("shift", ()) if shift is not None]
    if shifts and model.family not in FLOW_FAMILIES:
        raise ConfigError(f"shift={shifts[0]}: {model.name} is no flow model and has none")
    return axes


def _sizes(conf: RunConf) -> tuple[tuple[int, int], ...]:
    """(width, height) in px, from aspect ratios or from widths and heights."""
    model = conf.model
    ratios = _values(conf, "aspect_ratio")
    widths, heights = _values(conf, "width"), _values(conf, "height")
    if ratios:
        if widths or heights:
            name = "width" if widths else "height"
            raise ConfigError(
                f"{name} and aspect_ratio={ratios[0]} contradict each other: give one of them"
            )
        for ratio in ratios:
            if ratio not in model.aspect_ratios:
                known = ", ".join(model.aspect_ratios)
                raise ConfigError(f"aspect_ratio={ratio}: {model.name} has {known}")
        sizes = [(model.aspect_ratios[r][0], model.aspect_ratios[r][1]) for r in ratios]
    else:
        sizes = [
            (width, height)
            for width in (widths if widths else (model.width,))
            for height in (heights if heights else (model.height,))
        ]
    for size in sizes:
        for name, side in zip(SIZE, size, strict=True):
            if side % model.size_multiple or not model.size_multiple <= side <= model.max_side_px:
                raise ConfigError(
                    f"{name}={side}: must be a multiple of {model.size_multiple} from"
                    f" {model.size_multiple} to {model.max_side_px} for {model.name}"
                )
    return tuple(dict.fromkeys(sizes))


def _check_guidance(axes: dict[str, tuple[AxisValue, ...]]) -> None:
    negatives = [n for n in axes.get("negative_prompt", ("",)) if n != ""]
    cfgs = [c for c in axes["cfg"] if isinstance(c, int | float)]
    if negatives and max(cfgs) <= 1:
        raise ConfigError(
            f"negative_prompt={negatives[0]!r}: no effect at cfg={max(cfgs):g}, guidance is off at"
            " cfg <= 1; raise cfg or leave negative_prompt out"
        )


def _refuse_same_noise(axes: dict[str, tuple[AxisValue, ...]]) -> None:
    """Refuse seeds that are the same noise here, although they are told apart everywhere else.

    Source: torch's CPU generator seeds its Mersenne Twister with 32 bits (MT19937RNGEngine.h).
    """
    first: dict[int, AxisValue] = {}
    for seed in axes.get("seed", ()):
        other = first.setdefault(int(f"{seed}") % 2**32, seed)
        if other != seed:
            raise ConfigError(
                f"seed={seed}: the same noise as seed={other}, torch draws it from a seed's lower"
                " 32 bits; leave one of them out"
            )


def _prompts(conf: RunConf) -> tuple[PromptItem, ...]:
    spec = _prompt_spec(conf.prompts)
    items = load_prompts(spec)
    init_image = vars(conf)["init_image"]
    if init_image is None:
        return items
    path = Path(init_image).expanduser()
    return with_init_image(items, path, spec.first_frame, spec.init_background)


def _prompt_spec(prompts: PromptsConf) -> PromptSpec:
    path = prompts.path
    is_ours = path is not None and path.startswith("configs:")
    if path is not None and is_ours:
        path = str(config_dir() / path.removeprefix("configs:"))
    source = {} if is_ours else _source(prompts)
    columns, texts = {**vars(prompts.columns)}, tuple(prompts.texts)
    own: dict[str, Any] = {**vars(prompts), "path": path, "texts": texts, "columns": columns}
    return PromptSpec(**own, source=source)


def _source(prompts: PromptsConf) -> dict[str, str]:
    """What reads a file of prompts again, where its name alone does not."""
    columns = {f"columns.{name}": column for name, column in vars(prompts.columns).items()}
    found = {name: column for name, column in columns.items() if name != f"columns.{column}"}
    found |= {"skip_empty": "true"} if prompts.skip_empty else {}
    found |= {"first_frame": "true"} if prompts.first_frame else {}
    if prompts.init_background is not None:
        found["init_background"] = prompts.init_background
    is_elsewhere = prompts.path is not None and Path(prompts.path).name != prompts.path
    return {"path": f"{prompts.path}", **found} if is_elsewhere else found


def _task(item: PromptItem) -> Task:
    return Task.TEXT_TO_IMAGE if item.init_image is None else Task.IMAGE_TO_IMAGE


def _settle_negatives(
    axes: dict[str, tuple[AxisValue, ...]], prompts: tuple[PromptItem, ...]
) -> None:
    own = any(item.negative_prompt is not None for item in prompts)
    if own and axes.get("negative_prompt", ("",)) != ("",):
        raise ConfigError(
            "negative_prompt is given twice, on the command line and in the prompt file: drop one"
        )


def _refuse_encoder_fields(conf: RunConf, prompts: tuple[PromptItem, ...]) -> None:
    """Refuse texts of single encoders, and weights, where they cannot reach one.

    Raises: ConfigError naming the column.
    """
    model, backend = conf.model, conf.backend
    asked = dict.fromkeys(name for item in prompts for name in encoder_fields(item))
    for name in asked:
        why = None
        if is_provider(backend.kind):
            why = f"backend={backend.name} sends one prompt, without weights"
        elif model.family != "sd3":
            why = f"{model.name} has one text encoder, and weights are not read there"
        elif name == "prompt_3" and backend.options.get("t5") is False:
            why = f"backend={backend.name} loads no T5, which would read it"
        elif name == "prompt_weights" and model.weights == "random" and backend.needs_weights:
            why = "a model of random weights has no words"
        if why is not None:
            raise ConfigError(f"{name}: {why}; leave the column out")


def _settle_strength(
    conf: RunConf, axes: dict[str, tuple[AxisValue, ...]], prompts: tuple[PromptItem, ...]
) -> None:
    """Strengths need init images; init images need a strength."""
    has_init = any(item.init_image is not None for item in prompts)
    if not has_init and "prompt_strength" in axes:
        values = ",".join(f"{v}" for v in axes["prompt_strength"])
        raise ConfigError(
            f"prompt_strength={values}: it acts only on an init image and these prompts have none;"
            " leave it out, or give init_image=FILE or prompts.task=edit"
        )
    if has_init:
        axes.setdefault("prompt_strength", (float(conf.model.prompt_strength),))


def _timed_limit(conf: RunConf) -> int:
    return DEFAULT_TIMED_LIMIT if conf.timed_limit is None else conf.timed_limit


def _notes(conf: RunConf, axes: dict[str, tuple[AxisValue, ...]]) -> tuple[str, ...]:
    notes = []
    if axes.get("output_format", ("png",)) == ("png",) and axes["output_quality"] != (PNG_QUALITY,):
        notes.append("output_quality has no effect on png")
    if conf.prompts.kind == "geneval":
        notes.append(GENEVAL_DRIFT)
    if conf.prompts.kind == "nano" and (conf.model.hub_id is not None or conf.model.hosted):
        notes.append(
            f"prompts=nano: coloured shapes, for the embedded model; {conf.model.name} has a set of"
            " its own, which it gets where prompts= is left out"
        )
    notes.extend(model_notes(conf.model, conf.backend.needs_weights))
    return tuple(notes)


def _split_notes(conf: RunConf, prompts: tuple[PromptItem, ...]) -> tuple[str, ...]:
    """Say what is held out for a confirmation, or why nothing is, where nobody said which part."""
    if conf.prompts.split is not None or conf.prompts.kind not in ("file", "given"):
        return ()
    ref = prompts[0].ref
    if ref.held_out is not None:
        return (
            f"prompts: {ref.held_out} of {ref.set} are held out, by a hash of their text, for"
            f" `recommend --confirm`; {len(prompts)} of the others run (prompts.split=all: all)",
        )
    if conf.prompts.kind == "given":
        return (f"prompts: none is held out, so a choice on them stays unconfirmed; {_TO_CONFIRM}",)
    return (
        f"prompts: {ref.set} has fewer than {FEWEST_TO_SPLIT}: none is held out, so a choice on"
        " them stays unconfirmed",
    )


def _column_notes(prompts: tuple[PromptItem, ...]) -> tuple[str, ...]:
    """Say which columns of a file are not read, since a run has these fields."""
    ignored = dict.fromkeys(name for item in prompts for name in item.ignored)
    if not ignored:
        return ()
    said, first = ", ".join(ignored), next(iter(ignored))
    where = prompts[0].ref.set
    return (f"prompts: {said} in {where} are ignored: fields of a run, such as {first}=VALUE",)


_TO_CONFIRM = f"give {FEWEST_TO_SPLIT} or more in a file, prompts.path=FILE"


def _picture_notes(prompts: tuple[PromptItem, ...]) -> tuple[str, ...]:
    """Say what was done to init images that are not plain 8-bit RGB."""
    files = {item.init_image: item.ref.init_done for item in prompts if item.init_image is not None}
    counts = Counter(done for each in files.values() for done in each)
    return tuple(f"init images: {done} ({counts[done]} of {len(files)})" for done in sorted(counts))


def _resize_notes(
    prompts: tuple[PromptItem, ...], sizes: tuple[tuple[int, int], ...]
) -> tuple[str, ...]:
    """Say when init images are not of the size that is asked for."""
    own = {init_size(item.init_image) for item in prompts if item.init_image is not None}
    odd = sorted(own - set(sizes)) if len(sizes) == 1 else []
    if not odd:
        return ()
    shown = ", ".join(f"{width}x{height}" for width, height in odd[:3])
    to = f"{sizes[0][0]}x{sizes[0][1]}"
    return (f"init images of {shown} px are resized to {to}; give width and height to choose",)


# What a model on a backend can do ---------------------------------------------------------------


def check_backend(backend: BackendConf) -> None:
    """Import a plug-in's class before anything is loaded or asked for.

    Raises: ConfigError for an unknown kind, and for a class that is no backend or provider.
    """
    if backend.kind not in KINDS:
        provider_class(backend.kind) if is_provider(backend.kind) else backend_class(backend.kind)


def check_family(model: ModelConf, backend: BackendConf) -> None:
    """Refuse a model that the backend cannot run. Raises: ConfigError."""
    if model.family not in backend.families:
        raise ConfigError(
            f"backend={backend.name}: it runs models of the family {', '.join(backend.families)}"
            f" only, {model.name} is of {model.family}; take backend=eager or backend=compile"
        )


def check_task(model: ModelConf, backend: BackendConf, task: Task) -> None:
    """Refuse a task that the model or the backend does not do. Raises: ConfigError."""
    for who, tasks in ((model.name, model.tasks), (f"backend {backend.name}", backend.tasks)):
        if task.value not in tasks:
            field = "init_image" if task is Task.IMAGE_TO_IMAGE else "prompts.task=t2i"
            raise ConfigError(
                f"{field}: {who} does {', '.join(tasks)} only, these prompts ask for {task.value};"
                " take other prompts, another model or another backend"
            )


def check_guides(
    model: ModelConf, backend: BackendConf, axes: Mapping[str, Sequence[AxisValue]]
) -> None:
    """Refuse rules of guidance, its interval and a step cache where they cannot be had.

    A hosted service has none; of what runs here only SD3's pipelines and the core do.

    Raises: ConfigError.
    """
    if is_provider(backend.kind):
        who = f"backend {backend.name}"
    elif model.family != "sd3":
        who = f"{model.name} (family {model.family})"
    else:
        return
    for name, neutral in GUIDES.items():
        for value in axes.get(name, ()):
            if value != neutral:
                raise ConfigError(
                    f"{name}={value_text(value)}: {who} cannot; use {name}={value_text(neutral)}"
                )


def sampler_axis(
    model: ModelConf, backend: BackendConf, asked: Iterable[str | None], schema: Schema = ()
) -> tuple[str, ...]:
    """Return the samplers; ``None``, and none at all, mean the model's first.

    Raises: ConfigError for one that the model's scheduler, the backend, or the input schema of a
    hosted model does not allow.
    """
    values = tuple(model.samplers[0] if name is None else name for name in asked)
    values = values if values else (model.samplers[0],)
    for name in values:
        if name in SAMPLERS and name not in EVALUATIONS_PER_STEP:
            plugin_sampler(name)
    named = [name for item in schema if item.source == "sampler" for name in item.words]
    there = (named if named else model.samplers[:1]) if schema else backend.samplers
    for name in values:
        for who, known in ((model.name, model.samplers), (f"backend {backend.name}", there)):
            if name not in known:
                raise ConfigError(f"sampler={name}: {who} has {', '.join(known)}")
    return values


def skip_layer_axis(
    model: ModelConf,
    backend: BackendConf,
    presets: tuple[str, ...],
    scales: tuple[float | None, ...],
) -> tuple[SkipLayerGuidance | None, ...]:
    """Return every preset under every scale, each once; "none" has no scale.

    Raises: ConfigError for an unknown preset, a scale without guidance, a model or backend
    without layers to leave out.
    """
    found: dict[SkipLayerGuidance | None, None] = {}
    for name in presets:
        if name == OFF:
            found[None] = None
            continue
        preset = _preset(model, backend, name)
        for scale in scales if scales else (None,):
            found[preset if scale is None else replace(preset, scale=scale)] = None
    given = [scale for scale in scales if scale is not None]
    if given and set(found) == {None}:
        raise ConfigError(
            f"skip_layer_scale={given[0]:g}: it acts only with skip_layer_guidance; give"
            " skip_layer_guidance=NAME or leave skip_layer_scale out"
        )
    return tuple(found)


def _preset(model: ModelConf, backend: BackendConf, name: str) -> SkipLayerGuidance:
    if not backend.skip_layers or not model.skip_layer_guidance:
        who = model.name if backend.skip_layers else f"backend {backend.name}"
        raise ConfigError(
            f"skip_layer_guidance={name}: {who} cannot leave layers out; use"
            " skip_layer_guidance=none"
        )
    written = parse_skip_layers(name)
    if written is None:
        if name not in model.skip_layer_guidance:
            known = ", ".join([OFF, *model.skip_layer_guidance])
            raise ConfigError(
                f"skip_layer_guidance={name}: {model.name} has {known}, or write {WRITTEN}"
                f"{nearest(name, model.skip_layer_guidance)}"
            )
        preset = model.skip_layer_guidance[name]
        written = SkipLayerGuidance(
            layers=tuple(preset.layers), scale=preset.scale, start=preset.start, stop=preset.stop
        )
    if not 0 <= written.start < written.stop <= 1 or not written.layers or written.scale <= 0:
        raise ConfigError(
            f"skip_layer_guidance={name}: needs layers, a scale above 0 and 0 <= start < stop <= 1"
        )
    return written
