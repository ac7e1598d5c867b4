"""Precision and recall of a set of images: whether they look real, and whether all is there.

Shares in [0, 1] of images inside the reference's manifold, and of the reference inside the images',
by `k` nearest neighbours among features; see `sd35bench.stats.neighbours`. The paper's features
are VGG-16's; here the extractor is part of the name, and numbers of two extractors have nothing to
do with each other. Both numbers depend on n: compare sets of equal n.

Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991).
"""

from typing import Any

from sd35bench.errors import ConfigError
from sd35bench.metrics.kid import MIN_IMAGES
from sd35bench.metrics.reference import ReferencedMetric
from sd35bench.stats.neighbours import NEIGHBOURS


class _Manifold(ReferencedMetric):
    needs_features = True
    own_least = MIN_IMAGES
    k: int = NEIGHBOURS

    @property
    def parameters(self) -> dict[str, Any]:
        """How many neighbours a ball reaches to."""
        return {"k": self.k}


class Precision(_Manifold):
    """Share of images inside the reference's manifold."""

    family = "precision"
    statistic = "precision"


class Recall(_Manifold):
    """Share of the reference inside the images' manifold."""

    family = "recall"
    statistic = "recall"


def load(name: str, *, k: int = NEIGHBOURS, **options: Any) -> Precision | Recall:
    """Load `precision` or `recall`, or either with an extractor: `precision_nano` and so on.

    `k` is the number of neighbours, at least 1; `options` are what `ReferencedMetric.load` takes.

    Raises: ConfigError for a reference that is not there, or a `k` that cannot be.
    """
    kind = Precision if name.startswith("precision") else Recall
    metric = kind.load(name, **options)
    if not 1 <= k < metric.min_images // 2:
        raise ConfigError(
            f"metric.{kind.family}.k={k} must be from 1 to less than half of min_images"
            f" ({metric.min_images})"
        )
    metric.k = k
    return metric
