"""The report's charts: quality over latency or an axis, trade-offs, then one row per setting.

Each returns a `Figure`: SVG, a legend, and a sentence on how to read it. Bars and whiskers are
95 % intervals. Every mark has a `<title>`, which browsers show as a tooltip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sd35bench import words
from sd35bench.report.render import Figure, estimate_cell
from sd35bench.report.svg import Box, Label, Scale, axes, element, mark, place_labels, spread
from sd35bench.words import Estimate

# A target further away than this many times the largest latency would squeeze all points together.
_TARGET_REACH = 3.0
_LOG_FROM = 6.0
_CHARACTER = 6.6


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
        aside=tuple(
            (
                p.label,
                p.badge,
                estimate_cell(p.y),
                estimate_cell(p.x, words.latency_decimals),
            )
            for p in front
        ),
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
        f"{point.label}\n{metric}: {_with_n(point.y)}\nlatency p50: {words.latency(point.x)}"
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
    return f"dominated in {words.share(share)} of resampled prompts"


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
    return words.estimate(estimate) + ("" if estimate.n is None else f", n = {estimate.n}")


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
            title = (
                f"{name}, prompt_strength {label}\n{followed}: {_with_n(f)}\n{kept}: {_with_n(k)}"
            )
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


# One row per setting --------------------------------------------------------------------------

STAGES = ("text", "denoise", "decode", "encode", "other")
CALL_PARTS = {
    "submit": "submit",
    "queue": "queue",
    "predict": "inference",
    "download": "download",
    "other": "not told apart",
    "local": "this machine",
}
_ROW = 24.0
_MAX_DOTS = 120
_LABEL = 5.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One setting's timed latencies, and mean seconds by stage."""

    label: str
    latencies_s: tuple[float, ...]
    stage_s: dict[str, float]
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CallBar:
    """One setting's mean seconds by part (names of `CALL_PARTS`), seen at most `late_by_s` late."""

    label: str
    parts: dict[str, float]
    late_by_s: float | None = None
    strong: bool = False


def quantile(values: Sequence[float], fraction: float) -> float:
    """Quantile of sorted `values` by linear interpolation."""
    at = fraction * (len(values) - 1)
    below = int(at)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (at - below)


def _rows_box(labels: Sequence[str], count: int) -> Box:
    left = min(250.0, max(60.0, 20 + _LABEL * max((len(text) for text in labels), default=0)))
    return Box(520.0, 34.0 + count * _ROW + 44.0, left=left, right=16.0)


def _row_label(text: str, y: float, box: Box, strong: bool) -> Markup:
    class_ = "row strong end" if strong else "row end"
    return element("text", text, class_=class_, x=box.left - 10, y=y, dy="0.32em")


def plot_distributions(samples: Sequence[Samples]) -> Figure:
    """Every timed image as a dot; box from p25 to p75, bar at the median, tick at p90."""
    box = _rows_box([s.label for s in samples], len(samples))
    every = [v for s in samples for v in s.latencies_s]
    x = Scale.fit(every, box.left + 6, box.x_end, log=max(every) / min(every) > 6)
    parts = [_row_axes(box, x, "latency of one image, seconds")]
    for i, sample in enumerate(samples):
        parts.append(_distribution(sample, x, box.top + (i + 0.5) * _ROW, box))
    return Figure(
        title="Latency of each timed image",
        svg=_svg(box, parts, "Latency distributions"),
        legend=(
            ("c1", "circle", "one image"),
            ("iqr", "square", "middle half"),
            ("bar", "bar", "median"),
            ("c6", "bar", "p90"),
        ),
        note="Images made one at a time (batch 1).",
    )


def _row_axes(box: Box, x: Scale, name: str) -> Markup:
    parts = [
        element("line", class_="grid", x1=x(t), x2=x(t), y1=box.top, y2=box.y_end)
        for t in x.ticks()
    ]
    parts += [
        element("text", f"{t:g}", class_="tick mid", x=x(t), y=box.y_end + 16) for t in x.ticks()
    ]
    line = element("line", class_="axis", x1=box.left, x2=box.x_end, y1=box.y_end, y2=box.y_end)
    title = element("text", name, class_="name end", x=box.x_end, y=box.height - 8)
    return Markup("").join(parts) + line + title


