"""Which of a view's lines count: the last record of each trial, the last score of each image."""

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from sd35bench.study.columns import Columns, Floats, Places, Records, dense, grouped, pick, texts
from sd35bench.types import Score, Status


def in_order(columns: Columns, shards: Sequence[str]) -> Records:
    """Every record of a view in the order of its journal, whose shards are named in theirs."""

    def make() -> Places:
        codes, names = columns.codes("shard")
        ranks = {name: rank for rank, name in enumerate(shards)}
        rank = np.array([ranks[name] for name in names], np.int64)[codes]
        places, offsets = np.arange(columns.size), columns.whole("offset")
        after = np.diff(rank)
        if np.any(after < 0) or np.any((after == 0) & (np.diff(offsets) < 0)):
            places = np.lexsort((offsets, rank))
        return places

    return Records(columns, columns.kept(("order", *shards), make))


def last_of_each(records: Records, whole: Callable[[], Container[str]]) -> Records:
    """The record that counts of each trial, in the order in which trials first appeared.

    It is the last, but that an image that is `whole` wins over later failures.
    """
    if not _made_again(records.columns):
        return records
    codes = dense(records.columns.whole("number")[records.places])
    keys, firsts, counts = np.unique(codes, return_index=True, return_counts=True)
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


def _made_again(columns: Columns) -> bool:
    """Whether some trial has several records."""

    def make() -> bool:
        numbers = np.sort(columns.whole("number"))
        return bool(np.any(numbers[1:] == numbers[:-1]))

    return columns.kept("made again", make)


# Scores ----------------------------------------------------------------------------------------


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
        _, firsts = grouped(codes[self._places])
        return [names[code] for code in codes[self._places[firsts]].tolist()]

    def details(self) -> list[dict[str, Any]]:
        """Every detail that some score has, by its number."""
        _, known = self.columns.codes("detail")
        return self.columns.kept("details", lambda: [json.loads(text) for text in known])

    def of(self, metric: str) -> Iterator[Score]:
        """One metric's scores."""
        return self._made(metric, self._of(metric))

    def _made(self, metric: str, places: Places) -> Iterator[Score]:
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

    def refusals(self, metric: str) -> Iterator[Score]:
        """The last scores of a metric that are 0, or no number; the others are not made."""
        places = self._of(metric)
        latest = places[_lasts(self.columns.whole("where")[places])]
        values = self.columns.numbers("value")[latest]
        return self._made(metric, np.sort(latest[~(np.abs(values) > 0.0)]))

    def aligned(self, metric: str, columns: Columns) -> tuple[Places, Floats]:
        """The number of each record's detail, -1 without a score, and its value: [all records]."""
        return self.columns.kept(("aligned", metric, columns), lambda: self._align(metric, columns))

    def _align(self, metric: str, columns: Columns) -> tuple[Places, Floats]:
        places = self._of(metric)
        which, mine = _matched(self.columns.whole("where")[places], columns)
        found = places[which]
        codes, values = np.full(columns.size, -1, np.int64), np.full(columns.size, np.nan)
        codes[mine] = self.columns.codes("detail")[0][found]
        values[mine] = self.columns.numbers("value")[found]
        return codes, values

    def _of(self, metric: str) -> Places:
        codes, names = self.columns.codes("metric")
        code = names.index(metric) if metric in names else -2
        return self._places[codes[self._places] == code]


def _matched(where: Places, columns: Columns) -> tuple[Places, Places]:
    """Which scores, of all by their `where`, count for some record, and the places of these."""
    images = columns.kept("images", lambda: np.flatnonzero(columns.codes("image")[0] >= 0))
    # Mostly every image has one score, in the order of the records: then nothing is sorted.
    if np.array_equal(where, columns.whole("where")[images]) and not _made_again(columns):
        return np.arange(len(where)), images
    order = np.argsort(where, kind="stable")  # of several scores of an image the last one counts
    known = where[order]
    asked, wanted = columns.kept("where", lambda: _ordered(columns.whole("where")))
    last = np.searchsorted(known, wanted, side="right") - 1
    there = last >= 0
    there[there] = known[last[there]] == wanted[there]
    return order[last[there]], asked[there]


def _lasts(values: Places) -> Places:
    """Where each value appears last."""
    return len(values) - 1 - np.unique(values[::-1], return_index=True)[1]


def _ordered(values: Places) -> tuple[Places, Places]:
    order = np.argsort(values)
    return order, values[order]
