"""CMMD: maximum mean discrepancy of CLIP embeddings of length 1 under a Gaussian kernel.

sigma is 10 and the scale 1000, as in the paper; the backbone is part of the name (the paper's is
`cmmd_ViT-L-14-336_openai`). The estimate here is the unbiased one of the paper's equation 3. The
authors' own code keeps each image's pair with itself, which adds about ``1000 (1 - mean k) / n`` a
side: nothing at their 30,000 images, more than most differences at 64.

Source: Jayasumana et al. 2024 (arXiv 2401.09603); google-research/cmmd/distance.py.
"""

from sd35bench.metrics.extractors import Backbone, choose_extractor
from sd35bench.metrics.kid import MIN_IMAGES
from sd35bench.metrics.reference import PROMPTS, ReferencedMetric

_DEFAULT_LABEL = "ViT-L-14-336_openai"


class Cmmd(ReferencedMetric):
    """Unbiased kernel distance of CLIP embeddings, times 1000."""

    family = "cmmd"
    statistic = "cmmd"
    needs_features = True

    def _own_least(self) -> int:
        return MIN_IMAGES


def load(
    name: str,
    *,
    reference: str = PROMPTS,
    model: str | None = None,
    pretrained: str | None = None,
    min_images: int | None = None,
) -> Cmmd:
    """Load `cmmd`, `cmmd_nano` or `cmmd_<clip model>_<pretrained>`.

    Args:
        name: the metric's name; the bare family is the paper's ViT-L-14-336 openai.
        reference: ``prompts``, a folder of images, or an .npz of `sd35bench reference make`.
        model: instead of the name's backbone: an open_clip model, ``local-dir:PATH`` or ``nano``.
        pretrained: its pretrained tag or checkpoint path.
        min_images: fewest images for a value instead of 64.

    Raises: ConfigError for a reference that is not there, MetricError for an unknown backbone.
    """
    label = name.removeprefix("cmmd").removeprefix("_")
    if model is not None:
        label = "nano" if model == "nano" else "clip"
    backbone = Backbone(None, model, pretrained)
    chosen = choose_extractor(label if label else _DEFAULT_LABEL, backbone)
    return Cmmd(*chosen, reference, min_images)
