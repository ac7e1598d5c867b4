"""Prompt sets from files: text, JSON, JSONL, CSV, TSV, Parquet, and GenEval's and COCO's layouts.

Every error names the file and the line. UTF-8 with or without a byte order mark, LF or CRLF.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sd35bench.errors import ConfigError
from sd35bench.prompts import (
    ENCODER_FIELDS,
    PromptItem,
    PromptSpec,
    places_of,
    read_init_image,
    read_weights,
)
from sd35bench.types import PromptRef, Request

SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")
COLUMNS = ("prompt", "negative_prompt", "init_image", "id", *ENCODER_FIELDS)

RUN_FIELDS = frozenset(field.name for field in fields(Request)) - {"prompt"} | {"batch_size"}
"""Columns of these names are no tags: a run has them, not a prompt."""

Row = tuple[str, dict[str, Any]]  # (where it stands, its columns)


def read_file(spec: PromptSpec) -> list[PromptItem]:
    """Read prompts from a file with named columns; a text file has one prompt a line.

    Raises: ConfigError naming file, line and column.
    """
    path = _existing(spec)
    columns = {name: spec.columns.get(name, name) for name in COLUMNS}
    rows = list(_rows(path, columns["prompt"]))
    if not rows:
        raise ConfigError(f"prompts.path={path}: the file has no prompts")
    if not any(columns["prompt"] in row for _, row in rows):
        there = ", ".join(str(name) for name in rows[0][1])
        raise ConfigError(
            f"prompts.path={path}: no column {columns['prompt']!r}; there: {there};"
            " name it with prompts.columns.prompt=NAME"
        )
    for name, column in columns.items():
        if name in spec.columns and column != name and column not in rows[0][1]:
            raise ConfigError(f"prompts.columns.{name}={column}: no such column in {path}")
    if spec.skip_empty:
        rows = [(where, row) for where, row in rows if not _is_empty(row.get(columns["prompt"]))]
    items = []
    for number, (where, row) in enumerate(rows):
        known = {name: row.get(column) for name, column in columns.items()}
        item = _item(path, number, where, known, spec)
        own = {str(n): value for n, value in row.items() if n not in columns.values()}
        ignored = tuple(name for name in own if name.casefold() in RUN_FIELDS)
        tags = {
            n: texts for n, value in own.items() if n not in ignored and (texts := _tags(value))
        }
        items.append(replace(item, ref=replace(item.ref, tags=tags), ignored=ignored))
    return _unrepeated(items, [where for where, _ in rows])


def read_geneval(spec: PromptSpec) -> list[PromptItem]:
    """Read GenEval's evaluation_metadata.jsonl; the tag becomes the level."""
    path = _existing(spec)
    items = []
    for number, (where, row) in enumerate(_json_lines(path)):
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("tag"), str):
            raise ConfigError(f"{where}: not a GenEval line; it needs prompt and tag")
        ref = PromptRef(id=f"{number:05d}", set="geneval", level=row["tag"])
        items.append(PromptItem(ref=ref, prompt=row["prompt"]))
    return items


def read_coco(spec: PromptSpec) -> list[PromptItem]:
    """Read MLPerf's captions_source.tsv (id, image_id, caption, …)."""
    path = _existing(spec)
    items = []
    for where, row in _table(path, "\t"):
        if row.get("caption") in (None, "") or row.get("id") in (None, ""):
            raise ConfigError(f"{where}: not a COCO captions row; it needs id and caption")
        ref = PromptRef(id=str(row["id"]), set="coco")
        items.append(PromptItem(ref=ref, prompt=str(row["caption"]).strip()))
    return items


def _item(path: Path, number: int, where: str, row: dict[str, Any], spec: PromptSpec) -> PromptItem:
    for name, value in row.items():
        kinds = str | int if name == "id" else str
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ConfigError(f"{where}: {name}={value!r} is not text")
    prompt = row["prompt"]
    if _is_empty(prompt):
        raise ConfigError(
            f"{where}: the prompt is empty; fill it in, or leave such rows out with"
            " prompts.skip_empty=true"
        )
    init, done = None, ()
    if row["init_image"] not in (None, ""):
        file = path.parent / str(row["init_image"])
        init, done = read_init_image(file, where, spec.first_frame, spec.init_background)
    own_id = row["id"]
    item_id = f"{number:05d}" if own_id in (None, "") else str(own_id)
    negative = row["negative_prompt"]
    return PromptItem(
        ref=PromptRef(id=item_id, set=path.name, init_done=done),
        prompt=prompt.strip(),
        **_for_encoders(path, where, row),
        negative_prompt=None if negative in (None, "") else str(negative).strip(),
        init_image=init,
    )


