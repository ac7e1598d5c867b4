"""LDR-FLIP written down from the paper in NumPy, to hold the library against.

Source: Andersson et al. 2020, "FLIP: A Difference Evaluator for Alternating Images": equations 4-8
(contrast sensitivity), 9-12 (Hunt, HyAB, redistribution), 13-18 (features), 19 (combination).
"""

import numpy as np
from scipy import ndimage

_RGB_TO_XYZ = np.array(
    [
        [10135552, 8788810, 4435075],
        [2613072, 8788810, 887015],
        [1425312, 8788810, 70074185],
    ]
) / np.array([[24577794, 24577794, 24577794], [12288897, 12288897, 12288897], [73733382] * 3])
_WHITE = _RGB_TO_XYZ.sum(1)
_CSF = {  # a1, b1, a2, b2 of the achromatic, red-green and blue-yellow channel
    0: (1.0, 0.0047, 0.0, 1e-5),
    1: (1.0, 0.0053, 0.0, 1e-5),
    2: (34.1, 0.04, 13.5, 0.025),
}
_QC, _PC, _PT, _QF, _WIDTH = 0.7, 0.4, 0.95, 0.5, 0.082


def paper_flip(image: np.ndarray, reference: np.ndarray, ppd: float = 67.0) -> np.ndarray:
    """Error per pixel [H, W] of two uint8 sRGB images [H, W, 3]."""
    pair = [_ycxcz(_linear(x / 255.0)) for x in (reference, image)]
    labs = [_hunt_lab(np.clip(_from_ycxcz(_filtered(x, ppd)), 0, 1)) for x in pair]
    green, blue = (_hunt_lab(np.array([[c]], float)) for c in ((0, 1, 0), (0, 0, 1)))
    most = float(_hyab(green, blue)[0, 0] ** _QC)
    colour = _hyab(*labs) ** _QC
    knee = _PC * most
    colour = np.where(
        colour < knee, _PT / knee * colour, _PT + (colour - knee) / (most - knee) * (1 - _PT)
    )
    grey = [(x[..., 0] + 16) / 116 for x in pair]
    edges = np.abs(np.subtract(*(_features(g, ppd, edges=True) for g in grey)))
    points = np.abs(np.subtract(*(_features(g, ppd, edges=False) for g in grey)))
    feature = (np.maximum(edges, points) / np.sqrt(2)) ** _QF
    return colour ** (1 - feature)


def _linear(x):
    return np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)


def _ycxcz(rgb):
    x, y, z = np.moveaxis(rgb @ _RGB_TO_XYZ.T / _WHITE, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _from_ycxcz(c):
    y = (c[..., 0] + 16) / 116
    xyz = np.stack([c[..., 1] / 500 + y, y, y - c[..., 2] / 200], -1) * _WHITE
    return xyz @ np.linalg.inv(_RGB_TO_XYZ).T


def _hunt_lab(rgb):
    xyz = rgb @ _RGB_TO_XYZ.T / _WHITE
    d = 6 / 29
    f = np.where(xyz > d**3, np.cbrt(xyz), xyz / (3 * d**2) + 4 / 29)
    light = 116 * f[..., 1] - 16
    a, b = 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])
    return np.stack([light, 0.01 * light * a, 0.01 * light * b], -1)


def _hyab(one, other):
    d = one - other
    return np.abs(d[..., 0]) + np.hypot(d[..., 1], d[..., 2])


def _filtered(c, ppd):
    widest = max(max(b1, b2) for _, b1, _, b2 in _CSF.values())
    radius = int(np.ceil(3 * np.sqrt(widest / (2 * np.pi**2)) * ppd))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1] / ppd
    z = x**2 + y**2
    out = []
    for channel, (a1, b1, a2, b2) in _CSF.items():
        g = a1 * np.sqrt(np.pi / b1) * np.exp(-(np.pi**2) * z / b1)
        g += a2 * np.sqrt(np.pi / b2) * np.exp(-(np.pi**2) * z / b2)
        out.append(ndimage.correlate(c[..., channel], g / g.sum(), mode="nearest"))
    return np.stack(out, -1)


def _features(grey, ppd, *, edges):
    sd = 0.5 * _WIDTH * ppd
    radius = int(np.ceil(3 * sd))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    g = np.exp(-(x**2 + y**2) / (2 * sd**2))
    kernel = -x * g if edges else (x**2 / sd**2 - 1) * g
    kernel = np.where(kernel < 0, kernel / -kernel[kernel < 0].sum(), kernel)
    kernel = np.where(kernel > 0, kernel / kernel[kernel > 0].sum(), kernel)
    found = [ndimage.correlate(grey, k, mode="nearest") for k in (kernel, kernel.T)]
    return np.hypot(*found)
