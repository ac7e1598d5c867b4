"""The leaderboard: one sortable row per setting, every figure with its interval and n."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from sd35bench.fields import label
from sd35bench.recommend.pareto import pareto_front
from sd35bench.report.figures import (
    MISSING,
    Estimate,
    column_decimals,
    decimals_for,
    format_bytes,
    format_interval,
    format_number,
    format_plain,
)
from sd35bench.report.recommend import share_text
from sd35bench.report.rows import (
    Row,
    failed_text,
    lower_is_better,
    metric_label,
    metric_names,
    usd_text,
)
from sd35bench.report.svg import element

__all__ = ["Cell", "Leaderboard", "best_first", "build_leaderboard", "front_ids", "primary_metric"]

_GLYPH = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell: text, a muted second part, a glyph, and the number that sorting uses."""

    text: str
    sub: str = ""
    sort: float | str | None = None
    glyph: Markup | None = None
    numeric: bool = True
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaderboard:
    """Column heads (title, hint), and rows (row id, badges, on the front, cells).

    `notes` says of metrics that no row has a value for, and which therefore have no column, why.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[str, ...], bool, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()


def primary_metric(rows: Sequence[Row]) -> str | None:
    """The first metric, in reading order, that some row has a value for."""
    names = metric_names(rows)
    return next((m for m in names if any(_value(r, m) is not None for r in rows)), None)


def _value(row: Row, metric: str) -> float | None:
    found = row.metrics.get(metric)
    return None if found is None else found.value


def front_ids(rows: Sequence[Row], metric: str | None) -> set[str]:
    """Rows that no other row dominates in p50 latency and `metric` (point estimates)."""
    if metric is None:
        return set()
    sign = -1.0 if lower_is_better(metric) else 1.0
    known = [
        (r.id, sign * value, r.latency.value)
        for r in rows
        if r.latency is not None and r.latency.value is not None
        for value in [_value(r, metric)]
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
        value = None if metric is None else _value(row, metric)
        seconds = None if row.latency is None else row.latency.value
        return (
            float("inf") if value is None else sign * value,
            float("inf") if seconds is None else seconds,
        )

    return sorted(rows, key=rank)


def build_leaderboard(
    rows: Sequence[Row],
    badges: Mapping[str, tuple[str, ...]],
    extra: Sequence[str],
    shares: Mapping[str, Mapping[str, float]],
) -> Leaderboard:
    """Leaderboard of one task's `rows`; `extra` are further setting fields that vary.

    `shares` is metric → row id → in which share of resamples the row is dominated.
    """
    metric = primary_metric(rows)
    ordered = best_first(rows, metric)
    front = front_ids(rows, metric)
    measured = [m for m in metric_names(rows) if any(_value(r, m) is not None for r in rows)]
    missing = [m for m in metric_names(rows) if m not in measured]
    columns = [
        *_setting_columns(ordered, extra),
        _count_column("n", "images that the quality figures rest on", [r.n for r in ordered]),
        *(_metric_column(name, ordered) for name in measured),
        *_cost_columns(ordered),
        *_dominated_column(ordered, shares),
    ]
    return Leaderboard(
        columns=tuple((title, hint) for title, hint, _ in columns),
        rows=tuple(
            (row.id, badges.get(row.id, ()), row.id in front, tuple(c[2][i] for c in columns))
            for i, row in enumerate(ordered)
        ),
        notes=tuple(note for m in missing if (note := _missing_note(m, rows))),
    )


def _missing_note(metric: str, rows: Sequence[Row]) -> str:
    """Why a metric has no column: too few images, or what the analysis said."""
    entries = [r.metrics[metric] for r in rows if metric in r.metrics]
    needs = [e.needs for e in entries if e.needs is not None]
    if needs:
        most = max((e.n for e in entries if e.n is not None), default=0)
        return (
            f"{metric_label(metric)} is refused here: it needs n ≥ {max(needs):,} images per"
            f" setting, and there are at most {most:,}."
        )
    reason = next((e.note for e in entries if e.note), "no value")
    # What does not apply to a task at all (init kept without an init image) is not worth a line.
    return "" if reason.startswith("not applicable") else f"{metric_label(metric)}: {reason}."


_Column = tuple[str, str, list[Cell]]


def _setting_columns(rows: Sequence[Row], extra: Sequence[str]) -> list[_Column]:
    names = ["steps", "cfg"]
    if any(r.prompt_strength is not None for r in rows):
        names.append("prompt_strength")
    columns: list[_Column] = []
    backend = [name for name in extra if name == "backend"]
    for name in (*backend, *names, *(name for name in extra if name != "backend")):
        cells = [_setting_cell(r, name, name in names) for r in rows]
        columns.append((label(name), "", cells))
    return columns


def _setting_cell(row: Row, name: str, numeric: bool) -> Cell:
    value: Any = row.setting.get(name)
    plain = isinstance(value, int | float | str)
    text = format_plain(value) if plain else row.text(name)
    short = text if len(text) <= 24 else text[:10] + "…"
    return Cell(text=short, sort=_sortable(value), numeric=numeric)


def _sortable(value: object) -> float | str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None if value is None else str(value)
    return float(value)


def _count_column(title: str, hint: str, counts: Sequence[int]) -> _Column:
    return title, hint, [Cell(text=str(c), sort=float(c)) for c in counts]


def _metric_column(name: str, rows: Sequence[Row]) -> _Column:
    estimates = [r.metrics.get(name) for r in rows]
    hint = "lower is better" if lower_is_better(name) else "higher is better"
    cells = _estimate_cells(estimates, "glyph " + ("down" if lower_is_better(name) else "up"))
    return metric_label(name), f"{hint}; 95 % interval", cells


def _dominated_column(
    rows: Sequence[Row], shares: Mapping[str, Mapping[str, float]]
) -> list[_Column]:
    """How surely a row is off the front, by the metric that these rows were judged by."""
    ids = {r.id for r in rows}
    judged = next((m for m in shares if ids & shares[m].keys()), None)
    if judged is None:
        return []
    known = [shares[judged].get(r.id) for r in rows]
    hint = (
        f"resamples of the prompts in which another setting has no lower {metric_label(judged)} and"
        " takes no longer, and is better in one of the two"
    )
    cells = [Cell(text=MISSING if p is None else share_text(p), sort=p) for p in known]
    return [("dominated", hint, cells)]


def _cost_columns(rows: Sequence[Row]) -> list[_Column]:
    latency = _estimate_cells([r.latency for r in rows], "glyph cost", most=3)
    columns: list[_Column] = [("latency s", "p50 of batch-1 trials; 95 % interval", latency)]
    timed = [0 if r.latency is None or r.latency.n is None else r.latency.n for r in rows]
    if any(t != r.n for t, r in zip(timed, rows, strict=True)):
        columns.append(_count_column("timed n", "images made one at a time", timed))
    p90 = [r.latency_s.get("p90") for r in rows]
    decimals = min(3, column_decimals([Estimate(value=v) for v in p90]))
    columns.append(("p90 s", "", [_plain_cell(v, decimals) for v in p90]))
    if any(r.target_ratio is not None for r in rows):
        ratios = [r.target_ratio for r in rows]
        columns.append(("× target", "latency over target", [_plain_cell(v, 2) for v in ratios]))
    columns += _rate_columns(rows)
    vram = any(r.peak_vram_bytes is not None for r in rows)
    memory = [r.peak_vram_bytes if vram else r.peak_rss_bytes for r in rows]
    hint = "peak GPU memory of the worker" if vram else "peak host memory of the worker so far"
    cells = [Cell(text=format_bytes(m), sort=None if m is None else float(m)) for m in memory]
    columns.append(("memory", hint, cells))
    if any(r.usd_per_image is not None for r in rows):
        columns.append(("USD/image", "what the service asks for one image", _usd_cells(rows)))
    if any(r.failed for r in rows):
        hint = "trials that failed; ambiguous ones may have been billed"
        failed = [Cell(text=failed_text(r), sort=float(r.failed)) for r in rows]
        columns.append(("failed", hint, failed))
    return columns


def _usd_cells(rows: Sequence[Row]) -> list[Cell]:
    known = [(usd_text(r), r.usd_per_image) for r in rows]
    return [
        Cell(text=text) if e is None else Cell(text=text, sort=e.value, hint=f"n = {e.n}")
        for text, e in known
    ]


def _rate_columns(rows: Sequence[Row]) -> list[_Column]:
    """Speed and drift against the reference backend, and the rate against the machine's limit."""
    columns: list[_Column] = []
    if any(r.speedup is not None for r in rows):
        hint = "times faster than the reference backend on the same prompts and seeds"
        far = any(r.remote is not None and r.speedup is not None for r in rows)
        if far:
            hint += "; a hosted service's time includes queue and network"
        cells = _estimate_cells([r.speedup for r in rows], "glyph up", most=3 if far else 2)
        columns.append(("× eager", f"{hint}; 95 % interval", cells))
    if any(r.psnr_db is not None for r in rows):
        cells = _estimate_cells([r.psnr_db for r in rows], "glyph up", most=1)
        cells = [_identical_cell(r, c) for r, c in zip(rows, cells, strict=True)]
        columns.append(("PSNR dB", "against the reference backend's images", cells))
    if any(r.achieved_tflops is not None for r in rows):
        hint = "operations over time, and the share of this machine's measured limit"
        columns.append(("TFLOP/s", hint, [_rate_cell(r) for r in rows]))
    return columns


