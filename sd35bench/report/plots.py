"""The report's charts of quality: over latency with the Pareto front, over an axis, trade-offs.

Each returns a `Figure`: SVG, a legend, and a sentence on how to read it. Bars and whiskers are
95 % intervals. Every mark has a `<title>`, which browsers show as a tooltip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sd35bench.report.figures import Estimate, format_estimate, format_latency
from sd35bench.report.recommend import share_text
from sd35bench.report.style import read_asset
from sd35bench.report.svg import Box, Label, Scale, axes, element, mark, place_labels, spread

__all__ = ["Figure", "Line", "Point", "plot_front", "plot_lines", "plot_tradeoff"]

# A target further away than this many times the largest latency would squeeze all points together.
_TARGET_REACH = 3.0
_LOG_FROM = 6.0
_CHARACTER = 6.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart. `legend` has (class, marker, text) entries, drawn by the page in HTML.

    `aside` lists what stands beside a wide chart: (setting, badge, quality, latency).
    """

    title: str
    svg: Markup
    legend: tuple[tuple[str, str, str], ...] = ()
    note: str = ""
    aside: tuple[tuple[str, str, Estimate, Estimate], ...] = ()

    def _repr_svg_(self) -> str:
        """Show itself in a notebook: the chart with its legend and styles, on its own."""
        return str(_alone(self))


def _alone(figure: Figure) -> Markup:
    """An SVG document: the legend becomes a line above the chart."""
    width, height = map(float, figure.svg.split('viewBox="0 0 ')[1].split('"')[0].split())
    parts, x = [], 10.0
    for class_, marker, text in figure.legend:
        parts.append(mark("circle" if marker == "bar" else marker, x, -14.0, 4.0, f"pt {class_}"))
        parts.append(element("text", text, class_="name", x=x + 9, y=-10.0))
        x += 26 + len(text) * 6.2
    style = Markup(read_asset("charts.css") + "svg { background: var(--bg); }")
    inner = figure.svg[figure.svg.index(">") + 1 : figure.svg.rindex("</svg>")]
    return element(
        "svg",
        element("style", style),
        *parts,
        inner,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 -28 {width:g} {height + 28:g}",
        width=f"{width:g}",
        height=f"{height + 28:g}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting in a plane of two estimates; `badge` names the profiles that chose it.

    `dominated` is the share of resamples in which another setting is better and no slower.
    """

    x: Estimate
    y: Estimate
    class_: str
    marker: str
    label: str
    on_front: bool = False
    badge: str = ""
    dominated: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A named curve: (position on the axis, estimate) in order."""

    name: str
    class_: str
    marker: str
    points: tuple[tuple[float, Estimate], ...]
    dashed: bool = False


def plot_front(
    points: Sequence[Point], *, metric: str, lower: bool, target_s: float | None
) -> Figure:
    """Quality over median latency; the front is the staircase of settings nothing dominates."""
    box = Box(760.0, 440.0)
    xs = _extent([p.x for p in points])
    shown_target = target_s is not None and target_s <= _TARGET_REACH * max(xs)
    if shown_target and target_s is not None:
        xs = [*xs, target_s]
    x = Scale.fit(xs, box.left, box.x_end, log=_spans(xs))
    y = Scale.fit(_extent([p.y for p in points]), box.y_end, box.top)
    front = sorted((p for p in points if p.on_front), key=_x)
    name = "latency p50, seconds" + (", log scale" if x.log else "")
    parts = [axes(box, x, y, (name, _axis_title(metric, lower)))]
    parts += [_front_line(front, x, y)] if len(front) > 1 else []
    if shown_target and target_s is not None:
        parts.append(_target(x(target_s), target_s, box))
    parts += [_draw_point(p, x, y, metric) for p in sorted(points, key=lambda p: p.on_front)]
    parts += _labels(points, x, y, box)
    note = "Up and to the left is better." if not lower else "Down and to the left is better."
    note += " Labels: steps · cfg."
    if target_s is not None and not shown_target:
        ratio = target_s / max(xs)
        note += f" The target of {target_s:g} s lies off this plot, {ratio:.0f}× to the right."
    return Figure(
        title=metric,
        svg=_svg(box, parts, f"{metric} over latency"),
        note=note,
        aside=tuple((p.label, p.badge, p.y, p.x) for p in front),
    )


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
        px, py = x(_x(point)), y(_y(point))
        path.append(f"M{px:.1f},{py:.1f}" if i == 0 else f"H{px:.1f}V{py:.1f}")
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
    title = (
        f"{point.label}\n{metric}: {_with_n(point.y)}\nlatency p50: {format_latency(point.x)}"
        + ("\non the Pareto front" if point.on_front else "")
        + ("" if point.dominated is None else f"\n{_dominated(point.dominated)}")
        + (f"\nrecommended: {point.badge}" if point.badge else "")
    )
    parts = [element("title", title)]
    parts += _whisker(point.y, px, y, vertical=True, class_=point.class_)
    parts += _whisker(point.x, py, x, vertical=False, class_=point.class_)
    if point.badge:
        parts.append(element("circle", class_="ring", cx=px, cy=py, r=10))
    parts.append(mark(point.marker, px, py, 5.0 if point.on_front else 4.0, class_))
    return element("g", *parts)


def _dominated(share: float) -> str:
    return f"dominated in {share_text(share)} of resampled prompts"


def _whisker(
    estimate: Estimate, across: float, scale: Scale, *, vertical: bool, class_: str
) -> list[Markup]:
    if estimate.low is None or estimate.high is None:
        return []
    low, high = scale(estimate.low), scale(estimate.high)
    if vertical:
        ends: dict[str, object] = {"x1": across, "x2": across, "y1": low, "y2": high}
    else:
        ends = {"y1": across, "y2": across, "x1": low, "x2": high}
    return [element("line", class_=f"whisker {class_}", **ends)]


def _with_n(estimate: Estimate) -> str:
    return format_estimate(estimate) + ("" if estimate.n is None else f", n = {estimate.n}")


def _labels(points: Sequence[Point], x: Scale, y: Scale, box: Box) -> list[Markup]:
    """Names for what matters: first the recommended settings, then the front."""
    named = [p for p in points if p.badge] + [p for p in points if p.on_front and not p.badge]
    wanted = [
        Label(x(_x(p)), y(_y(p)), f"{p.badge}: {p.label}", "label strong", 13.0)
        if p.badge
        else Label(x(_x(p)), y(_y(p)), p.label)
        for p in named
    ]
    return place_labels(wanted, [(x(_x(p)), y(_y(p))) for p in points], box)


def _svg(box: Box, parts: Sequence[Markup], title: str) -> Markup:
    return element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {box.width:g} {box.height:g}",
        role="img",
    )


