"""A study on disk: append-only journal shards, content-addressed images, kept features and scores.

    results/<study>/
      study.json              schema version
      journal/<shard>.jsonl   sessions and records, one JSON object a line, fsync per line
      scores/<shard>.jsonl    scores, appended by `score`
      images/ab/<sha256>.png  what trials made; inits/ holds what they started from
      machine/<shard>.json    limits of the machines that ran it
      features/<extractor>/   what extractors saw in images, so that nothing is embedded twice
      view/ …                 derived views; delete them whenever you like

Nothing is ever rewritten. A writer that dies leaves at most a torn last line, which readers
ignore, and at most one image that no record names, which stays until `clean` moves it. Locks are
kernel locks (flock): they end with the process that held them, so none can be stale. Writers of
different loads may share a study; a second writer of the same load is refused.
"""

import contextlib
import copy
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from sd35bench.disk import (
    disk_errors,
    is_abandoned,
    open_lock,
    parse_json,
    read_regular,
    try_flock,
    write_atomic,
)
from sd35bench.errors import StoreError, StudyLocked
from sd35bench.pictures import decode_rgb
from sd35bench.study.columns import (
    Columns,
    Records,
    among,
    distinct,
    is_text,
    pick,
    texts,
    with_tags,
)
from sd35bench.study.content_files import Scan, StoredFiles, is_named
from sd35bench.study.journal import Journal, Shard, Shards, new_shard_id, read_score, shard_order
from sd35bench.study.latest import Scores, in_order, last_of_each
from sd35bench.study.view import JournalView, ParquetView, ScoreView, Unfit
from sd35bench.types import Record, Score, Session, Status, to_json

SCHEMA = 1
_SEED = "request_seed"
IMAGE_SUFFIXES = (".png", ".jpg", ".webp")
T = TypeVar("T")


def _check_schema(marker: Path, name: str) -> None:
    """Refuse another schema, and a damaged `study.json`. Raises: StoreError."""
    try:
        schema = parse_json(read_regular(marker, follow=True)[0])["schema"]
    except (ValueError, TypeError, KeyError) as exc:
        raise StoreError(
            f"{marker} is damaged: it must be {json.dumps({'schema': SCHEMA})}; write that into it"
            f" if version {SCHEMA} made study {name!r}"
        ) from exc
    if schema != SCHEMA:
        raise StoreError(f"study {name!r} has schema {schema}, this version reads {SCHEMA}")


def study_names(root: Path) -> list[str]:
    """Names of the studies of a folder, in order; some may be unreadable."""
    return sorted(path.parent.name for path in Path(root).glob("*/study.json"))


