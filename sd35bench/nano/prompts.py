"""The embedded model's prompt sets: two disjoint splits of combinations that training never saw.

A set is a stream: the first 8 items of a longer set are the set of 8. Levels are interleaved so
that every prefix is a balanced mix, half of it single objects. Overlap, the hardest level, has a
set of its own, so that it is never averaged with the rest.

An edit is a pair of scenes: the init image's, and one that differs from it in one part.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sd35bench.nano.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Level,
    Partition,
    Scene,
    caption,
    fits,
    render,
    replace_layout,
    sample_scene,
    scene_partition,
)

Split = Literal["tune", "heldout"]
Kind = Literal["t2i", "edit"]

SIZES: dict[Kind, int] = {"t2i": 256, "edit": 128}
"""How many items a set has where no limit is given."""
MAX_ITEMS = 400
_T2I_LEVELS: tuple[Level, ...] = (
    *("single", "relation", "single", "count"),
    *("single", "relation", "single", "several"),
)
_EDIT_LEVELS: tuple[Level, ...] = ("single", "single", "single", "relation", "relation", "relation")
Change = Literal["colour", "shape", "background"]
CHANGES: tuple[Change, ...] = get_args(Change)


@dataclass(frozen=True)
class NanoPrompt:
    """One prompt with the scene that it describes; an edit also has the scene it starts from.

    `width`, `height` in px. `change` names the part that an edit changes.
    """

    id: str
    prompt: str
    level: Level
    width: int
    height: int
    scene: Scene
    init_scene: Scene | None = None
    change: str | None = None


def prompt_set(
    split: Split, kind: Kind = "t2i", limit: int | None = None, seed: int = 0
) -> list[NanoPrompt]:
    """The first `limit` items (all of `SIZES` by default), with distinct prompts.

    Raises: ValueError for an unknown split or kind, or a limit outside [1, MAX_ITEMS].
    """
    if split not in ("tune", "heldout") or kind not in SIZES:
        raise ValueError(f"no prompt set {split!r}/{kind!r}: tune or heldout, t2i or edit")
    wanted = _checked(SIZES[kind] if limit is None else limit)
    return list(islice(_stream(split, kind, _T2I_LEVELS, seed), wanted))


def level_set(split: Split, level: Level, limit: int = 64, seed: int = 0) -> list[NanoPrompt]:
    """Prompts of one level alone: "overlap", reported apart, or "relation".

    Relations are where guidance and steps still buy quality at 20 steps.

    Raises: ValueError for a limit outside [1, MAX_ITEMS].
    """
    return list(islice(_stream(split, "t2i", (level,), seed), _checked(limit)))


def init_image(item: NanoPrompt) -> NDArray[np.uint8]:
    """The picture that an edit starts from: [height, width, 3] uint8. Raises: ValueError."""
    if item.init_scene is None:
        raise ValueError(f"prompt {item.id} has no init image; edits have one")
    return render(item.init_scene)


def true_render(
    item: NanoPrompt, seed: int, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """A fresh true picture of the prompt, objects elsewhere: [height, width, 3] uint8.

    `size` is (width, height) in px, the item's own by default.
    """
    width, height = size or (item.width, item.height)
    scene = replace(item.scene, width=width, height=height)
    return render(replace_layout(np.random.default_rng([seed, 7919]), scene))


def _checked(limit: int) -> int:
    if not 1 <= limit <= MAX_ITEMS:
        raise ValueError(f"prompts.limit is {limit}; nano has 1 to {MAX_ITEMS} items in a set")
    return limit


def _stream(split: Split, kind: Kind, levels: tuple[Level, ...], seed: int) -> Iterator[NanoPrompt]:
    """Items without end, no prompt twice."""
    rng = np.random.default_rng([seed, split == "heldout", kind == "edit", len(levels)])
    said: set[str] = set()
    for number in count():
        item = _draw(rng, split, kind, levels, number)
        while item.prompt in said:
            item = _draw(rng, split, kind, levels, number)
        said.add(item.prompt)
        name = levels[0] if len(levels) == 1 else kind
        yield replace(item, id=f"{split}-{name}-{seed}-{number:04d}")


def _draw(
    rng: np.random.Generator, split: Split, kind: Kind, levels: tuple[Level, ...], number: int
) -> NanoPrompt:
    if kind == "t2i":
        scene = sample_scene(rng, levels[number % len(levels)], wanted=split)
        return NanoPrompt("", caption(scene), scene.level, scene.width, scene.height, scene)
    level = _EDIT_LEVELS[number % len(_EDIT_LEVELS)]
    change = CHANGES[number % len(CHANGES)]
    edit = sample_edit(rng, level, change, split)
    scene = edit.target
    return NanoPrompt(
        "", caption(scene), level, scene.width, scene.height, scene, edit.init, change
    )


@dataclass(frozen=True)
class Edit:
    """Two scenes of one layout that differ in one part."""

    change: Change
    init: Scene
    target: Scene


def sample_edit(
    rng: np.random.Generator,
    level: Level = "single",
    change: Change = "colour",
    wanted: Partition = "train",
) -> Edit:
    """A random edit whose target's combinations lie in `wanted`.

    The init scene's lie there or in training, so that edits of one split never show the other's.
    """
    while True:
        target = sample_scene(rng, level, wanted=wanted)
        init = _changed(rng, target, change)
        if fits(init) and scene_partition(init) in ("train", wanted):
            return Edit(change, init, target)


def _changed(rng: np.random.Generator, scene: Scene, change: Change) -> Scene:
    if change == "background":
        others = [name for name in BACKGROUNDS if name != scene.background]
        return replace(scene, background=others[rng.integers(len(others))])
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    if change == "colour":
        taken = {other.colour for other in scene.things}
        hues = [name for name in COLOURS if name not in taken]
        thing = replace(thing, colour=hues[rng.integers(len(hues))])
    else:
        shapes = [name for name in SHAPES if name != thing.shape]
        thing = replace(thing, shape=shapes[rng.integers(len(shapes))])
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))
