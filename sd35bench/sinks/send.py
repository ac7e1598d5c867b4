"""A study's summary, and how it is sent: each sink by itself, so that none can stop another."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd35bench.analysis.grouping import pair_keys
from sd35bench.analysis.summary import show_document
from sd35bench.analysis.table import Row, read_table
from sd35bench.data import setting_rows
from sd35bench.errors import StoreError
from sd35bench.fields import describe
from sd35bench.sinks.base import SINKS, Entry, Picture, load_sink
from sd35bench.study.store import Study

PICTURES = 4
"""Images of a setting, of the same prompts and seeds for all settings of a task."""
WITH_PICTURES = 16
"""Settings with images: those that were chosen first, then the front, then the others."""
FOLDER = "sinks"


def entries_of(study: Study, recommendation: Mapping[str, Any] | None = None) -> list[Entry]:
    """Every setting of a study; a `recommend` document says what is on the front and chosen."""
    table = read_table(study)
    rows = setting_rows(show_document(study, table))
    settings = {row.id: row.setting for row in table.rows}
    known, chosen = _compared(recommendation)
    ranked = sorted(
        (row["id"] for row in rows),
        key=lambda i: (i not in chosen, not known.get(i, {}).get("on_front")),
    )
    pictures = _pictures(study, [row for row in table.rows if row.id in ranked[:WITH_PICTURES]])
    entries = []
    for row in rows:
        setting, found = settings[row["id"]], known.get(row["id"], {})
        quality = (found.get("quality") or {}).get("value")
        figures = _figures(row, setting) | ({} if quality is None else {"quality": quality})
        entries.append(
            Entry(
                id=row["id"],
                name=describe(setting, settings.values()),
                asked={k: v for k, v in row.items() if k in setting and v is not None},
                figures=figures,
                on_front=found.get("on_front"),
                chosen_for=tuple(chosen.get(row["id"], ())),
                pictures=pictures.get(row["id"], ()),
            )
        )
    return entries


def _figures(row: Mapping[str, Any], setting: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that are no part of its setting."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in setting and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _compared(
    document: Mapping[str, Any] | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """What a `recommend` document says of each setting, and for which profiles it was chosen."""
    known: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[str]] = {}
    for profile, tasks in ({} if document is None else document["profiles"]).items():
        for entry in filter(None, tasks.values()):
            for other in entry["alternatives"]:
                known.setdefault(other["setting_id"], other)
            if entry["setting_id"] is not None:
                known[entry["setting_id"]] = entry["evidence"]
                chosen.setdefault(entry["setting_id"], []).append(profile)
    return known, chosen


def _pictures(study: Study, rows: Sequence[Row]) -> dict[str, tuple[Picture, ...]]:
    """A few images of each row, of pairs that most rows have."""
    keys = {row.id: pair_keys(row.usable) for row in rows}
    counts = Counter(key for each in keys.values() for key in dict.fromkeys(each))
    rank = {key: number for number, (key, _) in enumerate(counts.most_common())}
    found = {}
    for row in rows:
        order = sorted(range(len(keys[row.id])), key=lambda i: rank[keys[row.id][i]])
        found[row.id] = tuple(_whole(study, row, order[:PICTURES]))
    return found


def _whole(study: Study, row: Row, numbers: Sequence[int]) -> Iterator[Picture]:
    for number in numbers:
        record = row.usable[number]
        request = record.trial.request
        try:
            path = study.image_path(record.image or "")
        except StoreError:
            continue
        yield Picture(path=path, caption=f"{request.prompt} (seed {request.seed})")


def send(
    names: Sequence[str],
    study: Study,
    recommendation: Mapping[str, Any] | None = None,
    report: Path | None = None,
) -> dict[str, str | None]:
    """Send a study to sinks. Returns: for each name ``None``, or why it was not sent."""
    try:
        entries = entries_of(study, recommendation)
    except Exception as exc:  # the verb is done: nothing here may take its result away
        return dict.fromkeys(names, _why(exc))
    return {name: _send_one(name, study, entries, report) for name in names}


def _send_one(name: str, study: Study, entries: Sequence[Entry], report: Path | None) -> str | None:
    front = [entry for entry in entries if entry.on_front]
    front.sort(key=lambda entry: entry.figures.get("latency_s_p50", float("inf")))
    try:
        sink = load_sink(name)(study.name, study.path / FOLDER / name.replace(":", "-"))
        try:
            for entry in entries:
                sink.put_setting(entry)
            if front:
                sink.put_front(front)
            if report is not None:
                sink.put_file(report)
        finally:
            sink.close()
    except ModuleNotFoundError as exc:
        remedy = f"; pip install {name}" if name in SINKS else ""
        return f"{exc}{remedy}"
    except (Exception, SystemExit) as exc:  # somebody else's code and somebody else's server
        return _why(exc)
    return None


def _why(exc: BaseException) -> str:
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0][:200]}" if lines else type(exc).__name__
