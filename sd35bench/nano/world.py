"""A procedural world of coloured shapes, with captions: what the embedded model learns.

A scene is a flat background with one to four objects. Everything a caption says can be read back
from the pixels (see `verifier`), so accuracy on this world needs no human and no network. Shapes
differ in topology or silhouette, colours and backgrounds are far apart in RGB, sizes have a clear
gap, and every object spans at least two cells of the 8-px latent grid.

Held-out means compositional: some (shape, colour, background) triples, chosen by hash, never occur
in training at any level, although each of their pairs does.

Lengths are pixels, x grows to the right, y downwards. NumPy only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
Shape = Literal["circle", "square", "triangle", "cross", "ring"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "cyan"]
Background = Literal["white", "black", "grey", "pink"]
Size = Literal["small", "large"]
Place = Literal["left", "right", "top", "bottom"]
Relation = Literal["left of", "right of", "above", "below", "in front of", "behind"]
Level = Literal["single", "relation", "count", "several", "overlap"]
Partition = Literal["train", "tune", "heldout"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
LEVELS: tuple[Level, ...] = get_args(Level)
BESIDE: tuple[Relation, ...] = ("left of", "right of", "above", "below")
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 165, 50),
    "blue": (35, 65, 225),
    "yellow": (245, 220, 30),
    "purple": (160, 40, 200),
    "cyan": (30, 205, 225),
}
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (15, 15, 15),
    "grey": (128, 128, 128),
    "pink": (255, 190, 205),
}
PLACES: dict[Place, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS: dict[Shape, str] = {
    shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES
}

ASPECT_RATIOS: dict[str, tuple[int, int]] = {
    "1:1": (64, 64),
    "16:9": (88, 48),
    "21:9": (112, 48),
    "3:2": (72, 48),
    "2:3": (48, 72),
    "4:5": (64, 80),
    "5:4": (80, 64),
    "3:4": (48, 64),
    "4:3": (64, 48),
    "9:16": (48, 88),
    "9:21": (48, 112),
}
"""The hosted service's aspect ratios as (width, height) in px, multiples of 8 near 64 x 64."""

