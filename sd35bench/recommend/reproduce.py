"""A setting to run: the `sd35bench run` command, plain diffusers, the hosted protocol's JSON.

All are made from a record, so every value is the one that was in force. Prompts are untrusted text:
they reach the snippet as Python literals and never the command line. Negative prompts that a
command line gave are quoted for Hydra and for the shell.

A command can only say which prompts a record had as the first so many of a set. So it asks for as
many as reach the highest of the records' numbers: where a search took some of a set, or some
failed, these and what lies between them, and never others in their place.

The hosted protocol (of Eachlabs and of `serve`) has no sampler, shift or skip-layer guidance and
takes 1 to 50 steps: what it cannot say is named beside the body, and where the rest would be
another setting there is no body.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sd35bench.analysis.settings import known_digest, known_threads, shared_negatives
from sd35bench.checkpoint import NANO_WEIGHTS, weights_digest
from sd35bench.evaluations import skip_layer_text, skip_layer_window
from sd35bench.fields import FIELDS, SETTING, is_unasked, later_asked
from sd35bench.types import Load, ModelSpec, PromptRef, Record, Request, SkipLayerGuidance, Task

_DEFAULT_RESULTS = "results"
_FIRST = ("steps", "cfg", "prompt_strength", "width", "height")
"""What a command says before the weights."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_PLAIN = re.compile(r"[A-Za-z/.][\w./-]*")
_WORDS = ("null", "true", "false", "nan", "inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """What a command is to ask for that its records do not say.

    `split` and `limit`: other prompts of the same set; `skip_layers`: a preset of skip-layer
    guidance, by the model's name for it; `results_dir` where that is not the default.
    """

    split: str | None = None
    limit: int | None = None
    skip_layers: str | None = None
    results_dir: str | None = None


def run_command(records: Sequence[Record], study: str, elsewhere: Elsewhere | None = None) -> str:
    """Write the command that makes these records' images again, in a study of this name."""
    load, request = records[0].trial.load, records[0].trial.request
    asked = Elsewhere() if elsewhere is None else elsewhere
    seeds = sorted({r.trial.request.seed for r in records})
    parts = [f"model={load.model.name}", f"backend={load.backend.name}"]
    parts += _options(load)
    said = _said(load, request, asked.skip_layers)
    remote = records[0].remote
    for name in () if remote is None or load.model.family == "sd3" else remote.unsent:
        said.pop(name, None)  # the model has no input for it, and a run refuses it
    parts += [f"{name}={said.pop(name)}" for name in _FIRST if name in said]
    parts += _weights(load.model)
    parts += [f"{name}={text}" for name, text in said.items()]
    parts += [f"extra.{name}={_own_value(value)}" for name, value in request.extra]
    parts += [f"images.{role}={role.upper()}_FILE" for role, _ in request.images]
    parts += _prompts(records, asked)
    negatives = _negatives(records)
    parts += [f"negative_prompt={','.join(map(quoted, negatives))}"] if negatives else []
    parts += [f"seed={','.join(map(str, seeds))}", f"batch_size={records[0].trial.batch_size}"]
    many = ["-m"] if len(seeds) > 1 or len(negatives) > 1 else []
    where = [f"results_dir={asked.results_dir}"] if asked.results_dir is not None else []
    return shlex.join(["sd35bench", "run", *many, *parts, f"study={study}", *where])


def _said(load: Load, request: Request, skip_layers: str | None) -> dict[str, str]:
    """Overrides of a setting, without what a run has unasked: field → text."""
    values = {name: getattr(request, name) for name in SETTING if FIELDS[name].typed}
    quiet = [name for name, value in values.items() if is_unasked(name, value)]
    if load.model.family != "sd3" and "sampler" in quiet:
        quiet.remove("sampler")  # the model's own is another
    said = {name: _text(value) for name, value in values.items() if name not in quiet}
    if "skip_layer_guidance" in quiet and skip_layers is not None:
        said["skip_layer_guidance"] = skip_layers
    last = said.pop("skip_layer_guidance", None)
    return said if last is None else {**said, "skip_layer_guidance": last}


def remote_overrides(loads: Iterable[Load]) -> dict[str, str]:
    """Overrides that say where hosted backends among `loads` are called; empty without any."""
    options = [o for load in loads if "base_url" in (o := load.backend.options)]
    urls = sorted({str(o["base_url"]) for o in options})
    found = {"remote.base_url": ",".join(urls)} if urls else {}
    slugs = sorted({str(o["slug"]) for o in options if o.get("slug") is not None})
    if slugs:
        found["remote.slug"] = ",".join(slugs)
    if any(url.startswith("http:") for url in urls):
        found["remote.allow_loopback"] = "true"
    return found


def results_dir_of(path: Path) -> str | None:
    """The folder of the studies, where a command has to name it."""
    return None if path.parent == Path(_DEFAULT_RESULTS) else str(path.parent)


def _options(load: Load) -> list[str]:
    """A backend's options as overrides; a hosted one's live under `remote.`."""
    own = sorted(load.backend.options.items())
    parts = [f"{k}={v}" for k, v in remote_overrides([load]).items()]
    parts += [f"backend.{k}={_text(v)}" for k, v in own if k not in ("base_url", "slug")]
    threads = known_threads(load)
    return parts if threads is None else [*parts, f"threads={threads}"]


def snippet(record: Record, init_path: Path | None) -> str | None:
    """Write a Python script that makes this record's image with diffusers alone.

    ``None`` where diffusers alone cannot: random weights, files in the original layout, what a
    hosted service made, and what no argument of its pipelines says.
    """
    load, request = record.trial.load, record.trial.request
    if (
        known_digest(load) is None
        or load.model.weights != "checkpoint"
        or load.model.components is not None
        or load.model.changes
        or load.model.variant is not None
    ):
        return None
    if later_asked(request):
        return None
    dtype = _DTYPES.get(str(load.backend.options.get("dtype", "fp32")), "float32")
    edit = request.task is Task.IMAGE_TO_IMAGE
    pipeline = _PIPELINES["sd3-edit" if edit else load.model.family]
    imported, scheduler = _scheduler(load.model.family, request)
    lines = [
        "import torch",
        f"from diffusers import {', '.join(sorted({pipeline} | imported))}",
        *(["from diffusers.utils import load_image"] if edit else []),
        "",
        f"torch.set_num_threads({load.threads})",
        f"pipe = {pipeline}.from_pretrained(",
        f"    {load.model.path!r}, dtype=torch.{dtype}",
        ")",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        *scheduler,
        "image = pipe(",
        *(f"    {name}={value}," for name, value in _arguments(record, init_path)),
        ").images[0]",
        f'image.save("image.{request.output_format}"{_quality(request)})',
    ]
    return "\n".join(lines) + "\n"


_PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "sd3-edit": "StableDiffusion3Img2ImgPipeline",
    "sana": "SanaPipeline",
    "pixart": "PixArtAlphaPipeline",
}
# What a checkpoint of the family comes with: the sampler, and the name of its shift.
_OWN = {"sd3": ("euler", "shift"), "sana": ("dpmpp_2m", "flow_shift"), "pixart": ("dpmpp_2m", "")}
_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# diffusers 0.42.1 has no such method in its multistep samplers.
_START_FROM_IMAGE = """
def scale_noise(sample, timestep, noise):
    sigma = pipe.scheduler.sigmas[pipe.scheduler.begin_index].to(noise)
    return sigma * noise + (1 - sigma) * sample

pipe.scheduler.scale_noise = scale_noise
"""


