"""Records as columns, whether they are a list or come from a large study's Parquet view.

What is computed for every record of a study asks here for one field of all of them. A list gives it
by looking at each; `Records`, a part of a view, gives it without making a single `Record`, and
makes one only for who asks for it. Numbers that are not known are NaN.
"""

import itertools
import json
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sd35bench.study.view import FREE, OF_MEMORY, OF_SURROUNDINGS, OF_TIMINGS, ParquetView
from sd35bench.types import Flops, Record, from_json

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
_PART = {
    **dict.fromkeys(OF_TIMINGS, "timings"),
    **dict.fromkeys(OF_MEMORY, "memory"),
    **dict.fromkeys(OF_SURROUNDINGS, "surroundings"),
    **dict.fromkeys(("key", "batch_size"), "trial"),
}
FREE_TEXTS = tuple(name for name in FREE if name != "seed")
"""Texts of a request that are columns of their own."""


_FEW, _MOST_MADE = 8192, 65536
"""Records of a part that is remembered once it was looked at, and of all such parts: 150 MB."""
_FEW_OF = 20
"""One in so many records are few: making all texts of a column takes 0.2 µs each."""


class Columns:
    """All records of a view; a column is read when it is first asked for."""

    def __init__(self, view: ParquetView, parts: Sequence[Any], parse: Callable[[bytes], Any]):
        """`parts` are open Parquet files, `parse` reads a journal's line."""
        self._view, self._parts, self._parse = view, parts, parse
        self._kept: dict[Hashable, Any] = {}
        self._made: dict[int, Record] = {}
        self.size = sum(part.metadata.num_rows for part in parts)

    def kept(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What was computed from the columns under a name, once."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def codes(self, name: str) -> tuple[Places, list[str]]:
        """Numbers into a list of texts, -1 where there is none; of a column that is `coded`."""

        def make() -> tuple[Places, list[str]]:
            found = self._column(name).unify_dictionaries()
            codes = [_plain(chunk.indices, -1) for chunk in found.chunks]
            texts = found.chunk(0).dictionary.to_pylist() if found.num_chunks else []
            return np.concatenate([*codes, np.empty(0, np.int32)]).astype(np.int64), texts

        return self.kept(f"codes {name}", make)

    def texts(self, name: str) -> NDArray[np.object_]:
        """A text column; records of one text share it."""

        def make() -> NDArray[np.object_]:
            if name not in self._view.coded and name != "shard":
                return self.arrow(name).to_numpy()
            codes, texts = self.codes(name)
            return np.array([*texts, None], object)[codes]

        return self.kept(f"texts {name}", make)

    def texts_of(self, name: str, places: Places) -> NDArray[np.object_]:
        """A text column of some records; of few, the others' texts are not made."""
        if name in self._view.coded or len(places) * _FEW_OF > self.size:
            return self.texts(name)[places]
        if not len(places):  # the column is not even read
            return np.empty(0, object)
        return np.array(self.arrow(name).take(_arrow(places)).to_pylist(), object)

    def numbers(self, name: str) -> Floats:
        """A column of numbers."""

        def make() -> Floats:
            parts = [_plain(chunk, np.nan) for chunk in self._column(name).chunks]
            return np.concatenate([*parts, np.empty(0)])

        return self.kept(f"numbers {name}", make)

    def whole(self, name: str) -> NDArray[Any]:
        """A column of whole numbers (or truth values) that every record has."""

        def make() -> NDArray[Any]:
            parts = [_plain(chunk) for chunk in self._column(name).chunks]
            return np.concatenate(parts) if parts else np.empty(0, np.int64)

        return self.kept(f"whole {name}", make)

    def lists(self, name: str, places: Places) -> Floats:
        """The numbers of some records' lists, one list after the other."""

        def make() -> Any:
            found = self._column(name)
            return found.chunk(0) if found.num_chunks == 1 else found.combine_chunks()

        some = self.kept(f"lists {name}", make).take(_arrow(places))
        _, ends, data = some.buffers()
        count = int(np.frombuffer(ends, np.int64)[len(some)]) // 8 if len(some) else 0
        return np.frombuffer(data, np.float64, count) if count else np.empty(0)

    def moments(self) -> Places | None:
        """Numbers that sort as `started_at` does; ``None`` where some are of another form."""

        def make() -> Places | None:
            return None if self._column("moment").null_count else self.whole("moment")

        return self.kept("moments", make)

    def arrow(self, name: str) -> Any:
        """A column as Arrow has it."""
        return self.kept(f"arrow {name}", lambda: self._column(name))

    def record(self, place: int) -> Record:
        """One whole record, from its line in the journal. Raises: StoreError."""
        if place not in self._made:
            shards, names = self.codes("shard")
            where = int(self.whole("offset")[place]), int(self.whole("length")[place])
            line = self._view.read_line(names[shards[place]], *where)
            self._made[place] = self._parse(line)
        return self._made[place]

    def records(self, places: Places) -> Iterator[Record]:
        """Whole records; those of small parts are remembered. Raises: StoreError."""
        if len(places) > _FEW or len(self._made) >= _MOST_MADE:
            yield from self._read(places)
            return
        asked = places.tolist()
        new = [place for place in dict.fromkeys(asked) if place not in self._made]
        self._made.update(zip(new, self._read(np.array(new, np.int64)), strict=True))
        yield from (self._made[place] for place in asked)

    def _read(self, places: Places) -> Iterator[Record]:
        """The same, each file opened once for neighbours."""
        shards, names = self.codes("shard")
        offsets, lengths = self.whole("offset"), self.whole("length")
        for start, end in _runs(shards[places]):
            with open(self._view.source / names[shards[places[start]]], "rb") as file:
                for place in places[start:end]:
                    file.seek(int(offsets[place]))
                    yield self._parse(file.read(int(lengths[place])))

    def _column(self, name: str) -> Any:
        return self._view.column(self._parts, name)


def _plain(found: Any, unknown: float | None = None) -> NDArray[Any]:
    """An Arrow array of numbers or truth values, with a value for what is not known.

    Its own conversion imports pandas, which takes half a second.
    """
    import pyarrow as pa

    if not len(found):
        return np.empty(0, found.type.to_pandas_dtype())
    valid, data = found.buffers()
    part = slice(found.offset, found.offset + len(found))

    def bits(buffer: Any) -> NDArray[np.bool_]:
        return np.unpackbits(np.frombuffer(buffer, np.uint8), bitorder="little")[part].astype(bool)

    if pa.types.is_boolean(found.type):
        return bits(data)
    values = np.frombuffer(data, found.type.to_pandas_dtype())[part]
    if unknown is None:
        return values
    values = values.astype(np.result_type(values, unknown), copy=True)
    if found.null_count:
        values[~bits(valid)] = unknown
    return values


def _arrow(values: NDArray[Any]) -> Any:
    """Whole numbers as an Arrow array, without its own conversion."""
    import pyarrow as pa

    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, data])


