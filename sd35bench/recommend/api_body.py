"""A setting as the JSON body of a create, in the hosted protocol of Eachlabs and of `serve`.

The protocol has no sampler, shift or skip-layer guidance and takes 1 to 50 steps: what it cannot
say is named beside the body, and where the rest would be another setting there is no body.
"""

from typing import Any

from sd35bench.fields import FIELDS, later_asked
from sd35bench.types import Record, Request

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
