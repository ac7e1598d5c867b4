"""The report's charts in a plane: quality over latency, curves over an axis, trade-offs.

Each returns a `Figure`: SVG for a page and for a narrow screen, a legend, the values as a table,
and a sentence on how to read it. Whiskers are 95 % intervals. Every mark has a `<title>`, which the
page shows as a tooltip, and names in `data-k` the legend's entries that hide it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sd35bench import words
from sd35bench.report.render import Figure, Table, estimate_cell, text_table
from sd35bench.report.svg import (
    SMALL,
    Box,
    Label,
    Scale,
    axes,
    chart,
    cut,
    element,
    mark,
    place_labels,
    spread,
    units,
)
from sd35bench.words import Estimate

# A target further away than this many times the largest latency would squeeze all points together.
_TARGET_REACH = 3.0
_LOG_FROM = 6.0
_CHARACTER = 6.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting in a plane of two estimates; `badge` names the profiles that chose it.

    `dominated` is the share of resamples in which another setting is better and no slower. `keys`
    are the legend's entries that it belongs to.
    """

    x: Estimate
    y: Estimate
    class_: str
    marker: str
    label: str
    on_front: bool = False
    badge: str = ""
    dominated: float | None = None
    keys: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named curve: (position on the axis, estimate) in order."""

    name: str
    class_: str
    marker: str
    points: tuple[tuple[float, Estimate], ...]
    dashed: bool = False


def plot_front(
    points: Sequence[Point], *, metric: str, lower: bool, target_s: float | None, half: bool = False
) -> Figure:
    """Quality over median latency; the front is the staircase of settings nothing dominates.

    `half`: for half a page, without the list of the front and the table of values.
    """
    xs = _extent([p.x for p in points])
    shown_target = target_s is not None and target_s <= _TARGET_REACH * max(xs)
    far = target_s if shown_target else None
    draw = functools.partial(_front_svg, points, titles=(metric, _axis_title(metric, lower)))
    wide, small = Box(560.0, 360.0) if half else Box(760.0, 440.0), Box(*SMALL)
    window = None if half else _dense(points)
    note = "Up and to the left is better." if not lower else "Down and to the left is better."
    note += " Labels: steps · cfg."
    if target_s is not None and not shown_target:
        ratio = words.ratio(target_s / max(xs), 0)
        note += f" The target of {target_s:g} s lies off this plot, {ratio} to the right."
    front = sorted((p for p in points if p.on_front), key=_x)
    aside = tuple(
        (p.label, p.badge, estimate_cell(p.y), estimate_cell(p.x, words.latency_decimals))
        for p in front
    )
    return Figure(
        title=metric,
        svg=draw(wide, target_s=far),
        small=draw(small, target_s=far),
        dense=() if window is None else tuple(draw(b, window=window) for b in (wide, small)),
        note=note,
        aside=() if half else aside,
        values=None if half else _front_values(points, metric),
    )


_DENSE_SHARE, _DENSE_EXTENT = 0.7, 0.4

Window = tuple[tuple[float, float], tuple[float, float]]


def _dense(points: Sequence[Point]) -> Window | None:
    """Where 70 % of the points are, by axis; ``None`` where that is not a small part of either."""
    if len(points) < 8:
        return None
    axes = [[_x(p) for p in points], [_y(p) for p in points]]
    found, shares = [], []
    for values in map(sorted, axes):
        take = math.ceil(_DENSE_SHARE * len(values))
        starts = range(len(values) - take + 1)
        at = min(starts, key=lambda i, v=values, n=take: v[i + n - 1] - v[i])
        found.append((values[at], values[at + take - 1]))
        whole = values[-1] - values[0]
        shares.append((found[-1][1] - found[-1][0]) / whole if whole > 0 else 1.0)
    return (found[0], found[1]) if min(shares) < _DENSE_EXTENT else None


def _front_svg(
    points: Sequence[Point],
    box: Box,
    *,
    titles: tuple[str, str],
    target_s: float | None = None,
    window: Window | None = None,
) -> Markup:
    """The chart in a box; of a window's points only where there is one."""
    metric, y_title = titles
    if window is not None:
        (x_low, x_high), (y_low, y_high) = window
        inside = [p for p in points if x_low <= _x(p) <= x_high and y_low <= _y(p) <= y_high]
        points = inside if inside else points
        xs, ys = [_x(p) for p in points], [_y(p) for p in points]
    else:
        xs, ys = _extent([p.x for p in points]), _extent([p.y for p in points])
    xs = xs if target_s is None else [*xs, target_s]
    x = Scale.fit(xs, box.left, box.x_end, log=_spans(xs))
    y = Scale.fit(ys, box.y_end, box.top)
    front = sorted((p for p in points if p.on_front), key=_x)
    name = "latency p50, seconds" + (", log scale" if x.log else "")
    parts = [axes(box, x, y, (name, y_title))]
    parts += [_front_line(front, x, y)] if len(front) > 1 else []
    if target_s is not None:
        parts.append(_target(x(target_s), target_s, box))
    parts += [_draw_point(p, x, y, metric) for p in sorted(points, key=lambda p: p.on_front)]
    parts += _labels(points, x, y, box, None if target_s is None else x(target_s))
    return chart(box, parts, f"{metric} over latency")