class Records(Sequence[Record]):
    """Some of a view's records, in an order of their own."""

    def __init__(self, columns: Columns, places: Places) -> None:
        """`places` are the records' numbers in the view."""
        self.columns, self.places = columns, places
        self._kept: dict[str, Any] = {}

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was computed from these records under a name, once."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def column(self, name: str, read: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
        """What a column has for these records, read-only; it is kept: they lie far apart."""

        def make() -> NDArray[Any]:
            found = read(name)[self.places]
            found.flags.writeable = False
            return found

        return self.kept(name, make)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return Records(self.columns, self.places[index])
        return self.columns.record(int(self.places[index]))

    def __iter__(self) -> Iterator[Record]:
        return self.columns.records(self.places)


Some = Sequence[Record]
_REF = {"split": "all", "level": None, "init_prompt": None, "tags": {}}


def pick(records: Some, which: NDArray[Any]) -> Some:
    """Records by a mask or by their numbers, of the same kind as they are."""
    if isinstance(records, Records):
        if which.dtype == bool and which.all():
            return records  # what was read of them is kept
        return Records(records.columns, records.places[which])
    chosen = np.flatnonzero(which) if which.dtype == bool else which
    return [records[i] for i in chosen.tolist()]


def join(parts: Sequence[Some]) -> Some:
    """Records of several parts after each other."""
    if parts and all(isinstance(p, Records) for p in parts):
        places = np.concatenate([p.places for p in parts])  # pyright: ignore
        return Records(parts[0].columns, places)  # pyright: ignore
    return [r for part in parts for r in part]


