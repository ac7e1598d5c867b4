"""FID∞: the Fréchet distance extrapolated to infinitely many images.

It takes away the part of FID that depends on n, and so compares sets of unlike n; see
`sd35bench.stats.frechet` for the line, its standard error (`fit_se`) and the interval.
It needs twice the images of FID, since the line reaches down to half of them.

Source: Chong and Forsyth 2020 (arXiv 1911.07023).
"""

from sd35bench.metrics.reference import ReferencedMetric


class FidInfinity(ReferencedMetric):
    """Extrapolated Fréchet distance."""

    family = "fid_infinity"
    statistic = "frechet_infinity"

    @property
    def min_images(self) -> int:
        """Twice what a Fréchet distance needs, or as configured."""
        return 2 * self.extractor.min_images if self._least is None else self._least


load = FidInfinity.load
