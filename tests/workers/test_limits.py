import pytest

from sd35bench.config import compose, freeze
from sd35bench.errors import ConfigError
from sd35bench.types import Request
from sd35bench.workers.limits import (
    BATCH_FLOOR_S,
    LONGEST_WAIT_S,
    START_FLOOR_S,
    Limits,
    work_of,
)


def request(**fields) -> Request:
    return Request(
        **{"prompt": "", "steps": 28, "cfg": 5, "seed": 0, "width": 1000, "height": 1000, **fields}
    )


def test_batch_deadline_comes_from_the_warm_up_with_a_floor():
    limits = Limits()
    assert limits.batch_deadline_s(0.01) == BATCH_FLOOR_S == 120
    assert limits.batch_deadline_s(10) == 200
    assert limits.batch_deadline_s(1e9) == LONGEST_WAIT_S


def test_a_given_deadline_is_taken_as_it_is():
    limits = Limits(deadline_s=3)
    assert limits.batch_deadline_s(1000) == 3
    assert limits.start_deadline_s() == limits.start_deadline_s(1e6) == 30


def test_start_deadline_grows_with_the_work_of_a_warm_up():
    assert Limits().start_deadline_s() == START_FLOOR_S
    assert Limits().start_deadline_s(1.0) == START_FLOOR_S
    assert Limits().start_deadline_s(56) == 56 * 60


def test_longest_wait_is_one_that_poll_can_count():
    assert Limits(deadline_s=1e6).start_deadline_s() * 1000 < 2**31


@pytest.mark.parametrize(
    ("fields", "images", "work"),
    [
        ({}, 1, 56),
        ({"cfg": 1}, 1, 28),
        ({"width": 500}, 1, 28),
        ({}, 4, 224),
        ({"init_image": "x", "prompt_strength": 0.5}, 1, 28),
        ({"sampler": "heun"}, 1, 2 * (2 * 28 - 1)),
        ({"sampler": "heun", "cfg": 1}, 1, 2 * 28 - 1),
    ],
    ids=["guided", "unguided", "half-size", "batch", "half-the-steps", "heun", "heun-unguided"],
)
def test_work_counts_evaluations_and_pixels(fields, images, work):
    assert work_of(request(**fields), images) == pytest.approx(work)


@pytest.mark.parametrize(
    "text", ["deadline_s=0", "memory_limit_gb=-1", "max_failures=0", "starts=0"]
)
def test_limits_that_allow_nothing_are_refused(text):
    with pytest.raises(ConfigError, match=text.partition("=")[0]):
        freeze(compose(["backend=fake", text]))
