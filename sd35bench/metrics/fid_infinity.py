"""FID∞: the Fréchet distance extrapolated to infinitely many images.

It takes away the part of FID that depends on n, and so compares sets of unlike n; see
`sd35bench.stats.frechet` for the line, its standard error (`fit_se`) and the interval.
It needs twice the images of FID, since the line reaches down to half of them.

Source: Chong and Forsyth 2020 (arXiv 1911.07023).
"""

from sd35bench.metrics.extractors import Backbone, choose_extractor
from sd35bench.metrics.reference import PROMPTS, ReferencedMetric


class FidInfinity(ReferencedMetric):
    """Extrapolated Fréchet distance."""

    family = "fid_infinity"
    statistic = "frechet_infinity"

    def _own_least(self) -> int:
        return 2 * self.extractor.min_images


def load(
    name: str,
    *,
    extractor: str | None = None,
    reference: str = PROMPTS,
    model: str | None = None,
    pretrained: str | None = None,
    weights: str | None = None,
    min_images: int | None = None,
) -> FidInfinity:
    """Load `fid_infinity`, or it with an extractor: `fid_infinity_nano` and so on.

    Args:
        name: the metric's name; the bare family is Inception.
        extractor: instead of the name's: ``inception``, ``nano``, ``clip`` (with `model`) or
            ``dinov2``.
        reference: ``prompts``, a folder of images, or an .npz with `mean`, `cov` and `n`.
        model: for ``clip``: an open_clip model; for ``dinov2``: a Hub id; or ``local-dir:PATH``.
        pretrained: its pretrained tag or checkpoint path.
        weights: for ``inception``: its checkpoint's path.
        min_images: fewest images for a value instead of twice FID's.

    Raises: ConfigError for a reference that is not there.
    """
    label = name.removeprefix("fid_infinity").removeprefix("_")
    backbone = Backbone(extractor, model, pretrained, weights)
    chosen = choose_extractor(label if label else "inception", backbone)
    return FidInfinity(*chosen, reference, min_images)
