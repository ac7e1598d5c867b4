import numpy as np
import pytest

from sd35bench.errors import MetricError
from sd35bench.metrics.flip import PIXELS_PER_DEGREE, flip, flip_map
from tests.metrics.doubles import pictures
from tests.metrics.flip_paper import paper_flip

A, B = pictures(2)
FAINT = np.clip(A.astype(int) + np.random.default_rng(0).integers(-3, 4, A.shape), 0, 255)
PAIRS = {
    "unlike": (A, B),
    "shifted": (np.roll(A, 1, axis=1), A),
    "faint": (FAINT.astype(np.uint8), A),
    "smaller than the filters": (A[:20, :9], B[:20, :9]),
    "oblong": (A[:, :40], B[:, :40]),
}
# Single precision and cubes of it (Lab): 1e-5 was seen at most.
CLOSE = 5e-5


@pytest.mark.parametrize("ppd", [67.0, 30.0])
@pytest.mark.parametrize("name", PAIRS)
def test_flip_is_what_the_paper_says(name, ppd):
    image, reference = PAIRS[name]
    ours = flip_map(image, reference, pixels_per_degree=ppd)
    assert ours.shape == image.shape[:2]
    np.testing.assert_allclose(ours, paper_flip(image, reference, ppd), atol=CLOSE)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda a, b: (a[..., ::-1], b[..., ::-1], 67.0),
        lambda a, b: (a, b, 60.0),
        lambda a, b: (a // 2, b // 2, 67.0),
    ],
    ids=["channels swapped", "another viewer", "another range"],
)
def test_mutants_are_further_from_the_paper_than_the_tolerance(mutate):
    wrong = flip_map(*(np.ascontiguousarray(x) for x in (A, B)))
    a, b, ppd = mutate(A, B)
    assert np.abs(wrong - paper_flip(a, b, ppd)).max() > 100 * CLOSE


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 64), (5, 200)])
def test_known_values(size):
    black = np.zeros((*size, 3), np.uint8)
    white, green, blue = (np.full_like(black, c) for c in (255, (0, 255, 0), (0, 0, 255)))
    assert flip(black, black) == 0.0
    assert flip(black, white) == pytest.approx(0.9674, abs=1e-3)
    assert flip(green, blue) == pytest.approx(1.0, abs=1e-4)  # the largest colour distance there is


def test_mean_of_a_large_image_is_not_lost_in_single_precision():
    black = np.zeros((512, 512, 3), np.uint8)
    assert flip(black, np.full_like(black, 255)) == pytest.approx(0.9674, abs=1e-3)


def test_flip_is_symmetric_bounded_and_grows_with_the_difference():
    assert flip(A, B) == pytest.approx(flip(B, A), abs=1e-6)
    levels = [flip(np.minimum(A.astype(int) + d, 255).astype(np.uint8), A) for d in (0, 1, 4, 16)]
    assert levels[0] == 0.0
    assert levels == sorted(set(levels))
    noise = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    found = flip_map(*noise)
    assert 0.0 <= found.min() <= found.max() <= 1.0


def test_viewer_further_away_sees_less():
    grey = np.full((64, 64, 3), 128, np.uint8)
    striped = grey.copy()
    striped[::2], striped[1::2] = 148, 108
    near, far = (flip(striped, grey, pixels_per_degree=p) for p in (10.0, 120.0))
    assert far < near


@pytest.mark.parametrize(
    ("image", "reference"),
    [(A.astype(np.float32) / 255, A), (A, A[:, :32]), (A[..., :1], A[..., :1])],
    ids=["float", "unlike sizes", "grey"],
)
def test_flip_refuses(image, reference):
    with pytest.raises(MetricError, match="images"):
        flip(image, reference)


def test_flip_refuses_a_viewer_that_cannot_be():
    with pytest.raises(MetricError, match="pixels_per_degree"):
        flip(A, B, pixels_per_degree=0)


def test_pixels_per_degree_are_the_papers():
    viewer = np.pi / 180 * 0.7 * 3840 / 0.7
    assert abs(viewer - PIXELS_PER_DEGREE) < 0.05
