"""A study as flat rows, one a setting or one an image, and as a table of the reader's library.

Rows hold texts, numbers, booleans and ``None`` alone, under one column for each fact, so that a
file of any kind can hold them.
"""

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from sd35bench.analysis.settings import setting_fields, setting_key
from sd35bench.analysis.table import GUARD
from sd35bench.errors import ConfigError
from sd35bench.types import Status

Form = Literal["arrow", "pandas", "polars"]
FORMS = ("arrow", "pandas", "polars")
_LEFT_OUT = ("environment", "in_force", "remote", "gpu", "contention")
"""Nested facts of a setting's row in `show --json` that are no column."""

Row = dict[str, Any]


def settings_rows(document: Mapping[str, Any]) -> list[Row]:
    """The settings of a `show` document: fields, figures with `_low`, `_high` and `_n`."""
    return [_setting(row) for row in document["settings"]]


def _setting(row: Mapping[str, Any]) -> Row:
    found: Row = {}
    for name, value in row.items():
        if name == "metrics":
            for metric, figure in value.items():
                found |= _figure(metric, figure)
        elif name == "latency_s":
            found |= {f"latency_s_{part}": value.get(part) for part in ("p50", "p90", "p99")}
            found |= _figure("latency_s", {**value, "value": value.get("mean")})
        elif name == "stage_s":
            found |= {f"{stage}": seconds for stage, seconds in value.items()}
        elif name == "warnings":
            found["warnings"] = "; ".join(value)
        elif name not in _LEFT_OUT:
            found[name] = _plain(value)
    return found


def _figure(name: str, figure: Mapping[str, Any]) -> Row:
    """A figure's value, the ends of its 95 % interval, and n."""
    ends = figure.get("ci95")
    low, high = (None, None) if ends is None else ends
    return {
        name: figure.get("value"),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_n": figure.get("n"),
    }


def image_rows(study: Any) -> list[Row]:
    """Every trial of a study (`sd35bench.store.Study`), failures too, with its scores.

    `path` is the image's file, ``None`` where it is gone or damaged; `generate_s` is the wall time
    of the whole batch; `tag_NAME` are the prompt file's own columns.
    """
    scores: dict[tuple[str, str], Row] = {}
    for score in study.scores():
        if score.metric != GUARD:
            scores.setdefault((score.key, score.image), {})[score.metric] = score.value
    whole = study.images().whole
    fields: dict[str, Row] = {}
    found = []
    for record in study.records():
        trial, request = record.trial, record.trial.request
        setting = setting_key(trial)
        if setting not in fields:
            fields[setting] = {n: _plain(v) for n, v in setting_fields(record).items()}
        there = record.image in whole
        found.append(
            {
                "key": trial.key,
                **fields[setting],
                "prompt": request.prompt,
                "negative_prompt": request.negative_prompt,
                "seed": request.seed,
                "init_image": request.init_image,
                "prompt_id": trial.prompt.id,
                "split": trial.prompt.split,
                **{f"tag_{name}": ", ".join(v) for name, v in trial.prompt.tags.items()},
                "batch_size": trial.batch_size,
                "status": str(record.status),
                "error": record.error,
                "started_at": record.started_at,
                **_measured(record),
                "image": record.image,
                "path": str(study.image_path(record.image)) if there else None,
                **(scores.get((trial.key, record.image), {}) if there else {}),
            }
        )
    return found


def _measured(record: Any) -> Row:
    timings, memory = record.timings, record.memory
    is_ok = record.status is Status.OK and timings is not None
    names = ("generate_s", "encode_s", "text_s", "denoise_s", "decode_s")
    return {
        **{name: getattr(timings, name) if is_ok else None for name in names},
        "evaluations": record.evaluations,
        "truncated_tokens": record.truncated_tokens,
        "peak_vram_bytes": None if memory is None else memory.peak_vram_bytes,
        "peak_rss_bytes": None if memory is None else memory.peak_rss_bytes,
    }


def _plain(value: Any) -> Any:
    """A value as a cell: nested ones are JSON."""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, sort_keys=True, default=str)
    return value


# As a table --------------------------------------------------------------------------------------


def as_table(rows: Sequence[Row], form: str) -> Any:
    """Rows as a pyarrow Table, or a DataFrame of pandas or polars.

    Raises: ConfigError for another form, or where its library is not installed.
    """
    require_form(form)  # before a long study is turned into columns
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column(pa, [row.get(name) for row in rows]) for name in names}
    return convert(pa.table(columns), form)


def _column(pa: Any, values: Iterable[Any]) -> Any:
    """One column; whole numbers beyond 64 signed bits are unsigned, as seeds may be."""
    found = list(values)
    is_whole = any(type(v) is int and v >= 2**63 for v in found)
    return pa.array(found, pa.uint64()) if is_whole else pa.array(found)


def require_form(form: str) -> None:
    """Refuse a form that cannot be had. Raises: ConfigError."""
    if form not in FORMS:
        raise ConfigError(f"as_={form!r}: must be one of {', '.join(FORMS)}")
    name = "pyarrow" if form == "arrow" else form
    try:
        importlib.import_module(name)
    except ImportError as exc:
        raise ConfigError(
            f"as_={form!r}: {name} is not installed; pip install {name}, or take as_='arrow'"
        ) from exc


def convert(table: Any, form: str) -> Any:
    """A pyarrow Table in the reader's library. Raises: ConfigError as `require_form`."""
    require_form(form)
    if form == "pandas":
        return table.to_pandas()
    return importlib.import_module("polars").from_arrow(table) if form == "polars" else table
