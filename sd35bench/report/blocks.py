"""The tables beside the settings: throughput, compilation, drift, GPU, and the machine's limits.

Each is made once from a `show` document. A table that has nothing to say is not there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from sd35bench import words
from sd35bench.fields import label, unusual_words
from sd35bench.report.render import Cell, Column, Table, estimate_cell, text_column
from sd35bench.report.rows import SETTING_FIELDS, UNTOLD, Row, setting_text, told_by_threads
from sd35bench.words import MISSING, Estimate

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
    ("cvvdp_jod", "CVVDP JOD"),
    ("latent_rel_last", "latent end"),
    ("latent_rel_first", "latent 1st"),
    ("changed", "share changed"),
    ("shift_red", "red"),
    ("shift_green", "green"),
    ("shift_blue", "blue"),
)


def comparison_blocks(document: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """Return the tables that hold backends against each other, those with something to say."""
    found = [
        _throughput_block(rows),
        _starts_block(rows),
        *_drift_blocks(document.get("drift") or {}),
        _gpu_block(rows),
        machine_block(document),
    ]
    return [block for block in found if block is not None]


def block(title: str, names: Sequence[Column], figures: Sequence[Column], note: str = "") -> Table:
    """A table of figures, which a narrow terminal leaves out from the last one on; names stay."""
    ranked = [replace(c, rank=rank) for rank, c in enumerate(figures)]
    return Table(title=title, columns=(*names, *ranked), note=note)


def figures(title: str, cells: Iterable[Cell | str]) -> Column:
    """A column of figures."""
    made = (c if isinstance(c, Cell) else Cell(text=c) for c in cells)
    return Column(title=title, cells=tuple(made))


# Throughput -----------------------------------------------------------------------------------


def _throughput_block(rows: Sequence[Row]) -> Table | None:
    shown = [r for r in rows if len(r.throughput) > 1]
    if not shown:
        return None
    sizes = sorted({size for r in shown for size in r.throughput})
    timed = ("/".join(str(r.throughput[s].n) for s in sizes if s in r.throughput) for r in shown)
    return block(
        "Throughput, images per second",
        title_columns(shown),
        [
            *(
                figures(f"batch {s}", (estimate_cell(r.throughput.get(s)) for r in shown))
                for s in sizes
            ),
            figures("gain", map(_gain, shown)),
            figures("batches", timed),
        ],
        "Batch size over the median time of a whole batch, files included. Gain: the largest"
        " rate over that of the smallest batch. Batches: how many were timed at each size.",
    )


def _gain(row: Row) -> str:
    rates = {size: e.value for size, e in row.throughput.items() if e.value is not None}
    return words.ratio(max(rates.values()) / rates[min(rates)])


# Load, compilation, first image ---------------------------------------------------------------


def _starts_block(rows: Sequence[Row]) -> Table | None:
    """One row per model on a backend: what comes before the steady state, and how steady it is."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row.remote is None:  # a service loads nothing here
            groups[tuple(row.setting.get(n) for n in _LOAD)].append(row)
    loads = list(groups.values())
    told = any(r.cold_compile_s or r.warm_compile_s or r.start_spread for r in rows)
    if not told and len(loads) < 2:
        return None
    told_figures: list[tuple[str, Callable[[list[Row]], str]]] = [
        ("load", lambda m: _middle_s(r.load_s for r in m)),
        ("first image", lambda m: _middle_s(_first_image_s(r) for r in m)),
        ("first, warm", lambda m: _middle_s(r.warm_first_call_s for r in m)),
        ("compile, cold", lambda m: _middle_s(r.cold_compile_s for r in m)),
        ("compile, warm", lambda m: _middle_s(r.warm_compile_s for r in m)),
        ("starts", lambda m: str(max(r.starts for r in m))),
        ("between starts", lambda m: _spread(r.start_spread for r in m)),
    ]
    columns = [(name, [figure(m) for m in loads]) for name, figure in told_figures]
    return block(
        "Load, compilation, first image",
        title_columns([members[0] for members in loads], _LOAD),
        [figures(name, cells) for name, cells in columns if set(cells) != {MISSING}],
        "Medians over process starts; cold: with an empty compiler cache, which is how a first"
        " image is shown where both were seen; warm: with a full one. Between starts: the slowest"
        " start's median latency over the fastest's, the largest of its settings.",
    )


_LOAD = ("model", "backend", "threads", "environment_id")


def _first_image_s(row: Row) -> float | None:
    """With a cold cache, where there is one."""
    return row.first_call_s if row.cold_first_call_s is None else row.cold_first_call_s


