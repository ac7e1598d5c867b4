"""Records as columns, whether they are a list or come from a large study's Parquet view.

What is computed for every record of a study asks here for one field of all of them. A list gives it
by looking at each; `Records`, a part of a view, gives it without making a single `Record`, and
makes one only for who asks for it. Numbers that are not known are NaN.
"""

import importlib
import itertools
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sd35bench.types import Flops, Record, Score, Status, from_json
from sd35bench.view import OF_MEMORY, OF_SURROUNDINGS, OF_TIMINGS, ParquetView

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
_PART = {
    **dict.fromkeys(OF_TIMINGS, "timings"),
    **dict.fromkeys(OF_MEMORY, "memory"),
    **dict.fromkeys(OF_SURROUNDINGS, "surroundings"),
    **dict.fromkeys(("key", "batch_size"), "trial"),
}
_ASKED = frozenset(("prompt", "negative_prompt", "init_image"))


_FEW, _MOST_MADE = 8192, 65536
"""Records of a part that is remembered once it was looked at, and of all such parts: 150 MB."""


class Columns:
    """All records of a view; a column is read when it is first asked for."""

    def __init__(self, view: ParquetView, parts: Sequence[Any], parse: Callable[[bytes], Any]):
        """`parts` are open Parquet files, `parse` reads a journal's line."""
        self._view, self._parts, self._parse = view, parts, parse
        self._kept: dict[str, Any] = {}
        self._made: dict[int, Record] = {}
        self.size = sum(part.metadata.num_rows for part in parts)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What was computed from the columns under a name, once."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def codes(self, name: str) -> tuple[Places, list[str]]:
        """Numbers into a list of texts, -1 where there is none; of a column that is `coded`."""

        def make() -> tuple[Places, list[str]]:
            import pyarrow as pa

            found = self._column(name).unify_dictionaries()
            codes = [c.indices.fill_null(-1).to_numpy(zero_copy_only=False) for c in found.chunks]
            texts = found.chunk(0).dictionary.to_pylist() if found.num_chunks else []
            assert pa.types.is_dictionary(found.type)
            return np.concatenate([*codes, np.empty(0, np.int32)]).astype(np.int64), texts

        return self.kept(f"codes {name}", make)

    def texts(self, name: str) -> NDArray[np.object_]:
        """A text column; records of one text share it."""

        def make() -> NDArray[np.object_]:
            if name not in self._view.coded and name != "shard":
                return self._column(name).to_numpy()
            codes, texts = self.codes(name)
            return np.array([*texts, None], object)[codes]

        return self.kept(f"texts {name}", make)

    def numbers(self, name: str) -> Floats:
        """A column of numbers."""

        def make() -> Floats:
            import pyarrow as pa

            found = self._column(name)
            return found.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)

        return self.kept(f"numbers {name}", make)

    def whole(self, name: str) -> NDArray[Any]:
        """A column of whole numbers (or truth values) that every record has."""
        return self.kept(f"whole {name}", lambda: self._column(name).to_numpy())

    def lists(self, name: str) -> tuple[Places, Floats]:
        """Where each record's numbers begin and end, and all of them."""

        def make() -> tuple[Places, Floats]:
            found = self._column(name).combine_chunks()
            return found.offsets.to_numpy().astype(np.int64), found.values.to_numpy()

        return self.kept(f"lists {name}", make)

    def grouped(self, *columns: NDArray[Any]) -> tuple[Places, Places]:
        """Number unlike combinations of columns: each record's number, and a record of each."""
        code = np.zeros(self.size, np.int64)
        for column in columns:
            _, inverse = np.unique(column, return_inverse=True)
            code = code * (int(inverse.max(initial=0)) + 1) + inverse
            _, code = np.unique(code, return_inverse=True)
        _, firsts = np.unique(code, return_index=True)
        return code, firsts

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
        if len(places) <= _FEW and len(self._made) < _MOST_MADE:
            yield from map(self.record, places.tolist())
            return
        shards, names = self.codes("shard")
        offsets, lengths = self.whole("offset"), self.whole("length")
        for start, end in _runs(shards[places]):
            with open(self._view.source / names[shards[places[start]]], "rb") as file:
                for place in places[start:end]:
                    file.seek(int(offsets[place]))
                    yield self._parse(file.read(int(lengths[place])))

    def _column(self, name: str) -> Any:
        return self._view.column(self._parts, name)


class Records(Sequence[Record]):
    """Some of a view's records, in an order of their own."""

    def __init__(self, columns: Columns, places: Places) -> None:
        """`places` are the records' numbers in the view."""
        self.columns, self.places = columns, places

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
        return records.columns.numbers(name)[records.places]
    found = (_value(r, name) for r in records)
    return np.array([np.nan if v is None else v for v in found], np.float64)


def texts(records: Some, name: str) -> NDArray[np.object_]:
    """A text field of each record, ``None`` where there is none: [n]."""
    if isinstance(records, Records):
        return records.columns.texts(name)[records.places]
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
    if isinstance(records, Records):
        codes, known = records.columns.codes("ref")
        refs = records.columns.kept("refs", lambda: [json.loads(text) for text in known])
        values = np.empty(len(refs), object)
        values[:] = [{**_REF, **ref}[name] for ref in refs]
        return values[codes[records.places]]
    found = np.empty(len(records), object)
    found[:] = [getattr(r.trial.prompt, name) for r in records]
    return found


