"""Fréchet distance of a setting's images from a reference, on features of a named extractor.

`fid_inception` is the FID of the literature; `fid_nano` and `fid_<clip model>` are the same formula
on other features and have numbers of their own. For the reference see
`sd35bench.metrics.reference`; the distance itself is `sd35bench.stats.frechet`, from features
that are kept.
"""

from sd35bench.metrics.extractors import Backbone, choose_extractor
from sd35bench.metrics.reference import PROMPTS, ReferencedMetric


class Fid(ReferencedMetric):
    """Fréchet distance; `reference` is ``prompts``, a folder, or an .npz file."""

    family = "fid"


def load(
    name: str,
    *,
    extractor: str | None = None,
    reference: str = PROMPTS,
    model: str | None = None,
    pretrained: str | None = None,
    weights: str | None = None,
) -> Fid:
    """Load `fid`, `fid_inception`, `fid_nano` or `fid_<clip model>_<pretrained>`.

    Args:
        name: the metric's name; the bare family is Inception.
        extractor: instead of the name's: ``inception``, ``nano``, ``clip`` (with `model`) or
            ``dinov2``.
        reference: ``prompts``, a folder of images, or an .npz with `mean`, `cov` and `n`.
        model: for ``clip``: an open_clip model; for ``dinov2``: a Hub id; or ``local-dir:PATH``.
        pretrained: its pretrained tag or checkpoint path.
        weights: for ``inception``: its checkpoint's path.

    Raises: ConfigError for a reference that is not there.
    """
    label = name.removeprefix("fid").removeprefix("_")
    backbone = Backbone(extractor, model, pretrained, weights)
    return Fid(*choose_extractor(label if label else "inception", backbone), reference)
