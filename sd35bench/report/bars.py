"""The report's charts with one row per setting: latency distributions, stages, memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sd35bench.report.figures import format_bytes, format_seconds
from sd35bench.report.plots import Figure
from sd35bench.report.svg import Box, Scale, element

__all__ = ["STAGES", "Samples", "plot_distributions", "plot_memory", "plot_stages"]

STAGES = ("text", "denoise", "decode", "encode", "other")
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