def seconds(records: Some) -> Floats:
    """Latency of each record, NaN where it was not timed: [n]."""
    return numbers(records, "generate_s") + numbers(records, "encode_s")


def flops(records: Some) -> list[Flops | None]:
    """Operations of each record's image; ``None`` where they were not counted."""
    if not isinstance(records, Records):
        return [r.flops for r in records]
    codes, known = records.columns.codes("flops")
    made = records.columns.kept("flops", lambda: [from_json(Flops, json.loads(t)) for t in known])
    return [made[code] if code >= 0 else None for code in codes[records.places].tolist()]


def step_seconds(records: Some) -> Floats:
    """Seconds of all steps of all records, one after the other."""
    if not isinstance(records, Records):
        return np.array([s for r in records if r.timings is not None for s in r.timings.step_s])
    edges, values = records.columns.lists("step_s")
    starts, ends = edges[records.places], edges[records.places + 1]
    counts = ends - starts
    first = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
    return values[first + np.arange(int(counts.sum()))]


def has(records: Some, part: str) -> NDArray[np.bool_]:
    """Whether each record has `gpu`, `remote` or `surroundings`: [n]."""
    if isinstance(records, Records):
        return records.columns.whole(f"has_{part}")[records.places]
    return np.array([getattr(r, part) is not None for r in records], bool)


def in_time(records: Some) -> Some:
    """Records in the order of their starts; those of one moment stay as they are."""
    started = texts(records, "started_at")
    if len(started) < 2 or bool(np.all(started[:-1] <= started[1:])):
        return records
    return pick(records, np.array(sorted(range(len(started)), key=started.__getitem__)))


def by_text(records: Some, name: str) -> dict[str, Places]:
    """The numbers of the records of each text, in the order in which texts first appear."""
    if isinstance(records, Records):
        codes, known = records.columns.codes(name)
        mine = codes[records.places]
        unique, first = np.unique(mine, return_index=True)
        order = unique[np.argsort(first)]
        return {known[code]: np.flatnonzero(mine == code) for code in order}
    found: dict[str, list[int]] = {}
    for number, text in enumerate(texts(records, name)):
        found.setdefault(text, []).append(number)
    return {text: np.array(numbers) for text, numbers in found.items()}


def with_tags(records: Some, where: Mapping[str, str]) -> Some:
    """Records of prompts whose own columns have these values."""

    def fits(tags: Mapping[str, Sequence[str]]) -> bool:
        return all(value in tags.get(name, ()) for name, value in where.items())

    if not where:
        return records
    if isinstance(records, Records):
        codes, known = records.columns.codes("ref")
        right = np.array([fits(json.loads(text).get("tags", {})) for text in known], bool)
        return pick(records, right[codes[records.places]])
    return [r for r in records if fits(r.trial.prompt.tags)]


def _value(record: Record, name: str) -> Any:
    if name in _ASKED:
        return getattr(record.trial.request, name)
    part = _PART.get(name)
    owner = record if part is None else getattr(record, part)
    return None if owner is None else getattr(owner, name)


def _runs(codes: Places) -> Iterator[tuple[int, int]]:
    """Where neighbours of one code begin and end."""
    edges = np.flatnonzero(np.diff(codes)) + 1
    bounds = [0, *edges.tolist(), len(codes)]
    return ((a, b) for a, b in itertools.pairwise(bounds) if b > a)


# Scores ----------------------------------------------------------------------------------------


def unlike(records: Some) -> Sequence[Record]:
    """One record for each unlike load, batch size, seed and request without its prompt."""
    if not isinstance(records, Records):
        return records
    columns = records.columns
    parts = [columns.codes(name)[0] for name in ("load", "asked")]
    parts += [columns.codes("init_image")[0] >= 0, columns.whole("batch_size")]
    code = columns.kept("unlike", lambda: columns.grouped(*parts, columns.whole("seed"))[0])
    _, firsts = np.unique(code[records.places], return_index=True)
    return list(pick(records, np.sort(firsts)))


def prompts(records: Some) -> set[tuple[str, str | None]]:
    """Every prompt with its init image."""
    return set(zip(texts(records, "prompt"), texts(records, "init_image"), strict=True))


