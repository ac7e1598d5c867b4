"""Fréchet distance of a setting's images from a reference, on features of a named extractor.

`fid_inception` is the FID of the literature; `fid_nano` and `fid_<clip model>` are the same formula
on other features and have numbers of their own. For the reference see
`sd35bench.metrics.reference`; the distance itself is `sd35bench.stats.frechet`, from features
that are kept.
"""

from sd35bench.metrics.reference import ReferencedMetric


class Fid(ReferencedMetric):
    """Fréchet distance: `fid`, `fid_inception`, `fid_nano` or `fid_<clip model>_<pretrained>`."""

    family = "fid"
    not_taken = frozenset({"min_images"})


load = Fid.load
