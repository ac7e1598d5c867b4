"""A setting to run: the `sd35bench run` command, plain diffusers, the hosted protocol's JSON.

All are made from a record, so every value is the one that was in force. Prompts are untrusted text:
they reach the snippet as Python literals and never the command line.

The hosted protocol (of Eachlabs and of `serve`) has no sampler, shift or skip-layer guidance and
takes 1 to 50 steps: what it cannot say is named beside the body, and where the rest would be
another setting there is no body.
"""

import shlex
from pathlib import Path
from typing import Any

from sd35bench import plugins
from sd35bench.analysis.commands import (
    Elsewhere,
    asked_overrides,
    load_overrides,
    negative_overrides,
    prompt_overrides,
)
from sd35bench.analysis.grouping import shared_negatives
from sd35bench.architectures import PIPELINES
from sd35bench.evaluations import skip_layer_window
from sd35bench.fields import CURVES, FIELDS, OF_MODEL, SIZE, later_asked
from sd35bench.recommend.named_defaults import OWN_SHIFT
from sd35bench.remote.providers.wire import MOST_CFG, MOST_STEPS, RATIOS, schema_input
from sd35bench.study.columns import Some, seeds
from sd35bench.types import Record, Request, Task

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run_command(
    records: Some, study: str, elsewhere: Elsewhere | None = None, asking: Request | None = None
) -> str:
    """Write the command that makes these records' images again, in a study of this name.

    `asking`: a request that all their prompts are to be in instead of their own.
    """
    load = records[0].trial.load
    request = records[0].trial.request if asking is None else asking
    asked = Elsewhere() if elsewhere is None else elsewhere
    known = sorted(set(seeds(records).tolist()))
    said = asked_overrides(load, [request], asked.skip_layers)
    for name in () if load.model.family == "sd3" else records[0].unsent:
        said.pop(name, None)  # the model has no input for it, and a run refuses it
    first = {name: said.pop(name) for name in CURVES + SIZE if name in said}
    loads = load_overrides(load)
    weights = {name: text for name, text in loads.items() if name.startswith("model.")}
    parts = [f"{n}={loads[n]}" for n in loads if n not in weights]
    parts += [f"{name}={text}" for name, text in {**first, **weights, **said}.items()]
    parts += prompt_overrides(records, asked)
    negatives = shared_negatives(records, asking)
    parts += negative_overrides(negatives)
    parts += [f"seed={','.join(map(str, known))}", f"batch_size={records[0].trial.batch_size}"]
    many = ["-m"] if len(known) > 1 or len(negatives or ()) > 1 else []
    where = [f"results_dir={asked.results_dir}"] if asked.results_dir is not None else []
    return plugins.command(shlex.join(["run", *many, *parts, f"study={study}", *where]))


def snippet(record: Record, init_path: Path | None) -> str | None:
    """Write a Python script that makes this record's image with diffusers alone.

    ``None`` where diffusers alone cannot: random weights, files in the original layout, what a
    hosted service made, and what no argument of its pipelines says.
    """
    load, request = record.trial.load, record.trial.request
    if (
        load.known_digest is None
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
    pipeline = "StableDiffusion3Img2ImgPipeline" if edit else PIPELINES[load.model.family]
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


def _quality(request: Request) -> str:
    lossy = request.output_format != "png"
    return f", quality={request.output_quality}" if lossy else ""


SLUG = "stable-diffusion-3-5-medium"
INIT_IMAGE = "https://example.com/init.png"
"""Stands for the address of the init image, which only the user knows."""

_ROUNDED_AWAY = {(896, 1152): "3:4", (1152, 896): "4:3"}
"""Sizes of Stable Diffusion 3.5 that rounding to 64 px brought nearer to another ratio."""


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
    image = None if request.init_image is None else INIT_IMAGE
    inputs = schema_input(request, {(request.width, request.height): ratio}, image)
    unsaid = [name for name in OF_MODEL if getattr(request, name) is not None]
    body = {"model": SLUG, "version": "0.0.1", "input": inputs}
    return {"body": body, "not_sent": [*SIZE, *unsaid], "why_not": None}


def _refusal(request: Request, ratio: str) -> str | None:
    checks = (
        (request.negative_prompt != "", "the protocol has no negative prompt"),
        (request.skip_layer_guidance is not None, "the protocol has no skip-layer guidance"),
        (
            request.shift not in OWN_SHIFT,
            f"the protocol cannot ask for a shift, here {request.shift}",
        ),
        *((not FIELDS[n].sent, f"the protocol cannot ask for {n}") for n in later_asked(request)),
        (request.sampler != "euler", f"the protocol cannot ask for sampler {request.sampler}"),
        (
            not 1 <= request.steps <= MOST_STEPS,
            f"the protocol takes 1 to {MOST_STEPS} steps, not {request.steps}",
        ),
        (
            not 0 <= request.cfg <= MOST_CFG,
            f"the protocol takes cfg 0 to {MOST_CFG:g}, not {request.cfg:g}",
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

    nearest = min(RATIOS, key=distance)
    return nearest if distance(nearest) <= 1.06 else ""
