"""The settings as columns: a table of `show`, and the report's leaderboard.

A further column is one more entry of `setting_columns`; every form that does not rule it out shows
it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from sd35bench import words
from sd35bench.fields import CURVES
from sd35bench.recommend.pareto import pareto_front
from sd35bench.report.render import (
    FIRST_TO_GO,
    HTML,
    MARKDOWN,
    TERMINAL,
    Cell,
    Column,
    Layout,
    Table,
)
from sd35bench.report.rows import (
    Row,
    failed_text,
    has_far,
    latency_scope,
    lower_is_better,
    metric_label,
    metric_names,
    usd_text,
)
from sd35bench.report.svg import element
from sd35bench.words import MISSING, Estimate

_GLYPH = 64.0
_PLAIN, _PAGE = (TERMINAL, MARKDOWN), (HTML,)
# Columns of this rank and above are left out before intervals move below their values.
_EXTRA = 3
_ALIKE, LAST_TO_GO = 0.75, 0.5
"""Ranks below every metric's: what is alike in all rows goes before what tells them apart."""
_SHOW = (
    Layout(drops=_EXTRA),
    Layout(between="\n", drops=1),
    Layout(between="\n", drops=_ALIKE),
    Layout(between="\n", drops=_ALIKE, folds=True),
    Layout(between=None, drops=LAST_TO_GO, folds=True, wraps=True),
)
_KEYS = {
    "strength": "prompt_strength",
    "latency s": "latency_s",
    "× target": "latency_ratio",
    "× eager": "speedup",
    "TFLOP/s": "achieved_tflops",
    "USD/image": "usd_per_image",
    "VRAM": "peak_vram_bytes",
    "peak RSS": "peak_rss_bytes",
    "PSNR dB": "",
}
"""Columns whose name in ``show --columns`` is not their title."""

Shares = Mapping[str, Mapping[str, float]]
"""Metric → row id → in which share of resamples the row is dominated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """A sortable table, and per row: its id, the profiles that chose it, whether on the front.

    `notes` says of metrics that no row has a value for, and which therefore have no column, why.
    """

    table: Table
    marks: tuple[tuple[str, tuple[str, ...], bool], ...]
    notes: tuple[str, ...] = ()


def primary_metric(rows: Sequence[Row]) -> str | None:
    """The first metric, in reading order, that some row has a value for."""
    return next(iter(_measured(rows)), None)


def _measured(rows: Sequence[Row]) -> list[str]:
    return [m for m in metric_names(rows) if any(r.value(m) is not None for r in rows)]


def front_ids(rows: Sequence[Row], metric: str | None) -> set[str]:
    """Rows that no other row dominates in p50 latency and `metric` (point estimates)."""
    if metric is None:
        return set()
    sign = -1.0 if lower_is_better(metric) else 1.0
    known = [
        (r.id, sign * value, r.latency.value)
        for r in rows
        if r.latency is not None and r.latency.value is not None
        for value in [r.value(metric)]
        if value is not None
    ]
    quality, cost = (np.array([k[i] for k in known], np.float64) for i in (1, 2))
    return {
        row_id for (row_id, _, _), on in zip(known, pareto_front(quality, cost), strict=True) if on
    }


def best_first(rows: Sequence[Row], metric: str | None) -> list[Row]:
    """Best `metric` first, unmeasured last; ties by latency."""
    sign = 1.0 if metric is not None and lower_is_better(metric) else -1.0

    def rank(row: Row) -> tuple[float, float]:
        value = None if metric is None else row.value(metric)
        seconds = None if row.latency is None else row.latency.value
        return (
            float("inf") if value is None else sign * value,
            float("inf") if seconds is None else seconds,
        )

    return sorted(rows, key=rank)


def setting_table(rows: Sequence[Row], extra: Sequence[str]) -> Table:
    """One task's `rows` as `show` prints them; `extra` are further setting fields that vary.

    Where there is little room, `n` goes first, then `threads` where other fields tell
    the settings apart, then what is alike in all; what differs between them stays, at last as
    words of one column.
    """
    told = {row.id: row.name(f for f in extra if f != "threads") for row in rows}
    alike = [name for name in CURVES if len({r.setting.get(name) for r in rows}) == 1]
    ranks = dict.fromkeys(alike, _ALIKE) | {"n": FIRST_TO_GO + 1}
    if len(set(told.values())) == len(told):
        ranks["threads"] = FIRST_TO_GO
        alike.append("threads")
    keys = _KEYS | {metric_label(name): name for name in metric_names(rows)}
    differing = {*CURVES, *extra} - {*alike}
    columns = []
    for column in setting_columns(rows, extra, {}):
        key = keys.get(column.title, column.title.replace(" ", "_"))
        said = tuple(r.differences([key]) for r in rows) if key in differing else ()
        rank = ranks.get(key, LAST_TO_GO / 2 if key == "failed" else column.rank)
        narrow = column.narrow
        if said:
            narrow = replace(column, title=column.title.replace(" ", "\n"))
        elif key == "failed":
            cells = tuple(replace(c, text=c.text.replace(" (", "\n(")) for c in column.cells)
            narrow = replace(column, cells=cells)
        columns.append(replace(column, rank=rank, key=key, said=said, narrow=narrow))
    return Table(title=rows[0].task, columns=tuple(columns), layouts=_SHOW)


def build_leaderboard(
    rows: Sequence[Row], badges: Mapping[str, tuple[str, ...]], extra: Sequence[str], shares: Shares
) -> Leaderboard:
    """Leaderboard of one task's `rows`; `extra` are further setting fields that vary."""
    metric = primary_metric(rows)
    ordered, front = best_first(rows, metric), front_ids(rows, metric)
    missing = [m for m in metric_names(rows) if m not in _measured(rows)]
    return Leaderboard(
        table=Table(columns=tuple(setting_columns(ordered, extra, shares))),
        marks=tuple((r.id, badges.get(r.id, ()), r.id in front) for r in ordered),
        notes=tuple(note for m in missing if (note := _missing_note(m, rows))),
    )