def _scheduler(family: str, request: Request) -> tuple[set[str], list[str]]:
    """The scheduler's class to import, if any, and the lines that put it in place."""
    own, shift_name = _OWN[family]
    if request.sampler == own and request.shift is None:
        return set(), []
    shift = f"pipe.scheduler.config.{shift_name}"
    shift = shift if request.shift is None else repr(request.shift)
    if request.sampler == own:
        given = f"    pipe.scheduler.config, {shift_name}={shift}"
        return set(), ["pipe.scheduler = type(pipe.scheduler).from_config(", given, ")"]
    name = _SCHEDULERS[request.sampler]
    if request.sampler in ("euler", "heun"):
        return {name}, [f"pipe.scheduler = {name}(shift={shift})"]
    lines = [
        f"pipe.scheduler = {name}(",
        f'    use_flow_sigmas=True, flow_shift={shift}, prediction_type="flow_prediction"',
        ")",
    ]
    edit = request.task is Task.IMAGE_TO_IMAGE
    return {name}, [*lines, *(_START_FROM_IMAGE.splitlines() if edit else [])]


def _arguments(record: Record, init_path: Path | None) -> list[tuple[str, str]]:
    load, r = record.trial.load, record.trial.request
    own = load.model.max_sequence_length
    found = [("prompt", repr(r.prompt)), ("negative_prompt", repr(r.negative_prompt))]
    if r.task is Task.IMAGE_TO_IMAGE:
        found += [
            ("image", f"load_image({str(init_path)!r})"),
            ("strength", repr(r.prompt_strength)),
        ]
    found += [
        ("num_inference_steps", repr(r.steps)),
        ("guidance_scale", repr(r.cfg)),
        ("width", repr(r.width)),
        ("height", repr(r.height)),
        ("max_sequence_length", repr(r.max_sequence_length if r.max_sequence_length else own)),
    ]
    skip = r.skip_layer_guidance
    if skip is not None:
        start, stop = skip_layer_window(skip, r.steps, r.sampler)
        found += [
            ("skip_guidance_layers", repr(list(skip.layers))),
            ("skip_layer_guidance_scale", repr(skip.scale)),
            ("skip_layer_guidance_start", repr(start)),
            ("skip_layer_guidance_stop", repr(stop)),
        ]
    if load.model.family != "sd3":
        found += [("use_resolution_binning", "False"), ("clean_caption", "False")]
    return [*found, ("generator", f'torch.Generator("cpu").manual_seed({r.seed})')]