def _for_encoders(path: Path, where: str, row: dict[str, Any]) -> dict[str, Any]:
    """What only some encoders read, and weights.

    An empty text is no text for that encoder; CSV and TSV have no other way to say "none given".
    """
    is_table = path.suffix.lower() in (".csv", ".tsv")
    given = {name: row[name] for name in ENCODER_FIELDS if row[name] is not None}
    found = {name: text.strip() for name, text in given.items() if text.strip() or not is_table}
    weights = found.get("prompt_weights")
    if weights is None:
        return found
    try:
        pairs = read_weights(weights)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from exc
    texts = (row["prompt"], found.get("prompt_2", ""), found.get("prompt_3", ""))
    for words, _ in pairs:
        if not any(places_of(words, text) for text in texts):
            raise ConfigError(f"{where}: prompt_weights={weights}: {words!r} is not in the prompt")
    if not pairs:
        del found["prompt_weights"]
    return found


def _tags(value: Any) -> tuple[str, ...]:
    """A column's value as texts: of a list each, of an object none."""
    values = value if isinstance(value, list) else [value]
    plain = (v for v in values if isinstance(v, str | int | float) and f"{v}".strip())
    return tuple(dict.fromkeys(f"{v}".strip() for v in plain))


def _is_empty(prompt: Any) -> bool:
    return prompt is None or (isinstance(prompt, str) and not prompt.strip())


def _unrepeated(items: list[PromptItem], places: list[str]) -> list[PromptItem]:
    first: dict[str, str] = {}
    for item, where in zip(items, places, strict=True):
        if item.ref.id in first:
            raise ConfigError(f"{where}: id {item.ref.id!r} is already at {first[item.ref.id]}")
        first[item.ref.id] = where
    return items


def _existing(spec: PromptSpec) -> Path:
    if spec.path is None:
        raise ConfigError(
            f"prompts.path is missing: prompts={spec.kind} needs a file, prompts.path=FILE"
        )
    path = Path(spec.path).expanduser()
    if not path.is_file():
        raise ConfigError(f"prompts.path={spec.path}: there is no such file")
    return path


def _rows(path: Path, prompt_column: str) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", {prompt_column: line}
    elif suffix == ".jsonl":
        yield from _json_lines(path)
    elif suffix == ".json":
        yield from _json_list(path, prompt_column)
    elif suffix in (".csv", ".tsv"):
        yield from _table(path, "," if suffix == ".csv" else "\t")
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise ConfigError(f"prompts.path={path}: the suffix must be one of {', '.join(SUFFIXES)}")


def _json_list(path: Path, prompt_column: str) -> Iterator[Row]:
    """A list of texts, or of objects with named columns."""
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"prompts.path={path}: not JSON: {exc}") from exc
    if not isinstance(found, list):
        raise ConfigError(f"prompts.path={path}: must be a JSON list of prompts")
    for number, row in enumerate(found):
        yield f"{path}[{number}]", row if isinstance(row, dict) else {prompt_column: row}


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as exc:
            raise ConfigError(f"{where}: not JSON: {exc}") from exc
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: must be a JSON object with a prompt")
        yield where, row


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    # COCO captions hold bare quotation marks; tab-separated files have no quoting by convention.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    reader = csv.reader(
        io.StringIO(_text(path), newline=""), delimiter=delimiter, quoting=quoting, strict=True
    )
    try:
        header: list[str] | None = None
        for cells in reader:
            if not cells:  # a line without a character is no row; one of commas is, an empty one
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(header):
                raise ConfigError(
                    f"{where}: {len(cells)} columns where the header has {len(header)}"
                )
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as exc:
        raise ConfigError(f"{path}:{reader.line_num}: {exc}") from exc


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as exc:
        raise ConfigError(f"prompts.path={path}: not a readable Parquet file") from exc
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        raise ConfigError(f"prompts.path={path}: not UTF-8 text (byte {exc.start})") from exc
