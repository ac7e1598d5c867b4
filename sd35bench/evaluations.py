"""How often a request calls the denoiser, from the request alone: what time and FLOPs follow.

Skip-layer guidance: at some steps the denoiser runs once more with some layers left out, and the
result is pushed away from that worse prediction, ``guided + scale (text - text without the
layers)``. On the command line it is a preset of the model's, or LAYERS@SCALE:START-STOP, such as
``7-8-9@2.5:0.01-0.2``.

A step is one evaluation, Heun's two and its last one; skip-layer guidance adds one with layers
left out to every evaluation of the steps that it acts on. Steps that are zero (cfg-zero-star) or
predicted (`step_cache`) have none. Guidance's second half of the batch is not counted: it is in
the same call, and outside the guidance interval there is none.
"""

import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple

from sd35bench import plugins
from sd35bench.core import guidance
from sd35bench.core.guidance import EVALUATIONS_PER_STEP, Call, Guidance, Kind, SkipLayers
from sd35bench.types import Request, SkipLayerGuidance, Task

SAMPLERS = (*EVALUATIONS_PER_STEP, *plugins.entry_points("samplers"))
"""The package's own, then those that installed packages add."""
_NUMBER = r"(\d+(?:\.\d*)?(?:e[-+]?\d+)?)"
_INTERVAL = re.compile(r"(\d+(?:\.\d*)?)-(\d+(?:\.\d*)?)")
WRITTEN = re.compile(rf"(\d+(?:-\d+)*)@{_NUMBER}:{_NUMBER}-{_NUMBER}")


def sampler_order(sampler: str) -> int:
    """Evaluations of one step: 2 for Heun, else 1, for every plug-in too."""
    return EVALUATIONS_PER_STEP.get(sampler, 1)


class Sampler(ABC):
    """A plug-in's solver for flow models on diffusers' pipelines: one evaluation a step.

    Its module imports torch and diffusers inside `scheduler`: the class is looked at in processes
    that load neither.
    """

    @abstractmethod
    def scheduler(self, own: Any, shift: float) -> Any:
        """Build diffusers' scheduler. `own`: the one that the checkpoint came with.

        For image-to-image it needs `scale_noise` and `set_begin_index`.
        """


def plugin_sampler(name: str) -> type[Sampler]:
    """A plug-in's class. Raises: ConfigError where it cannot be had."""
    return plugins.load_class("samplers", name, Sampler, list(EVALUATIONS_PER_STEP))


def acting_steps(skipping: SkipLayerGuidance, steps: int) -> tuple[int, ...]:
    """Return the steps, from 0, that it acts on; never the first, often none of very few."""
    return guidance.acting_steps(skipping.start, skipping.stop, steps)


def skip_layer_text(skipping: SkipLayerGuidance) -> str:
    """Write it as the command line takes it."""
    layers = "-".join(map(str, skipping.layers))
    return f"{layers}@{skipping.scale!r}:{skipping.start!r}-{skipping.stop!r}"


def parse_skip_layers(text: str) -> SkipLayerGuidance | None:
    """Read what `skip_layer_text` writes; ``None`` for anything else, a preset's name perhaps."""
    match = WRITTEN.fullmatch(text)
    if match is None:
        return None
    return SkipLayerGuidance(
        layers=tuple(int(layer) for layer in match[1].split("-")),
        scale=float(match[2]),
        start=float(match[3]),
        stop=float(match[4]),
    )


def skip_layer_window(skipping: SkipLayerGuidance, steps: int, sampler: str) -> tuple[float, float]:
    """Return the start and stop to hand to diffusers, so that they mean fractions of the steps.

    diffusers compares an evaluation's index with a fraction of the number of steps. With Heun,
    which has two evaluations a step, its own numbers would end the guidance at half the fraction
    and begin it in mid-step.
    """
    acting = acting_steps(skipping, steps)
    if sampler_order(sampler) == 1 or not acting:
        return skipping.start, skipping.stop
    return (2 * acting[0] - 0.5) / steps, (2 * acting[-1] + 1.5) / steps


