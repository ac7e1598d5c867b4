"""The Parquet view of a large journal: columns, refreshed by appending, thrown away when in doubt.

    view/journal/manifest.json      version, parts, and how far each shard is covered
    view/journal/<digest>.parquet   columns; a part is united with others of its size or less
    view/scores/…                   the same of scores

A record takes 60 µs to parse and 2 kB of memory, so a million of them a minute and 2 GB; as columns
they take 1 s and 300 MB. Texts that nearly every record has for itself are columns of whole numbers
too, which sort and match 20 times faster: `number` and `where` (`name_number`), and `moment`. The
journal stays the truth. A part says by file, place and length where each record's line is, and
whoever needs the whole record gets it from there.

Only what was appended to the journal is parsed again. A shard that is another file than the one
that was covered (by size, inode and times) is hashed; where its covered bytes are others, or where
a part is damaged or of another version, the whole view is made anew. Nothing is kept of a study
whose journal is small (`LEAST_BYTES`), and none where a text is no Unicode (a lone surrogate).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from sd35bench.disk import file_stamp, open_lock, read_regular, try_flock, write_atomic
from sd35bench.errors import StoreError
from sd35bench.types import Request, Session, Status

LEAST_BYTES = 8_000_000
"""Of a smaller journal (some 5,000 records) no view is kept: reading it takes half a second."""
VERSION = 3
FOLDER = "view"
FREE = ("prompt", "negative_prompt", "seed", "init_image")
"""What of a request is a column of its own, and not in `asked`."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Request)}
_RECORD = b'{"kind":"record",'


class Unfit(Exception):
    """The journal holds what columns cannot: it has to be read line by line."""


_NULL = msgspec.Raw(b"null")


class _Timings(msgspec.Struct):
    generate_s: float
    encode_s: float
    text_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    step_s: list[float] = []


class _Memory(msgspec.Struct):
    peak_rss_bytes: int
    peak_vram_bytes: int | None = None
    peak_allocator_bytes: int | None = None


class _Surroundings(msgspec.Struct):
    canary_before: float | None = None
    canary_after: float | None = None
    cpu_share: float | None = None
    switches: int | None = None


class _Trial(msgspec.Struct):
    key: str
    load: msgspec.Raw
    request: dict[str, Any]
    batch_size: int
    prompt: msgspec.Raw


class _Record(msgspec.Struct):
    kind: str
    trial: _Trial
    status: Status
    session_id: str
    started_at: str
    phase: str | None = None
    error: str | None = None
    timings: _Timings | None = None
    memory: _Memory | None = None
    image: str | None = None
    image_bytes: int | None = None
    effective_steps: int | None = None
    evaluations: int | None = None
    truncated_tokens: int | None = None
    batch_actual: int = 1
    latents: str | None = None
    flops: msgspec.Raw = _NULL
    gpu: msgspec.Raw = _NULL
    remote: msgspec.Raw = _NULL
    surroundings: _Surroundings | None = None


class _Kind(msgspec.Struct):
    kind: str


_DECODE = msgspec.json.Decoder(_Record).decode
_KIND = msgspec.json.Decoder(_Kind).decode

_TEXTS = (
    *("shard", "key", "status", "session_id", "started_at", "load", "asked", "prompt"),
    *("negative_prompt", "init_image", "ref", "error", "image", "latents", "flops"),
)
CODED = tuple(n for n in _TEXTS if n not in ("key", "started_at"))
"""Texts of which many records have the same: kept and read as numbers into a list of them."""
WHOLE = (
    *("offset", "length", "batch_size", "batch_actual", "image_bytes", "effective_steps"),
    *("evaluations", "truncated_tokens", "peak_rss_bytes", "peak_vram_bytes"),
    *("peak_allocator_bytes", "switches", "seed", "number", "where", "moment"),
)
_FLOATS = (
    *("generate_s", "encode_s", "text_s", "denoise_s", "decode_s"),
    *("canary_before", "canary_after", "cpu_share"),
)
_OWN_NUMBERS = ("offset", "number", "where", "moment")
_FLAGS = ("has_gpu", "has_remote", "has_surroundings")
_PACKED = ("step_s",)
"""Lists of floats as bytes: as lists 14 million of them take 0.8 s to read, so 0.25."""
OF_TIMINGS, OF_MEMORY = _FLOATS[:5], tuple(n for n in WHOLE if n.startswith("peak_"))
OF_SURROUNDINGS = (*_FLOATS[5:], "switches")
OWN = (
    *("status", "session_id", "started_at", "error", "image", "latents", "batch_actual"),
    *("image_bytes", "effective_steps", "evaluations", "truncated_tokens"),
)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FORMS = {25: "seconds", 29: "milliseconds", 32: "microseconds"}


