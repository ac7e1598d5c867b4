"""Which charts a study deserves: rows of settings become points, lines and samples."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sd35bench import words
from sd35bench.analysis.facts import facts
from sd35bench.analysis.table import made_alone
from sd35bench.fields import field_words
from sd35bench.report.bars import STAGES, Samples, plot_distributions, plot_memory, plot_stages
from sd35bench.report.leaderboard import front_ids
from sd35bench.report.plots import Line, Point, plot_front, plot_lines, plot_tradeoff
from sd35bench.report.render import Figure
from sd35bench.report.rows import (
    Row,
    by_task,
    lower_is_better,
    metric_label,
    metric_names,
    read_rows,
    row_words,
    size_rank,
    varying_fields,
)
from sd35bench.report.svg import MARKERS, SHAPES, ramp
from sd35bench.study.columns import Some, is_text, seconds
from sd35bench.types import Status
from sd35bench.words import Estimate

_MAX_SPEED_ROWS = 40
_MAX_LINES = 8


def front_figures(
    rows: Sequence[Row],
    badges: Mapping[str, tuple[str, ...]],
    extra: Sequence[str],
    target_s: float | None,
    shares: Mapping[str, Mapping[str, float]],
    half: bool = False,
) -> list[Figure]:
    """Quality over latency, one chart per metric that was measured.

    `shares` is metric → row id → in which share of resamples the row is dominated. `half`: drawn
    for half a page, without the list of the front.
    """
    figures = []
    for metric in metric_names(rows):
        known = [r for r in rows if r.value(metric) is not None and r.latency is not None]
        if not known or not facts(metric).ranks:
            continue
        front = front_ids(known, metric)
        colours, shapes = _channels(known, extra)
        points = [
            Point(
                x=r.latency,
                y=r.metrics[metric],
                class_=ramp(colours.place(r), len(colours.names)),
                marker=SHAPES[shapes.place(r) % len(SHAPES)],
                label=_short_name(r, extra),
                on_front=r.id in front,
                badge=", ".join(badges.get(r.id, ())),
                dominated=shares.get(metric, {}).get(r.id),
                keys=f"a{colours.place(r)} b{shapes.place(r)}",
            )
            for r in known
            if r.latency is not None
        ]
        figure = plot_front(
            points,
            metric=metric_label(metric),
            lower=lower_is_better(metric),
            target_s=target_s,
            half=half,
        )
        legend, keys = _legend(colours, shapes)
        figures.append(replace(figure, legend=legend, keys=keys))
    return figures


@dataclass(frozen=True, slots=True)
class _Channel:
    """Colour or shape: the fields that it shows, and what each of their values is called."""

    fields: tuple[str, ...]
    names: dict[tuple[Any, ...], str]

    def place(self, row: Row) -> int:
        """The number of a row's value."""
        return list(self.names).index(_values(row, self.fields))


def _values(row: Row, fields: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.text(f) if row.setting.get(f) is not None else "" for f in fields)


def _channel(rows: Sequence[Row], fields: tuple[str, ...]) -> _Channel:
    """The values in order: numbers by size, a field without a value left out of the name."""
    ordered = sorted(rows, key=lambda row: [size_rank(row.setting.get(f)) for f in fields])
    return _Channel(fields, {_values(r, fields): row_words(r, fields) for r in ordered})


def _channels(rows: Sequence[Row], extra: Sequence[str]) -> tuple[_Channel, _Channel]:
    """What colour and shape show: fields that vary.

    Colour is cfg (of edits the strength, which matters more) where that varies, else the first
    other field; shape is the rest, as far as there are shapes for it.
    """
    edits = any(r.prompt_strength is not None for r in rows)
    names = ("prompt_strength", *extra, "cfg") if edits else ("cfg", *extra)
    names = (*(n for n in names if n == "study"), *(n for n in names if n != "study"))
    varying = [n for n in names if len({_values(r, (n,)) for r in rows}) > 1]
    colours = _channel(rows, tuple(varying[:1]))
    shapes = _channel(rows, tuple(varying[1:]))
    if len(shapes.names) > len(SHAPES):
        shapes = _channel(rows, tuple(varying[1:2]))
    if len(shapes.names) > len(SHAPES) >= len(colours.names):
        colours, shapes = shapes, colours
    return colours, shapes


def _legend(
    colours: _Channel, shapes: _Channel
) -> tuple[tuple[tuple[str, str, str], ...], tuple[str, ...]]:
    """Entries of colours and shapes, and which marks each hides; what is alone needs no entry."""
    entries = [
        (ramp(i, len(colours.names)), "circle", name, f"a{i}")
        for i, name in enumerate(colours.names.values())
        if len(colours.names) > 1
    ]
    entries += [
        ("plain", SHAPES[i % len(SHAPES)], name, f"b{i}")
        for i, name in enumerate(shapes.names.values())
        if len(shapes.names) > 1
    ]
    return tuple(e[:3] for e in entries), tuple(e[3] for e in entries)