# Radii in fractions of the canvas' short side; `radius` is that of the circle of the same family.
SMALL_RADIUS, LARGE_RADIUS = 0.165, 0.27
SIZE_BOUNDARY = (SMALL_RADIUS * LARGE_RADIUS) ** 0.5
_CROWD_RADIUS: dict[Level, tuple[float, float]] = {
    "relation": (0.155, 0.185),
    "count": (0.145, 0.165),
    "several": (0.145, 0.165),
    "overlap": (0.20, 0.24),
}
_MARGIN_PX = 1.5
_GAP_PX = 3.0
# Half extents (left/right, up, down) of each shape at radius 1, with its centroid at the origin.
_EXTENTS: dict[Shape, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (0.9, 0.9, 0.9),
    "triangle": (1.17, 1.35, 0.675),
    "cross": (1.15, 1.15, 1.15),
    "ring": (1.1, 1.1, 1.1),
}
# Chosen so that every (shape, colour), (shape, background) and (colour, background) pair is seen
# in training with at least two partners; `tests/nano/test_world.py` holds this.
_HOLDOUT_SALT = "nano-60"
_HOLDOUT_PERCENT = 9


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its centroid in px and its radius in px."""

    shape: Shape
    colour: Colour
    x: float
    y: float
    radius: float

    def box(self) -> tuple[float, float, float, float]:
        """Bounding box (left, top, right, bottom) in px."""
        side, up, down = (self.radius * extent for extent in _EXTENTS[self.shape])
        return self.x - side, self.y - up, self.x + side, self.y + down


@dataclass(frozen=True)
class Scene:
    """Objects from back to front on a background, and which of their properties are said.

    `size` and `place` are said of single objects only, `relation` of the first object to the
    second. `phrasing` picks one of three wordings.
    """

    level: Level
    things: tuple[Thing, ...]
    background: Background
    width: int
    height: int
    size: Size | None = None
    place: Place | None = None
    relation: Relation | None = None
    phrasing: int = 0


def partition(shape: Shape, colour: Colour, background: Background) -> Partition:
    """Where a combination belongs: training, or one of the two splits that it never sees."""
    key = f"{_HOLDOUT_SALT}/{shape}/{colour}/{background}"
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    if bucket < _HOLDOUT_PERCENT:
        return "tune"
    return "heldout" if bucket < 2 * _HOLDOUT_PERCENT else "train"


def scene_partition(scene: Scene) -> Partition | None:
    """`train` if no combination in the scene is held out; None if it mixes both splits."""
    found: set[Partition] = {
        partition(thing.shape, thing.colour, scene.background) for thing in scene.things
    }
    found.discard("train")
    if len(found) > 1:
        return None
    return found.pop() if found else "train"


def caption(scene: Scene) -> str:
    """The scene in words, at most 14 of them; the order of objects is the order in the text."""
    body = _body(scene)
    # "several" has no room for the long wording in 16 tokens.
    phrasing = 0 if scene.level == "several" and scene.phrasing == 1 else scene.phrasing
    if phrasing == 0:
        return f"{body} on {scene.background}"
    if phrasing == 1:
        return f"{body} on a {scene.background} background"
    return f"{scene.background} background with {body}"


def _body(scene: Scene) -> str:
    first = scene.things[0]
    if scene.level == "count":
        return f"{NUMBERS[len(scene.things)]} {first.colour} {PLURALS[first.shape]}"
    named = [f"a {thing.colour} {thing.shape}" for thing in scene.things]
    if scene.level == "single":
        size = f"{scene.size} " if scene.size else ""
        place = f" {PLACES[scene.place]}" if scene.place else ""
        return f"a {size}{first.colour} {first.shape}{place}"
    if scene.relation is not None:
        return f"{named[0]} {scene.relation} {named[1]}"
    return " and ".join(named)


def signed_distance(
    shape: Shape, dx: NDArray[np.floating], dy: NDArray[np.floating], radius: float
) -> NDArray[np.floating]:
    """Distance to the outline in px, negative inside; `dx`, `dy` are offsets from the centroid."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.825 * radius) - 0.275 * radius
    if shape == "cross":
        ax, ay = np.abs(dx), np.abs(dy)
        long, short = np.maximum(ax, ay), np.minimum(ax, ay)
        return np.maximum(long - 1.15 * radius, short - 0.38 * radius)
    inner = 0.675 * radius  # equilateral triangle, point up
    slanted = 0.8660254 * np.abs(dx) - 0.5 * dy - inner
    return np.maximum(slanted, dy - inner)


def coverage(thing: Thing, width: int, height: int) -> NDArray[np.floating]:
    """Antialiased coverage of an object: [height, width] in [0, 1]."""
    dx = (np.arange(width, dtype=np.float32) + 0.5 - thing.x)[None, :]
    dy = (np.arange(height, dtype=np.float32) + 0.5 - thing.y)[:, None]
    return np.clip(0.5 - signed_distance(thing.shape, dx, dy, thing.radius), 0.0, 1.0)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The scene's picture: [height, width, 3] uint8.

    With "in front of" the first object named is drawn last; otherwise later objects are on top.
    """
    canvas = np.empty((scene.height, scene.width, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    things = scene.things[::-1] if scene.relation == "in front of" else scene.things
    for thing in things:
        alpha = coverage(thing, scene.width, scene.height)[..., None]
        canvas += alpha * (np.array(COLOURS[thing.colour], np.float32) - canvas)
    return (canvas + 0.5).astype(np.uint8)


def sample_scene(
    rng: np.random.Generator,
    level: Level,
    width: int = 64,
    height: int = 64,
    wanted: Partition = "train",
) -> Scene:
    """A random scene of a level whose combinations lie in `wanted`."""
    while True:
        scene = _draw(rng, level, width, height)
        if scene_partition(scene) == wanted:
            return replace_layout(rng, scene)


def _draw(rng: np.random.Generator, level: Level, width: int, height: int) -> Scene:
    """What is in a scene, without a layout."""
    number = {"single": 1, "relation": 2, "several": 3, "overlap": 2}.get(level)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    size: Size | None = None
    place: Place | None = None
    relation: Relation | None = None
    kinds: list[tuple[Shape, Colour]]
    if level == "count":
        number = int(rng.integers(2, 5))
        kinds = [(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)))] * number
    else:
        assert number is not None
        hues = rng.permutation(len(COLOURS))[:number]
        kinds = [(_pick(rng, SHAPES), tuple(COLOURS)[hue]) for hue in hues]
    if level == "single":
        size = _pick(rng, (None, "small", "large"))
        place = _pick(rng, (None, *PLACES))
    elif level == "relation":
        relation = _pick(rng, BESIDE)
    elif level == "overlap":
        relation = _pick(rng, ("in front of", "behind"))
    things = tuple(Thing(shape, colour, 0.0, 0.0, 1.0) for shape, colour in kinds)
    phrasing = int(rng.integers(3))
    return Scene(level, things, background, width, height, size, place, relation, phrasing)


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def replace_layout(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same caption with fresh positions and radii."""
    while True:
        shared = rng.uniform(0.97, 1.03)
        things: list[Thing] = []
        for thing in scene.things:
            radius = _radius(rng, scene) if not things or scene.level != "count" else 0.0
            radius = radius * shared if radius else things[0].radius
            placed = _place(rng, replace(thing, radius=radius), scene, things)
            if placed is None:
                break
            things.append(placed)
        else:
            return replace(scene, things=tuple(things))


