"""Which timed trials other work disturbed, and how fast the machine was: pure judgement.

A trial lies between two readings of the canary (`machine.canary`); trials of one block share
them. It is *disturbed* where the two differ by more than `TOLERANCE`, where one lies further than
that off the session's median, or where the worker was taken off its cores and got a tenth less CPU
time than that setting's median: what happens in the middle of a long trial, between the readings.

A host can be slow for hours: then no trial stands out, and the session's median against the best
that was ever seen on the machine tells. Sessions whose medians differ by more than a fifth
(`REGIME`) are unlike *regimes*, whose latencies are never pooled.

Disturbed trials are timed again at the session's end, up to `BUDGET` of the timed ones. Latencies
leave disturbed trials out, unless more than half of a setting's are: then all count, and the tables
say so. Images are not affected: quality is judged on all.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import words
from sd35bench.fields import setting_identity
from sd35bench.study.columns import (
    Columns,
    Floats,
    Records,
    Some,
    by_session,
    coded,
    grouped,
    has,
    is_text,
    numbers,
    pick,
    texts,
)
from sd35bench.study.view import name_number
from sd35bench.types import CanaryFacts, Record, Session, Status, Surroundings

TOLERANCE = 0.10
"""How far readings may differ, as a share. Chosen: no machine was quiet enough to measure what a
quiet one shows; beside a hog on the core they fell to 0.40 of the best (docs/log.md)."""
REGIME = 0.8
"""Median speeds whose quotient is below are unlike regimes: twice the tolerance apart."""
BUDGET = 0.5
"""Share of the timed trials that are timed again, no more: a host can be slow for hours."""
LEAST_FOR_CPU = 4
"""Trials of a setting from which its usual share of CPU time is taken."""
_LEAST_SHARE = 0.25
"""Share of a setting's timed trials that a faster regime must have made to be the one that counts;
with fewer the slower regime's many say more than the faster one's few."""

DISTURBED = "disturbed by other work on the machine"
OVERLAPPED = "timed while another run timed on the same device"
_SLACK_S = 0.002
"""Starts are kept in whole milliseconds."""
SLOWER = "timed while the machine ran slower"

Stamp = tuple[str, str, str]


def stamp(record: Record) -> Stamp:
    """What tells two timings of one trial apart."""
    return record.session_id, record.trial.key, record.started_at


@dataclass(frozen=True, slots=True)
class Contention:
    """What a study's readings say: disturbed trials, and each session's median relative speed.

    A session without readings (an older version, a hosted service) has no speed: unknown.
    `overlapped` trials were timed while another session timed on one of their devices.
    """

    disturbed: frozenset[Stamp] = frozenset()
    speed: Mapping[str, float] = field(default_factory=dict)
    overlapped: frozenset[Stamp] = frozenset()

    def is_disturbed(self, record: Record) -> bool:
        """Whether this very timing is disturbed or overlapped; not where nothing is known."""
        return stamp(record) in self.disturbed or self.is_overlapped(record)

    def is_overlapped(self, record: Record) -> bool:
        """Whether this very timing overlapped another session's on its device."""
        return stamp(record) in self.overlapped

    def is_refused(self, record: Record) -> bool:
        """Whether it is disturbed, or its session ran far below the machine's best."""
        return self.is_disturbed(record) or self.speed.get(record.session_id, 1.0) < REGIME


def read_contention(records: Iterable[Record], sessions: Mapping[str, Session]) -> Contention:
    """Judge all timings of a study, those that were made again too, in the order of its journal."""
    found = records if isinstance(records, Records) else list(records)
    timed = pick(found, _are_timed(found))
    spans = _Spans(sessions)
    spans.add(found)
    best: dict[str, float] = defaultdict(float)
    middles: dict[str, tuple[float, str]] = {}
    marked: list[Stamp] = []
    for session_id, places in by_session(timed).items():
        series, session = pick(timed, places), sessions.get(session_id)
        marked += _stamps(pick(series, _judged(series)))
        seen, facts = readings(series), None if session is None else session.canary
        if len(seen) and facts is not None:
            middles[session_id] = middle(seen) * facts.best, facts.machine
            highest = facts.best * max(1.0, sustained(series))
            best[facts.machine] = max(best[facts.machine], highest)
    speed = {key: found / best[machine] for key, (found, machine) in middles.items()}
    return Contention(frozenset(marked), speed, spans.overlapped())


