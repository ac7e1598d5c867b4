"""A study as plain tables: settings, images and pairs, for pandas, SQL, spreadsheets and trainers.

No column is defined here. A row of settings is a row of `show --json`, and a column is a path in
it with `_` between the names, where `metrics`, `stage_s` and `value` are silent: `latency_s.p50`
is `latency_s_p50`, `metrics.clip_score.value` is `clip_score`, its `ci95` are `clip_score_low` and
`_high`. An image has the fields of its setting, what its pair shares, what its prompt's file said
(`tag_NAME`), what the journal's view has of a record, and its score by each metric. A pair is two
images of one prompt, seed, size and init image, one of them of a reference setting.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sd35bench.analysis.grouping import pair_keys
from sd35bench.analysis.table import GUARD, Row, Table
from sd35bench.disk import disk_errors, write_atomic
from sd35bench.errors import ConfigError, nearest
from sd35bench.fields import SETTING, pair_fields
from sd35bench.study.columns import Some, has, join, numbers, prompt_refs, seconds, seeds, texts
from sd35bench.study.store import Study
from sd35bench.study.view import FREE, OF_MEMORY, OF_SURROUNDINGS, OF_TIMINGS, OWN, WHOLE
from sd35bench.types import Status, content_hash, to_json

_AS_JSON = (
    *("backend_options", "contention", "environment", "excluded", "extra", "flops", "gpu"),
    *("images", "in_force", "levels", "remote", "skip_layer_guidance"),
)
"""Mappings with names of their own: one column of JSON each."""
_SILENT = ("metrics", "stage_s", "value")
_REF = {"prompt_id": "id", "prompt_set": "set", "split": "split", "level": "level"}
_OF_RECORD = (*OWN, *OF_TIMINGS, *OF_MEMORY, *OF_SURROUNDINGS)
_NUMERIC = frozenset((*WHOLE, *OF_TIMINGS, *OF_SURROUNDINGS))
_SIDE = ("key", "image", "file", "latency_s", "timed", "usable")
_LARGEST_INT64 = 2**63 - 1


# Settings -----------------------------------------------------------------------------------------


def setting_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flat rows of a `show` document, all with the same names; lists and free mappings are JSON."""
    rows = [dict(_flat(row)) for row in document["settings"]]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _flat(row: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        path = above if name in _SILENT else (*above, name)
        if name.endswith("ci95"):
            whole = "_".join(path).removesuffix("ci95")
            for end, bound in zip(("low", "high"), value or (None, None), strict=True):
                yield f"{whole}{end}", bound
        elif isinstance(value, Mapping) and name not in _AS_JSON:
            yield from _flat(value, path)
        else:
            yield "_".join(path), _plain(value)


def settings_table(document: Mapping[str, Any]) -> pa.Table:
    """Rows of a `show` document as an Arrow table."""
    rows = setting_rows(document)
    return pa.table({name: _array([r[name] for r in rows]) for name in (rows[0] if rows else ())})


# Images -------------------------------------------------------------------------------------------


def images_table(study: Study, table: Table) -> pa.Table:
    """A row for every trial of a study, failed ones too; `table` is the study's.

    `timed` says whether a row counts in latencies, `usable` whether in quality; `file` is the
    image's place in the study's folder. Seeds are uint64, seconds and bytes are in the names.
    """
    records = join([row.records for row in table.rows])
    found = _of_settings(table.rows) | _of_pairs(records)
    found |= {name: _texts(prompt_refs(records, own)) for name, own in _REF.items()}
    found |= _tags(records)
    found |= {"key": _texts(texts(records, "key"))}
    found |= {"batch_size": _number(numbers(records, "batch_size"), whole=True)}
    found |= {"latency_s": _number(seconds(records))}
    for name in _OF_RECORD:
        found[name] = (
            _number(numbers(records, name), name in WHOLE)
            if name in _NUMERIC
            else _texts(texts(records, name))
        )
    found |= {"file": _texts([_file(study, d) for d in found["image"].to_pylist()])}
    for name in ("timed", "usable"):
        keys = {key for row in table.rows for key in texts(getattr(row, name), "key").tolist()}
        found[name] = pa.array([key in keys for key in found["key"].to_pylist()], pa.bool_())
    found |= _of_services(records)
    for metric in metric_names(table):
        found[metric] = _number(table.scores.found(metric, records).values)
    return pa.table(found)


def with_paths(images: pa.Table, study: Study) -> pa.Table:
    """Images with `path`, where each file is and whole, in place of `file`."""
    whole = study.images().whole
    pairs = zip(images["file"].to_pylist(), images["image"].to_pylist(), strict=True)
    paths = _texts([str(study.path / file) if image in whole else None for file, image in pairs])
    return images.set_column(images.column_names.index("file"), "path", paths)


def metric_names(table: Table) -> list[str]:
    """Metrics that have a score, in the order of the alphabet."""
    return sorted(set(table.scores) - {GUARD})


def _of_settings(rows: Sequence[Row]) -> dict[str, pa.Array]:
    """What all images of a row share, repeated for each."""
    counts = np.array([len(row.records) for row in rows], np.int64)
    which = pa.array(np.repeat(np.arange(len(rows)), counts))
    shared = [
        {"setting_id": row.id, **row.setting, "environment_id": row.environment_id} for row in rows
    ]
    names = shared[0] if shared else {}
    return {name: _array([_plain(s[name]) for s in shared]).take(which) for name in names}


def _of_pairs(records: Some) -> dict[str, pa.Array]:
    """The pair of each record: its hash, and what it shares."""
    codes: dict[Any, int] = {}
    which = pa.array([codes.setdefault(key, len(codes)) for key in pair_keys(records)], pa.int64())
    fields = [pair_fields(key) for key in codes]
    names = [n for n in (fields[0] if fields else {}) if n not in SETTING and n != "seed"]
    found = {name: _texts([f[name] for f in fields]).take(which) for name in names}
    hashes = _texts([content_hash(to_json(key))[:12] for key in codes]).take(which)
    return {"pair": hashes, "seed": pa.array(seeds(records).tolist(), pa.uint64()), **found}


def _tags(records: Some) -> dict[str, pa.Array]:
    """The prompts' own columns; several values stand between commas."""
    tags = prompt_refs(records, "tags").tolist()
    names = sorted({name for each in tags for name in each})
    return {
        f"tag_{name}": _texts([", ".join(t[name]) if name in t else None for t in tags])
        for name in names
    }


def _of_services(records: Some) -> dict[str, pa.Array]:
    """What calls of hosted services cost; no column where none was called."""
    hosted = has(records, "remote")
    if not hosted.any():
        return {}
    calls = [records[i].remote if there else None for i, there in enumerate(hosted.tolist())]
    names = ("provider", "cost_usd", "queue_s", "predict_s")
    return {n: _array([None if c is None else getattr(c, n) for c in calls]) for n in names}


def _file(study: Study, digest: str | None) -> str | None:
    if digest is None:
        return None
    return study.find_stored("images", digest).relative_to(study.path).as_posix()


# Pairs --------------------------------------------------------------------------------------------


def pairs_table(images: pa.Table, metrics: Sequence[str], reference: str | None = None) -> pa.Table:
    """Each image beside the image of a reference setting with the same pair and batch size.

    `reference` is a `setting_id`; without one it is, for each task, the setting with most images,
    of several the one with most evaluations. The columns of the other side are `reference_NAME`.

    Raises: ConfigError for a setting that is not there.
    """
    made = images.filter(
        pa.array([s == Status.OK for s in images["status"].to_pylist()], pa.bool_())
    )
    chosen = _references(made, reference)
    names = ("setting_id", *_SIDE, *metrics)
    shared = ("pair", *FREE, "batch_size")
    keys = list(zip(*(made[n].to_pylist() for n in ("pair", "batch_size")), strict=True))
    ids = made["setting_id"].to_pylist()
    where = {
        key: i for i, (key, found) in enumerate(zip(keys, ids, strict=True)) if found in chosen
    }
    couples = [
        (i, where[key])
        for i, (key, found) in enumerate(zip(keys, ids, strict=True))
        if found not in chosen and key in where
    ]
    one, other = (made.take(pa.array([c[side] for c in couples], pa.int64())) for side in (0, 1))
    found = {name: one[name] for name in (*shared, *names)}
    return pa.table(found | {f"reference_{name}": other[name] for name in names})


def _references(images: pa.Table, asked: str | None) -> set[str]:
    ids = images["setting_id"].to_pylist()
    if asked is not None:
        if asked not in ids:
            known = sorted(set(ids))
            raise ConfigError(
                f"--reference={asked}: no setting with images has this id; `show --json` and"
                f" settings.csv have them{nearest(asked, known)}"
            )
        return {asked}
    task, work = dict(zip(ids, images["task"].to_pylist(), strict=True)), Counter[str]()
    for name, count in zip(ids, images["evaluations"].to_pylist(), strict=True):
        work[name] += count or 0
    counts = Counter(ids)
    best: dict[str, str] = {}
    for name in sorted(task, key=lambda n: (counts[n], work[n])):
        best[task[name]] = name
    return set(best.values())


# Files --------------------------------------------------------------------------------------------


def write_csv(folder: Path, tables: Mapping[str, pa.Table]) -> list[Path]:
    """Write NAME.csv for each table and return the paths. Raises: DiskFull, StoreError."""
    import pyarrow.csv as csv

    return _write(folder, tables, "csv", csv.write_csv)


def write_parquet(folder: Path, tables: Mapping[str, pa.Table]) -> list[Path]:
    """Write NAME.parquet for each table and return the paths. Raises: DiskFull, StoreError."""
    import pyarrow.parquet as pq

    return _write(folder, tables, "parquet", pq.write_table)


def _write(folder: Path, tables: Mapping[str, pa.Table], suffix: str, write: Any) -> list[Path]:
    written = []
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        write(table, sink)
        written.append(folder / f"{name}.{suffix}")
        write_atomic(written[-1], sink.getvalue().to_pybytes())
    return written


def write_dataset(folder: Path, study: Study, images: pa.Table) -> int:
    """Write images and `metadata.jsonl` as Hugging Face's `imagefolder` reads them; their number.

    The folder appears whole or not at all. Seeds are text where one is above 2^63 - 1, which JSON
    readers make a rounded double of.

    Raises: ConfigError where the folder has something in it, DiskFull, StoreError.
    """
    folder = Path(os.path.abspath(folder))
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f"--dataset={folder}: is a link, or is not empty; name a new folder")
    whole = study.images().whole
    rows = [row for row in images.to_pylist() if row["status"] == Status.OK]
    rows = [row for row in rows if row["image"] in whole]
    made = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with disk_errors(folder):
        try:
            (made / "images").mkdir(parents=True)
            _copy_images(study.path, rows, made)
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    return len(rows)


