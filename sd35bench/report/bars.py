"""The report's charts with a row per setting: latencies, stages, hosted calls, memory.

On a page a row's name stands to the left of its bar and its figure to the right; on a narrow screen
the name stands above the bar.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from sd35bench import words
from sd35bench.report.render import Figure, Table, text_table
from sd35bench.report.svg import (
    CHARACTER,
    SMALL,
    Box,
    Scale,
    chart,
    cut,
    element,
    tick_texts,
    units,
)

STAGES = {
    "text": "text encoders",
    "denoise": "denoise",
    "decode": "VAE decode",
    "encode": "image file",
    "other": "other",
}
_CALL_PARTS = {
    "submit": "submit",
    "queue": "queue",
    "predict": "inference",
    "download": "download",
    "other": "not told apart",
    "local": "this machine",
}
_ROW = 24.0
_MAX_DOTS = 120
_LONGEST = 34
_VALUE = 66.0
"""Room at the right for a row's figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One setting's timed latencies, and mean seconds by stage."""

    label: str
    latencies_s: tuple[float, ...]
    stage_s: dict[str, float]
    strong: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A bar of mean seconds by part, whose end was seen at most `late_by_s` late."""

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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where rows of bars are: labels to the left, or above their bars on a narrow screen."""

    box: Box
    height: float
    stacked: bool

    @classmethod
    def fit(cls, labels: Sequence[str], *, stacked: bool, right: float = 16.0) -> "_Rows":
        height = 40.0 if stacked else _ROW
        longest = min(_LONGEST, max((len(text) for text in labels), default=0))
        left = 8.0 if stacked else max(60.0, 20 + CHARACTER * longest)
        width = SMALL[0] if stacked else 560.0
        total = 34.0 + len(labels) * height + 44.0
        return cls(Box(width, total, left=left, right=right), height, stacked)

    def y(self, i: int) -> float:
        """The middle of a row's bar."""
        return self.box.top + (i + 0.5) * self.height + (8.0 if self.stacked else 0.0)

    def label(self, text: str, y: float, strong: bool) -> Markup:
        """The row's name, cut to the room that it has."""
        class_ = "row strong" if strong else "row"
        if self.stacked:
            return element("text", cut(text, 50), class_=class_, x=self.box.left, y=y - 14)
        text = cut(text, _LONGEST)
        return element("text", text, class_=f"{class_} end", x=self.box.left - 10, y=y, dy="0.32em")

    def value(self, text: str, y: float) -> Markup:
        """A figure at the right end of a row."""
        return element("text", text, class_="row end", x=self.box.width - 4, y=y, dy="0.32em")


def _both(labels: Sequence[str], draw: Callable[[_Rows], Markup], right: float) -> dict[str, Any]:
    """A chart of rows for a page and for a narrow screen."""
    wide, small = (_Rows.fit(labels, stacked=s, right=right) for s in (False, True))
    return {"svg": draw(wide), "small": draw(small)}


def plot_distributions(samples: Sequence[Samples]) -> Figure:
    """Every timed image as a dot; box from p25 to p75, bar at the median, tick at p90."""
    every = [v for s in samples for v in s.latencies_s]

    def draw(rows: _Rows) -> Markup:
        box = rows.box
        x = Scale.fit(every, box.left + 6, box.x_end, log=max(every) / min(every) > 6)
        parts = [_row_axes(box, x, "latency, seconds (right: median)")]
        parts += [_distribution(s, x, rows.y(i), rows) for i, s in enumerate(samples)]
        return chart(box, parts, "Latency distributions")

    return Figure(
        title="Latency of each timed image",
        **_both([s.label for s in samples], draw, _VALUE),
        legend=(
            ("c1", "circle", "one image"),
            ("iqr", "square", "middle half"),
            ("bar", "bar", "median"),
            ("c6", "bar", "p90"),
        ),
        keys=("dots", "iqr", "median", "p90"),
        note="Images made one at a time (batch 1).",
        values=_distribution_values(samples),
    )


def _distribution_values(samples: Sequence[Samples]) -> Table:
    rows = []
    for sample in samples:
        ordered = sorted(sample.latencies_s)
        told = (quantile(ordered, q) for q in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0))
        rows.append((sample.label, str(len(ordered)), *map(words.seconds, told)))
    titles = ("setting", "n", "least", "p25", "median", "p75", "p90", "most")
    return Table(columns=text_table(titles, rows, titles[1:]))


def _row_axes(box: Box, x: Scale, name: str) -> Markup:
    parts = [
        element("line", class_="grid", x1=x(t), x2=x(t), y1=box.top, y2=box.y_end)
        for t in x.ticks()
    ]
    parts += tick_texts(x, x.ticks(), box.y_end, 16)
    line = element("line", class_="axis", x1=box.left, x2=box.x_end, y1=box.y_end, y2=box.y_end)
    title = element("text", name, class_="name end", x=box.width - 4, y=box.height - 8)
    return Markup("").join(parts) + line + title


def _distribution(sample: Samples, x: Scale, y: float, rows: _Rows) -> Markup:
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
    width = max(x(p75) - x(p25), 1)
    bars = (("median", p50, 8), ("p90", p90, 5))
    return element(
        "g",
        element("title", title),
        rows.label(sample.label, y, sample.strong),
        element("g", *dots, data_k="dots"),
        element("rect", class_="iqr", x=x(p25), y=y - 6, width=width, height=12, data_k="iqr"),
        *(
            element("line", class_=k, x1=x(at), x2=x(at), y1=y - h, y2=y + h, data_k=k)
            for k, at, h in bars
        ),
        rows.value(words.seconds(p50), y),
    )


