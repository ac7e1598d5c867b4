"""CMMD: maximum mean discrepancy of CLIP embeddings of length 1 under a Gaussian kernel.

sigma is 10 and the scale 1000, as in the paper; the backbone is part of the name (the paper's is
`cmmd_ViT-L-14-336_openai`). The estimate here is the unbiased one of the paper's equation 3. The
authors' own code keeps each image's pair with itself, which adds about ``1000 (1 - mean k) / n`` a
side: nothing at their 30,000 images, more than most differences at 64.

Source: Jayasumana et al. 2024 (arXiv 2401.09603); google-research/cmmd/distance.py.
"""

from typing import Any

from sd35bench.metrics.kid import MIN_IMAGES
from sd35bench.metrics.reference import ReferencedMetric


class Cmmd(ReferencedMetric):
    """Unbiased kernel distance of CLIP embeddings, times 1000."""

    family = "cmmd"
    default_extractor = "ViT-L-14-336_openai"
    not_taken = frozenset({"extractor", "weights"})  # the features are CLIP's
    statistic = "cmmd"
    needs_features = True
    own_least = MIN_IMAGES


def load(name: str, *, model: str | None = None, **options: Any) -> Cmmd:
    """Load `cmmd`, `cmmd_nano` or `cmmd_<clip model>_<pretrained>`.

    `model` takes the place of the name's backbone: an open_clip model, ``local-dir:PATH`` or
    ``nano``. `options` are what else `ReferencedMetric.load` takes.

    Raises: ConfigError for a reference that is not there, MetricError for an unknown backbone.
    """
    if model is not None:
        name = "cmmd_nano" if model == "nano" else "cmmd_clip"
    return Cmmd.load(name, model=model, **options)