class Study:
    """A named set of trials under a results folder.

    A `Study` keeps what it has read: a command reads each journal shard once, however many of its
    parts ask for the records.
    """

    def __init__(self, path: Path) -> None:
        """Use `Study.open`."""
        self.path = path
        self.name = path.name
        self._where: dict[str, str] = {}
        self._images = StoredFiles(path / "images", IMAGE_SUFFIXES)
        self._inits = StoredFiles(path / "inits", (".img",))
        self._latents = StoredFiles(path / "latents", (".npz",))
        self._features: dict[str, tuple[tuple[Path, ...], dict[str, np.ndarray]]] = {}
        self._parse = Journal().parse
        self._journal = Shards(path / "journal", self._parse)
        self._view = JournalView(path, self._parse)
        self._score_view = ScoreView(path, read_score)
        self._kept: dict[Path, tuple[Any, Columns | None]] = {}
        self._scores = Shards(path / "scores", read_score)

    @classmethod
    def open(cls, root: Path, name: str, create: bool = False) -> "Study":
        """Open `root/name`, making it if `create`.

        Raises: StoreError where there is no such study, or one of another schema.
        """
        path = Path(root) / name
        marker = path / "study.json"
        if not os.path.lexists(marker):
            if not create:
                there = ", ".join(study_names(root)) or "none"
                raise StoreError(f"study {name!r} is not in {root}; there: {there}")
            with disk_errors(path):
                for folder in ("journal", "scores", "images", "inits", "features"):
                    (path / folder).mkdir(parents=True, exist_ok=True)
            write_atomic(marker, json.dumps({"schema": SCHEMA}).encode())
        _check_schema(marker, name)
        return cls(path)

    # Records -----------------------------------------------------------------------------------

    def new_shard_id(self) -> str:
        """Name a shard that comes after all others of the study, ledgers included."""
        return new_shard_id(self.path / "journal", self.path / "remote")

    def shards(self) -> list[Path]:
        """The journal's files, the oldest first."""
        return self._journal.paths()

    def check_lines(self, folder: str, shard: Path) -> list[Any]:
        """Parse one shard of `journal` or `scores`. Raises: StoreError where it is damaged."""
        return list((self._journal if folder == "journal" else self._scores).read(shard))

    def shard(self, shard_id: str) -> Shard:
        """Open a new journal shard of this writer's own."""
        return Shard(self.path / "journal" / f"{shard_id}.jsonl")

    def records(self) -> Sequence[Record]:
        """Read every trial's last record, in the order in which keys first appeared.

        A record with its whole image wins over failures, whichever is later.

        Raises: StoreError for a damaged journal.
        """
        everything = self.all_records()
        if isinstance(everything, Records):
            found = last_of_each(everything, lambda: self.images().whole)
            return with_tags(found, self._where)
        last: dict[str, Record] = {}
        there: set[str] | None = None
        for record in everything:
            before = last.get(record.trial.key)
            if before is not None and before.status is Status.OK is not record.status:
                there = self.images().whole if there is None else there
                if before.image in there:
                    continue
            last[record.trial.key] = record
        return with_tags(list(last.values()), self._where)

    def part(self, where: Mapping[str, str]) -> "Study":
        """The same study; its `records` are of prompts whose own columns have these values."""
        found = copy.copy(self)
        found._where = {**self._where, **where}
        return found

    @property
    def is_part(self) -> bool:
        """Whether it has a part of its records only."""
        return bool(self._where)

    def all_records(self) -> Iterable[Record]:
        """Read every record, those that a later one of the same trial replaces too."""
        columns = self._columns()
        if columns is not None:
            return in_order(columns, [path.name for path in self.shards()])
        return (line for line in self._journal.lines() if isinstance(line, Record))

    def sessions(self) -> dict[str, Session]:
        """Read every worker's session, by id."""
        if self._columns() is not None:
            return {s.id: s for s in self._view.sessions()}
        return {line.id: line for line in self._journal.lines() if isinstance(line, Session)}

    def done_keys(self) -> set[str]:
        """Keys of the trials that succeeded and whose image is still there, and whole."""
        records = self.records()
        done = is_text(records, "status", Status.OK)
        done &= among(records, "image", self.images().whole)
        return set(texts(pick(records, done), "key").tolist())

    def check_view(self) -> str | None:
        """What is wrong with the view, by all of its bytes. Raises: StoreError."""
        found = self._view.check(self.shards()), self._score_view.check(self._scores.paths())
        return next((text for text in found if text is not None), None)

    def _columns(self) -> Columns | None:
        return self._viewed(self._view, self.shards(), self._parse)

    def _viewed(
        self, view: ParquetView, shards: list[Path], parse: Callable[[bytes], Any]
    ) -> Columns | None:
        """A large folder's view; ``None`` where there is none. Raises: StoreError."""
        if not view.fits(shards):
            return None
        stamps, kept = view.stamps(shards), self._kept.get(view.folder)
        if kept is None or kept[0] != stamps:
            columns = None
            with contextlib.suppress(Unfit):
                columns = Columns(view, view.refresh(shards), parse)
            kept = self._kept[view.folder] = stamps, columns
        return kept[1]

    # Images ------------------------------------------------------------------------------------

    def images(self) -> Scan:
        """Look at all images: which are whole, and which are not what their names say.

        Raises: StoreError where the folder cannot be read.
        """
        return self._images.scan()

    def image_changes(self) -> list[list[int]]:
        """What changes where images were added, removed, or found to be others."""
        return self._images.changes()

    def has_image(self) -> bool:
        """Whether a trial succeeded whose image is still there, and whole."""
        records = self.records()
        made = pick(records, is_text(records, "status", Status.OK))
        for digest in distinct(made, "image"):
            with contextlib.suppress(StoreError):
                if self._images.path(digest) is not None:
                    return True
        return False

    def put_image(self, data: bytes, suffix: str) -> str:
        """Keep an image file under its SHA-256 and return that; a damaged one is put aside."""
        return self._images.put(data, suffix)

    def image_path(self, digest: str) -> Path:
        """Path of an image. Raises: StoreError if it is gone or damaged."""
        return self._there(self._images.path(digest), f"image {digest}")

    def read_image_file(self, digest: str) -> bytes:
        """Read an image's file. Raises: StoreError if it is gone or damaged."""
        return self._there(self._images.bytes_of(digest), f"image {digest}")

    def read_image(self, digest: str) -> np.ndarray:
        """Read an image as uint8 RGB [H, W, 3]. Raises: StoreError if it is gone or damaged."""
        return decode_rgb(self.read_image_file(digest))

    def find_stored(self, kind: str, digest: str) -> Path:
        """Where a file of `images`, `inits` or `latents` is, or would be; it is not read."""
        return self._stored(kind).find(digest)

    def stored_names(self, kind: str) -> dict[str, str]:
        """The name of every file of `images`, `inits` or `latents`, by its digest."""
        return self._stored(kind).names()

    def put_stored(self, kind: str, data: bytes, suffix: str) -> str:
        """Keep a file of one of these kinds under its SHA-256 and return that."""
        return self._stored(kind).put(data, suffix)

    def _stored(self, kind: str) -> StoredFiles:
        return {"images": self._images, "inits": self._inits, "latents": self._latents}[kind]

    def put_init(self, data: bytes) -> str:
        """Keep an init image's file under its SHA-256 and return that."""
        return self._inits.put(data, ".img")

    def init_path(self, digest: str) -> Path:
        """Where an init image's file is, if it is there."""
        return self.path / "inits" / digest[:2] / f"{digest}.img"

    def read_init_file(self, digest: str) -> bytes:
        """Read an init image's file. Raises: StoreError if it is gone or damaged."""
        return self._there(self._inits.bytes_of(digest), f"init image {digest}")

    def read_init(self, digest: str) -> np.ndarray:
        """Read an init image as uint8 RGB [H, W, 3]. Raises: StoreError if gone or damaged."""
        return decode_rgb(self.read_init_file(digest))

    def put_latents(self, first: np.ndarray, last: np.ndarray) -> str:
        """Keep one image's latents [C, h, w] after the first and the last step."""
        buffer = io.BytesIO()
        np.savez(buffer, first=first, last=last)
        return self._latents.put(buffer.getvalue(), ".npz")

    def read_latents(self, digest: str) -> tuple[np.ndarray, np.ndarray]:
        """Read the latents after the first and the last step. Raises: StoreError if gone."""
        data = self._there(self._latents.bytes_of(digest), f"latents {digest}")
        with np.load(io.BytesIO(data)) as arrays:
            return arrays["first"], arrays["last"]

    def save_checked(self) -> None:
        """Keep which files were found whole, so that they are not read again for that."""
        for files in (self._images, self._inits, self._latents):
            files.save()

    def _there(self, found: T | None, what: str) -> T:
        if found is None:
            raise StoreError(f"{what} is not in study {self.name!r}; run it again")
        return found

    # Scores and features -----------------------------------------------------------------------

    def append_scores(self, metric: str, rows: Iterable[Score]) -> None:
        """Append scores of one metric in a shard of their own, on disk when this returns."""
        lines = [json.dumps(to_json(row), allow_nan=False) for row in rows]
        if lines:
            folder = self.path / "scores"
            path = folder / f"{new_shard_id(folder)}-{metric}.jsonl"
            write_atomic(path, ("\n".join(lines) + "\n").encode())

    def scores(self) -> Iterable[Score]:
        """Read the last score of every (metric, trial, image)."""
        columns = self._viewed(self._score_view, self._scores.paths(), read_score)
        if columns is not None:
            order = in_order(columns, [path.name for path in self._scores.paths()])
            return Scores(columns, order.places)
        return list({(s.metric, s.key, s.image): s for s in self._scores.lines()}.values())

    def put_features(self, extractor: str, digests: list[str], features: np.ndarray) -> None:
        """Keep features [n, d] of the images with these digests."""
        if len(digests) != len(features):
            raise ValueError(f"{len(digests)} digests for {len(features)} rows of features")
        buffer = io.BytesIO()
        np.savez(buffer, digests=np.array(digests), features=features)
        write_atomic(
            self.path / "features" / extractor / f"{new_shard_id()}.npz", buffer.getvalue()
        )

    def features(self, extractor: str) -> dict[str, np.ndarray]:
        """Read an extractor's features [d] by image digest; a damaged file counts as missing.

        They are read again only when files were added.
        """
        paths = tuple(sorted((self.path / "features" / extractor).glob("*.npz")))
        kept = self._features.get(extractor)
        if kept is None or kept[0] != paths:
            found: dict[str, np.ndarray] = {}
            for path in paths:
                with contextlib.suppress(StoreError):  # what is missing is embedded again
                    found.update(load_features(path))
            kept = self._features[extractor] = paths, found
        return dict(kept[1])

    # The machine -------------------------------------------------------------------------------

    def append_machine(self, found: dict[str, Any]) -> None:
        """Keep one measurement of a machine's limits (see `machine.rates`) in its own file."""
        data = json.dumps(found, allow_nan=False).encode() + b"\n"
        folder = self.path / "machine"
        write_atomic(folder / f"{new_shard_id(folder)}.json", data)

    def machine(self) -> list[dict[str, Any]]:
        """Read the measurements of the machines that ran this study, the latest last."""
        paths = sorted((self.path / "machine").glob("*.json"), key=shard_order)
        return [load_machine(path) for path in paths]

    # Locks and sweeping ------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, load_key: str) -> Iterator[None]:
        """Hold this load's lock; the first writer in removes the temporary files of dead ones.

        Raises: StudyLocked if another process runs the same load on this study.
        """
        with contextlib.ExitStack() as stack:
            shared = stack.enter_context(open_lock(self.path / ".lock"))
            own = stack.enter_context(open_lock(self.path / f".lock-{load_key[:16]}"))
            if not try_flock(own, fcntl.LOCK_EX):
                raise StudyLocked(
                    f"another process is running this model and backend on study {self.name!r};"
                    " wait for it, or use another study= name"
                )
            if try_flock(shared, fcntl.LOCK_EX):
                self._remove_abandoned()
            fcntl.flock(shared, fcntl.LOCK_SH)
            yield

    def _remove_abandoned(self) -> None:
        """Remove temporary files of ours whose process is dead; nothing else is ever deleted."""
        for path in self.path.rglob(".sd35bench-*.tmp"):
            if is_abandoned(path.name):
                path.unlink(missing_ok=True)

    def unnamed(self) -> list[Path]:
        """Files of images and latents that no record names; they are kept.

        A killed writer leaves one at most; many mean that the journal lacks a shard, or that
        another study shares the folder.
        """
        named = {name for r in self.all_records() for name in (r.image, r.latents)}
        files = (p for name in ("images", "latents") for p in (self.path / name).glob("*/*"))
        return sorted(p for p in files if is_named(p) and p.stem not in named)

    # Derived views -----------------------------------------------------------------------------

    def export_parquet(self) -> dict[str, Path]:
        """Write records.parquet and scores.parquet beside the journal and return their paths.

        Raises: StoreError where there is no record: a file needs a column.
        """
        import pyarrow.parquet as pq

        records = [_flat(to_json(r)) for r in self.records()]
        if not records:
            raise StoreError(f"study {self.name!r} has no record yet; run it first")
        scores = [{**to_json(s), "detail": json.dumps(s.detail)} for s in self.scores()]
        tables = {"records": _table(records), "scores": _score_table(scores)}
        paths = {}
        for name, table in tables.items():
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            paths[name] = self.path / f"{name}.parquet"
            write_atomic(paths[name], buffer.getvalue())
        return paths

    def sql(self, query: str) -> Any:
        """Run SQL over the views `records` and `scores`; returns a pyarrow Table.

        Columns of `records` are the record's fields with dots as underscores
        (``request_steps``, ``timings_generate_s``).
        """
        import duckdb

        paths = self.export_parquet()
        with duckdb.connect() as connection:
            for name, path in paths.items():
                quoted = str(path).replace("'", "''")
                connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{quoted}')")
            return connection.sql(query).to_arrow_table()