class _Spans:
    """When which session timed on which device, as far as sessions say where they were."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        users: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for key, session in sessions.items():
            for device in _devices(session):
                users[device].add(key)
        # Cores that the same sessions used tell the same.
        self._groups = {frozenset(found) for found in users.values() if len(found) > 1}
        self._known = frozenset[str]().union(*self._groups)
        self._records: dict[str, Some] = {}

    def add(self, records: Some) -> None:
        """Note when records' times were taken."""
        if self._known:
            alone = (numbers(records, "batch_size") == 1) | has(records, "surroundings")
            timed = pick(records, alone & ~np.isnan(numbers(records, "generate_s")))
            places = by_session(timed)
            self._records = {k: pick(timed, v) for k, v in places.items() if k in self._known}

    def overlapped(self) -> frozenset[Stamp]:
        """All timings that overlapped one of another session on a device that both used."""
        windows = {key: self._window(found) for key, found in self._records.items()}
        found: set[Stamp] = set()
        for group in self._groups:
            keys = [key for key in group if key in windows]
            # Sessions that followed each other, which most do, are not looked at any closer.
            near = [k for k in keys if any(k != o and _meet(windows[k], windows[o]) for o in keys)]
            found |= _overlaps([span for key in near for span in _spans(self._records[key])])
        return frozenset(found)

    def _window(self, records: Some) -> tuple[float, float]:
        started = texts(records, "started_at").tolist()
        ends = (f(range(len(started)), key=started.__getitem__) for f in (min, max))
        (first, last) = _spans(pick(records, np.array(list(ends))))
        return first[0], last[1]


_Span = tuple[float, float, Stamp]


def _spans(records: Some) -> list[_Span]:
    stamps, taken = _stamps(records), numbers(records, "generate_s").tolist()
    began = [datetime.fromisoformat(at).timestamp() for _, _, at in stamps]
    return [(b, b + s, stamp) for b, s, stamp in zip(began, taken, stamps, strict=True)]


def _meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] - _SLACK_S and other[0] < one[1] - _SLACK_S


def _overlaps(spans: list[_Span]) -> set[Stamp]:
    found: set[Stamp] = set()
    running: list[_Span] = []
    for span in sorted(spans):
        running = [other for other in running if span[0] < other[1] - _SLACK_S]
        for other in running:
            if other[2][0] != span[2][0]:
                found |= {other[2], span[2]}
        running.append(span)
    return found


def _devices(session: Session) -> list[tuple[Any, ...]]:
    """What a session timed on: a GPU or cores, of one boot of one host."""
    known = session.environment
    names = str(known.get("occupies") or "").split(",")
    return [(known.get("hostname"), known.get("boot_id"), name) for name in names if name]


def _stamps(records: Some) -> list[Stamp]:
    parts = (texts(records, name) for name in ("session_id", "key", "started_at"))
    return list(zip(*parts, strict=True))


def judge_session(series: Sequence[Record]) -> Contention:
    """Judge the timings of one session, in order of time."""
    marked = [stamp(r) for r, bad in zip(series, judge(series), strict=True) if bad]
    found, best = readings(series), max(1.0, sustained(series))
    speed = {series[0].session_id: middle(found) / best} if len(found) else {}
    return Contention(frozenset(marked), speed)


def relative(seen: Surroundings | None, facts: CanaryFacts) -> Surroundings | None:
    """What a worker saw, with the canary's speeds relative to the session's best."""
    if seen is None:
        return None
    before, after = (
        None if speed is None else round(speed / facts.best, 4)
        for speed in (seen.canary_before, seen.canary_after)
    )
    return replace(seen, canary_before=before, canary_after=after)


def judge(series: Some) -> list[bool]:
    """Say of each of one session's timed records, in order of time, whether it is disturbed."""
    return _judged(series).tolist()


def _judged(series: Some) -> NDArray[np.bool_]:
    before, after = _around(series)
    known = readings(series)
    usual = middle(known) if len(known) else np.nan
    highest, lowest = np.fmax(before, after), np.fmin(before, after)
    apart = highest - lowest > TOLERANCE * highest
    off = (np.abs(x - usual) > TOLERANCE * usual for x in (before, after))
    disturbed = np.logical_or.reduce([apart, *off])
    return (disturbed & ~np.isnan(usual)) | _starved(series)


