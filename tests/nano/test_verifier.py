"""The verifier: right on true renders, wrong on anything else, never a crash."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sd35bench.nano.prompts import CHANGES, sample_edit
from sd35bench.nano.verifier import verify, verify_edit
from sd35bench.nano.world import (
    ASPECT_RATIOS,
    Level,
    Scene,
    Thing,
    caption,
    render,
    replace_layout,
    sample_scene,
)

CLEAR: tuple[Level, ...] = ("single", "relation", "count", "several")
PROMPT = "a red circle left of a blue square on white"


def scenes(number: int, levels: tuple[Level, ...], seed: int = 0) -> list[Scene]:
    """Scenes of mixed sizes and levels."""
    rng = np.random.default_rng(seed)
    sizes = list(ASPECT_RATIOS.values())
    return [
        sample_scene(rng, levels[i % len(levels)], *sizes[i % len(sizes)]) for i in range(number)
    ]


def test_verify_true_renders_at_least_99_percent():
    right = [verify(render(scene), caption(scene)).all_right for scene in scenes(100, CLEAR)]
    assert np.mean(right) >= 0.99


def test_verify_overlap_true_renders():
    right = [verify(render(scene), caption(scene)).all_right for scene in scenes(4, ("overlap",))]
    assert np.mean(right) >= 0.9


def test_verify_shuffled_captions_near_chance():
    made = scenes(50, CLEAR)
    right = [
        verify(render(scene), caption(other)).all_right
        for scene, other in zip(made, made[7:] + made[:7], strict=True)
    ]
    assert np.mean(right) <= 0.02


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("a green circle left of a blue square on white", "colour"),
        ("a red ring left of a blue square on white", "shape"),
        ("a blue circle left of a red square on white", "shape"),
        ("a red circle right of a blue square on white", "relation"),
        ("a red circle above a blue square on white", "relation"),
        ("a red circle left of a blue square on pink", "background"),
        ("a red circle on white", "count"),
        ("two red circles on white", "colour"),
        ("three red circles on white", "count"),
        ("a red circle and a blue square and a green ring on white", "count"),
        ("a red circle in front of a blue square on white", "relation"),
    ],
)
def test_verify_catches_mutant_prompt(asked: str, part: str):
    things = (Thing("circle", "red", 0, 0, 1), Thing("square", "blue", 0, 0, 1))
    scene = Scene("relation", things, "white", 64, 64, relation="left of")
    image = render(replace_layout(np.random.default_rng(1), scene))
    assert caption(scene) == PROMPT
    assert verify(image, PROMPT).all_right
    verdict = verify(image, asked)
    assert not verdict.parts[part]
    assert verdict.score < 1


def test_verify_sizes_places_and_counts():
    rng = np.random.default_rng(2)
    small = replace(sample_scene(rng, "single"), size="small", place="left", phrasing=0)
    image = render(replace_layout(rng, small))
    text = caption(small)
    assert verify(image, text).all_right
    assert not verify(image, text.replace("small", "large")).parts["size"]
    assert not verify(image, text.replace("left", "right")).parts["place"]


@pytest.mark.parametrize("kind", ["black", "white", "noise", "stripes"])
def test_verify_fails_what_is_no_picture_of_the_world(kind: str):
    rng = np.random.default_rng(0)
    image = {
        "black": np.zeros((64, 64, 3), np.uint8),
        "white": np.full((64, 64, 3), 255, np.uint8),
        "noise": rng.integers(0, 256, (64, 64, 3)).astype(np.uint8),
        "stripes": np.tile(np.array([[[220, 30, 30]], [[35, 65, 225]]], np.uint8), (32, 64, 1)),
    }[kind]
    for scene in scenes(8, CLEAR):
        assert not verify(image, caption(scene)).all_right


@settings(max_examples=25, deadline=None)
@given(
    image=st.tuples(st.integers(8, 40), st.integers(8, 40)).flatmap(
        lambda size: arrays(np.uint8, (*size, 3))
    ),
    number=st.integers(0, 19),
)
def test_verify_never_crashes_on_a_uint8_image(image: np.ndarray, number: int):
    prompt = caption(scenes(20, (*CLEAR, *CLEAR))[number])
    assert 0 <= verify(image, prompt).score <= 1


def test_verify_refuses_floats_and_foreign_prompts():
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(TypeError, match="uint8"):
        verify(image.astype(np.float32), PROMPT)
    with pytest.raises(ValueError, match="shape"):
        verify(image[..., 0], PROMPT)
    with pytest.raises(ValueError, match="not a caption"):
        verify(image, "a cat")


@pytest.mark.parametrize("change", CHANGES)
def test_verify_edit_tells_init_target_and_other_layout_apart(change: str):
    rng = np.random.default_rng(5)
    kept, kept_elsewhere = [], []
    for level in ("single", "relation") * 4:
        edit = sample_edit(rng, level, change)
        prompt, init = caption(edit.target), render(edit.init)
        done = verify_edit(render(edit.target), init, prompt)
        untouched = verify_edit(init, init, prompt)
        assert done.followed == 1
        assert untouched.followed == 0
        assert untouched.kept == 1
        kept.append(done.kept)
        other = render(sample_scene(rng, level))
        kept_elsewhere.append(verify_edit(other, init, prompt).kept)
    assert np.mean(kept) > 0.93
    assert np.mean(kept_elsewhere) < 0.5


def test_verify_edit_refuses_unlike_sizes():
    edit = sample_edit(np.random.default_rng(0))
    with pytest.raises(ValueError, match="init image"):
        verify_edit(render(edit.target)[:, :56], render(edit.init), caption(edit.target))
