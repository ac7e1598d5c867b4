"""Which timed trials other work disturbed, and how fast the machine was: pure judgement.

A trial lies between two readings of the canary (`sd35bench.canary`); trials of one block share
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

from sd35bench.fields import setting_identity
from sd35bench.types import CanaryFacts, Record, Session, Status, Surroundings

TOLERANCE = 0.10
REGIME = 0.8
BUDGET = 0.5
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
    by_session: dict[str, list[Record]] = defaultdict(list)
    spans = _Spans(sessions)
    for record in records:
        spans.add(record)
        if is_timed(record):
            by_session[record.session_id].append(record)
    best: dict[str, float] = defaultdict(float)
    middles: dict[str, tuple[float, str]] = {}
    marked: list[Stamp] = []
    for session_id, series in by_session.items():
        marked += [stamp(r) for r, bad in zip(series, judge(series), strict=True) if bad]
        found, session = readings(series), sessions.get(session_id)
        facts = None if session is None else session.canary
        if found and facts is not None:
            middles[session_id] = median(found) * facts.best, facts.machine
            highest = facts.best * max(1.0, sustained(series))
            best[facts.machine] = max(best[facts.machine], highest)
    speed = {key: middle / best[machine] for key, (middle, machine) in middles.items()}
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
        self._records: dict[str, list[Record]] = defaultdict(list)

    def add(self, record: Record) -> None:
        """Note when a record's time was taken."""
        alone = record.trial.batch_size == 1 or record.surroundings is not None
        if record.session_id in self._known and record.timings is not None and alone:
            self._records[record.session_id].append(record)

    def overlapped(self) -> frozenset[Stamp]:
        """All timings that overlapped one of another session on a device that both used."""
        windows = {key: self._window(found) for key, found in self._records.items()}
        found: set[Stamp] = set()
        for group in self._groups:
            keys = [key for key in group if key in windows]
            # Sessions that followed each other, which most do, are not looked at any closer.
            near = [k for k in keys if any(k != o and _meet(windows[k], windows[o]) for o in keys)]
            found |= _overlaps([_span(r) for key in near for r in self._records[key]])
        return frozenset(found)

    def _window(self, records: list[Record]) -> tuple[float, float]:
        first, last = (f(records, key=lambda r: r.started_at) for f in (min, max))
        return _span(first)[0], _span(last)[1]


_Span = tuple[float, float, Stamp]


def _span(record: Record) -> _Span:
    assert record.timings is not None
    began = datetime.fromisoformat(record.started_at).timestamp()
    return began, began + record.timings.generate_s, stamp(record)


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


def judge_session(series: Sequence[Record], facts: CanaryFacts) -> Contention:
    """Judge the timings of one session, in order of time."""
    marked = [stamp(r) for r, bad in zip(series, judge(series), strict=True) if bad]
    found, best = readings(series), max(1.0, sustained(series))
    speed = {series[0].session_id: median(found) / best} if found else {}
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


def judge(series: Sequence[Record]) -> list[bool]:
    """Say of each of one session's timed records, in order of time, whether it is disturbed."""
    pairs = between(series)
    known = readings(series)
    middle = median(known) if known else None
    usual = _usual_shares(series)
    return [
        _disturbed(before, after, middle) or _starved(record, usual)
        for record, (before, after) in zip(series, pairs, strict=True)
    ]


def between(series: Sequence[Record]) -> list[tuple[float | None, float | None]]:
    """The readings before and after each record; a block's trials share those at its ends.

    A block that a long trial cut short ends with the reading before that.
    """
    found: list[tuple[float | None, float | None]] = []
    before: float | None = None
    for record in series:
        seen = record.surroundings
        if seen is not None and seen.canary_before is not None:
            before = seen.canary_before
        found.append((before, None))
    after: float | None = None
    for number in range(len(series) - 1, -1, -1):
        seen = series[number].surroundings
        if seen is not None and seen.canary_after is not None:
            after = seen.canary_after
        found[number] = (found[number][0], after)
        if seen is not None and seen.canary_before is not None:
            after = seen.canary_before  # an open block before it ends with the same reading
    return found


def readings(series: Iterable[Record]) -> list[float]:
    """All readings of a session, relative to its best; one that serves two trials counts twice."""
    seen = [r.surroundings for r in series if r.surroundings is not None]
    both = ((s.canary_before, s.canary_after) for s in seen)
    return [value for pair in both for value in pair if value is not None]


def sustained(series: Sequence[Record]) -> float:
    """The highest speed that held from before a trial to after it; 0 where none is known."""
    known = (min(b, a) for b, a in between(series) if b is not None and a is not None)
    return max(known, default=0.0)