def between(series: Some) -> list[tuple[float | None, float | None]]:
    """The readings before and after each record; a block's trials share those at its ends.

    A block that a long trial cut short ends with the reading before that.
    """
    sides = ([None if np.isnan(v) else v for v in x.tolist()] for x in _around(series))
    return list(zip(*sides, strict=True))


def _around(series: Some) -> tuple[Floats, Floats]:
    """The same, NaN where there is none."""
    before, after = numbers(series, "canary_before"), numbers(series, "canary_after")
    # After a record comes its own reading, or the next one's before or after.
    both = np.stack([before, after], axis=1).ravel()
    return _carried(before), _carried(both[::-1])[::-1][1::2]


def _carried(values: Floats) -> Floats:
    """Each value that is not known replaced by the last known one before it."""
    places = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(places) if len(values) else places
    return np.where(last < 0, np.nan, values[last])


def readings(series: Some) -> Floats:
    """All readings of a session, relative to its best; one that serves two trials counts twice."""
    found = np.stack([numbers(series, name) for name in ("canary_before", "canary_after")], axis=1)
    return found[~np.isnan(found)]


def middle(values: Floats) -> float:
    """The median of at least one value."""
    return float(np.median(values))


def sustained(series: Some) -> float:
    """The highest speed that held from before a trial to after it; 0 where none is known."""
    held = np.minimum(*_around(series))
    return float(np.max(held[~np.isnan(held)], initial=0.0))


def _starved(series: Some) -> NDArray[np.bool_]:
    """Whether each was taken off its cores and got less CPU time than its like.

    Waiting of its own (for a lock, a GPU, a disk) is no involuntary switch.
    """
    shares, works = numbers(series, "cpu_share"), _works(series)
    usual = np.full(len(shares), np.nan)
    for work in np.unique(works):
        mine = works == work
        known = shares[mine & ~np.isnan(shares)]
        if len(known) >= LEAST_FOR_CPU:
            usual[mine] = middle(known)
    return (numbers(series, "switches") > 0) & (shares < (1.0 - TOLERANCE) * usual)


def _works(series: Some) -> NDArray[np.int64]:
    """A number for what decides how long each takes: its setting's request, and its batch."""
    if isinstance(series, Records):
        columns = series.columns
        return columns.kept("works", lambda: _all_works(columns))[series.places]
    found: dict[object, int] = {}
    return np.array([found.setdefault(_work(r), len(found)) for r in series], np.int64)


def _all_works(columns: Columns) -> NDArray[np.int64]:
    init = columns.codes("init_image")[0] >= 0
    batch = columns.whole("batch_actual")
    codes, firsts = grouped(columns.codes("asked")[0], init, batch)
    found: dict[object, int] = {}
    works = (_work(columns.record(i)) for i in firsts.tolist())
    return np.array([found.setdefault(work, len(found)) for work in works], np.int64)[codes]


def _work(record: Record) -> tuple[object, ...]:
    return (record.batch_actual, *setting_identity(record.trial.request))


# What counts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timed:
    """A setting's timed records that count (`kept`), and how many do not and why (`left`).

    `disturbed` counts the disturbed ones, whether they count or not; `marked`: they count, since
    more than half are. `watched` counts those with readings; `speed` is the median relative speed
    of the sessions that count, ``None`` where it is unknown.
    """

    kept: Some = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    watched: int = 0
    disturbed: int = 0
    marked: bool = False
    speed: float | None = None

    def document(self) -> dict[str, object] | None:
        """What `show --json` prints; ``None`` where nothing was watched."""
        if not self.watched:
            return None
        return {
            "timed": self.watched,
            "disturbed": self.disturbed,
            "counted": self.marked,
            "slower": self.left[SLOWER],
            "canary": self.speed,
        }


def choose(timed: Some, found: Contention) -> Timed:
    """Choose which of a setting's timings count: of one regime, undisturbed where most are."""
    apart = timed
    if found.overlapped:
        apart = pick(timed, ~_are_in(timed, found.overlapped))
    alike, speed = _one_regime(apart, found.speed)
    watched = int(_are_timed(timed).sum())
    counts = {OVERLAPPED: len(timed) - len(apart), SLOWER: len(apart) - len(alike)}
    left = Counter({why: count for why, count in counts.items() if count})
    quiet = pick(alike, ~_are_in(alike, found.disturbed))
    disturbed = len(alike) - len(quiet)
    marked = disturbed > len(quiet)
    if disturbed and not marked:
        left[DISTURBED] = disturbed
    kept = alike if marked else quiet
    return Timed(kept, left, watched, disturbed, marked, speed)