def _radius(rng: np.random.Generator, scene: Scene) -> float:
    short_side = min(scene.width, scene.height)
    if scene.level != "single":
        return short_side * rng.uniform(*_CROWD_RADIUS[scene.level])
    size = scene.size or _pick(rng, ("small", "large"))
    return short_side * (SMALL_RADIUS if size == "small" else LARGE_RADIUS)


def _place(
    rng: np.random.Generator, thing: Thing, scene: Scene, others: list[Thing]
) -> Thing | None:
    """The object at a position that its caption and the others allow, or None if none is found."""
    side, up, down = (thing.radius * extent + _MARGIN_PX for extent in _EXTENTS[thing.shape])
    for _ in range(40):
        x = rng.uniform(side, scene.width - side)
        y = rng.uniform(up, scene.height - down)
        candidate = replace(thing, x=float(x), y=float(y))
        if _allowed(candidate, scene, others):
            return candidate
    return None


def _allowed(thing: Thing, scene: Scene, others: list[Thing]) -> bool:
    if scene.level == "overlap":
        return all(_half_covered(thing, other) for other in others)
    if not all(_apart(thing, other) for other in others):
        return False
    if scene.level == "single" and scene.place is not None:
        return in_place(scene.place, thing.x / scene.width, thing.y / scene.height, 0.06)
    if scene.level == "relation" and others:
        assert scene.relation is not None
        return holds(scene.relation, others[0], thing, 1.3)
    return True


def fits(scene: Scene) -> bool:
    """Whether every object lies on the canvas and apart from the others."""
    things = scene.things
    for thing in things:
        left, top, right, bottom = thing.box()
        if min(left, top) < 1 or right > scene.width - 1 or bottom > scene.height - 1:
            return False
    pairs = ((a, b) for i, a in enumerate(things) for b in things[:i])
    return all(_apart(a, b) for a, b in pairs)


def _apart(a: Thing, b: Thing) -> bool:
    """Whether the bounding boxes leave a gap in x or in y."""
    left, top, right, bottom = a.box()
    left2, top2, right2, bottom2 = b.box()
    gap_x = max(left2 - right, left - right2)
    gap_y = max(top2 - bottom, top - bottom2)
    return max(gap_x, gap_y) >= _GAP_PX


def _half_covered(a: Thing, b: Thing) -> bool:
    """Whether two objects overlap clearly but leave the one behind recognisable."""
    distance = float(np.hypot(a.x - b.x, a.y - b.y)) / (a.radius + b.radius)
    return 0.55 <= distance <= 0.75


def in_place(place: Place, x: float, y: float, margin: float = 0.0) -> bool:
    """Whether a centroid, in fractions of width and height, lies in the named half."""
    inside: dict[Place, bool] = {
        "left": x <= 0.5 - margin,
        "right": x >= 0.5 + margin,
        "top": y <= 0.5 - margin,
        "bottom": y >= 0.5 + margin,
    }
    return inside[place]


def holds(relation: Relation, a: Thing, b: Thing, steepness: float = 0.9) -> bool:
    """Whether `a` stands beside `b` as said, mainly along that axis (by the factor `steepness`)."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along > 0 and along >= steepness * abs(across)
