"""Precision and recall of a set of images: whether they look real, and whether all is there.

Shares in [0, 1] of images inside the reference's manifold, and of the reference inside the images',
by `k` nearest neighbours among features; see `sd35bench.stats.neighbours`. The paper's features
are VGG-16's; here the extractor is part of the name, and numbers of two extractors have nothing to
do with each other. Both numbers depend on n: compare sets of equal n.

Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991).
"""

from typing import Any

from sd35bench.errors import ConfigError
from sd35bench.metrics.extractors import Backbone, choose_extractor
from sd35bench.metrics.kid import MIN_IMAGES
from sd35bench.metrics.reference import PROMPTS, ReferencedMetric
from sd35bench.stats.neighbours import NEIGHBOURS


class _Manifold(ReferencedMetric):
    needs_features = True
    k: int = NEIGHBOURS

    @property
    def parameters(self) -> dict[str, Any]:
        """How many neighbours a ball reaches to."""
        return {"k": self.k}

    def _own_least(self) -> int:
        return MIN_IMAGES


class Precision(_Manifold):
    """Share of images inside the reference's manifold."""

    family = "precision"
    statistic = "precision"


class Recall(_Manifold):
    """Share of the reference inside the images' manifold."""

    family = "recall"
    statistic = "recall"


def load(
    name: str,
    *,
    extractor: str | None = None,
    reference: str = PROMPTS,
    model: str | None = None,
    pretrained: str | None = None,
    weights: str | None = None,
    min_images: int | None = None,
    k: int = NEIGHBOURS,
) -> Precision | Recall:
    """Load `precision` or `recall`, or either with an extractor: `precision_nano` and so on.

    Args:
        name: the metric's name; the bare families are Inception.
        extractor: instead of the name's: ``inception``, ``nano``, ``clip`` (with `model`) or
            ``dinov2``.
        reference: ``prompts``, a folder of images, or an .npz of `sd35bench reference make`.
        model: for ``clip``: an open_clip model; for ``dinov2``: a Hub id; or ``local-dir:PATH``.
        pretrained: its pretrained tag or checkpoint path.
        weights: for ``inception``: its checkpoint's path.
        min_images: fewest images for a value instead of 64.
        k: neighbours, at least 1.

    Raises: ConfigError for a reference that is not there, or a `k` that cannot be.
    """
    kind = Precision if name.startswith("precision") else Recall
    label = name.removeprefix(kind.family).removeprefix("_")
    backbone = Backbone(extractor, model, pretrained, weights)
    chosen = choose_extractor(label if label else "inception", backbone)
    metric = kind(*chosen, reference, min_images)
    if not 1 <= k < metric.min_images // 2:
        raise ConfigError(
            f"metric.{kind.family}.k={k} must be from 1 to less than half of min_images"
            f" ({metric.min_images})"
        )
    metric.k = k
    return metric
