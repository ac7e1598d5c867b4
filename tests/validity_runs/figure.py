"""The figure of `tune` against brute-forced truth: regret over the share of the grid's images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sd35bench.report.render import Figure
from sd35bench.report.svg import Box, Scale, axes, element, mark

__all__ = ["FIGURES", "regret_figure"]

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
_LOOKS = {
    "preview": ("c5", "triangle"),
    "balanced": ("c1", "circle"),
    "final": ("c7", "square"),
}
_MOST_SHARE = 40.0
_SIDE_STEP = 7.0
"""Pixels between marks that would lie on each other."""


def regret_figure(rows: Mapping[str, Any]) -> Figure:
    """One mark per search; a line at each profile's margin, and at the images allowed."""
    box = Box(640.0, 340.0, right=132.0)
    runs = [run for row in rows.values() for run in row["all"]["runs"] if run["chosen"] is not None]
    shares = [100 * run["share"] for run in runs]
    margins = [row["margin"] for row in rows.values()]
    x = Scale(0.0, max(_MOST_SHARE, *shares) * 1.06, box.left, box.x_end)
    highest = max([*margins, *(run["regret"] for run in runs)])
    y = Scale(-0.06 * highest, 1.12 * highest, box.y_end, box.top)
    titles = ("images used, % of the whole grid's", "regret: true prompt accuracy lost")
    parts = [axes(box, x, y, titles), _limit(box, x(_MOST_SHARE))]
    parts += _margins(rows, box, y)
    parts += _marks(rows, x, y)
    legend = tuple((*_LOOKS[name], _legend(name, row)) for name, row in rows.items())
    svg = element(
        "svg",
        element("title", "regret over images"),
        *parts,
        viewBox=f"0 0 {box.width:g} {box.height:g}",
        role="img",
    )
    return Figure(title="regret over images", svg=svg, legend=legend)


def _legend(name: str, row: Mapping[str, Any]) -> str:
    times = row["searches"]
    return f"{name}: {round(row['all']['within'] * times)} of {times} within {row['margin']:g}"


def _limit(box: Box, at: float) -> Markup:
    line = element("line", class_="target", x1=at, x2=at, y1=box.top, y2=box.y_end)
    text = element("text", "40 % allowed", class_="name end", x=at - 6, y=box.top + 10)
    return line + text


def _margins(rows: Mapping[str, Any], box: Box, y: Scale) -> list[Markup]:
    """A dashed line at each margin, named by the profiles that have it."""
    names: dict[float, list[str]] = {}
    for name, row in rows.items():
        names.setdefault(row["margin"], []).append(name)
    parts = []
    for margin, profiles in names.items():
        class_ = _LOOKS[profiles[-1]][0]
        at = y(margin)
        parts.append(
            element("line", class_=f"line dashed {class_}", x1=box.left, x2=box.x_end, y1=at, y2=at)
        )
        text = f"margin of {' and '.join(profiles)}"
        parts += [
            element("text", line, class_=f"series {class_}", x=box.x_end + 8, y=at + 4 + 13 * i)
            for i, line in enumerate(_wrapped(text))
        ]
    return parts


def _wrapped(text: str) -> list[str]:
    """A name in two lines where one would not fit beside the panel."""
    head, _, tail = text.partition(" and ")
    return [head, f"and {tail}"] if tail else [head]


def _marks(rows: Mapping[str, Any], x: Scale, y: Scale) -> list[Markup]:
    taken: list[tuple[float, float]] = []
    parts = []
    for name, row in rows.items():
        class_, marker = _LOOKS[name]
        for run in row["all"]["runs"]:
            if run["chosen"] is None:
                continue
            px, py = x(100 * run["share"]), y(run["regret"])
            while any(abs(px - a) < _SIDE_STEP and abs(py - b) < _SIDE_STEP for a, b in taken):
                py -= _SIDE_STEP
            taken.append((px, py))
            told = (
                f"{name}, search {run['seed']}: {run['chosen']}\nregret {run['regret']:.3f},"
                f" {run['images']} images"
            )
            parts.append(
                element("g", element("title", told), mark(marker, px, py, 4.4, f"pt {class_}"))
            )
    return parts