def _middle_s(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return words.seconds(median(known) if known else None)


def _spread(values: Iterable[float | None]) -> str:
    return words.ratio(max((v for v in values if v is not None), default=None), 3)


# Drift ----------------------------------------------------------------------------------------


def _drift_blocks(drift: Mapping[str, Any]) -> list[Table]:
    """Distance of every backend from the reference, then the reference's from itself."""
    name = str((drift.get("reference") or {}).get("backend") or "the reference")
    rows, floor = list(drift.get("rows") or ()), list(drift.get("noise_floor") or ())
    warnings = " ".join(f"{words.first_upper(text)}." for text in drift.get("warnings") or ())
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
) -> Table:
    """`columns` are the fields that may name a row, and (key, title) of verdicts."""
    fields, verdicts = columns
    names = [n for n in fields if n in ("backend", "what") or _differs(rows, n)]
    measures = [(k, t) for k, t in _DRIFT if any(_drift_estimate(r, k) for r in rows)]
    return block(
        title,
        [
            replace(
                text_column(label(n), (_text(r.get(n)) for r in rows)),
                said=tuple(", ".join(unusual_words(r, [n])) for r in rows),
            )
            for n in names
        ],
        [
            figures("pairs", (words.plain(r.get("n_pairs")) for r in rows)),
            *(figures(t, (_yes_no(r.get(k)) for r in rows)) for k, t in verdicts),
            *(figures(t, (_drift_cell(r, k) for r in rows)) for k, t in measures),
        ],
        note.strip(),
    )


def _yes_no(value: bool | None) -> str:
    return MISSING if value is None else ("yes" if value else "no")


def _drift_estimate(row: Mapping[str, Any], key: str) -> Estimate | None:
    raw = row.get(key)
    if raw is None or (raw.get("value") is None and not (key == "psnr_db" and _identical(row))):
        return None
    return words.read_estimate(raw)


def _identical(row: Mapping[str, Any]) -> bool:
    return bool(row.get("n_pairs")) and row.get("identical") == row["n_pairs"]


def _drift_cell(row: Mapping[str, Any], key: str) -> Cell:
    estimate = _drift_estimate(row, key)
    if estimate is None:
        return Cell(text=MISSING)
    if estimate.value is None:
        return Cell(text="identical")
    if key.startswith("latent") or 0 < estimate.value < _TINY:
        return Cell(text=words.scientific(estimate.value))
    if _identical(row) and key in ("mean_abs", "max_abs"):
        return Cell(text="exactly 0")
    if key == "max_abs":
        return Cell(text=words.number(estimate.value, 0))
    return estimate_cell(estimate)


# GPU and machine ------------------------------------------------------------------------------


def _gpu_block(rows: Sequence[Row]) -> Table | None:
    shown = [r for r in rows if r.gpu is not None]
    if not shown:
        return None
    gpus = [r.gpu or {} for r in shown]
    clocks = [gpu.get("sm_clock_mhz") or {} for gpu in gpus]
    why = (", ".join(gpu.get("throttled") or ()) or MISSING for gpu in gpus)
    return block(
        "GPU while images were made",
        title_columns(shown),
        [
            figures("SM clock MHz", (words.number(c.get("median"), 0) for c in clocks)),
            figures("lowest", (words.number(c.get("min"), 0) for c in clocks)),
            figures("power W", (words.number(gpu.get("power_w"), 0) for gpu in gpus)),
            figures("throttled", (words.percent(gpu.get("throttled_share")) for gpu in gpus)),
            text_column("why", why),
        ],
        "Medians of what NVML said right after each image. Throttled: share of images.",
    )


def machine_block(document: Mapping[str, Any]) -> Table | None:
    """What the machine can do at most: best rates, and by how much the median stays below."""
    machines = document.get("machine") or []
    if not machines:
        return None
    names = [n for n in _RATES if any(n in m["rates"] for m in machines)]
    titles = {n: f"{n} {'TOP/s' if n == 'int8' else 'TFLOP/s'}" for n in names}
    failed = [f"Not measured on {m['device']}: {m['error']}." for m in machines if m.get("error")]
    return block(
        "What this machine can do at most",
        [text_column("device", (words.plain(m.get("name") or m["device"]) for m in machines))],
        [
            figures("threads", (words.plain(m["threads"]) for m in machines)),
            *(
                figures(title, (_limit(m["rates"].get(n)) for m in machines))
                for n, title in {**titles, "copy": "copy GB/s"}.items()
            ),
        ],
        " ".join(
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
    return f"{words.significant(rate['best'])} ({words.significant(rate['median'])})"


# What rows are called -------------------------------------------------------------------------

_TITLES: tuple[str, ...] = (*SETTING_FIELDS[:4], "task", *SETTING_FIELDS[4:], "environment_id")
_DRIFT_NAMES = (*_TITLES, "batch_size")


def title_columns(rows: Sequence[Row], names: Sequence[str] = _TITLES) -> list[Column]:
    """The leading columns of a table: the backend, and those of `names` in which rows differ."""
    settings = [r.setting for r in rows]
    shown = [n for n in names if n == "backend" or _differs(settings, n)]
    if told_by_threads(rows):
        shown = [n for n in shown if n != "environment_id"]
    return [
        replace(
            text_column(label(n), (_shortened(r.text(n)) for r in rows)),
            said=tuple(r.differences([n]) for r in rows),
        )
        for n in shown
    ]


def _differs(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether rows differ in a field; a service that does not tell it counts as no difference."""
    values = [r.get(name) for r in rows]
    return len({_text(v) for v in values if v is not None or name not in UNTOLD}) > 1


def _text(value: object) -> str:
    return _shortened(setting_text(value))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:10] + "…"