def _copy_images(root: Path, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Copy each row's image under its trial's key, and say what is known of it."""
    exact = all(row["seed"] <= _LARGEST_INT64 for row in rows)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", errors="replace") as lines:
        for row in rows:
            source = root / row.pop("file")
            name = f"images/{row['key']}{source.suffix}"
            shutil.copyfile(source, folder / name)
            row["seed"] = row["seed"] if exact else str(row["seed"])
            # The reader's own column `image` is the decoded file.
            line = {"file_name": name, "image_sha256": row.pop("image"), **row}
            lines.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


# Arrow --------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else value


def _array(values: Sequence[Any]) -> pa.Array:
    """Values of one type; float64 where none is known."""
    found = pa.array(values)
    return found.cast(pa.float64()) if pa.types.is_null(found.type) else found


def _texts(values: Sequence[str | None] | NDArray[np.object_]) -> pa.Array:
    """Texts; what is no Unicode, a lone surrogate, is replaced."""
    try:
        return pa.array(values, pa.string())
    except UnicodeError:
        safe = (None if v is None else v.encode("utf-8", "replace").decode() for v in values)
        return pa.array([*safe], pa.string())


def _number(values: NDArray[np.float64], whole: bool = False) -> pa.Array:
    """Numbers whose NaN are null."""
    found = pa.array(values, mask=np.isnan(values))
    return found.cast(pa.int64()) if whole else found