def _missing_note(metric: str, rows: Sequence[Row]) -> str:
    """Why a metric has no column: too few images, or what the analysis said."""
    entries = [r.metrics[metric] for r in rows if metric in r.metrics]
    needs = [e.needs for e in entries if e.needs is not None]
    if needs:
        most = max((e.n for e in entries if e.n is not None), default=0)
        return (
            f"{metric_label(metric)} is refused here: it needs n ≥ {words.count(max(needs))}"
            f" images per setting, and there are at most {words.count(most)}."
        )
    reason = next((e.note for e in entries if e.note), "no value")
    # What does not apply to a task at all (init kept without an init image) is not worth a line.
    return "" if reason.startswith("not applicable") else f"{metric_label(metric)}: {reason}."


# Columns --------------------------------------------------------------------------------------


def setting_columns(rows: Sequence[Row], extra: Sequence[str], shares: Shares) -> list[Column]:
    """Every column of `rows`, in reading order."""
    target = _known(_number("× target", rows, lambda r: r.target_ratio, _two_decimals, rank=4))
    usd, latency = _usd(rows), [r.latency for r in rows]
    hint = f"p50 of batch-1 trials; 95 % interval {latency_scope(rows)}"
    return [
        *(c for name in extra if name == "backend" for c in _field(name, rows)),
        _number("steps", rows, lambda r: None if r.unsent("steps") else r.steps),
        _number("cfg", rows, lambda r: None if r.unsent("cfg") else r.cfg),
        *_known(_number("strength", rows, lambda r: r.prompt_strength)),
        *(c for name in extra if name != "backend" for c in _field(name, rows)),
        _number("n", rows, lambda r: r.n, hint="images that the quality figures rest on"),
        *_metrics(rows),
        _estimates("latency s", latency, "glyph cost", most=3, seconds=True, hint=hint),
        *_timed(rows),
        *(replace(c, hint="latency over target", forms=_PAGE) for c in target),
        *_against_reference(rows),
        *(replace(c, forms=_PLAIN) for c in (*target, *usd)),
        *_memory(rows),
        *(replace(c, forms=_PAGE) for c in usd),
        *_failed(rows),
        *_dominated(rows, shares),
    ]


_two_decimals = functools.partial(words.number, decimals=2)


def _number(
    title: str,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    said: Callable[[float | None], str] = words.plain,
    *,
    rank: int = 0,
    hint: str = "",
    forms: tuple[str, ...] = (*_PLAIN, *_PAGE),
) -> Column:
    cells = tuple(Cell(text=said(value(r)), sort=_sortable(value(r))) for r in rows)
    return Column(title=title, cells=cells, rank=rank, hint=hint, forms=forms)


def _known(column: Column) -> list[Column]:
    """A column of numbers, where some row has one."""
    return [column] if any(cell.sort is not None for cell in column.cells) else []


def _sortable(value: object) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else str(value)
    return float(value)


