"""Edit pairs: an init scene, and the scene that a prompt which changes one part of it describes."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from sd35bench.nano.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Level,
    Partition,
    Scene,
    fits,
    sample_scene,
    scene_partition,
)

Change = Literal["colour", "shape", "background"]
CHANGES: tuple[Change, ...] = get_args(Change)


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
    size: tuple[int, int] = (64, 64),
) -> Edit:
    """A random edit whose target's combinations lie in `wanted`.

    The init scene's lie there or in training, so that edits of one split never show the other's.
    """
    while True:
        target = sample_scene(rng, level, *size, wanted=wanted)
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