def _weights(model: ModelSpec) -> list[str]:
    """Overrides that say which weights, where a run would not find them unasked.

    The path of what lies in the Hub's cache names its revision.
    """
    if model.weights == "checkpoint":
        on_top = list(_on_top(model))
        if model.path in ("", str(NANO_WEIGHTS)) or model.weights_digest == _packaged():
            return on_top
        components = [] if model.components is None else [model.components]
        return [
            f"model.path={quoted(model.path)}",
            *(f"model.components={quoted(path)}" for path in components),
            *on_top,
        ]
    layers = [] if model.layers is None else [f"model.layers={model.layers}"]
    encoders = ["model.text_encoders=true"] if model.text_encoders else []
    return [f"model.weights={model.weights}", *layers, *encoders]


def _on_top(model: ModelSpec) -> Iterator[str]:
    """Overrides that say what changes the weights."""
    for change in model.changes:
        if change.kind != "lora":
            yield f"model.{change.kind}={quoted(change.path)}"
    loras = [f"{c.path}:{c.weight!r}" for c in model.changes if c.kind == "lora"]
    if loras:
        yield f"model.lora={quoted(','.join(loras))}"
    if model.variant is not None:
        yield f"model.variant={model.variant}"


@lru_cache(maxsize=1)
def _packaged() -> str | None:
    """Digest of the weights in the package; ``None`` where they were not installed."""
    return weights_digest(NANO_WEIGHTS) if NANO_WEIGHTS.is_dir() else None


def _negatives(records: Sequence[Record]) -> tuple[str, ...]:
    """Negative prompts to ask for; none where there are none, or where the prompts bring them."""
    found = shared_negatives(records)
    return () if found is None or found == ("",) else found


def quoted(text: str) -> str:
    """A text as an override's value: as it is where it is plain, else in Hydra's quotes."""
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # Hydra takes a backslash for itself only before a quotation mark.
    escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + m[2].replace('"', '\\"'), text)
    return f'"{escaped}"'


