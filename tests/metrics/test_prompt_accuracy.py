import numpy as np
import pytest

from sd35bench.metrics.init_kept import InitKept
from sd35bench.metrics.prompt_accuracy import PromptAccuracy
from sd35bench.metrics.reference import true_renders
from tests.studies.memory import record

RED, BLUE = "a large red circle on white", "a large blue circle on white"


def _render(prompt: str, seed: int = 0) -> np.ndarray:
    return list(true_renders(prompt, (64, 64), seed + 1))[seed]


def _accuracy(image, prompt):
    return PromptAccuracy().score_images([image], [record(0, prompt=prompt)], [None])[0]


def test_prompt_accuracy_is_1_for_a_true_render_and_0_for_another():
    right = _accuracy(_render(RED), RED)
    assert right.value == 1.0
    assert all(right.detail["parts"].values())
    wrong = _accuracy(_render(BLUE), RED)
    assert wrong.value == 0.0
    assert wrong.detail["parts"]["background"] is True
    assert wrong.detail["parts"]["colour"] is False
    assert 0 < wrong.detail["share"] < 1


def test_prompt_accuracy_mutant_with_swapped_channels_fails():
    assert _accuracy(_render(RED)[:, :, ::-1].copy(), RED).value == 0.0


def test_prompt_of_another_world_has_no_value():
    found = _accuracy(_render(RED), "a cat in a hat")
    assert found.value is None
    assert "cat" in found.detail["reason"]


def _kept(image, init, prompt=BLUE):
    return InitKept().score_images([image], [record(0, prompt=prompt)], [init])[0]


def test_init_kept_is_high_for_the_init_image_and_low_for_another_place():
    init = _render(RED, 1)
    assert _kept(init, init).value == pytest.approx(1.0)
    moved = next(
        image
        for seed in range(2, 40)
        if np.abs((image := _render(BLUE, seed)).astype(int) - init).mean() > 45
    )
    assert _kept(moved, init).value < 0.8
    assert _kept(np.full_like(init, 15), init).value < 0.2


def test_init_kept_without_or_with_another_size_of_init_has_no_value():
    init = _render(RED)
    assert _kept(init, None).value is None
    assert _kept(init, init[:32]).value is None
