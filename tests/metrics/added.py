"""A metric as a newcomer would add it: one module; the test adds the line."""

from sd35bench.metrics.base import ImageMetric, Value


class Sharpness(ImageMetric):
    def __init__(self, radius):
        self.name = f"sharpness_{radius}"

    def score_images(self, images, records, inits):
        return [Value(float(image.std())) for image in images]


def load(name, *, radius=1):
    return Sharpness(radius)
