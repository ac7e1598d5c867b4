"""Judging two objects of which one hides part of the other.

A template of each colour is fitted over positions, radii and shapes on the pixels that the other
colour does not cover; where the two fitted templates cross, the colour that is seen is in front.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sd35bench.nano.captions import Spec
from sd35bench.nano.segment import (
    COLOUR_TOLERANCE,
    MIN_FIT,
    Mask,
    Pixels,
    debris_px,
    find_ground,
    label_colours,
)
from sd35bench.nano.world import COLOURS, SHAPES, Colour, Shape, Thing, coverage

_RADII = np.linspace(0.19, 0.25, 5)  # of the short side, around what `world` draws
_SHIFTS = np.linspace(-0.09, 0.09, 7)


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