def _disturbed(before: float | None, after: float | None, middle: float | None) -> bool:
    known = [value for value in (before, after) if value is not None]
    if middle is None or not known:
        return False
    if max(known) - min(known) > TOLERANCE * max(known):
        return True
    return any(abs(value - middle) > TOLERANCE * middle for value in known)


def _usual_shares(series: Iterable[Record]) -> dict[tuple[object, ...], float]:
    shares: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for record in series:
        if record.surroundings is not None and record.surroundings.cpu_share is not None:
            shares[_work(record)].append(record.surroundings.cpu_share)
    return {work: median(x) for work, x in shares.items() if len(x) >= LEAST_FOR_CPU}


def _starved(record: Record, usual: Mapping[tuple[object, ...], float]) -> bool:
    """Whether it was taken off its cores and got less CPU time than its like.

    Waiting of its own (for a lock, a GPU, a disk) is no involuntary switch.
    """
    seen, share = record.surroundings, usual.get(_work(record))
    if seen is None or seen.cpu_share is None or share is None or not seen.switches:
        return False
    return seen.cpu_share < (1.0 - TOLERANCE) * share


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

    kept: list[Record] = field(default_factory=list)
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


def choose(timed: Sequence[Record], found: Contention) -> Timed:
    """Choose which of a setting's timings count: of one regime, undisturbed where most are."""
    apart = [r for r in timed if not found.is_overlapped(r)]
    alike, speed = _one_regime(apart, found.speed)
    watched = sum(map(is_timed, timed))
    counts = {OVERLAPPED: len(timed) - len(apart), SLOWER: len(apart) - len(alike)}
    left = Counter({why: count for why, count in counts.items() if count})
    quiet = [r for r in alike if not found.is_disturbed(r)]
    disturbed = len(alike) - len(quiet)
    marked = disturbed > len(quiet)
    if disturbed and not marked:
        left[DISTURBED] = disturbed
    kept = alike if marked else quiet
    return Timed(kept, left, watched, disturbed, marked, speed)


def unlike(one: float | None, other: float | None) -> bool:
    """Whether two median speeds are of unlike regimes; not where one is unknown."""
    if one is None or other is None:
        return False
    return min(one, other) < REGIME * max(one, other)


def _one_regime(
    timed: Sequence[Record], speed: Mapping[str, float]
) -> tuple[list[Record], float | None]:
    """The timings of the fastest regime that made enough of them, and its median speed."""
    known = sorted({speed[r.session_id] for r in timed if r.session_id in speed}, reverse=True)
    for fastest in known:
        members = [
            r for r in timed if REGIME * fastest <= speed.get(r.session_id, fastest) <= fastest
        ]
        if len(members) >= _LEAST_SHARE * len(timed):
            seen = [speed[r.session_id] for r in members if r.session_id in speed]
            return members, median(seen)
    return list(timed), None


def sentences(settings: Iterable[Timed], speeds: Mapping[str, float]) -> list[str]:
    """What a reader has to know of a study's clock; nothing where the machine was quiet.

    `speeds`: of the sessions with readings.
    """
    settings = list(settings)
    low, high = min(speeds.values(), default=1.0), max(speeds.values(), default=1.0)
    found = []
    if unlike(low, high):
        found.append(
            f"this machine ran at {low:.2f} of its best in one process start and at {high:.2f} in"
            " another: latencies of unlike regimes are not pooled, and settings that were timed in"
            " unlike ones cannot be compared"
        )
    elif low < REGIME:
        found.append(
            f"this machine ran at {low:.2f} of its best: latencies hold for that, not for a quiet"
            " one"
        )
    disturbed = sum(each.disturbed for each in settings)
    if disturbed:
        share = disturbed / sum(each.watched for each in settings)
        marked = sum(each.marked for each in settings)
        said = "none of them is in a latency"
        if marked:
            said = f"{marked} of {len(settings)} settings have more than half such and count them"
        found.append(f"{disturbed} timed images ({share:.0%}) were {DISTURBED}; {said}")
    return found


def clock_text(settings: Iterable[Timed], speeds: Mapping[str, float]) -> str | None:
    """How quiet the machine was, for a table's caption; ``None`` where nothing was watched."""
    settings = list(settings)
    watched = sum(each.watched for each in settings)
    if not watched or not speeds:
        return None
    disturbed = sum(each.disturbed for each in settings)
    return (
        f"clock: median canary at {median(speeds.values()):.2f} of this machine's best;"
        f" {disturbed} of {watched} timed images disturbed"
    )


def is_timed(record: Record) -> bool:
    """Whether it was timed between readings and ended well."""
    return record.status is Status.OK and record.surroundings is not None