def _table(rows: list[dict[str, Any]]) -> Any:
    """Rows as an Arrow table; seeds, which pass its signed integers, are uint64."""
    import pyarrow as pa

    table = pa.Table.from_pylist([{**row, _SEED: 0} if _SEED in row else row for row in rows])
    if _SEED not in table.column_names:
        return table
    seeds = pa.array([row[_SEED] for row in rows], pa.uint64())
    return table.set_column(table.column_names.index(_SEED), _SEED, seeds)


def _score_table(rows: list[dict[str, Any]]) -> Any:
    """Scores as an Arrow table, whose columns are there without any score, too."""
    import pyarrow as pa

    kinds = {"metric": pa.string(), "key": pa.string(), "image": pa.string()}
    kinds |= {"value": pa.float64(), "detail": pa.string()}
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def load_features(path: Path) -> dict[str, np.ndarray]:
    """Read one file of features [d] by digest. Raises: StoreError where it is damaged."""
    try:
        with np.load(io.BytesIO(read_regular(path)[0]), allow_pickle=False) as data:
            digests, features = data["digests"].tolist(), data["features"]
        if features.ndim != 2 or not np.isfinite(features).all():
            raise ValueError(f"an array of shape {features.shape}, or with NaN")
        return dict(zip(digests, features, strict=True))
    except StoreError:
        raise
    except Exception as exc:  # numpy and zipfile raise a dozen kinds for damaged bytes
        raise StoreError(f"{path} is damaged: {exc}; delete it, and score again") from exc


def load_machine(path: Path) -> dict[str, Any]:
    """Read one measurement of a machine. Raises: StoreError where it is damaged."""
    remedy = "delete it: run measures the machine again"
    try:
        found = parse_json(read_regular(path)[0])
        whole = msgspec.convert(found, _Machine)
    except (ValueError, msgspec.ValidationError) as exc:
        raise StoreError(f"{path} is damaged: {exc}; {remedy}") from exc
    return {**found, "rates": whole.rates}


class _Machine(msgspec.Struct):
    """What is read of a measurement; a rate has a unit, and numbers."""

    key: str
    device: str
    threads: int
    environment: dict[str, str | int | float | bool | None]
    measured_at: str
    rates: dict[str, dict[str, Any]]
    error: str | None = None


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: trial.request.steps becomes request_steps."""
    row: dict[str, Any] = {}
    for name, item in value.items():
        short = f"{prefix}{name}"
        if isinstance(item, dict) and name in ("options", "source", "tags"):
            row[short] = json.dumps(item, sort_keys=True)
        elif isinstance(item, dict):
            inner = "" if name in ("trial", "load") else f"{short}_"
            row.update(_flat(item, inner))
        else:
            row[short] = item
    return row