def _identical_cell(row: Row, cell: Cell) -> Cell:
    """An exact match has no finite PSNR, and is better than all that have one."""
    if row.identical_pairs is None:
        return cell
    return Cell(text="identical", sort=1e9, hint=f"n = {row.identical_pairs}")


def _rate_cell(row: Row) -> Cell:
    share = "" if row.limit_fraction is None else f"{100 * row.limit_fraction:.0f} % of limit"
    decimals = decimals_for(Estimate(value=row.achieved_tflops))
    text = format_number(row.achieved_tflops, decimals)
    return Cell(text=text, sub=share, sort=row.achieved_tflops)


def _plain_cell(value: float | None, decimals: int) -> Cell:
    return Cell(text=format_number(value, decimals), sort=value)


def _estimate_cells(estimates: Sequence[Estimate | None], class_: str, most: int = 4) -> list[Cell]:
    decimals = min(most, column_decimals(estimates))
    ends = [v for e in estimates if e is not None for v in (e.low, e.value, e.high)]
    known = [v for v in ends if v is not None]
    extent = (min(known), max(known)) if known else (0.0, 1.0)
    return [_estimate_cell(e, decimals, extent, class_) for e in estimates]


def _estimate_cell(
    estimate: Estimate | None, decimals: int, extent: tuple[float, float], class_: str
) -> Cell:
    if estimate is None:
        return Cell(text=MISSING)
    if estimate.value is None:
        why = f"needs n ≥ {estimate.needs:,}" if estimate.needs is not None else MISSING
        return Cell(text=why, sub="" if estimate.n is None else f"n = {estimate.n}")
    glyph = _glyph(estimate, extent, class_) if estimate.has_interval else None
    return Cell(
        text=format_number(estimate.value, decimals),
        sub=format_interval(estimate, decimals),
        sort=estimate.value,
        glyph=glyph,
        hint="" if estimate.n is None else f"n = {estimate.n}",
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
