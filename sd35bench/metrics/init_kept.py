"""Init kept: how much of the init image that the prompt did not change is still there.

Nano's verifier compares the edited picture with its init image part by part. Only image-to-image
in nano's world; elsewhere ``None``.
"""

from collections.abc import Sequence

from sd35bench.metrics.base import Image, ImageMetric, Value, is_nano, maker
from sd35bench.types import Record, Task


class InitKept(ImageMetric):
    """Share of the init image's parts that an edit should keep and did keep."""

    name = "init_kept"
    tasks = frozenset({Task.IMAGE_TO_IMAGE})
    needs_init = True

    def applies(self, record: Record) -> bool:
        """Image-to-image in nano's world."""
        return super().applies(record) and is_nano(maker(record))

    def score_images(
        self, images: Sequence[Image], records: Sequence[Record], inits: Sequence[Image | None]
    ) -> list[Value]:
        """One value in [0, 1] per image."""
        return [_judge(*each) for each in zip(images, records, inits, strict=True)]


def load(name: str) -> InitKept:
    """Load the metric; it has no options."""
    return InitKept()


def _judge(image: Image, record: Record, init: Image | None) -> Value:
    from sd35bench.nano.verifier import verify_edit

    if init is None:
        return Value(None, {"reason": "there is no init image"})
    try:
        verdict = verify_edit(image, init, record.trial.request.prompt)
    except ValueError as exc:
        return Value(None, {"reason": str(exc)})
    preserved = {name: float(share) for name, share in verdict.preserved.items()}
    changed = {name: bool(there) for name, there in verdict.changed.items()}
    return Value(float(verdict.kept), {"preserved": preserved, "changed": changed})
