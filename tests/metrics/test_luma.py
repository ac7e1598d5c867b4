import numpy as np
import pytest
from PIL import Image, ImageFilter

from sd35bench.errors import ConfigError, MetricError
from sd35bench.metrics.base import load_metric
from sd35bench.metrics.luma import contrast, luma, sharpness
from tests.metrics.doubles import pictures
from tests.studies.memory import record


def _grey(values) -> np.ndarray:
    return np.repeat(np.array(values, np.uint8)[:, :, None], 3, axis=2)


def _grainy(seed: int = 0) -> np.ndarray:
    """Noise that is strong in red and weak in blue."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(size=(40, 30, 3)) * [255, 80, 20]).astype(np.uint8)


def test_sharpness_of_one_bright_pixel_is_the_kernels_own_variance():
    image = np.zeros((7, 7), np.uint8)
    image[3, 3] = 10
    laplacian = np.zeros((5, 5))
    laplacian[2, 2], laplacian[1, 2], laplacian[3, 2] = -40, 10, 10
    laplacian[2, 1], laplacian[2, 3] = 10, 10
    assert sharpness(_grey(image)) == pytest.approx(laplacian.var())


def test_sharpness_of_a_ramp_is_zero_and_of_a_blurred_image_is_less():
    assert sharpness(_grey(np.arange(0, 200, 10)[None, :].repeat(20, 0))) == pytest.approx(0.0)
    image = _grainy()
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2)))
    assert sharpness(blurred) < 0.5 * sharpness(image)


def test_contrast_of_half_black_half_white_is_one_half():
    image = np.zeros((4, 8), np.uint8)
    image[:, 4:] = 255
    assert contrast(_grey(image)) == pytest.approx(0.5)
    assert contrast(_grey(np.full((4, 4), 77))) == pytest.approx(0.0)


def test_luma_weighs_channels_as_bt_601_does():
    image = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    assert luma(image)[0] == pytest.approx([76.245, 149.685, 29.07])


@pytest.mark.parametrize("measure", [sharpness, contrast])
def test_swapped_channels_mutant_is_another_value(measure):
    image = _grainy()
    assert measure(image[:, :, ::-1].copy()) != pytest.approx(measure(image), rel=0.02)


@pytest.mark.parametrize("measure", [sharpness, contrast])
def test_floats_are_refused(measure):
    with pytest.raises(MetricError, match="uint8"):
        measure(np.zeros((8, 8, 3), np.float32))


@pytest.mark.parametrize("name", ["sharpness", "contrast"])
def test_luma_metric_gives_one_value_per_image_of_any_size(name):
    images = [*pictures(2), *pictures(1, 40, 30)]
    rows = [record(i) for i in range(3)]
    values = load_metric(name).score_images(images, rows, [None] * 3)
    expected = {"sharpness": sharpness, "contrast": contrast}[name]
    assert [v.value for v in values] == [expected(i) for i in images]


def test_image_without_an_inside_has_no_sharpness():
    (value,) = load_metric("sharpness").score_images([_grey([[0, 9]])], [record(0)], [None])
    assert (value.value, value.detail) == (None, {"reason": "below 3 pixels"})


def test_unknown_variant_is_refused():
    with pytest.raises(ConfigError, match="did you mean sharpness"):
        load_metric("sharpness_3")