class Scores(Iterable[Score]):
    """The last score of every metric, trial and image, as a view has them."""

    def __init__(self, columns: Columns, places: Places) -> None:
        """`places` are all scores of the view, the oldest first."""
        self.columns, self._places = columns, places

    def __iter__(self) -> Iterator[Score]:
        for metric in self.metrics():
            yield from self.of(metric)

    def metrics(self) -> list[str]:
        """Every metric, in the order in which they first appear."""
        codes, names = self.columns.codes("metric")
        unique, first = np.unique(codes[self._places], return_index=True)
        return [names[code] for code in unique[np.argsort(first)]]

    def details(self) -> list[dict[str, Any]]:
        """Every detail that some score has, by its number."""
        _, known = self.columns.codes("detail")
        return self.columns.kept("details", lambda: [json.loads(text) for text in known])

    def of_keys(self, keys: Iterable[str]) -> Iterator[Score]:
        """The scores of some trials."""
        import pyarrow as pa

        pc: Any = importlib.import_module("pyarrow.compute")

        found = pc.is_in(pa.array(self.columns.texts("key")), pa.array([*keys], pa.string()))
        some = self._places[found.to_numpy(zero_copy_only=False)[self._places]]
        for metric in self.metrics():
            yield from self._made(metric, some)

    def of(self, metric: str) -> Iterator[Score]:
        """One metric's scores."""
        return self._made(metric, self._places)

    def _made(self, metric: str, places: Places) -> Iterator[Score]:
        places = self._of(metric, places)
        details = self.details()
        found: dict[tuple[str, str], Score] = {}
        parts = (self.columns.texts(n)[places].tolist() for n in ("key", "image"))
        codes = self.columns.codes("detail")[0][places].tolist()
        values = self.columns.numbers("value")[places].tolist()
        for key, image, code, value in zip(*parts, codes, values, strict=True):
            known = None if value != value else value
            found[key, image] = Score(
                metric=metric, key=key, image=image, value=known, detail=details[code]
            )
        yield from found.values()

    def aligned(self, metric: str, columns: Columns) -> tuple[Places, Floats]:
        """The number of each record's detail, -1 without a score, and its value: [all records]."""
        import pyarrow as pa

        pc: Any = importlib.import_module("pyarrow.compute")

        places = self._of(metric, self._places)
        where = columns.kept("keys", lambda: pa.array(columns.texts("key")))
        keys = pa.array(self.columns.texts("key")[places])
        # Trials that were made again have several records: the last score's image tells which.
        images, known = self.columns.codes("image")
        theirs, names = columns.codes("image")
        same = pc.index_in(pa.array(names), pa.array(known)).fill_null(-1).to_numpy()
        image_of = np.where(theirs >= 0, same[theirs], -1)
        codes, values = np.full(columns.size, -1, np.int64), np.full(columns.size, np.nan)
        own, scores = self.columns.codes("detail")[0][places], self.columns.numbers("value")[places]
        first = pc.index_in(where, keys).fill_null(-1).to_numpy().astype(np.int64)
        if len(pc.unique(keys)) == len(keys):
            match = (first >= 0) & (images[places][first] == image_of)
            codes[match], values[match] = own[first[match]], scores[first[match]]
            return codes, values
        last = {
            w: n for n, w in enumerate(zip(keys.to_pylist(), images[places].tolist(), strict=True))
        }
        for number, key in enumerate(
            zip(columns.texts("key").tolist(), image_of.tolist(), strict=True)
        ):
            at = last.get(key)
            if at is not None:
                codes[number], values[number] = own[at], scores[at]
        return codes, values

    def _of(self, metric: str, places: Places) -> Places:
        codes, names = self.columns.codes("metric")
        return places[codes[places] == names.index(metric)]


# All of a journal ------------------------------------------------------------------------------


def in_order(columns: Columns, shards: Sequence[str]) -> Records:
    """Every record of a view in the order of its journal, whose shards are named in theirs."""
    codes, names = columns.codes("shard")
    ranks = {name: rank for rank, name in enumerate(shards)}
    rank = np.array([ranks[name] for name in names], np.int64)[codes]
    places, offsets = np.arange(columns.size), columns.whole("offset")
    after = np.diff(rank)
    if np.any(after < 0) or np.any((after == 0) & (np.diff(offsets) < 0)):
        places = np.lexsort((offsets, rank))
    return Records(columns, places)


def last_of_each(records: Records, whole: Callable[[], Container[str]]) -> Records:
    """The record that counts of each trial, in the order in which trials first appeared.

    It is the last, but that an image that is `whole` wins over later failures.
    """
    codes = records.columns.kept("key codes", lambda: _encoded(records.columns))[records.places]
    keys, firsts, counts = np.unique(codes, return_index=True, return_counts=True)
    if counts.max(initial=0) <= 1:
        return records
    chosen = np.empty(int(codes.max()) + 1, np.int64)
    chosen[codes] = np.arange(len(codes))
    again = np.flatnonzero(np.isin(codes, keys[counts > 1]))
    status, images = texts(pick(records, again), "status"), texts(pick(records, again), "image")
    best: dict[int, int] = {}
    for i, place in enumerate(again):
        code = int(codes[place])
        before = best.get(code)
        failed_later = before is not None and status[before] == Status.OK != status[i]
        if failed_later and str(images[before]) in whole():
            continue
        best[code] = i
    for code, i in best.items():
        chosen[code] = again[i]
    return Records(records.columns, records.places[chosen[keys[np.argsort(firsts)]]])


def _encoded(columns: Columns) -> Places:
    import pyarrow as pa

    found = pa.array(columns.texts("key")).dictionary_encode()
    return found.indices.to_numpy().astype(np.int64)
