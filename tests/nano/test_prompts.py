"""Prompt sets: disjoint, held out, stable in their prefixes, balanced."""

from collections import Counter

import numpy as np
import pytest

from sd35bench.nano.prompts import (
    SIZES,
    NanoPrompt,
    init_image,
    level_set,
    prompt_set,
    true_render,
)
from sd35bench.nano.verifier import verify, verify_edit
from sd35bench.nano.world import caption, render, scene_partition


@pytest.mark.parametrize("kind", ["t2i", "edit"])
@pytest.mark.parametrize("split", ["tune", "heldout"])
def test_prompt_set_is_held_out_distinct_and_prefix_stable(split: str, kind: str):
    items = prompt_set(split, kind)
    assert len(items) == SIZES[kind] == {"t2i": 256, "edit": 128}[kind]
    assert len({item.prompt for item in items}) == len({item.id for item in items}) == len(items)
    assert all(scene_partition(item.scene) == split for item in items)
    assert all(caption(item.scene) == item.prompt for item in items)
    assert prompt_set(split, kind, 8) == items[:8]
    assert prompt_set(split, kind, 8, seed=1) != items[:8]


def test_prompt_set_splits_share_no_combination():
    tune, heldout = (
        {
            (thing.shape, thing.colour, item.scene.background)
            for item in prompt_set(split)
            if item.level == "single"
            for thing in item.scene.things
        }
        for split in ("tune", "heldout")
    )
    assert tune
    assert heldout
    assert not tune & heldout


@pytest.mark.parametrize("limit", [8, 24, 64])
def test_prompt_set_prefix_is_balanced(limit: int):
    levels = Counter(item.level for item in prompt_set("heldout", limit=limit))
    assert levels["single"] == limit // 2
    assert levels["relation"] == limit // 4
    assert levels["count"] == levels["several"] == limit // 8


def test_true_render_holds_and_moves():
    items: list[NanoPrompt] = prompt_set("heldout", limit=32)
    for item in items:
        first, second = true_render(item, 0), true_render(item, 1)
        assert verify(first, item.prompt).all_right
        assert verify(second, item.prompt).all_right
        assert np.array_equal(first, true_render(item, 0))
    moved = [not np.array_equal(true_render(item, 0), true_render(item, 1)) for item in items]
    assert np.mean(moved) > 0.9
    assert true_render(items[0], 0, size=(112, 48)).shape == (48, 112, 3)


def test_edit_items_change_what_they_say():
    for item in prompt_set("tune", "edit", 24):
        verdict = verify_edit(render(item.scene), init_image(item), item.prompt)
        assert verdict.followed == 1
        assert len(verdict.changed) == 1
        assert next(iter(verdict.changed)).startswith(str(item.change))


@pytest.mark.parametrize("level", ["overlap", "relation"])
def test_set_of_one_level_is_apart_and_held_out(level):
    items = level_set("tune", level, 80)
    assert {item.level for item in items} == {level}
    assert items[5].id == f"tune-{level}-0-0005"
    assert len({item.prompt for item in items}) == 80
    assert not {i.prompt for i in items} & {i.prompt for i in level_set("heldout", level, 80)}
    assert level_set("tune", level, 8) == items[:8]


def test_usual_set_has_no_overlap():
    assert "overlap" not in {item.level for item in prompt_set("tune")}


def test_prompts_refuse_bad_arguments():
    with pytest.raises(ValueError, match=r"prompts\.limit is 0"):
        prompt_set("tune", limit=0)
    with pytest.raises(ValueError, match="no prompt set"):
        prompt_set("train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no init image"):
        init_image(prompt_set("tune", limit=1)[0])