def _field(name: str, rows: Sequence[Row]) -> list[Column]:
    """A field of the setting; a page has room for four characters more."""
    columns = []
    cuts = ((_PLAIN, 20, 8), (_PAGE, 24, 10))
    if name == "weights":  # names of files differ at their ends
        cuts = tuple((forms, 60, 58) for forms, *_ in cuts)
    for forms, most, kept in cuts:
        cells = tuple(
            Cell(
                text=text if len(text) <= most else text[:kept] + "…",
                sort=_sortable(row.setting.get(name)),
            )
            for row, text in ((r, r.text(name)) for r in rows)
        )
        columns.append(
            Column(title=name.replace("_", " "), cells=cells, numeric=False, forms=forms)
        )
    return columns


def _metrics(rows: Sequence[Row]) -> list[Column]:
    measured = _measured(rows)
    refused = [m for m in metric_names(rows) if m not in measured and _needs(rows, m)]
    columns = []
    for rank, name in enumerate((*measured, *refused)):
        better = "lower is better" if lower_is_better(name) else "higher is better"
        column = _estimates(
            metric_label(name),
            [r.metrics.get(name) for r in rows],
            f"glyph {'down' if lower_is_better(name) else 'up'}",
            most=4,
            rank=rank if name in measured else _EXTRA,
            hint=f"{better}; 95 % interval",
        )
        folded = replace(column, title=column.title.replace(" ", "\n", 1))
        forms = column.forms if name in measured else _PLAIN
        columns.append(replace(column, narrow=folded, forms=forms))
    return columns


def _needs(rows: Sequence[Row], metric: str) -> bool:
    return any(r.metrics[metric].needs is not None for r in rows if metric in r.metrics)


def _timed(rows: Sequence[Row]) -> list[Column]:
    """How many images were timed, where that is not `n`, and the slow end."""
    columns = []
    timed = {r.id: 0 if r.latency is None or r.latency.n is None else r.latency.n for r in rows}
    if any(timed[r.id] != r.n for r in rows):
        hint = "images made one at a time"
        columns.append(_number("timed n", rows, lambda r: timed[r.id], hint=hint, forms=_PAGE))
    p90 = {r.id: r.latency_s.get("p90") for r in rows}
    decimals = min(3, words.column_decimals([Estimate(value=v) for v in p90.values()]))
    said = functools.partial(words.number, decimals=decimals)
    return [*columns, _number("p90 s", rows, lambda r: p90[r.id], said, forms=_PAGE)]


def _against_reference(rows: Sequence[Row]) -> list[Column]:
    """Speed and drift against the reference backend, and the rate against the machine's limit."""
    columns = []
    if any(r.speedup is not None for r in rows):
        far = has_far(rows)
        hint = "times faster than the reference backend on the same prompts and seeds"
        hint += "; a hosted service's time includes queue and network" if far else ""
        most = 3 if far else 2  # what is far away is a small share
        kept = {"rank": 1, "seconds": True, "hint": f"{hint}; 95 % interval {latency_scope(rows)}"}
        speedups = [r.speedup for r in rows]
        column = _estimates("× eager", speedups, "glyph up", most=most, **kept)
        alone = _estimates("× eager", _values_only(speedups), "", most=most, **kept)
        columns.append(replace(column, narrow=alone))
    if any(r.psnr_db is not None for r in rows):
        psnr, hint = [r.psnr_db for r in rows], "against the reference backend's images"
        for estimates, forms in ((_values_only(psnr), _PLAIN), (psnr, _PAGE)):
            column = _estimates("PSNR dB", estimates, "glyph up", most=1, rank=2, hint=hint)
            cells = tuple(_identical(r, c) for r, c in zip(rows, column.cells, strict=True))
            columns.append(replace(column, cells=cells, forms=forms))
    if any(r.achieved_tflops is not None for r in rows):
        hint = "operations over time, and the share of this machine's measured limit"
        cells = tuple(_rate(r, "{} of limit") for r in rows)
        column = Column(title="TFLOP/s", cells=cells, rank=3, hint=hint, forms=_PAGE)
        lines = tuple(Cell(text=_rate(r, "({})").line) for r in rows)
        columns += [column, replace(column, cells=lines, forms=_PLAIN)]
    return columns


def _values_only(estimates: Sequence[Estimate | None]) -> list[Estimate | None]:
    """Without intervals, which --json has."""
    return [None if e is None else e.without_interval for e in estimates]


def _identical(row: Row, cell: Cell) -> Cell:
    """An exact match has no finite PSNR, and is better than all that have one."""
    if row.identical_pairs is None:
        return cell
    return Cell(text="identical", sort=1e9, hint=f"n = {row.identical_pairs}")