def _own_value(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else _text(value)


def _quality(request: Request) -> str:
    lossy = request.output_format != "png"
    return f", quality={request.output_quality}" if lossy else ""


def _prompts(records: Sequence[Record], asked: Elsewhere) -> list[str]:
    """Which prompts: nano's generated set exactly, a file by its name."""
    first = records[0].trial.prompt
    split = first.split if asked.split is None else asked.split
    count = _reach(records) if asked.limit is None else asked.limit
    limit = [] if count is None else [f"prompts.limit={count}"]
    if first.set == "nano":
        task = _nano_set(first)
        if records[0].trial.request.init_image is not None and "prompts.task=edit" not in task:
            task.append("init_image=INIT_FILE")  # one for all; a record has its digest only
        return ["prompts=nano", f"prompts.split={split}", *task, *limit]
    if first.set == "starter.txt":
        return ["prompts=starter", f"prompts.split={split}", *limit]
    part = [f"prompts.split={split}"]
    if first.set == "given":
        texts = {r.trial.prompt.id: r.trial.request.prompt for r in records}
        return [f"prompt={quoted(texts[number])}" for number in sorted(texts)]
    if first.set in ("geneval", "coco"):
        path = first.source.get("path", f"{first.set.upper()}_FILE")
        part = [] if split == "all" else part
        return [f"prompts={first.set}", f"prompts.path={quoted(path)}", *part, *limit]
    source = {"path": first.set, **first.source}
    file = [f"prompts.{name}={quoted(value)}" for name, value in source.items()]
    return ["prompts=file", *file, *part, *limit]


def _nano_set(ref: PromptRef) -> list[str]:
    """Which of nano's sets, where it is not the usual one; ids are split-kind-seed-number."""
    _, kind, seed, _ = ref.id.split("-")
    task = [] if kind == "t2i" else [f"prompts.task={kind}"]
    return task if seed == "0" else [*task, f"prompts.seed={seed}"]


def _reach(records: Sequence[Record]) -> int | None:
    """How many of a set's first prompts hold all of the records'; ``None``: only the whole does.

    A prompt's number is its place in the set or, of a file, in all splits together, so that of one
    split the same number of prompts reaches as far or farther. COCO and files with identifiers of
    their own do not tell the place.
    """
    asked = {(r.trial.request.prompt, r.trial.request.init_image) for r in records}
    refs = [r.trial.prompt for r in records]
    numbers = [ref.id.rpartition("-")[2] if ref.set == "nano" else ref.id for ref in refs]
    width = 4 if refs[0].set == "nano" else 5
    if refs[0].set == "coco" or not all(n.isdecimal() and len(n) >= width for n in numbers):
        return None
    return max(len(asked), 1 + max(map(int, numbers)))


def _text(value: Any) -> str:
    """A value as an override: 4 for 4.0, true in YAML's words."""
    if isinstance(value, SkipLayerGuidance):
        return skip_layer_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


SLUG = "stable-diffusion-3-5-medium"
INIT_IMAGE = "https://example.com/init.png"
"""Stands for the address of the init image, which only the user knows."""

_RATIOS = (
    *("1:1", "16:9", "21:9", "3:2", "2:3", "4:5"),
    *("5:4", "3:4", "4:3", "9:16", "9:21"),
)
_ROUNDED_AWAY = {(896, 1152): "3:4", (1152, 896): "4:3"}
"""Sizes of Stable Diffusion 3.5 that rounding to 64 px brought nearer to another ratio."""

_OWN_SHIFT = (None, 3.0)
_MOST_STEPS = 50
_MOST_CFG = 20.0


def api_body(record: Record) -> dict[str, Any]:
    """Write the create that asks for this record's image.

    Returns: ``{"body", "not_sent", "why_not"}``; `body` is ``None`` where the protocol cannot ask
    for this setting, and `why_not` then says why; `not_sent` are fields that do not reach it and
    change little or nothing.
    """
    request = record.trial.request
    ratio = _ratio(request.width, request.height)
    why = _refusal(request, ratio)
    if record.trial.load.model.family != "sd3":
        why = f"{record.trial.load.model.name} has an input of its own, which its page shows"
    if why is not None:
        return {"body": None, "not_sent": [], "why_not": why}
    inputs: dict[str, Any] = {
        "prompt": request.prompt,
        "aspect_ratio": ratio,
        "cfg": request.cfg,
        "steps": request.steps,
        "seed": request.seed,
        "output_format": request.output_format,
        "output_quality": request.output_quality,
    }
    if request.init_image is not None:
        inputs |= {"image": INIT_IMAGE, "prompt_strength": request.prompt_strength}
    unsaid = [
        name for name in ("shift", "max_sequence_length") if getattr(request, name) is not None
    ]
    body = {"model": SLUG, "version": "0.0.1", "input": inputs}
    return {"body": body, "not_sent": ["width", "height", *unsaid], "why_not": None}


def _refusal(request: Request, ratio: str) -> str | None:
    checks = (
        (request.negative_prompt != "", "the protocol has no negative prompt"),
        (request.skip_layer_guidance is not None, "the protocol has no skip-layer guidance"),
        (
            request.shift not in _OWN_SHIFT,
            f"the protocol cannot ask for a shift, here {request.shift}",
        ),
        *((not FIELDS[n].sent, f"the protocol cannot ask for {n}") for n in later_asked(request)),
        (request.sampler != "euler", f"the protocol cannot ask for sampler {request.sampler}"),
        (
            not 1 <= request.steps <= _MOST_STEPS,
            f"the protocol takes 1 to {_MOST_STEPS} steps, not {request.steps}",
        ),
        (
            not 0 <= request.cfg <= _MOST_CFG,
            f"the protocol takes cfg 0 to {_MOST_CFG:g}, not {request.cfg:g}",
        ),
        (ratio == "", f"no aspect ratio of the protocol is {request.width}x{request.height}"),
    )
    return next((why for wrong, why in checks if wrong), None)


def _ratio(width: int, height: int) -> str:
    """The protocol's ratio nearest to a size, if within 6 %: models round sides to multiples."""
    if (width, height) in _ROUNDED_AWAY:
        return _ROUNDED_AWAY[width, height]

    def distance(ratio: str) -> float:
        w, h = map(int, ratio.split(":"))
        exact = (width / height) / (w / h)
        return max(exact, 1 / exact)

    nearest = min(_RATIOS, key=distance)
    return nearest if distance(nearest) <= 1.06 else ""
