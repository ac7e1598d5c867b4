"""A comparison as one HTML page: the verdicts, and the worst pairs to look at.

Each pair can be seen side by side, under a slider, blinking, and as their difference. Like the
report, the page needs nothing else: images are data URIs, and a content security policy lets run
only what is in the file.
"""

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from sd35bench.report.gate import about, failed_gates, figure_cells
from sd35bench.report.html import content_policy
from sd35bench.report.style import read_asset

__all__ = ["compare_page"]

_PIXEL_ART_PX = 128
_LONGEST_PX = 384
"""Images are kept without loss, since small differences are what matters; 24 of them in all."""

FindImage = Callable[[str], Path | None]


def compare_page(
    document: Mapping[str, Any],
    baseline: FindImage,
    candidate: FindImage,
    captions: Mapping[str, str] | None = None,
) -> str:
    """Render a `compare` document.

    Args:
        document: of `compare_sides`.
        baseline: finds its images by digest.
        candidate: finds its own.
        captions: what was asked for a candidate's image, by digest.
    """
    said = {} if captions is None else captions
    script = Markup(read_asset("compare.js"))
    style = Markup(read_asset("charts.css") + read_asset("report.css") + read_asset("compare.css"))
    comparisons = [
        {
            **comparison,
            "about": about(comparison),
            "rows": _rows(comparison),
            "pairs": _pairs(comparison, baseline, candidate, said),
        }
        for comparison in document["comparisons"]
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sd35bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("compare.html.j2").render(
        d={**document, "comparisons": comparisons, "failed_gates": failed_gates(document)},
        policy=content_policy(script, style),
        script=script,
        style=style,
    )


def _rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "verdict": figure["verdict"],
            "mark": figure["verdict"].replace(" ", "-"),
            "dimension": dimension,
            "cells": figure_cells(figure),
            "note": figure["note"],
        }
        for dimension, found in comparison["dimensions"].items()
        for figure in found["figures"]
    ]


def _pairs(
    comparison: Mapping[str, Any],
    baseline: FindImage,
    candidate: FindImage,
    captions: Mapping[str, str],
) -> list[dict[str, str]]:
    """The worst pairs of which both images are there."""
    found = []
    for pair in comparison["worst"]:
        paths = baseline(pair["baseline_image"]), candidate(pair["candidate_image"])
        if paths[0] is None or paths[1] is None:
            continue
        images = [_decode(path.read_bytes()) for path in paths if path is not None]
        found.append(
            {
                "baseline": _data_uri(images[0]),
                "candidate": _data_uri(images[1]),
                "grain": "pixels" if max(images[0].size) <= _PIXEL_ART_PX else "smooth",
                "caption": captions.get(pair["candidate_image"], ""),
                "lost": f"{pair['by']} {pair['value']:+.3g}",
            }
        )
    return found


def _decode(data: bytes) -> Image.Image:
    """Pixels of an image file, at most 384 px wide and high."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_LONGEST_PX, _LONGEST_PX), Image.Resampling.LANCZOS)
    return image


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
