"""Skip-layer guidance apart from any model: when it acts, and how it is written.

At some steps the denoiser runs once more with some layers left out, and the result is pushed away
from that worse prediction: ``guided + scale (text - text without the layers)``. On the command
line it is a preset of the model's, or LAYERS@SCALE:START-STOP, such as ``7-8-9@2.5:0.01-0.2``.
"""

import re

from sd35bench.core import guidance
from sd35bench.types import SkipLayerGuidance

_NUMBER = r"(\d+(?:\.\d*)?(?:e[-+]?\d+)?)"
WRITTEN = re.compile(rf"(\d+(?:-\d+)*)@{_NUMBER}:{_NUMBER}-{_NUMBER}")


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
