"""A study's lines: the shards of its journal and scores, named, ordered, appended and parsed.

The newest shard is the one with the highest number, whatever the clocks said. A field of a newer
version in what tells settings apart is refused; elsewhere it is left where it is.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from sd35bench.disk import LineFile, decode_line, disk_errors, parse_json, read_lines
from sd35bench.errors import StoreError
from sd35bench.types import BackendSpec, Load, ModelSpec, Record, Request, Score, Session, to_json

_NUMBER = re.compile(r"([0-9]{6,9})-[0-9]{8}T")
_SCORE = msgspec.json.Decoder(Score)


def read_score(line: bytes) -> Score:
    """Parse one line of a score file. Raises: StoreError for a value that is not finite."""
    score = decode_line(line, _SCORE, nan=True)
    if score.value is not None and not isfinite(score.value):
        raise StoreError(
            f"says {score.metric} = {score.value}, which is no number: delete that line, then"
            " score the study again"
        )
    return score


def new_shard_id(*folders: Path) -> str:
    """Name a shard that comes after all shards in `folders`, whatever the clock says.

    The number in front decides, the time only between shards of one number: two processes or
    machines that write at once. No two processes share a name.
    """
    last = max((shard_order(p)[0] for folder in folders for p in folder.glob("*")), default=0)
    now = time.time_ns()
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now // 10**9))
    return f"{last + 1:06d}-{stamp}.{now % 10**9:09d}-{os.getpid()}"


def shard_order(path: Path) -> tuple[int, str]:
    """Sorts shards from the oldest to the newest: by number, then by name; names had no number."""
    found = _NUMBER.match(path.name)
    return (0 if found is None else int(found[1]), path.name)


class Shard:
    """One writer's own journal file; every line is on disk before `append_*` returns."""

    def __init__(self, path: Path) -> None:
        """Nothing is created until the first line."""
        self.path = path
        self._file = LineFile(path)

    def append_session(self, session: Session) -> None:
        """Append one worker's session."""
        self._append({"kind": "session", **to_json(session)})

    def append_record(self, record: Record) -> None:
        """Append what one trial left behind."""
        self._append({"kind": "record", **to_json(record)})

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._file.append(data)


T = TypeVar("T")


class Shards(Generic[T]):
    """A folder's shards, parsed; a shard is parsed again only after it has changed."""

    def __init__(self, folder: Path, parse: Callable[[bytes], T]) -> None:
        self._folder = folder
        self._parse = parse
        self._kept: dict[Path, tuple[tuple[int, int, int], list[T]]] = {}

    def paths(self) -> list[Path]:
        """The shards, the oldest first."""
        return sorted(self._folder.glob("*.jsonl"), key=shard_order)

    def read(self, path: Path) -> Iterator[T]:
        """Parse one shard, whatever is kept of it. Raises: StoreError."""
        return read_lines(path, self._parse)

    def lines(self) -> Iterator[T]:
        """Every line of every shard, the oldest first."""
        for path in self.paths():
            # The stamp is taken before the read: what is appended meanwhile changes it again.
            with disk_errors(path):
                found = path.stat()
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
            kept = self._kept.get(path)
            if kept is None or kept[0] != stamp:
                kept = self._kept[path] = (stamp, list(self.read(path)))
            yield from kept[1]


class _TrialHead(msgspec.Struct):
    load: msgspec.Raw
    request: msgspec.Raw


_FIELDS = {cls: {f.name for f in fields(cls)} for cls in (Request, Load, ModelSpec, BackendSpec)}


class _Kind(msgspec.Struct):
    kind: str


class _Head(msgspec.Struct):
    """What a journal line is, and the text of what its trial is of."""

    kind: str
    trial: _TrialHead | None = None


class Journal:
    """Parses journal lines; records of one load share one `Load`."""

    _head = msgspec.json.Decoder(_Head)
    _record = msgspec.json.Decoder(Record)
    _session = msgspec.json.Decoder(Session)

    def __init__(self) -> None:
        self._loads: dict[bytes, Load] = {}

    def parse(self, line: bytes) -> Record | Session | None:
        """One line; ``None`` for a kind that this version does not know."""
        head = self._decode_head(line)
        if head.kind == "session":
            return decode_line(line, self._session)
        if head.kind != "record":
            return None
        record = decode_line(line, self._record)
        if head.trial is None:
            trial = parse_json(line)["trial"]
            _refuse_unknown(trial["request"], trial["load"])
            return record
        raw = bytes(head.trial.load)
        load = self._loads.get(raw)
        request = msgspec.json.decode(head.trial.request)
        _refuse_unknown(request, {} if load is not None else msgspec.json.decode(raw))
        object.__setattr__(record.trial, "load", self._loads.setdefault(raw, record.trial.load))
        return record

    def _decode_head(self, line: bytes) -> _Head:
        try:
            return self._head.decode(line)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:  # see `decode_line`
            return _Head(msgspec.convert(parse_json(line), _Kind).kind)


def _refuse_unknown(request: dict[str, Any], load: dict[str, Any]) -> None:
    """Refuse fields of a newer version in what tells settings apart: without them they would pool.

    Other fields that are not known are left where they are. Raises: msgspec.ValidationError.
    """
    parts = (
        ("request", request, Request),
        ("load", load, Load),
        ("load.model", load.get("model", {}), ModelSpec),
        ("load.backend", load.get("backend", {}), BackendSpec),
    )
    for name, given, cls in parts:
        unknown = given.keys() - _FIELDS[cls]
        if unknown:
            raise msgspec.ValidationError(
                f"trial.{name} has `{min(unknown)}`, which a newer version wrote"
            )
