"""A metric as a newcomer would add it: one module; the test adds the line."""

from sd35bench.metrics.base import ImageMetric, Value


class Brightness(ImageMetric):
    def __init__(self, radius):
        self.name = f"brightness_{radius}"

    def score_images(self, images, records, inits):
        return [Value(float(image.mean())) for image in images]


def load(name, *, radius=1):
    return Brightness(radius)