def _are_in(records: Some, stamps: frozenset[Stamp]) -> NDArray[np.bool_]:
    if not stamps:
        return np.zeros(len(records), bool)
    if isinstance(records, Records):
        columns = records.columns
        return columns.kept(stamps, lambda: _marked(columns, stamps))[records.places]
    return np.array([stamp in stamps for stamp in _stamps(records)], bool)


def _marked(columns: Columns, stamps: frozenset[Stamp]) -> NDArray[np.bool_]:
    """Which of all records of a view are among these; only those of the same trials are read."""
    known = columns.whole("number")
    found = np.isin(known, np.array([name_number(key) for _, key, _ in stamps]))
    near = Records(columns, np.flatnonzero(found))
    found[near.places] = [stamp in stamps for stamp in _stamps(near)]
    return found


def unlike(one: float | None, other: float | None) -> bool:
    """Whether two median speeds are of unlike regimes; not where one is unknown."""
    if one is None or other is None:
        return False
    return min(one, other) < REGIME * max(one, other)


def _one_regime(timed: Some, speed: Mapping[str, float]) -> tuple[Some, float | None]:
    """The timings of the fastest regime that made enough of them, and its median speed."""
    codes, names = coded(timed, "session_id")
    own = np.array([speed.get(name, np.nan) for name in names], np.float64)[codes]
    for fastest in np.unique(own[~np.isnan(own)])[::-1].tolist():
        filled = np.where(np.isnan(own), fastest, own)
        members = (filled >= REGIME * fastest) & (filled <= fastest)
        if members.sum() >= _LEAST_SHARE * len(timed):
            seen = own[members & ~np.isnan(own)]
            return timed if members.all() else pick(timed, members), middle(seen)
    return timed, None


def sentences(settings: Iterable[Timed], speeds: Mapping[str, float]) -> list[str]:
    """What a reader has to know of a study's clock; nothing where the machine was quiet.

    `speeds`: of the sessions with readings.
    """
    settings = list(settings)
    low, high = min(speeds.values(), default=1.0), max(speeds.values(), default=1.0)
    found = []
    if unlike(low, high):
        found.append(
            f"this machine ran at {words.number(low, 2)} of its best in one process start and at"
            f" {words.number(high, 2)} in another: latencies of unlike regimes are not pooled, and"
            " settings that were timed in unlike ones cannot be compared"
        )
    elif low < REGIME:
        found.append(
            f"this machine ran at {words.number(low, 2)} of its best: latencies hold for that, not"
            " for a quiet one"
        )
    disturbed = sum(each.disturbed for each in settings)
    if disturbed:
        share = words.number(100 * (disturbed / sum(each.watched for each in settings)), 0)
        marked = sum(each.marked for each in settings)
        said = "none of them is in a latency"
        if marked:
            have, count = ("has", "counts") if marked == 1 else ("have", "count")
            of = words.plural(len(settings), "setting")
            said = f"{marked} of {of} {have} more than half such and {count} them"
        found.append(f"{disturbed} timed images ({share}%) were {DISTURBED}; {said}")
    return found


def clock_text(settings: Iterable[Timed], speeds: Mapping[str, float]) -> str | None:
    """How quiet the machine was, for a table's caption; ``None`` where nothing was watched."""
    settings = list(settings)
    watched = sum(each.watched for each in settings)
    if not watched or not speeds:
        return None
    disturbed = sum(each.disturbed for each in settings)
    return (
        f"clock: median canary at {words.number(median(speeds.values()), 2)} of this machine's"
        f" best; {disturbed} of {watched} timed images disturbed"
    )


def _are_timed(records: Some) -> NDArray[np.bool_]:
    return is_text(records, "status", Status.OK) & has(records, "surroundings")


def is_timed(record: Record) -> bool:
    """Whether it was timed between readings and ended well."""
    return record.status is Status.OK and record.surroundings is not None