def _front_values(points: Sequence[Point], metric: str) -> Table:
    rows = [
        (p.label, words.latency(p.x), words.estimate(p.y), words.plain(p.y.n), why)
        for p in sorted(points, key=_x)
        for why in [p.badge or ("front" if p.on_front else "")]
    ]
    titles = ("setting", "latency p50", metric, "n", "chosen for")
    return Table(columns=text_table(titles, rows, titles[1:4]))


def _spans(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _LOG_FROM


def _x(point: Point) -> float:
    return point.x.value if point.x.value is not None else 0.0


def _extent(estimates: Sequence[Estimate]) -> list[float]:
    ends = [v for e in estimates for v in (e.value, e.low, e.high)]
    return [v for v in ends if v is not None]


def _axis_title(metric: str, lower: bool) -> str:
    return f"{metric} {'↓ lower is better' if lower else '↑'}"


def _front_line(front: Sequence[Point], x: Scale, y: Scale) -> Markup:
    """A staircase: between two settings of the front nothing better than the faster one is had."""
    path = []
    for i, point in enumerate(front):
        px, py = units(x(_x(point))), units(y(_y(point)))
        path.append(f"M{px},{py}" if i == 0 else f"H{px}V{py}")
    return element("path", class_="front", d="".join(path))


def _y(point: Point) -> float:
    return point.y.value if point.y.value is not None else 0.0


def _target(at: float, target_s: float, box: Box) -> Markup:
    line = element("line", class_="target", x1=at, x2=at, y1=box.top, y2=box.y_end)
    text = element("text", f"target {target_s:g} s", class_="name end", x=at - 6, y=box.top + 10)
    return line + text


def _draw_point(point: Point, x: Scale, y: Scale, metric: str) -> Markup:
    px, py = x(_x(point)), y(_y(point))
    class_ = f"{point.class_} {'pt' if point.on_front else 'pt dim'}"
    dominated = words.share(point.dominated)
    title = (
        f"{point.label}\n{metric}: {_with_n(point.y)}\nlatency p50: {words.latency(point.x)}"
        + ("\non the Pareto front" if point.on_front else "")
        + ("" if point.dominated is None else f"\ndominated in {dominated} of resampled prompts")
        + (f"\nrecommended: {point.badge}" if point.badge else "")
    )
    parts = [element("title", title)]
    parts += _whisker(point.y, px, y, vertical=True, class_=point.class_)
    parts += _whisker(point.x, py, x, vertical=False, class_=point.class_)
    if point.badge:
        parts.append(element("circle", class_="ring", cx=px, cy=py, r=10))
    parts.append(mark(point.marker, px, py, 5.0 if point.on_front else 4.0, class_))
    return element("g", *parts, data_k=point.keys or None)


def _whisker(
    estimate: Estimate, across: float, scale: Scale, *, vertical: bool, class_: str
) -> list[Markup]:
    if estimate.low is None or estimate.high is None:
        return []
    low, high = scale.inside(estimate.low), scale.inside(estimate.high)
    if vertical:
        ends: dict[str, object] = {"x1": across, "x2": across, "y1": low, "y2": high}
    else:
        ends = {"y1": across, "y2": across, "x1": low, "x2": high}
    return [element("line", class_=f"whisker {class_}", **ends)]


def _with_n(estimate: Estimate) -> str:
    return words.estimate(estimate) + ("" if estimate.n is None else f", n = {estimate.n}")


def _labels(
    points: Sequence[Point], x: Scale, y: Scale, box: Box, target: float | None
) -> list[Markup]:
    """Names for what matters: first the recommended settings, then the front.

    They keep off the points, and off the target's name left of its line at `target`.
    """
    named = [p for p in points if p.badge] + [p for p in points if p.on_front and not p.badge]
    wanted = [
        Label(x(_x(p)), y(_y(p)), f"{p.badge}: {p.label}", "label strong", 13.0, p.keys, p.badge)
        if p.badge
        else Label(x(_x(p)), y(_y(p)), p.label, keys=p.keys)
        for p in named
    ]
    avoid = [(x(_x(p)), y(_y(p))) for p in points]
    if target is not None:
        avoid += [(target - 8.0 * i, box.top + 6.0) for i in range(12)]
    return place_labels(wanted, avoid, box)


def plot_lines(
    lines: Sequence[Line], *, axis: str, metric: str, lower: bool = False, log: bool = False
) -> Figure:
    """Curves of one metric over one axis; whiskers stand side by side, so that each can be read."""
    longest = min(_NAME, max(len(line.name) for line in lines))
    boxes = (
        Box(500.0, 310.0, right=max(74.0, 16.0 + _CHARACTER * longest)),
        Box(*SMALL, right=16.0),
    )
    titles = axis, _axis_title(metric, lower), metric
    svg, small = (_lines_svg(lines, box, titles, log) for box in boxes)
    rows = [
        (line.name, f"{at:g}", _with_n(estimate)) for line in lines for at, estimate in line.points
    ]
    return Figure(
        title=f"{metric} over {axis}",
        svg=svg,
        small=small,
        legend=tuple((line.class_, line.marker, line.name) for line in lines),
        keys=tuple(f"a{i}" for i in range(len(lines))),
        values=Table(columns=text_table(("curve", axis, metric), rows, (axis, metric))),
    )


def _lines_svg(lines: Sequence[Line], box: Box, titles: tuple[str, str, str], log: bool) -> Markup:
    """Curves in a box, each named at its end where there is room."""
    axis, y_title, metric = titles
    values = sorted({at for line in lines for at, _ in line.points})
    x = Scale.fit(values, box.left, box.x_end, log=log and _spans(values))
    y = Scale.fit(_extent([e for line in lines for _, e in line.points]), box.y_end, box.top)
    ticks = values if len(values) <= 9 else None
    parts = [axes(box, x, y, (axis, y_title), ticks)]
    for i, line in enumerate(lines):
        shift = (i - (len(lines) - 1) / 2) * min(3.0, 14.0 / max(len(lines), 1))
        drawn = _draw_line(line, x, y, shift, metric)
        parts.append(element("g", drawn, data_k=f"a{i}"))
    parts += _end_labels(lines, y, box) if box.right > 20 else []
    return chart(box, parts, f"{metric} over {axis}")


def _draw_line(line: Line, x: Scale, y: Scale, shift: float, metric: str) -> Markup:
    known = [(x(at) + shift, e, at) for at, e in line.points if e.value is not None]
    path = " ".join(f"{units(px)},{units(y(e.value))}" for px, e, _ in known if e.value is not None)
    dash = " dashed" if line.dashed else ""
    parts = [element("polyline", class_=f"line {line.class_}{dash}", points=path)]
    for px, estimate, at in known:
        marks = [element("title", f"{line.name} at {at:g}\n{metric}: {_with_n(estimate)}")]
        marks += _whisker(estimate, px, y, vertical=True, class_=line.class_)
        marks.append(mark(line.marker, px, y(estimate.value or 0.0), 3.6, f"pt {line.class_}"))
        parts.append(element("g", *marks))
    return Markup("").join(parts)


def _end_labels(lines: Sequence[Line], y: Scale, box: Box) -> list[Markup]:
    known = [
        (i, line, [e for _, e in line.points if e.value is not None])
        for i, line in enumerate(lines)
    ]
    ends = [(i, line, estimates[-1]) for i, line, estimates in known if estimates]
    heights = spread([y(e.value or 0.0) for _, _, e in ends], 14, box.top, box.y_end)
    return [
        element(
            "text",
            cut(line.name, _NAME),
            class_=f"series {line.class_}",
            x=box.x_end + 10,
            y=at,
            dy="0.32em",
            data_k=f"a{i}",
        )
        for (i, line, _), at in zip(ends, heights, strict=True)
    ]


_NAME = 21
"""Characters of a curve's name that stand beside it; the legend has the whole."""


def plot_tradeoff(
    lines: Sequence[tuple[str, str, str, Sequence[tuple[str, Estimate, Estimate]]]],
    *,
    followed: str,
    kept: str,
) -> Figure:
    """Image-to-image: how far the prompt is followed against how much of the init is kept.

    Each line is (name, class, marker, [(label, followed, kept)]), one point per strength.
    """
    svg, small = (
        _tradeoff_svg(lines, box, (followed, kept)) for box in (Box(500.0, 350.0), Box(*SMALL))
    )
    rows = [
        (name, label, _with_n(f), _with_n(k))
        for name, _, _, points in lines
        for label, f, k in points
    ]
    titles = ("curve", "prompt_strength", followed, kept)
    return Figure(
        title=f"{followed} against {kept}",
        svg=svg,
        small=small,
        legend=tuple((class_, marker, name) for name, class_, marker, _ in lines),
        keys=tuple(f"a{i}" for i in range(len(lines))),
        note="Numbers beside the points are prompt_strength.",
        values=Table(columns=text_table(titles, rows, titles[1:])),
    )


def _tradeoff_svg(
    lines: Sequence[tuple[str, str, str, Sequence[tuple[str, Estimate, Estimate]]]],
    box: Box,
    titles: tuple[str, str],
) -> Markup:
    followed, kept = titles
    every = [p for line in lines for p in line[3]]
    x = Scale.fit(_extent([p[1] for p in every]), box.left, box.x_end)
    y = Scale.fit(_extent([p[2] for p in every]), box.y_end, box.top)
    parts = [axes(box, x, y, (f"{followed} →", f"{kept} ↑"))]
    wanted, spots = [], []
    for i, (name, class_, marker, points) in enumerate(lines):
        at = [(x(f.value or 0.0), y(k.value or 0.0)) for _, f, k in points]
        spots += at
        path = " ".join(f"{units(px)},{units(py)}" for px, py in at)
        drawn = [element("polyline", class_=f"line {class_}", points=path)]
        for (px, py), (label, f, k) in zip(at, points, strict=True):
            title = (
                f"{name}, prompt_strength {label}\n{followed}: {_with_n(f)}\n{kept}: {_with_n(k)}"
            )
            marks = [element("title", title)]
            marks += _whisker(k, px, y, vertical=True, class_=class_)
            marks += _whisker(f, py, x, vertical=False, class_=class_)
            marks.append(mark(marker, px, py, 4.0, f"pt {class_}"))
            drawn.append(element("g", *marks))
            wanted.append(Label(px, py, label, f"label {class_}", keys=f"a{i}"))
        parts.append(element("g", *drawn, data_k=f"a{i}"))
    parts += place_labels(wanted, spots, box)
    return chart(box, parts, f"{followed} against {kept}")