def _rate(row: Row, of: str) -> Cell:
    if row.achieved_tflops is None:
        return Cell(text=MISSING)
    share = row.limit_fraction
    beside = "" if share is None else of.format(words.percent(share))
    return Cell(
        text=words.significant(row.achieved_tflops), beside=beside, sort=row.achieved_tflops
    )


def _usd(rows: Sequence[Row]) -> list[Column]:
    if all(r.usd_per_image is None for r in rows):
        return []
    cells = tuple(
        Cell(text=usd_text(r))
        if r.usd_per_image is None
        else Cell(text=usd_text(r), sort=r.usd_per_image.value, hint=f"n = {r.usd_per_image.n}")
        for r in rows
    )
    hint = "what the service asks for one image"
    return [Column(title="USD/image", cells=cells, rank=1, hint=hint)]


def _memory(rows: Sequence[Row]) -> list[Column]:
    """Both peaks; on the page the one that is scarcer."""
    vram = _known(_number("VRAM", rows, lambda r: r.peak_vram_bytes, words.size, rank=5))
    rank = 2 if len({r.setting.get("backend") for r in rows}) > 1 else 6
    rss = _number("peak RSS", rows, lambda r: r.peak_rss_bytes, words.size, rank=rank)
    hint = "peak GPU memory of the worker" if vram else "peak host memory of the worker so far"
    page = replace(vram[0] if vram else rss, title="memory", hint=hint, forms=_PAGE)
    return [*(replace(c, forms=_PLAIN) for c in (*vram, rss)), page]


def _failed(rows: Sequence[Row]) -> list[Column]:
    if not any(r.failed for r in rows):
        return []
    cells = tuple(Cell(text=failed_text(r), sort=float(r.failed)) for r in rows)
    hint = "trials that failed; ambiguous ones may have been billed"
    return [Column(title="failed", cells=cells, hint=hint)]


def _dominated(rows: Sequence[Row], shares: Shares) -> list[Column]:
    """How surely a row is off the front, by the metric that these rows were judged by."""
    ids = {r.id for r in rows}
    judged = next((m for m in shares if ids & shares[m].keys()), None)
    if judged is None:
        return []
    hint = (
        f"resamples of the prompts in which another setting has no lower {metric_label(judged)} and"
        " takes no longer, and is better in one of the two"
    )
    known = shares[judged]
    return [
        _number("dominated", rows, lambda r: known.get(r.id), words.share, hint=hint, forms=_PAGE)
    ]


# Cells ----------------------------------------------------------------------------------------


def _estimates(
    title: str,
    estimates: Sequence[Estimate | None],
    class_: str,
    *,
    most: int,
    rank: int = 0,
    seconds: bool = False,
    hint: str = "",
) -> Column:
    """A column of figures with one number of decimals, and a glyph on one common scale.

    Latencies and their ratios differ a hundredfold: where `seconds`, a cell has more decimals if
    its own value needs them.
    """
    decimals = min(most, words.column_decimals(estimates))
    ends = [v for e in estimates if e is not None for v in (e.low, e.value, e.high)]
    known = [v for v in ends if v is not None]
    extent = (min(known), max(known)) if known else (0.0, 1.0)
    own = [
        words.latency_decimals(e, decimals) if seconds and e is not None else decimals
        for e in estimates
    ]
    cells = tuple(_estimate(e, d, extent, class_) for e, d in zip(estimates, own, strict=True))
    return Column(title=title, cells=cells, rank=rank, hint=hint)


def _estimate(
    estimate: Estimate | None, decimals: int, extent: tuple[float, float], class_: str
) -> Cell:
    if estimate is None:
        return Cell(text=MISSING)
    hint = "" if estimate.n is None else f"n = {estimate.n}"
    if estimate.value is None:
        return Cell(text=words.estimate(estimate), hint=hint, style="dim")
    return Cell(
        text=words.number(estimate.value, decimals),
        beside=words.interval(estimate, decimals),
        sort=estimate.value,
        glyph=_glyph(estimate, extent, class_),
        hint=hint,
    )


def _glyph(estimate: Estimate, extent: tuple[float, float], class_: str) -> Markup | None:
    """The interval as a small bar on the column's common scale."""
    low, high = extent
    if high <= low or estimate.value is None or estimate.low is None or estimate.high is None:
        return None

    def at(value: float) -> float:
        return 3 + (value - low) / (high - low) * (_GLYPH - 6)

    bar = element("line", x1=at(estimate.low), x2=at(estimate.high), y1=4, y2=4)
    dot = element("circle", cx=at(estimate.value), cy=4, r=2.6)
    return element("svg", bar, dot, class_=class_, viewBox=f"0 0 {_GLYPH:g} 8", aria_hidden="true")
