"""The tables beside the settings: throughput, compilation, drift, GPU, and the machine's limits.

Each is a `Block` of plain texts, made once from a `show` document and printed alike in a terminal,
in Markdown and in the report. A block that has nothing to say is not there.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sd35bench.fields import label
from sd35bench.report.figures import (
    MISSING,
    Estimate,
    decimals_for,
    format_interval,
    format_number,
    format_plain,
    format_seconds,
)
from sd35bench.report.rows import SETTING_FIELDS, UNTOLD, Row, setting_text, told_by_threads

__all__ = [
    "Block",
    "Titles",
    "comparison_blocks",
    "machine_block",
    "split_interval",
    "with_interval",
]

_INTERVAL = re.compile(r" (\[[^]]*\])$")

_TINY = 1e-3
"""Below this four decimals say nothing: written with an exponent, without its interval."""
_RATES = ("fp32", "bf16", "fp16", "int8")
_DRIFT = (
    ("psnr_db", "PSNR dB"),
    ("mean_abs", "mean abs Δ"),
    ("max_abs", "max abs Δ"),
    ("ssim", "SSIM"),
    ("flip", "FLIP"),
    ("lpips", "LPIPS"),
    ("latent_rel_last", "latent end"),
    ("latent_rel_first", "latent 1st"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A small table: `columns` are (title, whether numeric), `rows` one text per column."""

    title: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def split_interval(text: str) -> tuple[str, str]:
    """A cell's value and, where it has one, its interval with brackets."""
    found = _INTERVAL.search(text)
    return (text, "") if found is None else (text[: found.start()], found[1])


def comparison_blocks(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Block]:
    """Return the blocks that hold backends against each other, those with something to say."""
    found = [
        _throughput_block(rows),
        _starts_block(rows),
        *_drift_blocks(document.get("drift") or {}),
        _gpu_block(rows),
        machine_block(document),
    ]
    return [block for block in found if block is not None]


# Throughput -----------------------------------------------------------------------------------


def _throughput_block(rows: Sequence[Row]) -> Block | None:
    shown = [r for r in rows if len(r.throughput) > 1]
    sizes = sorted({size for r in shown for size in r.throughput})
    if not shown:
        return None
    titles = Titles(shown)
    columns = [*titles.columns, *((f"batch {size}", True) for size in sizes)]
    columns += [("gain", True), ("batches", True)]
    return Block(
        title="Throughput, images per second",
        columns=tuple(columns),
        rows=tuple(
            (
                *titles.of(r),
                *(_rate(r.throughput.get(s)) for s in sizes),
                _gain(r),
                "/".join(str(r.throughput[s].n) for s in sizes if s in r.throughput),
            )
            for r in shown
        ),
        note="Batch size over the median time of a whole batch, files included. Gain: the largest"
        " rate over that of the smallest batch. Batches: how many were timed at each size.",
    )