def _distribution(sample: Samples, x: Scale, y: float, box: Box) -> Markup:
    ordered = sorted(sample.latencies_s)
    p25, p50, p75, p90 = (quantile(ordered, q) for q in (0.25, 0.5, 0.75, 0.9))
    title = (
        f"{sample.label}\nn = {len(ordered)}, p50 {words.seconds(p50)}, p90 {words.seconds(p90)},"
        f" range {words.seconds(ordered[0])} to {words.seconds(ordered[-1])}"
    )
    stride = -(-len(ordered) // _MAX_DOTS)
    dots = [
        # A fixed pattern instead of noise, so that the same study gives the same file.
        element("circle", class_="dot", cx=x(v), cy=y + ((i * 5) % 9 - 4) * 1.1, r=1.6)
        for i, v in enumerate(ordered[::stride])
    ]
    return element(
        "g",
        element("title", title),
        _row_label(sample.label, y, box, sample.strong),
        *dots,
        element("rect", class_="iqr", x=x(p25), y=y - 6, width=max(x(p75) - x(p25), 1), height=12),
        element("line", class_="median", x1=x(p50), x2=x(p50), y1=y - 8, y2=y + 8),
        element("line", class_="p90", x1=x(p90), x2=x(p90), y1=y - 5, y2=y + 5),
    )


def plot_stages(samples: Sequence[Samples]) -> Figure:
    """Where the time goes: text encoding, denoising, VAE decoding, image encoding, the rest."""
    box = _rows_box([s.label for s in samples], len(samples))
    longest = max(sum(s.stage_s.values()) for s in samples)
    x = Scale(0.0, longest * 1.04, box.left, box.x_end)
    parts = [_row_axes(box, x, "seconds, mean by stage")]
    for i, sample in enumerate(samples):
        parts.append(_stack(sample, x, box.top + (i + 0.5) * _ROW, box))
    used = [s for s in STAGES if any(sample.stage_s.get(s) for sample in samples)]
    return Figure(
        title="Where the time goes",
        svg=_svg(box, parts, "Stage breakdown"),
        legend=tuple((f"st-{s}", "square", _stage_name(s)) for s in used),
    )


def _stage_name(stage: str) -> str:
    names = {"text": "text encoders", "decode": "VAE decode", "encode": "image file"}
    return names.get(stage, stage)


def _stack(sample: Samples, x: Scale, y: float, box: Box) -> Markup:
    parts = [(f"st-{s}", _stage_name(s), sample.stage_s.get(s, 0.0)) for s in STAGES]
    bars, _ = _segments(sample.label, parts, x, y)
    return element("g", _row_label(sample.label, y, box, sample.strong), *bars)


def _segments(
    label: str, parts: Sequence[tuple[str, str, float]], x: Scale, y: float
) -> tuple[list[Markup], float]:
    """A bar of (class, name, seconds) laid end to end, and its length in seconds."""
    total = sum(seconds for _, _, seconds in parts)
    drawn, start = [], 0.0
    for class_, name, seconds in parts:
        if seconds <= 0:
            continue
        text = f"{label}\n{name}: {words.seconds(seconds)} ({seconds / total:.0%})"
        width = max(x(start + seconds) - x(start), 0.5)
        drawn.append(
            element(
                "rect",
                element("title", text),
                class_=class_,
                x=x(start),
                y=y - 7,
                width=width,
                height=14,
            )
        )
        start += seconds
    return drawn, total


def plot_calls(bars: Sequence[CallBar]) -> Figure:
    """Where a hosted call's seconds go, over the same image made on this machine."""
    box = _rows_box([b.label + "   " * b.strong for b in bars], len(bars))  # bold is wider
    longest = max(sum(b.parts.values()) for b in bars)
    x = Scale(0.0, longest * 1.16, box.left, box.x_end)  # room for the totals
    rows = [_call(bar, x, box.top + (i + 0.5) * _ROW, box) for i, bar in enumerate(bars)]
    used = [p for p in CALL_PARTS if any(p in bar.parts for bar in bars)]
    legend = [(f"st-{p}", "square", CALL_PARTS[p]) for p in used]
    if any(b.late_by_s for b in bars):
        legend.append(("late", "bar", "polling: at most this much too long"))
    return Figure(
        title="Seconds of one image, made alone",
        svg=_svg(box, [_row_axes(box, x, "seconds, mean by part"), *rows], "Hosted calls"),
        legend=tuple(legend),
        note="Hosted settings in bold, the same request on this machine below them.",
    )


def _call(bar: CallBar, x: Scale, y: float, box: Box) -> Markup:
    named = [(f"st-{p}", CALL_PARTS[p], bar.parts[p]) for p in CALL_PARTS if p in bar.parts]
    parts, total = _segments(bar.label, named, x, y)
    if bar.late_by_s:
        parts.append(_late(x(max(total - bar.late_by_s, 0.0)), x(total), y, bar))
    text = element("text", words.seconds(total), class_="row", x=x(total) + 6, y=y, dy="0.32em")
    return element("g", _row_label(bar.label, y, box, bar.strong), *parts, text)


def _late(start: float, end: float, y: float, bar: CallBar) -> Markup:
    """A bracket over the end of the bar: somewhere in it the image was ready."""
    title = f"{bar.label}\npolling saw the end at most {words.seconds(bar.late_by_s)} late"
    low, high = f"{start:.1f}", f"{end:.1f}"
    path = f"M{low},{y - 5:.1f}v10M{high},{y - 5:.1f}v10M{low},{y:.1f}H{high}"
    return element(
        "g",
        element("title", title),
        element("path", class_="late halo", d=path),
        element("path", class_="late", d=path),
    )


def plot_memory(rows: Sequence[tuple[str, str, float]]) -> Figure:
    """Peak memory: (label, kind, bytes) with kind "rss" or "vram"."""
    box = _rows_box([label for label, _, _ in rows], len(rows))
    x = Scale(0.0, max(count for _, _, count in rows) / 2**20 * 1.15, box.left, box.x_end)
    parts = [_row_axes(box, x, "MiB")]
    for i, (label, kind, count) in enumerate(rows):
        y = box.top + (i + 0.5) * _ROW
        width = x(count / 2**20) - box.left
        bar = element(
            "rect", class_=f"mem-{kind}", x=box.left, y=y - 7, width=max(width, 1.0), height=14
        )
        text = element("text", words.size(count), class_="row", x=box.left + 6, y=y, dy="0.32em")
        parts.append(element("g", _row_label(label, y, box, False), bar, text))
    kinds = {"rss": "host memory (RSS)", "vram": "GPU memory"}
    return Figure(
        title="Peak memory",
        svg=_svg(box, parts, "Peak memory"),
        legend=tuple(
            (f"mem-{k}", "square", v) for k, v in kinds.items() if any(r[1] == k for r in rows)
        ),
    )
