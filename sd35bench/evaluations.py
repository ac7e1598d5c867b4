"""How often a request calls the denoiser, from the request alone: what time and FLOPs follow.

Skip-layer guidance: at some steps the denoiser runs once more with some layers left out, and the
result is pushed away from that worse prediction, ``guided + scale (text - text without the
layers)``. On the command line it is a preset of the model's, or LAYERS@SCALE:START-STOP, such as
``7-8-9@2.5:0.01-0.2``.

A step is one evaluation, Heun's two and its last one; skip-layer guidance adds one with layers
left out to every evaluation of the steps that it acts on. Guidance's second half of the batch is
not counted: it is in the same call.
"""

import re

from sd35bench.core import guidance
from sd35bench.types import Request, SkipLayerGuidance, Task

EVALUATIONS_PER_STEP = {"euler": 1, "heun": 2, "dpmpp_2m": 1, "unipc": 1}
SAMPLERS = tuple(EVALUATIONS_PER_STEP)
_NUMBER = r"(\d+(?:\.\d*)?(?:e[-+]?\d+)?)"
WRITTEN = re.compile(rf"(\d+(?:-\d+)*)@{_NUMBER}:{_NUMBER}-{_NUMBER}")


def sampler_order(sampler: str) -> int:
    """Evaluations of one step: 2 for Heun, else 1."""
    return EVALUATIONS_PER_STEP[sampler]


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


def skip_layer_evaluations(request: Request) -> int:
    """Calls of the denoiser with layers left out, for one image; they carry no negative prompt."""
    skipping = request.skip_layer_guidance
    if skipping is None or request.task is Task.IMAGE_TO_IMAGE or request.cfg <= 1:
        return 0
    order, last = sampler_order(request.sampler), request.steps - 1
    return sum(order if i < last else 1 for i in acting_steps(skipping, request.steps))


def evaluations(request: Request) -> int:
    """Calls of the denoiser for one image, guidance's second half of the batch not counted."""
    order = sampler_order(request.sampler)
    return order * request.effective_steps - (order - 1) + skip_layer_evaluations(request)