def plot_stages(samples: Sequence[Samples]) -> Figure:
    """Where the time goes: text encoding, denoising, VAE decoding, image encoding, the rest."""
    stacks = [Stack(label=s.label, parts=s.stage_s, strong=s.strong) for s in samples]
    labels = [s.label for s in samples]
    figure = _stacks(stacks, labels, STAGES, ("setting", "stage", "Stage breakdown"))
    return replace(figure, title="Where the time goes")


def plot_calls(stacks: Sequence[Stack]) -> Figure:
    """Where a hosted call's seconds go, over the same image made on this machine."""
    labels = [s.label + "   " * s.strong for s in stacks]  # bold is wider
    figure = _stacks(stacks, labels, _CALL_PARTS, ("call", "part", "Hosted calls"))
    if any(s.late_by_s for s in stacks):
        late = ("late", "bar", "polling: at most this much too long")
        figure = replace(figure, legend=(*figure.legend, late), keys=(*figure.keys, "late"))
    return replace(
        figure,
        title="Seconds of one image, made alone",
        note="Hosted settings in bold, the same request on this machine below them.",
    )


def _stacks(
    stacks: Sequence[Stack],
    labels: Sequence[str],
    names: Mapping[str, str],
    titles: tuple[str, str, str],
) -> Figure:
    """Bars of parts laid end to end; `titles`: what a row is, what a part is, the chart's own."""
    row, part, title = titles
    longest = max(sum(s.parts.values()) for s in stacks)

    def draw(rows: _Rows) -> Markup:
        x = Scale(0.0, longest * 1.04, rows.box.left, rows.box.x_end)
        drawn = [_row_axes(rows.box, x, f"seconds, mean by {part} (right: all)")]
        drawn += [_stack(s, names, x, rows.y(i), rows) for i, s in enumerate(stacks)]
        return chart(rows.box, drawn, title)

    used = [p for p in names if any(s.parts.get(p) for s in stacks)]
    columns = (row, *(names[p] for p in used))
    told = [(s.label, *(words.seconds(s.parts.get(p)) for p in used)) for s in stacks]
    return Figure(
        title=title,
        **_both(labels, draw, _VALUE),
        legend=tuple((f"st-{p}", "square", names[p]) for p in used),
        keys=tuple(f"st-{p}" for p in used),
        values=Table(columns=text_table(columns, told, columns[1:])),
    )


def _stack(stack: Stack, names: Mapping[str, str], x: Scale, y: float, rows: _Rows) -> Markup:
    known = [(f"st-{p}", names[p], stack.parts[p]) for p in names if stack.parts.get(p, 0) > 0]
    total = sum(seconds for _, _, seconds in known)
    drawn, start = [], 0.0
    for class_, name, seconds in known:
        share = words.number(100 * (seconds / total), 0)
        text = f"{stack.label}\n{name}: {words.seconds(seconds)} ({share}%)"
        place = {"x": x(start), "y": y - 7, "width": max(x(start + seconds) - x(start), 0.5)}
        title = element("title", text)
        drawn.append(element("rect", title, class_=class_, **place, height=14, data_k=class_))
        start += seconds
    if stack.late_by_s:
        drawn.append(_late(x(max(total - stack.late_by_s, 0.0)), x(total), y, stack))
    name = rows.label(stack.label, y, stack.strong)
    return element("g", name, *drawn, rows.value(words.seconds(total), y))


def _late(start: float, end: float, y: float, stack: Stack) -> Markup:
    """A bracket over the end of the bar: somewhere in it the image was ready."""
    title = f"{stack.label}\npolling saw the end at most {words.seconds(stack.late_by_s)} late"
    low, high, top = units(start), units(end), units(y - 5)
    path = f"M{low},{top}v10M{high},{top}v10M{low},{units(y)}H{high}"
    return element(
        "g",
        element("title", title),
        element("path", class_="late halo", d=path),
        element("path", class_="late", d=path),
        data_k="late",
    )


def plot_memory(rows: Sequence[tuple[str, str, float]]) -> Figure:
    """Peak memory: (label, kind, bytes) with kind "rss" or "vram"."""
    most = max(count for _, _, count in rows) / 2**20

    def draw(places: _Rows) -> Markup:
        box = places.box
        x = Scale(0.0, most * 1.04, box.left, box.x_end)
        parts = [_row_axes(box, x, "MiB")]
        for i, (label, kind, count) in enumerate(rows):
            y, width = places.y(i), max(x(count / 2**20) - box.left, 1.0)
            bar = element("rect", class_=f"mem-{kind}", x=box.left, y=y - 7, width=width, height=14)
            name = places.label(label, y, False)
            figure = places.value(words.size(count), y)
            parts.append(element("g", name, bar, figure, data_k=f"mem-{kind}"))
        return chart(box, parts, "Peak memory")

    kinds = {"rss": "host memory (RSS)", "vram": "GPU memory"}
    used = [k for k in kinds if any(r[1] == k for r in rows)]
    return Figure(
        title="Peak memory",
        **_both([label for label, _, _ in rows], draw, 74.0),
        legend=tuple((f"mem-{k}", "square", kinds[k]) for k in used),
        keys=tuple(f"mem-{k}" for k in used),
    )
