"""Which parts of a prompt hold in a picture, and what an edit kept of its init image.

Accuracy without a network: `captions.parse` reads the prompt, `segment` reads the pixels, and the
two are compared part by part. Of two objects of which one hides part of the other, a template of
each colour is fitted over positions, radii and shapes on the pixels that the other colour does not
cover; where the two fitted templates cross, the colour that is seen is in front.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sd35bench.nano.captions import Spec, parse
from sd35bench.nano.segment import (
    COLOUR_TOLERANCE,
    MIN_FIT,
    Found,
    Mask,
    Picture,
    Pixels,
    debris_px,
    find_ground,
    label_colours,
    overlap,
    segment,
)
from sd35bench.nano.world import (
    COLOURS,
    SHAPES,
    SIZE_BOUNDARY,
    Colour,
    Shape,
    Thing,
    coverage,
    holds,
    in_place,
)

_RADII = np.linspace(0.19, 0.25, 5)  # of the short side, around what `world` draws
_SHIFTS = np.linspace(-0.09, 0.09, 7)


@dataclass(frozen=True)
class Verdict:
    """Part of the prompt -> whether it holds; only parts that the prompt names are there."""

    parts: dict[str, bool]

    @property
    def all_right(self) -> bool:
        """Whether every part holds."""
        return all(self.parts.values())

    @property
    def score(self) -> float:
        """The fraction of the parts that hold, in [0, 1]."""
        return sum(self.parts.values()) / len(self.parts)


@dataclass(frozen=True)
class EditVerdict:
    """An edit's two sides: what the prompt changed, and what should have stayed.

    `changed`: part -> whether it is now as asked. `preserved`: part -> how well it was kept, in
    [0, 1] (mask overlap for objects in place, 0 or 1 for the background).
    """

    changed: dict[str, bool]
    preserved: dict[str, float]

    @property
    def followed(self) -> float:
        """The fraction of the asked changes that are there; 1 where nothing was to change."""
        return sum(self.changed.values()) / len(self.changed) if self.changed else 1.0

    @property
    def kept(self) -> float:
        """The mean over what should have stayed; 1 where nothing should have."""
        return float(np.mean(list(self.preserved.values()))) if self.preserved else 1.0


def verify(image: Pixels, prompt: str) -> Verdict:
    """Judge a uint8 [H, W, 3] picture of at least 8 px a side against a caption of the world.

    Raises: ValueError for another prompt or shape, TypeError for an image that is not uint8.
    """
    spec = parse(prompt)
    picture = segment(image)
    parts = {"background": picture.background == spec.background}
    if spec.level == "overlap":
        return Verdict(parts | judge_overlap(image, spec))
    parts["count"] = len(picture.objects) == spec.count
    if spec.level == "count":
        kinds = [(found.shape, found.colour) for found in picture.objects]
        parts["colour"] = bool(kinds) and all(kind[1] == spec.kinds[0][1] for kind in kinds)
        parts["shape"] = bool(kinds) and all(kind[0] == spec.kinds[0][0] for kind in kinds)
        return Verdict(parts)
    chosen = [_of_colour(picture, colour) for _, colour in spec.kinds]
    parts["colour"] = all(found is not None for found in chosen)
    parts["shape"] = all(
        found is not None and found.shape == shape
        for found, (shape, _) in zip(chosen, spec.kinds, strict=True)
    )
    return Verdict(parts | _layout(image, spec, chosen))


def _of_colour(picture: Picture, colour: str) -> Found | None:
    """The largest object of a colour."""
    return next((found for found in picture.objects if found.colour == colour), None)


def _layout(image: Pixels, spec: Spec, chosen: list[Found | None]) -> dict[str, bool]:
    """Size, place and relation, where the prompt names them."""
    height, width = image.shape[:2]
    first = chosen[0]
    parts: dict[str, bool] = {}
    if spec.size is not None:
        large = first is not None and first.radius > SIZE_BOUNDARY * min(height, width)
        parts["size"] = first is not None and large == (spec.size == "large")
    if spec.place is not None:
        parts["place"] = first is not None and in_place(
            spec.place, first.x / width, first.y / height
        )
    if spec.relation is not None:
        second = chosen[1]
        parts["relation"] = (
            first is not None
            and second is not None
            and holds(spec.relation, _as_thing(first), _as_thing(second))
        )
    return parts


def _as_thing(found: Found) -> Thing:
    return Thing("circle", "red", found.x, found.y, found.radius)


def verify_edit(image: Pixels, init_image: Pixels, prompt: str) -> EditVerdict:
    """Judge an edit: `prompt` describes `init_image` with one part changed.

    What was to change is found by comparing the prompt with what the init image shows, objects
    assigned so that the fewest differences remain.

    Raises: ValueError for a prompt that is no caption without overlap, for images of unlike sizes,
    and for an init image with another number of objects than the prompt names; TypeError for an
    image that is not uint8.
    """
    spec = parse(prompt)
    if spec.level == "overlap":
        raise ValueError(f"edits are judged without overlap, not for {prompt!r}")
    if image.shape != init_image.shape:
        raise ValueError(f"image has shape {image.shape}, its init image {init_image.shape}")
    before, after = segment(init_image), segment(image)
    if len(before.objects) != spec.count:
        raise ValueError(
            f"the init image shows {len(before.objects)} objects, prompt {prompt!r} names "
            f"{spec.count}"
        )
    changed: dict[str, bool] = {}
    preserved: dict[str, float] = {}
    if before.background == spec.background:
        preserved["background"] = float(after.background == spec.background)
    else:
        changed["background"] = after.background == spec.background
    for number, (was, kind) in enumerate(_assign(before, spec), 1):
        now = _nearest(after, was)
        place = _in_place(was, now, kind[0])
        for part, asked in zip(("shape", "colour"), kind, strict=True):
            if getattr(was, part) != asked:
                changed[f"{part} {number}"] = getattr(now, part, None) == asked
        same = (was.shape, was.colour) == kind
        if same and (now is None or now.colour != was.colour or now.shape != was.shape):
            place *= 0.5
        preserved[f"object {number}"] = place
    return EditVerdict(changed, preserved)


def _in_place(was: Found, now: Found | None, asked_shape: str) -> float:
    """Mask overlap; where the shape was to change, nearness of the centroids in radii."""
    if now is None:
        return 0.0
    if was.shape == asked_shape:
        return overlap(was.mask, now.mask)
    return max(0.0, 1 - float(np.hypot(now.x - was.x, now.y - was.y)) / was.radius)


def _assign(before: Picture, spec: Spec) -> list[tuple[Found, tuple[str, str]]]:
    """Each object of the init image with the kind that the prompt asks of it."""
    kinds = spec.kinds if len(spec.kinds) == spec.count else spec.kinds * spec.count

    def differences(order: tuple[Found, ...]) -> int:
        return sum(
            (found.shape != shape) + (found.colour != colour)
            for found, (shape, colour) in zip(order, kinds, strict=True)
        )

    return list(zip(min(permutations(before.objects), key=differences), kinds, strict=True))


def _nearest(after: Picture, was: Found) -> Found | None:
    """The object that stands where another stood: centroids nearer than one radius."""
    near = [
        (float(np.hypot(found.x - was.x, found.y - was.y)), index)
        for index, found in enumerate(after.objects)
    ]
    if not near or min(near)[0] > was.radius:
        return None
    return after.objects[min(near)[1]]


def judge_overlap(image: Pixels, spec: Spec) -> dict[str, bool]:
    """Count, colour, shape and relation of a two-object prompt with "in front of" or "behind"."""
    pixels = image.astype(np.float32)
    ground, _ = find_ground(pixels)
    foreground, labels = label_colours(pixels, ground)
    names = list(COLOURS)
    seen: dict[Colour, Mask] = {
        name: _cleaned(foreground & (labels == number), image) for number, name in enumerate(names)
    }
    present = {name for name, mask in seen.items() if mask.any()}
    asked: list[Colour] = [colour for _, colour in spec.kinds]
    parts = {"count": len(present) == 2, "colour": present >= set(asked)}
    if not parts["colour"] or not _true_colours(pixels, seen, asked):
        return {"count": parts["count"], "colour": False, "shape": False, "relation": False}
    masks = [seen[colour] for colour in asked]
    fits = [_fit(masks[0], masks[1]), _fit(masks[1], masks[0])]
    parts["shape"] = all(
        shape == wanted and fit >= MIN_FIT
        for (shape, fit, _), (wanted, _) in zip(fits, spec.kinds, strict=True)
    )
    crossing = np.minimum(fits[0][2], fits[1][2]) > 0.5
    first, second = (int((mask & crossing).sum()) for mask in masks)
    in_front = first > second if spec.relation == "in front of" else second > first
    parts["relation"] = bool(crossing.sum() >= debris_px(image) / 2 and in_front)
    return parts


def _cleaned(mask: Mask, image: Pixels) -> Mask:
    """The mask without thin fringes; empty if too little remains."""
    core = np.asarray(ndimage.binary_opening(mask, np.ones((2, 2))), bool)
    return core if core.sum() >= 2 * debris_px(image) else np.zeros_like(mask)


def _true_colours(
    pixels: NDArray[np.floating], seen: dict[Colour, Mask], asked: list[Colour]
) -> bool:
    distances = [
        np.linalg.norm(np.median(pixels[seen[name]], axis=0) - np.array(COLOURS[name]))
        for name in asked
    ]
    return bool(max(distances) < COLOUR_TOLERANCE)


def _fit(mask: Mask, hidden: Mask) -> tuple[Shape, float, NDArray[np.floating]]:
    """The shape whose template covers a mask best, judged where nothing hides it.

    Returns shape, intersection over union and the template [H, W].
    """
    height, width = mask.shape
    short_side = min(height, width)
    visible = ~np.asarray(ndimage.binary_dilation(hidden), bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, x0 = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    best: tuple[Shape, float, Thing] | None = None
    for shape in SHAPES:
        for radius in _RADII * short_side:
            for dy in _SHIFTS * short_side:
                for dx in _SHIFTS * short_side:
                    thing = Thing(shape, "red", x0 + dx, y0 + dy, radius)
                    fit = _visible_overlap(mask, coverage(thing, width, height) > 0.5, visible)
                    if best is None or fit > best[1]:
                        best = shape, fit, thing
    assert best is not None
    return best[0], best[1], coverage(best[2], width, height)


def _visible_overlap(mask: Mask, template: Mask, visible: Mask) -> float:
    union = int(((mask | template) & visible).sum())
    return int((mask & template & visible).sum()) / union if union else 0.0
