"""A metric: the mean level of an image."""

from sd35bench.metrics.base import ImageMetric, Value


class Brightness(ImageMetric):
    """Mean of all levels, 0 to 255, or of one channel."""

    quality = False

    def __init__(self, name, channel=None):
        self.name = name if channel is None else f"{name}_{channel}"
        self._channel = channel

    def score_images(self, images, records, inits):
        seen = (i if self._channel is None else i[..., self._channel] for i in images)
        return [Value(float(image.mean())) for image in seen]