def numbers(records: Some, name: str) -> Floats:
    """A field of each record as a float64, NaN where it is unknown: [n]."""
    if isinstance(records, Records):
        return records.column(name, records.columns.numbers)
    return floats(_value(r, name) for r in records)


def floats(values: Iterable[float | None]) -> Floats:
    """Numbers as float64, NaN where they are unknown: [n]."""
    return np.array([np.nan if v is None else v for v in values], np.float64)


def dense(values: NDArray[Any]) -> Places:
    """Number values that are equal alike, from 0 in the order in which they first appear: [n]."""
    if values.dtype == object:
        return numbered(values.tolist())[0]
    plain = values.view(np.int8 if values.dtype == bool else f"i{values.itemsize}")
    if len(plain) < _FEW:
        low = int(plain.min(initial=0))
        size = int(plain.max(initial=0)) - low + 1
        if size <= 4 * len(plain):  # of small numbers the first place of each is looked up
            near, order = plain.astype(np.int64) - low, np.arange(len(plain))
            firsts = np.empty(size, np.int64)
            firsts[near[::-1]] = order[::-1]  # of equal places the last one stays
            first = firsts[near]
            return (np.cumsum(first == order) - 1)[first]
        _, firsts, found = np.unique(plain, return_index=True, return_inverse=True)
        rank = np.empty(len(firsts), np.int64)
        rank[np.argsort(firsts)] = np.arange(len(firsts))
        return rank[found]
    return _plain(_arrow(plain).dictionary_encode().indices).astype(np.int64)


def grouped(*columns: NDArray[Any]) -> tuple[Places, Places]:
    """Number unlike combinations of columns [n]: each place's number, and the first of each."""
    code = dense(columns[0])
    for column in columns[1:]:
        part = dense(column)
        if part.any():
            code = dense(code * (int(part.max()) + 1) + part)
    firsts = np.empty(int(code.max(initial=-1)) + 1, np.int64)
    firsts[code[::-1]] = np.arange(len(code))[::-1]  # of equal places the last one stays
    return code, firsts


def split(codes: Places) -> list[Places]:
    """The places of each code, in the order in which codes first appear."""
    if not len(codes):
        return []
    # Sorting of 16 bits is by radix, 8 times as fast.
    short = codes.astype(np.int16) if int(codes.max()) < 1 << 15 else codes
    order = np.argsort(short, kind="stable")
    edges = np.flatnonzero(np.diff(codes[order])) + 1
    parts = np.split(order, edges)
    return sorted(parts, key=lambda places: int(places[0]))


def coded(records: Some, name: str) -> tuple[Places, Sequence[str]]:
    """A text field as a number into a list of texts, -1 where there is none: [n]."""
    if isinstance(records, Records):
        codes, known = records.columns.codes(name)
        return records.column(f"codes {name}", lambda _: codes), known
    numbers: dict[str | None, int] = {None: -1}
    found = [numbers.setdefault(t, len(numbers) - 1) for t in (_value(r, name) for r in records)]
    del numbers[None]
    return np.array(found, np.int64), [*numbers]  # pyright: ignore


def is_text(records: Some, name: str, text: str) -> NDArray[np.bool_]:
    """Whether a text field has this value: [n]."""
    codes, known = coded(records, name)
    return codes == (known.index(text) if text in known else -2)


def among(records: Some, name: str, some: Container[str]) -> NDArray[np.bool_]:
    """Whether a text field has one of some values: [n]."""
    codes, known = coded(records, name)
    found = np.zeros(len(known) + 1, bool)  # the last is of those without a text
    found[[c for c in _used(codes) if known[c] in some]] = True
    return found[codes]


def distinct(records: Some, name: str) -> set[str]:
    """The texts that a field has; a record without one is left out."""
    codes, known = coded(records, name)
    return {known[code] for code in _used(codes)}


def _used(codes: Places) -> list[int]:
    """Which codes there are but for -1, in their order; counting takes a tenth of sorting."""
    return np.flatnonzero(np.bincount(codes + 1)[1:]).tolist()


def texts(records: Some, name: str) -> NDArray[np.object_]:
    """A text field of each record, ``None`` where there is none: [n]."""
    if isinstance(records, Records):
        return records.columns.texts_of(name, records.places)
    found = np.empty(len(records), object)
    found[:] = [_value(r, name) for r in records]
    return found


def seeds(records: Some) -> NDArray[Any]:
    """The seed of each record: [n]."""
    if isinstance(records, Records):
        return records.columns.whole("seed")[records.places]
    return np.array([r.trial.request.seed for r in records], object)