def quality_figures(document: Mapping[str, Any]) -> list[Figure]:
    """Quality over latency from a `show` document, task by task; figures draw in a notebook."""
    rows = read_rows(document)
    extra = varying_fields(rows)
    figures = []
    for members in by_task(rows).values():
        figures += front_figures(members, {}, extra, None, {})
    return figures


def _short_name(row: Row, extra: Sequence[str]) -> str:
    return row.name(extra).replace(" steps · cfg ", " · cfg ")


def _main_group(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ only in steps, cfg and strength: the largest such group."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.rest].append(row)
    return max(groups.values(), key=len, default=[])


def line_figures(rows: Sequence[Row], pinned: Row | None) -> tuple[list[Figure], str]:
    """Curves over steps (a line per cfg), over cfg (per steps); for image-to-image at one strength.

    Returns the figures and a sentence that says what was held fixed; `pinned` is the recommended
    row, whose strength and backend are shown where the study has several.
    """
    group = [r for r in rows if pinned is not None and r.rest == pinned.rest]
    group = group if group else _main_group(rows)
    fixed = _fixed_strength(group, pinned)
    group = [r for r in group if r.prompt_strength == fixed]
    figures = []
    for metric in metric_names(group):
        known = [r for r in group if r.value(metric) is not None]
        for axis, other in (("steps", "cfg"), ("cfg", "steps")):
            lines = _lines(known, metric, axis, other)
            if lines:
                figures.append(
                    plot_lines(
                        lines,
                        axis=axis,
                        metric=metric_label(metric),
                        lower=lower_is_better(metric),
                        log=axis == "steps",
                    )
                )
    note = "" if fixed is None else f"At {field_words('prompt_strength', fixed)}."
    return figures, note


def _fixed_strength(rows: Sequence[Row], pinned: Row | None) -> float | None:
    if pinned is not None:
        return pinned.prompt_strength
    counts = Counter(r.prompt_strength for r in rows)
    return counts.most_common(1)[0][0] if counts else None


def _lines(rows: Sequence[Row], metric: str, axis: str, other: str) -> list[Line]:
    if len({getattr(r, axis) for r in rows}) < 2:
        return []
    values = sorted({getattr(r, other) for r in rows})
    shown = _thin(values)
    lines = []
    for i, value in enumerate(shown):
        points = sorted(
            ((getattr(r, axis), r.metrics[metric]) for r in rows if getattr(r, other) == value),
            key=lambda p: p[0],
        )
        name, style = field_words(other, value), _style(i, len(shown))
        lines.append(Line(name=name, points=tuple(points), **style))
    return lines


def _style(i: int, count: int) -> dict[str, Any]:
    """Colour and marker of the i-th of `count` lines."""
    return {"class_": ramp(i, count), "marker": MARKERS[i % len(MARKERS)]}


def _thin(values: Sequence[Any]) -> list[Any]:
    """At most eight values, spread over all of them."""
    if len(values) <= _MAX_LINES:
        return list(values)
    last = len(values) - 1
    return [values[round(i * last / (_MAX_LINES - 1))] for i in range(_MAX_LINES)]


def tradeoff_figures(rows: Sequence[Row], pinned: Row | None) -> list[Figure]:
    """Image-to-image: followed against kept, and both over prompt_strength."""
    followed = next((m for m in metric_names(rows) if m.startswith("prompt_accuracy")), None)
    followed = followed or next((m for m in metric_names(rows) if m.startswith("clip")), None)
    kept = next((m for m in metric_names(rows) if m.startswith("init_kept")), None)
    group = _main_group([r for r in rows if r.prompt_strength is not None])
    if followed is None or kept is None:
        return []
    group = [r for r in group if r.value(followed) is not None and r.value(kept) is not None]
    by_pair: dict[tuple[int, float], list[Row]] = defaultdict(list)
    for row in group:
        by_pair[row.steps, row.cfg].append(row)
    pairs = _thin(sorted(p for p, members in by_pair.items() if len(members) > 1))
    if not pairs:
        return []
    lines = [
        (
            f"{field_words('steps', steps)} · {field_words('cfg', cfg)}",
            ramp(i, len(pairs)),
            MARKERS[i % len(MARKERS)],
            [
                (words.plain(r.prompt_strength), r.metrics[followed], r.metrics[kept])
                for r in sorted(by_pair[steps, cfg], key=lambda r: r.prompt_strength or 0.0)
            ],
        )
        for i, (steps, cfg) in enumerate(pairs)
    ]
    plane = plot_tradeoff(lines, followed=metric_label(followed), kept=metric_label(kept))
    chosen = pairs[-1] if pinned is None else (pinned.steps, pinned.cfg)
    chosen = chosen if chosen in by_pair else pairs[-1]
    return [plane, _over_strength(by_pair[chosen], followed, kept, chosen)]


def _over_strength(
    rows: Sequence[Row], followed: str, kept: str, chosen: tuple[int, float]
) -> Figure:
    ordered = sorted(rows, key=lambda r: r.prompt_strength or 0.0)

    def points(metric: str) -> tuple[tuple[float, Estimate], ...]:
        return tuple((r.prompt_strength or 0.0, r.metrics[metric]) for r in ordered)

    lines = [
        Line(name="followed", class_="c1", marker="circle", points=points(followed)),
        Line(name="kept", class_="c6", marker="square", points=points(kept), dashed=True),
    ]
    figure = plot_lines(lines, axis="prompt_strength", metric="followed and kept")
    note = f"At {field_words('steps', chosen[0])}, {field_words('cfg', chosen[1])}."
    return replace(
        figure,
        title="Followed and kept over prompt_strength",
        legend=(("c1", "circle", metric_label(followed)), ("c6", "square", metric_label(kept))),
        note=note,
    )


def speed_figures(
    rows: Sequence[Row],
    matched: Mapping[str, Some],
    badges: Mapping[str, tuple[str, ...]],
    extra: Sequence[str],
) -> tuple[list[Figure], str]:
    """Distributions, stages and memory; the fastest settings and the recommended ones if many."""
    timed = {r.id: _latencies(matched.get(r.id, ())) for r in rows}
    known = [r for r in rows if timed[r.id]]
    known.sort(key=lambda r: sorted(timed[r.id])[len(timed[r.id]) // 2])
    note = ""
    if len(known) > _MAX_SPEED_ROWS:
        step = len(known) / _MAX_SPEED_ROWS
        keep = {known[int(i * step)].id for i in range(_MAX_SPEED_ROWS)}
        shown = [r for r in known if r.id in keep or r.id in badges]
        note = f"{len(shown)} of {len(known)} settings, spread evenly over their latencies."
        known = shown
    samples = [
        Samples(
            label=_short_name(r, extra),
            latencies_s=timed[r.id],
            stage_s=_stages(r),
            strong=r.id in badges,
        )
        for r in known
    ]
    figures = [plot_distributions(samples)] if samples else []
    staged = [s for s in samples if s.stage_s]
    figures += [plot_stages(staged)] if staged else []
    memory = _memory_rows(rows)
    return figures + ([plot_memory(memory)] if len(memory) > 1 else []), note


def throughput_figures(rows: Sequence[Row]) -> list[Figure]:
    """Images per second over batch size, a line per backend, at the setting most of them share."""
    groups: dict[Any, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if len(row.throughput) > 1:
            own = ("backend", "environment_id")
            shared = tuple((k, repr(v)) for k, v in row.setting.items() if k not in own)
            groups[shared].setdefault(str(row.setting.get("backend")), row)
    if not groups:
        return []
    chosen = max(groups.values(), key=len)
    names = _thin(sorted(chosen))
    lines = [
        Line(
            name=name,
            points=tuple((float(n), e) for n, e in sorted(chosen[name].throughput.items())),
            **_style(i, len(names)),
        )
        for i, name in enumerate(names)
    ]
    figure = plot_lines(lines, axis="batch size", metric="images per second", log=True)
    first = chosen[names[0]]
    note = f"At {first.name()}; whiskers: 95 % intervals."
    return [replace(figure, title="Throughput over batch size", note=note)]


def _latencies(records: Some) -> tuple[float, ...]:
    alone, _ = made_alone(records)
    taken = seconds(records)
    known = alone & is_text(records, "status", Status.OK) & ~np.isnan(taken)
    return tuple(taken[known].tolist())


def _stages(row: Row) -> dict[str, float]:
    """Mean seconds by stage, and what no stage explains where that is more than 1 %."""
    stages = {k: v for k, v in row.stage_s.items() if k in STAGES}
    if stages.get("other", 0.0) <= 0.01 * sum(stages.values()):
        stages.pop("other", None)
    return stages


def _memory_rows(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """Peaks by model and backend; a worker's peak does not belong to one setting."""
    peaks: dict[tuple[str, str], float] = {}
    for row in rows:
        label = f"{row.setting.get('model')} · {row.setting.get('backend')}"
        for kind, count in (("rss", row.peak_rss_bytes), ("vram", row.peak_vram_bytes)):
            if count is not None:
                peaks[label, kind] = max(count, peaks.get((label, kind), 0))
    return [(label, kind, count) for (label, kind), count in sorted(peaks.items())]
