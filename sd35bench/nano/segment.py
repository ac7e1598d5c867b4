"""What is in a picture of nano's world, read from its pixels: background and objects.

The background is the border's median colour; whatever is nearer to one of the object colours is
foreground; a connected piece of it is an object, or several where pieces of unlike colours touch.
Its shape is the one whose antialiased template, at the piece's own centroid and area, overlaps it
best. No network, no state: NumPy and SciPy on [H, W, 3] uint8.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sd35bench.nano.world import BACKGROUNDS, COLOURS, SHAPES, Background, Colour, Shape, Thing
from sd35bench.nano.world import coverage as thing_coverage

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

GROUND_TOLERANCE = 60.0  # in RGB; white and pink, the nearest backgrounds, are 69 apart
COLOUR_TOLERANCE = 90.0  # blue and purple, the nearest object colours, are 130 apart
MIN_FIT = 0.75
_DEBRIS = 0.008  # of the short side squared; the smallest true object has 0.05
_COLOUR_NAMES: tuple[Colour, ...] = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_AREAS: dict[Shape, float] = {
    shape: float(thing_coverage(Thing(shape, "red", 64.0, 64.0, 40.0), 128, 128).sum()) / 1600
    for shape in SHAPES
}


@dataclass(frozen=True, eq=False)
class Found:
    """An object in a picture: centroid and radius in px, soft mask [H, W] in [0, 1].

    `shape` is None where no template overlaps it by `MIN_FIT`, `colour` None where its median
    colour is far from every object colour.
    """

    colour: Colour | None
    shape: Shape | None
    fit: float
    x: float
    y: float
    radius: float
    mask: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Picture:
    """The background (None where it is none of the world's) and the objects, largest first."""

    background: Background | None
    objects: tuple[Found, ...]


def check_pixels(image: Pixels) -> None:
    """Refuse anything but a uint8 RGB image.

    Raises: TypeError where it is not uint8, ValueError where it is not [H, W, 3] of 8 px or more.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"image has dtype {image.dtype}; nano reads uint8 in [0, 255]")
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 8:
        raise ValueError(f"image has shape {image.shape}; expected [H, W, 3] of at least 8 px")


def segment(image: Pixels) -> Picture:
    """Background and objects of a uint8 RGB picture of at least 8 px a side."""
    check_pixels(image)
    pixels = image.astype(np.float32)
    ground, name = find_ground(pixels)
    foreground, labels = label_colours(pixels, ground)
    pieces, number = label_pieces(foreground)
    objects: list[Found] = []
    for piece, window in enumerate(ndimage.find_objects(pieces, number), 1):
        if (pieces[window] == piece).sum() >= debris_px(image):
            objects += _objects_in(pixels, ground, pieces == piece, labels)
    objects.sort(key=lambda found: -float(found.mask.sum()))
    return Picture(name, tuple(objects))


def label_pieces(mask: Mask) -> tuple[NDArray[np.int64], int]:
    """Connected pieces of a mask, numbered from 1, and how many there are."""
    return cast(tuple[NDArray[np.int64], int], ndimage.label(mask))


def debris_px(image: Pixels) -> float:
    """The area in px below which a piece is no object."""
    return _DEBRIS * min(image.shape[:2]) ** 2


def find_ground(pixels: NDArray[np.floating]) -> tuple[NDArray[np.floating], Background | None]:
    """The border's median colour, and its name if most of the border has a known colour."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    uniform = (np.linalg.norm(border - ground, axis=1) < GROUND_TOLERANCE).mean() > 0.6
    names: tuple[Background, ...] = tuple(BACKGROUNDS)
    distances = [float(np.linalg.norm(ground - np.array(BACKGROUNDS[name]))) for name in names]
    nearest = int(np.argmin(distances))
    known = uniform and distances[nearest] < GROUND_TOLERANCE
    return ground, names[nearest] if known else None


def label_colours(
    pixels: NDArray[np.floating], ground: NDArray[np.floating]
) -> tuple[Mask, NDArray[np.int64]]:
    """Foreground mask and, for each pixel, the number of the nearest object colour: [H, W]."""
    distances = np.linalg.norm(pixels[:, :, None] - _PALETTE, axis=-1)
    to_ground = np.linalg.norm(pixels - ground, axis=-1)
    return distances.min(axis=-1) < to_ground, distances.argmin(axis=-1)


def soft_mask(
    pixels: NDArray[np.floating], ground: NDArray[np.floating], colour: NDArray, piece: Mask
) -> NDArray[np.floating]:
    """How far each pixel near a piece has gone from the background to its colour: [H, W]."""
    axis = colour - ground
    alpha = (pixels - ground) @ axis / max(1.0, float(axis @ axis))
    return np.where(ndimage.binary_dilation(piece), np.clip(alpha, 0, 1), 0).astype(np.float32)


def _objects_in(
    pixels: NDArray[np.floating],
    ground: NDArray[np.floating],
    piece: Mask,
    labels: NDArray[np.int64],
) -> list[Found]:
    """The objects of one connected piece: usually one, more where unlike colours touch."""
    inside = np.asarray(ndimage.binary_erosion(piece), bool)
    counts = np.bincount(labels[inside], minlength=len(_PALETTE))
    smallest = _DEBRIS * min(piece.shape) ** 2
    present = np.flatnonzero(counts >= smallest)
    if len(present) <= 1:
        return [_describe(pixels, ground, piece)]
    found: list[Found] = []
    for number in present:
        parts, many = label_pieces(piece & (labels == number))
        areas = np.bincount(parts.ravel())[1:]
        found += [
            _describe(pixels, ground, parts == part)
            for part in range(1, many + 1)
            if areas[part - 1] >= smallest
        ]
    return found


def _describe(pixels: NDArray[np.floating], ground: NDArray[np.floating], piece: Mask) -> Found:
    inside = np.asarray(ndimage.binary_erosion(piece), bool)
    colour = np.median(pixels[inside if inside.any() else piece], axis=0)
    distances = np.linalg.norm(_PALETTE - colour, axis=1)
    nearest = int(distances.argmin())
    name = _COLOUR_NAMES[nearest] if distances[nearest] < COLOUR_TOLERANCE else None
    mask = soft_mask(pixels, ground, colour, piece)
    shape, fit, thing = best_template(mask)
    known = shape if fit >= MIN_FIT else None
    return Found(name, known, fit, thing.x, thing.y, thing.radius, mask)


def best_template(mask: NDArray[np.floating]) -> tuple[Shape, float, Thing]:
    """The shape that overlaps a soft mask best at its centroid and area, and by how much."""
    height, width = mask.shape
    area = max(1e-6, float(mask.sum()))
    x = float((mask.sum(0) * (np.arange(width) + 0.5)).sum()) / area
    y = float((mask.sum(1) * (np.arange(height) + 0.5)).sum()) / area
    best: tuple[Shape, float, Thing] | None = None
    for shape in SHAPES:
        thing = Thing(shape, "red", x, y, (area / _AREAS[shape]) ** 0.5)
        fit = overlap(mask, thing_coverage(thing, width, height))
        if best is None or fit > best[1]:
            best = shape, fit, thing
    assert best is not None
    return best


def overlap(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Intersection over union of two soft masks."""
    union = float(np.maximum(a, b).sum())
    return float(np.minimum(a, b).sum()) / union if union > 0 else 0.0
