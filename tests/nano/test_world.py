"""The procedural world: determinism, layout, captions that can be read back, held-out triples."""

from itertools import product

import numpy as np
import pytest

from sd35bench.nano import world
from sd35bench.nano.captions import Spec, parse, words
from sd35bench.nano.prompts import CHANGES, sample_edit
from sd35bench.nano.world import ASPECT_RATIOS, LEVELS, Scene, caption, render, sample_scene

SQUARE_AND_EXTREMES = [(64, 64), (112, 48), (48, 112)]


def scenes(number: int, seed: int = 0, size: tuple[int, int] = (64, 64)) -> list[Scene]:
    """Training scenes, levels in turn."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, LEVELS[i % len(LEVELS)], *size) for i in range(number)]


def test_sample_scene_same_seed_same_scenes_and_pixels():
    first, second = scenes(25), scenes(25)
    assert first == second
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, second, strict=True))
    assert scenes(25, seed=1) != first


@pytest.mark.parametrize("name", ASPECT_RATIOS)
def test_aspect_ratios_are_multiples_of_8_near_the_ratio(name: str):
    width, height = ASPECT_RATIOS[name]
    across, down = (int(part) for part in name.split(":"))
    assert width % 8 == height % 8 == 0
    assert 64 <= max(width, height) <= 128
    assert width / height == pytest.approx(across / down, rel=0.04)


@pytest.mark.parametrize("size", SQUARE_AND_EXTREMES)
def test_render_has_the_size_asked_and_a_clear_border(size: tuple[int, int]):
    for scene in scenes(25, size=size):
        image = render(scene)
        assert image.dtype == np.uint8
        assert image.shape == (size[1], size[0], 3)
        ground = world.BACKGROUNDS[scene.background]
        assert (image[0] == ground).all()
        assert (image[:, -1] == ground).all()


@pytest.mark.parametrize("size", SQUARE_AND_EXTREMES)
def test_caption_parses_back_to_the_scene(size: tuple[int, int]):
    for scene in scenes(250, size=size):
        said = tuple((thing.shape, thing.colour) for thing in scene.things)
        kinds = said[:1] if scene.level == "count" else said
        expected = Spec(
            scene.level,
            kinds,
            len(scene.things),
            scene.background,
            scene.size,
            scene.place,
            scene.relation,
        )
        assert parse(caption(scene)) == expected


def test_caption_stays_in_the_vocabulary_and_under_15_words():
    for scene in scenes(500):
        said = caption(scene).split()
        assert set(said) <= set(words())
        assert len(said) <= 14


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a red circle", "a red circle on orange", "two red circle on white", "a" * 5000],
)
def test_parse_refuses_foreign_text(text: str):
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_partition_holds_out_a_sixth_but_no_pair():
    triples = list(product(world.SHAPES, world.COLOURS, world.BACKGROUNDS))
    where = {triple: world.partition(*triple) for triple in triples}
    counts = {name: list(where.values()).count(name) for name in ("train", "tune", "heldout")}
    assert counts == {"train": 99, "tune": 11, "heldout": 10}
    for pair in ((0, 1), (0, 2), (1, 2)):
        seen = [tuple(t[i] for i in pair) for t in triples if where[t] == "train"]
        assert len(set(seen)) == len({tuple(t[i] for i in pair) for t in triples})
        assert min(seen.count(key) for key in seen) >= 2


def test_sample_scene_keeps_to_its_partition():
    rng = np.random.default_rng(3)
    for wanted in ("train", "tune", "heldout"):
        for level in LEVELS:
            scene = sample_scene(rng, level, wanted=wanted)
            assert world.scene_partition(scene) == wanted
            assert (world.scene_partition(scene) == "train") == (wanted == "train")


@pytest.mark.parametrize("change", CHANGES)
def test_sample_edit_changes_one_part_only(change: str):
    rng = np.random.default_rng(4)
    for level in ("single", "relation"):
        edit = sample_edit(rng, level, change, "heldout")
        assert world.scene_partition(edit.target) == "heldout"
        assert (edit.init.background != edit.target.background) == (change == "background")
        pairs = list(zip(edit.init.things, edit.target.things, strict=True))
        assert all((a.x, a.y, a.radius) == (b.x, b.y, b.radius) for a, b in pairs)
        differences = sum((a.colour != b.colour) + (a.shape != b.shape) for a, b in pairs)
        assert differences == (0 if change == "background" else 1)
