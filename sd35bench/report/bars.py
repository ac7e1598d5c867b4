"""The report's charts with one row per setting: latency distributions, stages, memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sd35bench.report.figures import format_bytes, format_seconds
from sd35bench.report.plots import Figure
from sd35bench.report.svg import Box, Scale, element

__all__ = [
    "STAGES",
    "CallBar",
    "Samples",
    "plot_calls",
    "plot_distributions",
    "plot_memory",
    "plot_stages",
]

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
        svg=_bars_svg(box, parts, "Latency distributions"),
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
        f"{sample.label}\nn = {len(ordered)}, p50 {format_seconds(p50)}, p90 {format_seconds(p90)},"
        f" range {format_seconds(ordered[0])} to {format_seconds(ordered[-1])}"
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
        svg=_bars_svg(box, parts, "Stage breakdown"),
        legend=tuple((f"st-{s}", "square", _stage_name(s)) for s in used),
    )


def _stage_name(stage: str) -> str:
    names = {"text": "text encoders", "decode": "VAE decode", "encode": "image file"}
    return names.get(stage, stage)


def _stack(sample: Samples, x: Scale, y: float, box: Box) -> Markup:
    total = sum(sample.stage_s.values())
    parts, start = [], 0.0
    for stage in STAGES:
        seconds = sample.stage_s.get(stage, 0.0)
        if seconds <= 0:
            continue
        text = f"{_stage_name(stage)}: {format_seconds(seconds)} ({seconds / total:.0%})"
        parts.append(
            element(
                "rect",
                element("title", f"{sample.label}\n{text}"),
                class_=f"st-{stage}",
                x=x(start),
                y=y - 7,
                width=max(x(start + seconds) - x(start), 0.5),
                height=14,
            )
        )
        start += seconds
    return element("g", _row_label(sample.label, y, box, sample.strong), *parts)


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
        svg=_bars_svg(box, [_row_axes(box, x, "seconds, mean by part"), *rows], "Hosted calls"),
        legend=tuple(legend),
        note="Hosted settings in bold, the same request on this machine below them.",
    )


def _call(bar: CallBar, x: Scale, y: float, box: Box) -> Markup:
    total = sum(bar.parts.values())
    parts, start = [], 0.0
    for name, seconds in ((p, bar.parts[p]) for p in CALL_PARTS if p in bar.parts):
        text = f"{CALL_PARTS[name]}: {format_seconds(seconds)} ({seconds / total:.0%})"
        parts.append(
            element(
                "rect",
                element("title", f"{bar.label}\n{text}"),
                class_=f"st-{name}",
                x=x(start),
                y=y - 7,
                width=max(x(start + seconds) - x(start), 0.5),
                height=14,
            )
        )
        start += seconds
    if bar.late_by_s:
        parts.append(_late(x(max(total - bar.late_by_s, 0.0)), x(total), y, bar))
    text = element("text", format_seconds(total), class_="row", x=x(total) + 6, y=y, dy="0.32em")
    return element("g", _row_label(bar.label, y, box, bar.strong), *parts, text)


def _late(start: float, end: float, y: float, bar: CallBar) -> Markup:
    """A bracket over the end of the bar: somewhere in it the image was ready."""
    title = f"{bar.label}\npolling saw the end at most {format_seconds(bar.late_by_s)} late"
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
        text = element("text", format_bytes(count), class_="row", x=box.left + 6, y=y, dy="0.32em")
        parts.append(element("g", _row_label(label, y, box, False), bar, text))
    kinds = {"rss": "host memory (RSS)", "vram": "GPU memory"}
    return Figure(
        title="Peak memory",
        svg=_bars_svg(box, parts, "Peak memory"),
        legend=tuple(
            (f"mem-{k}", "square", v) for k, v in kinds.items() if any(r[1] == k for r in rows)
        ),
    )


def _bars_svg(box: Box, parts: Sequence[Markup], title: str) -> Markup:
    return element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {box.width:g} {box.height:g}",
        role="img",
    )
