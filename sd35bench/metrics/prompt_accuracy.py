"""Prompt accuracy: is every part of the prompt in the image? Read from pixels, without a network.

1 where colour, shape, count, relation and background all hold, else 0; the detail says which.
Only for nano's world, whose analytic verifier can read its pictures.
"""

from collections.abc import Sequence

from sd35bench.metrics.base import Image, ImageMetric, Value, is_nano, maker
from sd35bench.types import Record


class PromptAccuracy(ImageMetric):
    """Share of images with all parts of the prompt right."""

    name = "prompt_accuracy"

    def applies(self, record: Record) -> bool:
        """Nano's world only."""
        return is_nano(maker(record))

    def score_images(
        self, images: Sequence[Image], records: Sequence[Record], inits: Sequence[Image | None]
    ) -> list[Value]:
        """1.0 or 0.0 per image; ``None`` for a prompt that is not of nano's world."""
        return [_judge(i, r) for i, r in zip(images, records, strict=True)]


def load(name: str) -> PromptAccuracy:
    """Load the metric; it has no options."""
    return PromptAccuracy()


def _judge(image: Image, record: Record) -> Value:
    from sd35bench.nano.verifier import verify

    try:
        verdict = verify(image, record.trial.request.prompt)
    except ValueError as exc:
        return Value(None, {"reason": str(exc)})
    parts = {name: bool(holds) for name, holds in verdict.parts.items()}
    return Value(float(verdict.all_right), {"parts": parts, "share": float(verdict.score)})