def prompt_refs(records: Some, name: str) -> NDArray[np.object_]:
    """A field of the reference to each record's prompt (`id`, `set`, `split`, `level`): [n]."""
    codes, values = ref_codes(records, name)
    return values[codes]


def ref_codes(records: Some, name: str) -> tuple[Places, NDArray[np.object_]]:
    """The same as numbers into a list of what prompts have."""
    if isinstance(records, Records):
        columns = records.columns

        def make() -> tuple[Places, NDArray[np.object_]]:
            refs = _refs(columns)
            of_refs, values = _of_refs(name, [{**_REF, **ref}[name] for ref in refs])
            return of_refs[columns.codes("ref")[0]], values

        codes, values = columns.kept(f"ref {name}", make)
        return codes[records.places], values
    return _of_refs(name, [getattr(r.trial.prompt, name) for r in records])


def _of_refs(name: str, found: Sequence[Any]) -> tuple[Places, NDArray[np.object_]]:
    if name != "tags":
        return numbered(found)
    values = np.empty(len(found), object)  # mappings, which cannot be told apart by a hash
    values[:] = found
    return np.arange(len(found)), values


def _refs(columns: Columns) -> list[dict[str, Any]]:
    """What unlike references to prompts say, by their numbers."""
    return columns.kept("refs", lambda: [json.loads(text) for text in columns.codes("ref")[1]])


def tags(records: Some) -> dict[str, set[str]]:
    """The values that the prompts' own columns have."""
    if isinstance(records, Records):
        refs, codes = _refs(records.columns), coded(records, "ref")[0]
        each = (refs[code].get("tags", {}) for code in _used(codes))
    else:
        each = (r.trial.prompt.tags for r in records)
    found: dict[str, set[str]] = {}
    for own in each:
        for name, values in own.items():
            found.setdefault(name, set()).update(values)
    return found


def numbered(found: Sequence[Any]) -> tuple[Places, NDArray[np.object_]]:
    """A list's values as numbers into those that are unlike, in the order of appearance: [n]."""
    numbers: dict[Any, int] = {}
    codes = np.array([numbers.setdefault(value, len(numbers)) for value in found], np.int64)
    values = np.empty(len(numbers), object)
    values[:] = [*numbers]
    return codes, values


def distinct_refs(records: Some, *names: str) -> set[tuple[Any, ...]]:
    """What fields of the references to prompts have together."""
    found = [ref_codes(records, name) for name in names]
    _, firsts = grouped(*(codes for codes, _ in found))
    parts = (values[codes[firsts]].tolist() for codes, values in found)
    return set(zip(*parts, strict=True))


def is_ref(records: Some, name: str, value: Any) -> NDArray[np.bool_]:
    """Whether a field of the reference to each record's prompt has this value: [n]."""
    codes, values = ref_codes(records, name)
    return (values == value)[codes] if len(values) else np.zeros(len(codes), bool)


def seconds(records: Some) -> Floats:
    """Latency of each record, NaN where it was not timed: [n]."""
    return numbers(records, "generate_s") + numbers(records, "encode_s")


def flops(records: Some) -> tuple[Places, list[Flops]]:
    """Operations of each record's image by number, -1 where they were not counted: [n]."""
    if not isinstance(records, Records):
        numbers: dict[Flops | None, int] = {None: -1}
        codes = [numbers.setdefault(r.flops, len(numbers) - 1) for r in records]
        return np.array(codes, np.int64), [f for f in numbers if f is not None]
    codes, known = records.columns.codes("flops")
    made = records.columns.kept("flops", lambda: [from_json(Flops, json.loads(t)) for t in known])
    return codes[records.places], made


def step_seconds(records: Some) -> Floats:
    """Seconds of all steps of all records, one after the other."""
    if not isinstance(records, Records):
        return np.array([s for r in records if r.timings is not None for s in r.timings.step_s])
    return records.columns.lists("step_s", records.places)


def has(records: Some, part: str) -> NDArray[np.bool_]:
    """Whether each record has `gpu`, `remote` or `surroundings`: [n]."""
    if isinstance(records, Records):
        return records.columns.whole(f"has_{part}")[records.places]
    return np.array([getattr(r, part) is not None for r in records], bool)