def name_number(*names: str) -> int:
    """A number of 64 bits for a name; two of 10^6 share one in 3 of 10^8 studies.

    A trial's key and the digest of its image together say which score is a record's.
    """
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def moment_number(text: str) -> int | None:
    """A number that sorts as the text of a moment does; ``None`` for a text of another form.

    Of one microsecond, a text with fewer digits comes first.
    """
    form = _FORMS.get(len(text))
    if form is None or not text.endswith("+00:00"):
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    if at.isoformat(timespec=form) != text:
        return None
    return (at - _EPOCH) // timedelta(microseconds=1) * 4 + [*_FORMS.values()].index(form)


def _text(value: Any) -> str | None:
    text = bytes(value).decode()
    return None if text == "null" else text


@dataclass(slots=True)
class Covered:
    """How far a shard is in the view: which file it was, its parsed bytes, and their digest."""

    stamp: list[int]
    end: int
    sha256: str
    sessions: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class _Manifest:
    version: int = VERSION
    parts: dict[str, list[int]] = field(default_factory=dict)
    shards: dict[str, Covered] = field(default_factory=dict)


class ParquetView:
    """The lines of one folder's shards as Parquet parts, as of the last `refresh`."""

    coded: tuple[str, ...] = ()
    few: tuple[str, ...] = ()
    """Whole numbers of which many rows have the same: read 5 times as fast as a list of values."""

    def __init__(self, study: Path, name: str, parse: Callable[[bytes], Any]) -> None:
        """`parse` reads one line as the folder's reader does, and refuses what it refuses."""
        self.folder, self.source, self._parse = study / FOLDER / name, study / name, parse
        self._manifest = _Manifest()

    def schema(self) -> Any:
        """Names and types of the columns, as Arrow has them."""
        raise NotImplementedError

    def row(self, line: bytes) -> Any:
        """What a line has for a row; ``None`` for none, a `Session` for what is kept by place.

        Raises: msgspec.MsgspecError, StoreError.
        """
        raise NotImplementedError

    def columns(self, shard: str, places: list[tuple[int, int]], rows: list[Any]) -> dict[str, Any]:
        """Columns of one shard's rows; `places` are each line's offset and length."""
        raise NotImplementedError

    def fits(self, shards: Iterable[Path]) -> bool:
        """Whether the journal is large enough to have a view."""
        with contextlib.suppress(OSError):
            return sum(p.stat().st_size for p in shards) >= LEAST_BYTES
        return False

    def stamps(self, shards: Iterable[Path]) -> list[list[int]]:
        """What changes where a shard does. Raises: StoreError."""
        return [_stamp(path) for path in shards]

    def refresh(self, shards: list[Path]) -> list[Any]:
        """Bring the view up to date, and return its parts, the oldest first.

        Raises: StoreError for a damaged journal; Unfit where columns cannot hold it.
        """
        self._manifest = self._read()
        stale = self._stale(shards)
        if stale is None:
            self._manifest, stale = _Manifest(), [(path, 0) for path in shards]
        try:
            parts = [self._load(name) for name in self._manifest.parts]
        except StoreError:
            self._manifest, parts = _Manifest(), []
            stale = [(path, 0) for path in shards]
        fresh = [self._convert(path, start) for path, start in stale]
        fresh = [table for table in fresh if table is not None]
        if stale:
            parts = self._save(parts, fresh)
        return parts

    def column(self, parts: Sequence[Any], name: str) -> Any:
        """One column of all parts as a chunked array; a damaged part was no part before.

        Raises: StoreError where it was damaged meanwhile.
        """
        import pyarrow as pa

        try:
            kind = self.schema().field(name).type
            found = [part.read([name], use_threads=False).column(0).cast(kind) for part in parts]
        except (pa.ArrowException, OSError) as exc:
            raise StoreError(
                f"{self.folder} is damaged: {exc}; delete it, it is made anew"
            ) from exc
        return pa.chunked_array([chunk for each in found for chunk in each.chunks], kind)

    def read_line(self, shard: str, offset: int, length: int) -> bytes:
        """One line of the journal. Raises: StoreError."""
        try:
            with open(self.source / shard, "rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as exc:
            raise StoreError(f"{self.source / shard} cannot be read: {exc.strerror}") from exc

    # What is there -----------------------------------------------------------------------------

    def _read(self) -> _Manifest:
        try:
            data = read_regular(self.folder / "manifest.json")[0]
            found = msgspec.json.decode(data, type=_Manifest)
        except (StoreError, msgspec.MsgspecError):
            return _Manifest()
        return found if found.version == VERSION else _Manifest()

    def _stale(self, shards: list[Path]) -> list[tuple[Path, int]] | None:
        """Shards that have more than the view, and from where; ``None`` where it does not fit."""
        known, found = self._manifest.shards, []
        if known.keys() - {path.name for path in shards}:
            return None
        for path in shards:
            covered = known.get(path.name)
            stamp = _stamp(path)
            if covered is None:
                found.append((path, 0))
            elif covered.stamp != stamp:
                data = read_regular(path, follow=True)[0][: covered.end]
                if hashlib.sha256(data).hexdigest() != covered.sha256:
                    return None
                found.append((path, covered.end))
        return found

    def _load(self, name: str) -> Any:
        """One part, held against its size and times; its bytes where these are others."""
        path = self.folder / name
        if _stamp(path) != self._manifest.parts[name]:
            digest = hashlib.sha256(read_regular(path)[0]).hexdigest()
            if digest[:32] != name.partition(".")[0]:
                raise StoreError(f"{path} is damaged; it is made anew")
            self._manifest.parts[name] = _stamp(path)
        return self._open(path)

    def _open(self, source: Any) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            part = pq.ParquetFile(
                source, read_dictionary=[*self.coded], page_checksum_verification=True
            )
            if part.schema_arrow.names != self.schema().names:
                raise StoreError(f"{source} has other columns; it is made anew")
            return part
        except (pa.ArrowException, OSError) as exc:
            raise StoreError(f"{source} is damaged: {exc}; it is made anew") from exc

    # Appending ---------------------------------------------------------------------------------

    def _convert(self, path: Path, start: int) -> Any:
        """Parse a shard from a line's beginning on; ``None`` where it has no record there."""
        import pyarrow as pa

        stamp, data = _stamp(path), read_regular(path, follow=True)[0]
        known = self._manifest.shards.get(path.name)
        sessions = [] if known is None else known.sessions
        rows: list[Any] = []
        places: list[tuple[int, int]] = []
        end = start
        for offset, line in _lines(data, start):
            found = self._row(path, data, offset, line)
            if isinstance(found, Session):
                sessions.append([offset, len(line)])
            elif found is not None:
                rows.append(found)
                places.append((offset, len(line)))
            elif offset + len(line) == len(data) and not _whole(line):
                break  # torn by a kill, or being written
            end = min(offset + len(line) + 1, len(data))
        digest = hashlib.sha256(memoryview(data)[:end]).hexdigest()
        self._manifest.shards[path.name] = Covered(stamp, end, digest, sessions)
        if not rows:
            return None
        try:
            return pa.Table.from_pydict(self.columns(path.name, places, rows), schema=self.schema())
        except (pa.ArrowException, UnicodeError, OverflowError) as exc:
            raise Unfit(str(exc)) from exc

    def _row(self, path: Path, data: bytes, offset: int, line: bytes) -> Any:
        """A line's row, or ``None``: another kind, or the last one, torn. Raises: StoreError."""
        try:
            return self.row(line)
        except StoreError as exc:
            raise StoreError(f"{path}:{_number(data, offset)} {exc}") from exc
        except msgspec.ValidationError as exc:
            number = _number(data, offset)
            raise StoreError(
                f"{path}:{number} cannot be read by this version of sd35bench: {exc}; update"
                " sd35bench, or restore or delete that line"
            ) from exc
        except (msgspec.MsgspecError, ValueError) as exc:
            if offset + len(line) == len(data):
                return None
            raise Unfit(f"{path}: {exc}") from exc  # its reader names the line

    def _save(self, parts: list[Any], fresh: list[Any]) -> list[Any]:
        """Write what is new; where that cannot be done, it is made again by the next reader."""
        import pyarrow as pa

        names = list(self._manifest.parts)
        united = pa.concat_tables(fresh).unify_dictionaries() if fresh else None
        while united is not None and parts and len(united) * 2 >= parts[-1].metadata.num_rows:
            older = parts.pop().read(use_threads=False).cast(self.schema())
            united = pa.concat_tables([older, united]).unify_dictionaries()
            del self._manifest.parts[names.pop()]
        data = None if united is None else _parquet(united, (*self.coded, *self.few))
        with contextlib.suppress(StoreError), open_lock_of(self.folder) as held:
            if held:
                if data is not None:
                    name = f"{hashlib.sha256(data).hexdigest()[:32]}.parquet"
                    write_atomic(self.folder / name, data)
                    self._manifest.parts[name] = _stamp(self.folder / name)
                write_atomic(self.folder / "manifest.json", msgspec.json.encode(self._manifest))
                for path in self.folder.glob("*.parquet"):
                    if path.name not in self._manifest.parts:
                        path.unlink(missing_ok=True)
        return parts if data is None else [*parts, self._open(io.BytesIO(data))]

    # Checking ----------------------------------------------------------------------------------

    def check(self, shards: list[Path]) -> str | None:
        """What is wrong with the view on disk, by all of its bytes; ``None`` where nothing is.

        A view that is behind the journal is none the worse: the next reader appends to it.
        """
        if not (self.folder / "manifest.json").exists():
            return None
        self._manifest = self._read()
        if not self._manifest.shards:
            return "its manifest is damaged, or another version's"
        there = {path.name: path for path in shards}
        for name, covered in self._manifest.shards.items():
            if name not in there:
                return f"it covers {name}, which is not in the journal"
            data = read_regular(there[name], follow=True)[0][: covered.end]
            if hashlib.sha256(data).hexdigest() != covered.sha256:
                return f"it covers other bytes of {name} than the journal's"
        for name in self._manifest.parts:
            try:
                data = read_regular(self.folder / name)[0]
            except StoreError as exc:
                return str(exc)
            if hashlib.sha256(data).hexdigest()[:32] != name.partition(".")[0]:
                return f"{name} is damaged"
        return None


def _parquet(table: Any, names: tuple[str, ...]) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    coded: Any = [*names]  # what stubs say of these two is less than what is taken
    plain = [name for name in table.column_names if name in _PACKED]
    packed: Any = {n: "none" if n in plain else "zstd" for n in table.column_names}
    pq.write_table(
        table, buffer, write_page_checksum=True, row_group_size=1 << 20,
        use_dictionary=coded, dictionary_pagesize_limit=1 << 28,
        compression=packed,
        column_encoding=dict.fromkeys(plain, "DELTA_LENGTH_BYTE_ARRAY"),
    )  # fmt: skip
    return buffer.getvalue()


@contextlib.contextmanager
def open_lock_of(folder: Path) -> Iterator[bool]:
    """Whether this process alone may write a view; readers never wait for each other."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with open_lock(folder / ".lock") as handle:
        yield try_flock(handle, fcntl.LOCK_EX)


def _stamp(path: Path) -> list[int]:
    try:
        found = path.stat()
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror}") from exc
    return [*file_stamp(found)]  # as JSON has it


def _number(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def _lines(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    for line in data[start:].split(b"\n"):
        if line:
            yield start, line
        start += len(line) + 1


def _whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


class JournalView(ParquetView):
    """A study's records, and where its sessions stand."""

    coded = CODED
    few = tuple(n for n in WHOLE if n not in _OWN_NUMBERS)

    def __init__(self, study: Path, parse: Callable[[bytes], Any]) -> None:
        """`parse` reads one line of the journal."""
        super().__init__(study, "journal", parse)
        self._seen: set[tuple[str | None, str]] = set()

    def sessions(self) -> Iterator[Session]:
        """Every session's line, read from the journal. Raises: StoreError."""
        for name, covered in self._manifest.shards.items():
            for offset, length in covered.sessions:
                found = self._parse(self.read_line(name, offset, length))
                if isinstance(found, Session):
                    yield found

    def schema(self) -> Any:
        """A record's fields; `asked` is the request without what is `FREE`."""
        import pyarrow as pa

        coded = pa.dictionary(pa.int32(), pa.string())
        return pa.schema(
            [
                *((n, coded if n in CODED else pa.string()) for n in _TEXTS),
                *((n, pa.uint64() if n == "seed" else pa.int64()) for n in WHOLE),
                *((n, pa.float64()) for n in _FLOATS),
                *((n, pa.bool_()) for n in _FLAGS),
                *((n, pa.large_binary()) for n in _PACKED),
            ]
        )

    def row(self, line: bytes) -> Any:
        """A record's fields, or a session. Raises: msgspec.MsgspecError."""
        if not line.startswith(_RECORD) and _KIND(line).kind != "record":
            return self._parse(line)
        found = _DECODE(line)
        asked = {k: v for k, v in found.trial.request.items() if k not in FREE}
        like = _text(found.trial.load), repr(asked)
        if like not in self._seen:
            self._parse(line)  # refuses what columns would not see
            self._seen.add(like)
        return found

    def columns(self, shard: str, places: list[tuple[int, int]], rows: list[Any]) -> dict[str, Any]:
        """Columns of one shard's records."""
        found: dict[str, Any] = {n: [getattr(r, n) for r in rows] for n in OWN}
        found |= {"shard": [shard] * len(rows)}
        found |= {"offset": [p for p, _ in places], "length": [n for _, n in places]}
        for names, part in (
            (OF_TIMINGS, [r.timings for r in rows]),
            (OF_MEMORY, [r.memory for r in rows]),
            (OF_SURROUNDINGS, [r.surroundings for r in rows]),
        ):
            for name in names:
                found[name] = [None if p is None else getattr(p, name) for p in part]
        steps = (() if r.timings is None else r.timings.step_s for r in rows)
        found["step_s"] = [array("d", each).tobytes() for each in steps]
        trials = [r.trial for r in rows]
        found |= {n: [getattr(t, n) for t in trials] for n in ("key", "batch_size")}
        found["number"] = [name_number(key) for key in found["key"]]
        named = zip(found["key"], found["image"], strict=True)
        found["where"] = [name_number(key, image or "") for key, image in named]
        found["moment"] = [moment_number(text) for text in found["started_at"]]
        found["load"] = [_text(t.load) for t in trials]
        found["ref"] = [_text(t.prompt) for t in trials]
        found["flops"] = [_text(r.flops) for r in rows]
        for name in ("gpu", "remote"):
            found[f"has_{name}"] = [_text(getattr(r, name)) is not None for r in rows]
        found["has_surroundings"] = [r.surroundings is not None for r in rows]
        requests = [t.request for t in trials]
        for name in FREE:
            found[name] = [r.pop(name, _DEFAULTS[name]) for r in requests]
        encode = msgspec.json.Encoder().encode
        found["asked"] = [encode(r).decode() for r in requests]
        return found


class ScoreView(ParquetView):
    """A study's scores; `detail` is JSON, which few scores have of their own."""

    coded = ("metric", "image", "detail")

    def __init__(self, study: Path, parse: Callable[[bytes], Any]) -> None:
        """`parse` reads one line of a shard of scores."""
        super().__init__(study, "scores", parse)

    def schema(self) -> Any:
        """A score's fields, and where its line stands."""
        import pyarrow as pa

        coded = pa.dictionary(pa.int32(), pa.string())
        texts = ((name, coded) for name in ("shard", *self.coded))
        whole = (("offset", pa.int64()), ("where", pa.int64()))
        rest = [("key", pa.string()), *whole, ("value", pa.float64())]
        return pa.schema([*texts, *rest])

    def row(self, line: bytes) -> Any:
        """A score. Raises: msgspec.MsgspecError, StoreError."""
        return self._parse(line)

    def columns(self, shard: str, places: list[tuple[int, int]], rows: list[Any]) -> dict[str, Any]:
        """Columns of one shard's scores."""
        found = {n: [getattr(r, n) for r in rows] for n in ("metric", "key", "image", "value")}
        found |= {"shard": [shard] * len(rows), "offset": [offset for offset, _ in places]}
        found["where"] = [name_number(r.key, r.image) for r in rows]
        return found | {"detail": [json.dumps(r.detail) if r.detail else "{}" for r in rows]}