def plot_lines(
    lines: Sequence[Line], *, axis: str, metric: str, lower: bool = False, log: bool = False
) -> Figure:
    """Curves of one metric over one axis, whiskers side-stepped so that they can be told apart."""
    longest = max(len(line.name) for line in lines)
    box = Box(500.0, 310.0, right=min(160.0, max(74.0, 16.0 + _CHARACTER * longest)))
    values = sorted({at for line in lines for at, _ in line.points})
    x = Scale.fit(values, box.left, box.x_end, log=log and _spans(values))
    y = Scale.fit(_extent([e for line in lines for _, e in line.points]), box.y_end, box.top)
    title = _axis_title(metric, lower)
    ticks = values if len(values) <= 9 else None
    parts = [axes(box, x, y, (axis, title), ticks)]
    for i, line in enumerate(lines):
        shift = (i - (len(lines) - 1) / 2) * min(3.0, 14.0 / max(len(lines), 1))
        parts.append(_draw_line(line, x, y, shift, metric))
    parts += _end_labels(lines, x, y, box)
    legend = tuple((line.class_, line.marker, line.name) for line in lines)
    return Figure(title=f"{metric} over {axis}", svg=_svg(box, parts, metric), legend=legend)


def _draw_line(line: Line, x: Scale, y: Scale, shift: float, metric: str) -> Markup:
    known = [(x(at) + shift, e, at) for at, e in line.points if e.value is not None]
    path = " ".join(f"{px:.1f},{y(e.value):.1f}" for px, e, _ in known if e.value is not None)
    dash = " dashed" if line.dashed else ""
    parts = [element("polyline", class_=f"line {line.class_}{dash}", points=path)]
    for px, estimate, at in known:
        marks = [element("title", f"{line.name} at {at:g}\n{metric}: {_with_n(estimate)}")]
        marks += _whisker(estimate, px, y, vertical=True, class_=line.class_)
        marks.append(mark(line.marker, px, y(estimate.value or 0.0), 3.6, f"pt {line.class_}"))
        parts.append(element("g", *marks))
    return Markup("").join(parts)


def _end_labels(lines: Sequence[Line], x: Scale, y: Scale, box: Box) -> list[Markup]:
    ends = [(line, [p for p in line.points if p[1].value is not None]) for line in lines]
    ends = [(line, points) for line, points in ends if points]
    heights = spread([y(points[-1][1].value or 0.0) for _, points in ends], 14, box.top, box.y_end)
    return [
        element(
            "text", line.name, class_=f"series {line.class_}", x=box.x_end + 10, y=at, dy="0.32em"
        )
        for (line, _), at in zip(ends, heights, strict=True)
    ]


def plot_tradeoff(
    lines: Sequence[tuple[str, str, str, Sequence[tuple[str, Estimate, Estimate]]]],
    *,
    followed: str,
    kept: str,
) -> Figure:
    """Image-to-image: how far the prompt is followed against how much of the init is kept.

    Each line is (name, class, marker, [(label, followed, kept)]), one point per strength.
    """
    box = Box(500.0, 350.0)
    every = [p for line in lines for p in line[3]]
    x = Scale.fit(_extent([p[1] for p in every]), box.left, box.x_end)
    y = Scale.fit(_extent([p[2] for p in every]), box.y_end, box.top)
    parts = [axes(box, x, y, (f"{followed} →", f"{kept} ↑"))]
    wanted, spots = [], []
    for name, class_, marker, points in lines:
        at = [(x(f.value or 0.0), y(k.value or 0.0)) for _, f, k in points]
        spots += at
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
        parts.append(element("polyline", class_=f"line {class_}", points=path))
        for (px, py), (label, f, k) in zip(at, points, strict=True):
            title = f"{name}, strength {label}\n{followed}: {_with_n(f)}\n{kept}: {_with_n(k)}"
            marks = [element("title", title)]
            marks += _whisker(k, px, y, vertical=True, class_=class_)
            marks += _whisker(f, py, x, vertical=False, class_=class_)
            marks.append(mark(marker, px, py, 4.0, f"pt {class_}"))
            parts.append(element("g", *marks))
            wanted.append(Label(px, py, label, f"label {class_}"))
    parts += place_labels(wanted, spots, box)
    return Figure(
        title=f"{followed} against {kept}",
        svg=_svg(box, parts, "trade-off"),
        legend=tuple((class_, marker, name) for name, class_, marker, _ in lines),
        note="Numbers beside the points are prompt_strength.",
    )