# Guidance's window and the step cache, as they are typed -----------------------------------------


def read_interval(value: object) -> str:
    """Read LO-HI and return its one spelling. Raises: ValueError."""
    found = _INTERVAL.fullmatch(f"{value}")
    if found is None or not 0 <= float(found[1]) < float(found[2]) <= 1:
        raise ValueError("not LO-HI")
    return "-".join(f"{float(part):.15g}" for part in found.groups())


def read_step_cache(value: object) -> str:
    """Read "none", a number or a mask A-B-C and return its one spelling; every step is "none".

    Raises: ValueError.
    """
    text = f"{value}"
    if text in ("none", "1"):
        return "none"
    if re.fullmatch(r"[1-9]\d{0,3}", text):
        return text
    if re.fullmatch(r"\d{1,4}(-\d{1,4})+", text) is None:
        raise ValueError("neither none, nor a number, nor a mask")
    return "-".join(str(step) for step in sorted({int(step) for step in text.split("-")}))


def last_masked(step_cache: str) -> int:
    """The last step that a mask names; -1 where there is none."""
    return int(step_cache.rpartition("-")[2]) if "-" in step_cache else -1


# How often ---------------------------------------------------------------------------------------


class Work(NamedTuple):
    """Calls of the denoiser for one image: with both prompts, with one, without some layers."""

    guided: int
    alone: int
    skipped: int

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def sequences(self) -> int:
        """What they carry: a guided call the image twice."""
        return 2 * self.guided + self.alone + self.skipped


def guidance_of(request: Request) -> Guidance:
    """Return how a request is guided; there are no layers to leave out in image-to-image."""
    r, skipping = request, request.skip_layer_guidance
    low, _, high = r.guidance_interval.partition("-")
    return Guidance(
        scale=r.cfg,
        rule=r.guidance,
        zero_init_steps=r.zero_init_steps,
        eta=r.apg_eta,
        norm=r.apg_norm,
        momentum=r.apg_momentum,
        interval=(float(low), float(high)),
        skip_layers=None
        if skipping is None or r.task is Task.IMAGE_TO_IMAGE
        else SkipLayers(
            layers=skipping.layers, scale=skipping.scale, start=skipping.start, stop=skipping.stop
        ),
        step_cache=r.step_cache,
    )


def planned_calls(request: Request) -> tuple[Call, ...]:
    """Return what each of the sampler's evaluations asks of the denoiser."""
    order, skip = sampler_order(request.sampler), request.steps - request.effective_steps
    return _planned(guidance_of(request), order, skip, request.steps)[0]


def work(request: Request) -> Work:
    """Count the calls of the denoiser for one image by what they carry."""
    order, skip = sampler_order(request.sampler), request.steps - request.effective_steps
    return _planned(guidance_of(request), order, skip, request.steps)[1]


@lru_cache(maxsize=256)
def _planned(how: Guidance, order: int, skip: int, steps: int) -> tuple[tuple[Call, ...], Work]:
    """Calls and their counts; kept, since a study has many images of few settings."""
    calls = guidance.plan_calls(how, guidance.evaluation_steps(order, skip, steps), steps)
    found = Work(
        guided=sum(call.kind is Kind.GUIDED for call in calls),
        alone=sum(call.kind is Kind.ALONE for call in calls),
        skipped=sum(call.kind is Kind.GUIDED and call.skips for call in calls),
    )
    return calls, found


def evaluations(request: Request) -> int:
    """Calls of the denoiser for one image, guidance's second half of the batch not counted."""
    return work(request).calls


def sequences(request: Request, seen: int | None) -> int:
    """Sequences that the denoiser's `seen` calls carried for one image, guidance's half counted.

    Planned calls say it exactly; of another number (``None``: unknown, as many as steps) all count
    alike.
    """
    planned = work(request)
    if seen == planned.calls:
        return planned.sequences
    return (2 if request.cfg > 1 else 1) * (request.effective_steps if seen is None else seen)