def moments(records: Some) -> NDArray[Any]:
    """What sorts as the records' starts do: numbers, or the texts themselves: [n]."""
    found = records.columns.moments() if isinstance(records, Records) else None
    if found is None or not isinstance(records, Records):
        return texts(records, "started_at")
    return found[records.places]


def in_time(records: Some) -> Some:
    """Records in the order of their starts; those of one moment stay as they are."""
    started = moments(records)
    if len(started) < 2 or bool(np.all(started[:-1] <= started[1:])):
        return records
    return pick(records, np.argsort(started, kind="stable"))


def by_session(records: Some) -> dict[str, Places]:
    """The numbers of the records of each session, in the order in which they first appear."""

    def make() -> dict[str, Places]:
        codes, known = coded(records, "session_id")
        return {known[int(codes[places[0]])]: places for places in split(codes)}

    return records.kept("by session", make) if isinstance(records, Records) else make()


def with_tags(records: Some, where: Mapping[str, str]) -> Some:
    """Records of prompts whose own columns have these values."""

    def fits(tags: Mapping[str, Sequence[str]]) -> bool:
        return all(value in tags.get(name, ()) for name, value in where.items())

    if not where:
        return records
    if isinstance(records, Records):
        right = np.array([fits(ref.get("tags", {})) for ref in _refs(records.columns)], bool)
        return pick(records, right[coded(records, "ref")[0]])
    return [r for r in records if fits(r.trial.prompt.tags)]


def _value(record: Record, name: str) -> Any:
    if name in FREE_TEXTS:
        return getattr(record.trial.request, name)
    part = _PART.get(name)
    owner = record if part is None else getattr(record, part)
    return None if owner is None else getattr(owner, name)


def _runs(codes: Places) -> Iterator[tuple[int, int]]:
    """Where neighbours of one code begin and end."""
    edges = np.flatnonzero(np.diff(codes)) + 1
    bounds = [0, *edges.tolist(), len(codes)]
    return ((a, b) for a, b in itertools.pairwise(bounds) if b > a)


def unlike(records: Some) -> Sequence[Record]:
    """One record for each unlike load, batch size, seed and request without its prompt."""
    if not isinstance(records, Records):
        return records
    columns = records.columns
    parts = [columns.codes(name)[0] for name in ("load", "asked")]
    parts += [columns.codes("init_image")[0] >= 0, columns.whole("batch_size")]
    code = columns.kept("unlike", lambda: grouped(*parts, columns.whole("seed"))[0])
    _, firsts = np.unique(code[records.places], return_index=True)
    return list(pick(records, np.sort(firsts)))


def kinds(records: Some) -> tuple[Places, list[Record]]:
    """A number for the kind of each record [n], and the first record of each kind.

    Those of one kind are alike in their load and in what was asked for, but for the words of the
    texts and the seed. A hosted one is a kind of its own.
    """
    if not isinstance(records, Records):
        return np.arange(len(records)), [*records]
    columns = records.columns

    def make() -> Places:
        prompts, known = columns.codes("prompt")
        parts = [columns.codes(name)[0] for name in ("load", "asked")]
        parts += [columns.codes("init_image")[0] >= 0, np.array([t == "" for t in known])[prompts]]
        own = np.where(columns.whole("has_remote"), np.arange(columns.size) + 1, 0)
        return grouped(*parts, own)[0]

    codes, firsts = grouped(columns.kept("kinds", make)[records.places])
    return codes, [*pick(records, firsts)]


def samples(records: Some) -> Sequence[Record]:
    """One record for each unlike prompt, and one for each seed, the first of all among them."""
    if not isinstance(records, Records):
        return records

    def make() -> list[Record]:
        _, firsts = grouped(*(coded(records, name)[0] for name in (*FREE_TEXTS, "ref")))
        _, of_seeds = grouped(seeds(records))
        return list(pick(records, np.union1d(firsts, of_seeds)))

    return records.kept("samples", make)


def prompts(records: Some) -> set[tuple[str, str | None]]:
    """Every prompt with its init image."""
    (asked, known), (inits, files) = (coded(records, n) for n in ("prompt", "init_image"))
    _, firsts = grouped(asked, inits)
    pairs = zip(map(int, asked[firsts]), map(int, inits[firsts]), strict=True)
    return {(known[prompt], files[init] if init >= 0 else None) for prompt, init in pairs}