def _rate(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return MISSING
    return with_interval(estimate)


def _gain(row: Row) -> str:
    rates = {size: e.value for size, e in row.throughput.items() if e.value is not None}
    return f"{max(rates.values()) / rates[min(rates)]:.2f}×"


# Load, compilation, first image ---------------------------------------------------------------


def _starts_block(rows: Sequence[Row]) -> Block | None:
    """One row per model on a backend: what comes before the steady state, and how steady it is."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.remote is None:  # a service loads nothing here
            groups[tuple(row.setting.get(n) for n in _LOAD)].append(row)
    loads = list(groups.values())
    told = any(r.cold_compile_s or r.warm_compile_s or r.start_spread for r in rows)
    if not told and len(loads) < 2:
        return None
    firsts = [members[0] for members in loads]
    titles = Titles(firsts, _LOAD)
    figures: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("load", lambda m: format_seconds(_middle(r.load_s for r in m))),
        ("first image", lambda m: format_seconds(_middle(_first_image_s(r) for r in m))),
        ("first, warm", lambda m: format_seconds(_middle(r.warm_first_call_s for r in m))),
        ("compile, cold", lambda m: format_seconds(_middle(r.cold_compile_s for r in m))),
        ("compile, warm", lambda m: format_seconds(_middle(r.warm_compile_s for r in m))),
        ("starts", lambda m: str(max(r.starts for r in m))),
        ("between starts", lambda m: _spread(r.start_spread for r in m)),
    ]
    shown = [(name, cells) for name, figure in figures if (cells := [figure(m) for m in loads])]
    shown = [(name, cells) for name, cells in shown if set(cells) != {MISSING}]
    return Block(
        title="Load, compilation, first image",
        columns=(*titles.columns, *((name, True) for name, _ in shown)),
        rows=tuple(
            (*titles.of(first), *(cells[i] for _, cells in shown)) for i, first in enumerate(firsts)
        ),
        note="Medians over process starts; cold: with an empty compiler cache, which is how a first"
        " image is shown where both were seen; warm: with a full one. Between starts: the slowest"
        " start's median latency over the fastest's, the largest of its settings.",
    )


_LOAD = ("model", "backend", "threads", "environment_id")


def _first_image_s(row: Row) -> float | None:
    """With a cold cache, where there is one."""
    return row.first_call_s if row.cold_first_call_s is None else row.cold_first_call_s


def _middle(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return median(known) if known else None


def _spread(values: Any) -> str:
    known = [v for v in values if v is not None]
    return f"{max(known):.3f}×" if known else MISSING


# Drift ----------------------------------------------------------------------------------------


def _drift_blocks(drift: Mapping[str, Any]) -> list[Block]:
    """Distance of every backend from the reference, then the reference's from itself."""
    name = str((drift.get("reference") or {}).get("backend") or "the reference")
    rows, floor = list(drift.get("rows") or ()), list(drift.get("noise_floor") or ())
    warnings = " ".join(f"{text[:1].upper()}{text[1:]}." for text in drift.get("warnings") or ())
    blocks = []
    if rows:
        note = (
            f"Each image against {name}'s of the same request; Δ in levels of 255; latent:"
            " relative error of the latents after the first and the last step. > noise: surely more"
            " than the noise floor."
        )
        columns = _DRIFT_NAMES, (("beyond_noise", "> noise"),)
        blocks.append(_drift_block(f"Drift from {name}", rows, columns, f"{note} {warnings}"))
    if floor:
        note = f"How far another batch size or thread count alone moves {name}'s images."
        own = ("threads", "batch_size", "environment_id")  # `what` says these
        columns = (*(n for n in _DRIFT_NAMES if n not in own), "what"), ()
        blocks.append(_drift_block(f"Noise floor of {name}", floor, columns, note))
    return blocks


def _drift_block(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: tuple[Sequence[str], Sequence[tuple[str, str]]],
    note: str,
) -> Block:
    """`columns` are the fields that may name a row, and (key, title) of verdicts."""
    fields, verdicts = columns
    always = ("backend", "what")
    names = [n for n in fields if n in always or _differs(rows, n)]
    measures = [(k, t) for k, t in _DRIFT if any(_drift_estimate(r, k) for r in rows)]
    heads = [(label(n), False) for n in names]
    heads += [
        ("pairs", True),
        *((t, True) for _, t in verdicts),
        *((t, True) for _, t in measures),
    ]
    return Block(
        title=title,
        columns=tuple(heads),
        rows=tuple(
            (
                *(_text(r.get(n)) for n in names),
                format_plain(r.get("n_pairs")),
                *(_yes_no(r.get(k)) for k, _ in verdicts),
                *(_drift_text(r, k) for k, _ in measures),
            )
            for r in rows
        ),
        note=note.strip(),
    )


def _yes_no(value: bool | None) -> str:
    return MISSING if value is None else ("yes" if value else "no")


def _drift_estimate(row: Mapping[str, Any], key: str) -> Estimate | None:
    raw = row.get(key)
    if raw is None or (raw.get("value") is None and not (key == "psnr_db" and _identical(row))):
        return None
    low, high = raw.get("ci95") or (None, None)
    return Estimate(value=raw["value"], low=low, high=high, n=raw.get("n"))


def _identical(row: Mapping[str, Any]) -> bool:
    return bool(row.get("n_pairs")) and row.get("identical") == row["n_pairs"]


def _drift_text(row: Mapping[str, Any], key: str) -> str:
    estimate = _drift_estimate(row, key)
    if estimate is None:
        return MISSING
    if estimate.value is None:
        return "identical"
    if key.startswith("latent") or 0 < estimate.value < _TINY:
        return f"{estimate.value:.1e}"
    if _identical(row) and key in ("mean_abs", "max_abs"):
        return "exactly 0"
    if key == "max_abs":
        return format_number(estimate.value, 0)
    return with_interval(estimate)


# GPU and machine ------------------------------------------------------------------------------


def _gpu_block(rows: Sequence[Row]) -> Block | None:
    shown = [(r, r.gpu) for r in rows if r.gpu is not None]
    if not shown:
        return None
    titles = Titles([r for r, _ in shown])
    heads = ("SM clock MHz", "lowest", "power W", "throttled", "why")
    return Block(
        title="GPU while images were made",
        columns=(*titles.columns, *((head, head != "why") for head in heads)),
        rows=tuple((*titles.of(row), *_gpu_cells(gpu)) for row, gpu in shown),
        note="Medians of what NVML said right after each image. Throttled: share of images.",
    )


def _gpu_cells(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    clock = gpu.get("sm_clock_mhz") or {}
    share = gpu.get("throttled_share")
    return (
        format_number(clock.get("median"), 0),
        format_number(clock.get("min"), 0),
        format_number(gpu.get("power_w"), 0),
        MISSING if share is None else f"{100 * share:.0f} %",
        ", ".join(gpu.get("throttled") or ()) or MISSING,
    )


def machine_block(document: Mapping[str, Any]) -> Block | None:
    """What the machine can do at most: best rates, and by how much the median stays below."""
    machines = document.get("machine") or []
    if not machines:
        return None
    names = [n for n in _RATES if any(n in m["rates"] for m in machines)]
    units = {n: "TOP/s" if n == "int8" else "TFLOP/s" for n in names}
    failed = [f"Not measured on {m['device']}: {m['error']}." for m in machines if m.get("error")]
    return Block(
        title="What this machine can do at most",
        columns=(
            ("device", False),
            ("threads", True),
            *((f"{n} {units[n]}", True) for n in names),
            ("copy GB/s", True),
        ),
        rows=tuple(
            (
                format_plain(m.get("name") or m["device"]),
                format_plain(m["threads"]),
                *(_limit(m["rates"].get(n)) for n in (*names, "copy")),
            )
            for m in machines
        ),
        note=" ".join(
            [
                "Matrix products and a copy, measured once for this study: the best, and in"
                " brackets the median.",
                *failed,
            ]
        ),
    )


def _limit(rate: Mapping[str, Any] | None) -> str:
    if rate is None:
        return MISSING
    return f"{_significant(rate['best'])} ({_significant(rate['median'])})"


# What rows are called -------------------------------------------------------------------------

_TITLES: tuple[str, ...] = (*SETTING_FIELDS[:4], "task", *SETTING_FIELDS[4:], "environment_id")
_DRIFT_NAMES = (*_TITLES, "batch_size")


class Titles:
    """The leading columns of a block: the backend, and every field in which its rows differ."""

    def __init__(self, rows: Sequence[Row], names: Sequence[str] = _TITLES) -> None:
        """`names` are the fields that may be shown."""
        settings = [r.setting for r in rows]
        self._names = [n for n in names if n == "backend" or _differs(settings, n)]
        if told_by_threads(rows):
            self._names = [n for n in self._names if n != "environment_id"]

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Column heads."""
        return [(label(name), False) for name in self._names]

    def of(self, row: Row) -> tuple[str, ...]:
        """One row's texts."""
        return tuple(_shortened(row.text(n)) for n in self._names)


def _differs(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a field tells rows apart; that a service leaves it untold does not."""
    values = [r.get(name) for r in rows]
    return len({_text(v) for v in values if v is not None or name not in UNTOLD}) > 1


def _text(value: object) -> str:
    return _shortened(setting_text(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:10] + "…"


def with_interval(estimate: Estimate) -> str:
    """``value [low, high]`` with the decimals that the interval supports."""
    decimals = decimals_for(estimate)
    value = format_number(estimate.value, decimals)
    return f"{value} {format_interval(estimate, decimals)}".strip()


def _significant(value: float) -> str:
    """Three significant digits, never in exponents."""
    return format_number(value, decimals_for(Estimate(value=value)))
