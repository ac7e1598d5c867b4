"""A study's records, sessions and scores, sorted into rows: one per setting and environment.

Figures from unlike environments are never pooled, so a setting that ran on two machines is two
rows. Guards come before every metric: a record counts for quality only if it is OK, its image is
there, was not found black, constant or of a wrong size when it was scored, and is not the very
file that another seed gave in the same setting. One pass over the records, one over the scores.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.facts import GUARD
from sd35bench.analysis.grouping import HELD_OUT, setting_codes, setting_fields
from sd35bench.analysis.scores import Found, ScoreIndex, ScoreLike
from sd35bench.machine.contention import Timed, choose, clock_text, read_contention, sentences
from sd35bench.machine.measure import environment_id
from sd35bench.study.columns import (
    Places,
    Some,
    among,
    coded,
    distinct,
    distinct_refs,
    grouped,
    has,
    is_ref,
    is_text,
    join,
    numbers,
    pick,
    seeds,
    split,
)
from sd35bench.types import CUT, Record, Session, Status, content_hash
from sd35bench.words import plural

T = TypeVar("T")

REPEATED = "same image under different seeds"
MISSING = "image file missing"
DAMAGED = "image file damaged"
NAMED = 5
"""Damaged files whose names are said; `sd35bench verify` names all."""
RESUMED = "found again after a crash or a lost answer"
BESIDE = "ran beside others"
_BATCHED = "did not run at batch size 1"


@dataclass(slots=True)
class Row:
    """One setting in one environment.

    `records` are all of them, failed ones too; `timed` the OK ones that ran alone; `usable` the
    ones whose images may be scored; `excluded` counts the OK ones that may not, by reason;
    `untimed` counts hosted calls that are OK and give no latency, by reason. `clock` says which of
    the timings made here count, and how quiet the machine was.
    """

    setting: dict[str, Any]
    environment_id: str | None
    records: Some = field(default_factory=list)
    timed: Some = field(default_factory=list)
    usable: Some = field(default_factory=list)
    excluded: Counter[str] = field(default_factory=Counter)
    untimed: Counter[str] = field(default_factory=Counter)
    clock: Timed = field(default_factory=Timed)

    @property
    def id(self) -> str:
        """The setting's hash and the environment's first digits."""
        return f"{self.setting['setting']}@{(self.environment_id or 'unknown')[:8]}"

    @property
    def random_weights(self) -> bool:
        """Whether its images are noise by design, of which no quality can be asked."""
        return self.records[0].trial.load.model.weights == "random"

    @property
    def failed(self) -> int:
        """How many trials did not end OK."""
        return int((~is_text(self.records, "status", Status.OK)).sum())

    @property
    def hosted(self) -> bool:
        """Whether a hosted service made its images, so that no limit of this machine holds."""
        return self.records[0].trial.load.is_hosted

    def here(self, found: Sequence[T]) -> Sequence[T]:
        """What was found of this machine: none of it is a hosted service's.

        What this process took to talk to a service says nothing of the model.
        """
        return [] if self.hosted else found

    @property
    def ambiguous(self) -> int:
        """How many of the failed may have been made, and billed, all the same."""
        return int(is_text(self.records, "status", Status.AMBIGUOUS).sum())

    @property
    def quality_batch_size(self) -> int | None:
        """The batch size that made most usable images; on a tie, the larger."""
        if not self.usable:
            return None
        found = np.unique(numbers(self.usable, "batch_size"), return_counts=True)
        sizes = zip(*(part.tolist() for part in reversed(found)), strict=True)
        return int(max(sizes)[1])

    def quality_records(self) -> Some:
        """Usable records of the batch size that quality figures come from."""
        if not self.usable:
            return []
        mine = numbers(self.usable, "batch_size") == self.quality_batch_size
        return self.usable if mine.all() else pick(self.usable, mine)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a study, its sessions, and scores by metric and (trial key, image digest).

    `busy` says in sentences what other work did to the latencies, `clock` how quiet the machine
    was; `speed` is each session's median canary, relative to the machine's best.
    """

    rows: list[Row]
    sessions: dict[str, Session]
    scores: ScoreIndex
    warnings: list[str]
    busy: list[str] = field(default_factory=list)
    clock: str | None = None
    speed: Mapping[str, float] = field(default_factory=dict)

    def score(self, metric: str, record: Record) -> ScoreLike | None:
        """Look up a record's score for the image that it has now."""
        return self.scores.get(metric, {}).get((record.trial.key, record.image or ""))


def read_table(study: Any, pool_hosts: bool = False) -> Table:
    """Sort a study (`sd35bench.study.store.Study`) into rows.

    `pool_hosts`: unlike hosts and devices with the same software share rows.
    """
    sessions = by_host(study.sessions(), pool_hosts)
    scores = ScoreIndex(study.scores())
    records = study.records()
    images = study.images()
    damaged = {path.name.partition(".")[0]: path for path in images.damaged}
    found = read_contention(study.all_records(), sessions)
    # Looked up once for all: each setting has images of its own, thousands of them.
    lost = _lost(records, images.whole, damaged)
    rows = []
    for row, places in _rows(records, sessions):
        _sort_out(row, scores.found(GUARD, row.records), lost[places])
        row.clock = choose(row.timed, found)
        row.timed = row.clock.kept
        rows.append(row)
    named = distinct(records, "image") if damaged else set()
    paths = [p.relative_to(study.path) for digest, p in damaged.items() if digest in named]
    warnings = [*damaged_text(paths), *_warnings(rows)]
    clocks = [row.clock for row in rows]
    busy, clock = sentences(clocks, found.speed), clock_text(clocks, found.speed)
    return Table(rows, sessions, scores, warnings, busy, clock, found.speed)


def by_host(sessions: Mapping[str, Session], pool: bool = False) -> dict[str, Session]:
    """Tell sessions of unlike hosts apart by `environment_id`; with `pool` not even by hardware.

    Devices of one host stay together where their environments are alike. A study of one host keeps
    the ids that it has.
    """
    hosts: dict[str, set[Any]] = defaultdict(set)
    for session in sessions.values():
        hosts[session.environment_id].add(session.environment.get("hostname"))

    def place(session: Session) -> str:
        if "service" in session.environment or "hostname" not in session.environment:
            return session.environment_id
        if pool:
            return environment_id(session.environment, software=True)
        if len(hosts[session.environment_id]) == 1:
            return session.environment_id
        return content_hash([session.environment_id, session.environment["hostname"]])[:16]

    return {key: replace(s, environment_id=place(s)) for key, s in sessions.items()}


def damaged_text(paths: Iterable[Path]) -> list[str]:
    """Name stored images that are not what their names say, and the remedy; nothing for none."""
    names = sorted(map(str, paths))
    if not names:
        return []
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if names[NAMED:] else "")
    return [
        f"{len(names)} stored images are damaged: {shown}; the `sd35bench run` that made them makes"
        " them again, or fetches them again where a service made them: it buys none"
    ]


def keep_records(rows: Iterable[Row], keep: Callable[[Some], NDArray[np.bool_]]) -> list[Row]:
    """Rows with the records that are kept; rows without any are gone."""
    found = []
    for row in rows:
        kept = keep(row.records)
        if len(kept) and kept.all():
            found.append(replace(row, excluded=Counter(), untimed=Counter()))
        elif kept.any():
            part = Row(row.setting, row.environment_id, pick(row.records, kept))
            part.timed, part.usable = (pick(x, keep(x)) for x in (row.timed, row.usable))
            part.clock = row.clock
            found.append(part)
    return found


def part_held_out(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """Rows without held-out images, and how many were left out, where a task has others, too.

    A few settings alone are made on held-out prompts, to confirm a choice: beside settings that
    were made on the others they would be compared by what prompts they had.
    """
    rows = list(rows)
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[row.setting["task"]].update(s for (s,) in distinct_refs(row.records, "split"))
    mixed = {task for task, found in splits.items() if HELD_OUT in found and len(found) > 1}
    if not mixed:
        return rows, 0

    whole = [row for row in rows if row.setting["task"] not in mixed]
    of_mixed = (row for row in rows if row.setting["task"] in mixed)
    parts = keep_records(of_mixed, lambda x: ~is_ref(x, "split", HELD_OUT))
    left = sum(len(r.records) for r in rows) - sum(len(r.records) for r in (*whole, *parts))
    return [*whole, *parts], left


def why_untimed(record: Record) -> str | None:
    """Say why an OK record's time is no latency of one image alone; ``None`` where it is one.

    A hosted call that ran beside others of this client shared the service with them; one that was
    found again was not watched all the time.
    """
    call = record.remote
    if call is not None and (call.resumed or call.in_flight != 1):
        return RESUMED if call.resumed else BESIDE
    alone = record.trial.batch_size == 1 and record.batch_actual == 1
    return None if alone and record.timings is not None else _BATCHED


def made_alone(records: Some) -> tuple[NDArray[np.bool_], Counter[str]]:
    """Whether each OK record's time is a latency [n], and why hosted ones are none, counted.

    Only hosted ones are looked at as a whole.
    """
    alone = (numbers(records, "batch_size") == 1) & (numbers(records, "batch_actual") == 1)
    alone &= ~np.isnan(numbers(records, "generate_s"))
    whys: Counter[str] = Counter()
    for number in np.flatnonzero(has(records, "remote")).tolist():
        why = why_untimed(records[number])
        alone[number] = why is None
        whys.update([] if why is None else [why])
    return alone, whys


def ambiguous_text(count: int) -> str:
    """What ambiguous trials are, and what to do about them."""
    return f"{count} ambiguous: may have been billed; run again to look for them"


def repeated_seeds(records: Some) -> set[str]:
    """Image digests that different seeds gave in one setting: the seed had no effect there."""
    codes, known = coded(records, "image")
    again = np.flatnonzero((codes >= 0) & (np.bincount(codes + 1)[codes + 1] > 1))
    found: dict[int, set[int]] = defaultdict(set)
    for code, seed in zip(codes[again].tolist(), seeds(records)[again].tolist(), strict=True):
        found[code].add(seed)
    return {known[code] for code, members in found.items() if len(members) > 1}


def _rows(records: Some, sessions: Mapping[str, Session]) -> Iterator[tuple[Row, Places]]:
    """Group records, with their places; those whose worker died nameless go to the first row."""
    settings, _ = setting_codes(records)
    started, names = coded(records, "session_id")
    environments: dict[str | None, int] = {None: 0}
    known = [sessions[n].environment_id if n in sessions else None for n in names]
    place = np.array([environments.setdefault(e, len(environments)) for e in known], np.int64)
    there = np.array([n in sessions for n in names], bool)
    homed = there[started] | is_text(records, "status", Status.OK)
    groups: dict[tuple[int, int], Places] = {}
    for members in _split_of(np.flatnonzero(homed), settings, place[started]):
        groups[int(settings[members[0]]), int(place[started[members[0]]])] = members
    first: dict[int, tuple[int, int]] = {}
    for key in groups:
        first.setdefault(key[0], key)
    for members in _split_of(np.flatnonzero(~homed), settings):
        setting = int(settings[members[0]])
        key = first.get(setting, (setting, 0))
        groups[key] = np.concatenate([groups.get(key, members[:0]), members])
    ids = [*environments]
    for key, members in groups.items():
        setting = setting_fields(records[int(members[0])])
        yield Row(setting, ids[key[1]], pick(records, members)), members


def _split_of(places: Places, *codes: Places) -> list[Places]:
    """Some places by what they have in common."""
    if not len(places):
        return []
    return [places[part] for part in split(grouped(*(c[places] for c in codes))[0])]


_WHOLE, _MISSING, _DAMAGED = range(3)


def _lost(records: Some, whole: Container[str], damaged: Collection[str]) -> NDArray[np.int8]:
    """Whether each record's image is whole, missing or damaged: [n]."""
    gone = ~among(records, "image", whole)
    hurt = gone & among(records, "image", damaged) if damaged else np.zeros(len(gone), bool)
    return np.where(hurt, _DAMAGED, np.where(gone, _MISSING, _WHOLE)).astype(np.int8)


def _sort_out(row: Row, guards: Found, lost: NDArray[np.int8]) -> None:
    """Fill in which of a row's records are timed, usable or excluded."""
    images, _ = coded(row.records, "image")
    made = np.flatnonzero(is_text(row.records, "status", Status.OK) & (images >= 0))
    ok, lost = pick(row.records, made), lost[made]
    refused = (guards.there & ~(guards.values > 0.0))[made]
    repeated = repeated_seeds(ok)
    again = among(ok, "image", repeated) if repeated else np.zeros(len(made), bool)
    # A file that is gone and an ignored seed say nothing against the time that was measured.
    gone = (lost == _DAMAGED) | ((lost == _MISSING) & ~refused & ~again)
    usable = ~(refused | again | gone)
    for i in np.flatnonzero(~usable).tolist():
        if gone[i]:
            why = DAMAGED if lost[i] == _DAMAGED else MISSING
        else:
            why = str(guards.detail(int(made[i])).get("reason")) if refused[i] else REPEATED
        row.excluded[why] += 1
    timed, row.untimed = made_alone(ok)
    row.usable, row.timed = pick(ok, usable), pick(ok, timed & (~refused | gone))


def _warnings(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    excluded: Counter[str] = sum((row.excluded for row in rows), Counter())
    found = [
        f"{plural(n, 'image')} left out of every metric: {why}" for why, n in excluded.most_common()
    ]
    failed, ambiguous = (sum(getattr(r, name) for r in rows) for name in ("failed", "ambiguous"))
    if failed > ambiguous:
        count = plural(failed - ambiguous, "trial")
        found.append(f"{count} failed, which counts in `failed` and nowhere else")
    if ambiguous:
        found.append(ambiguous_text(ambiguous))
    everything = join([row.records for row in rows])
    asked = distinct(everything, "prompt")
    cut = distinct(_cut(everything), "prompt")
    if cut:
        found.append(f"{len(cut)} of {len(asked)} prompts {CUT}")
    for task, sets in _prompt_sets(rows).items():
        if len(sets) > 1:
            unlike = "; ".join(f"{n} settings on {', '.join(names)}" for names, n in sets.items())
            found.append(
                f"{task}: settings were judged on unlike prompts ({unlike}), so that their figures"
                " do not compare; recommend compares settings on common prompts only"
            )
    # That a service is another machine than this one goes without saying.
    places: dict[Any, set[str | None]] = defaultdict(set)
    for row in rows:
        places[row.setting["backend"] if row.hosted else None].add(row.environment_id)
    environments = max(map(len, places.values()), default=0)
    if environments > 1:
        found.append(f"{environments} unlike environments: their figures are in rows of their own")
    return found


def _cut(records: Some) -> Some:
    return pick(records, numbers(records, "truncated_tokens") > 0)


def _prompt_sets(rows: Iterable[Row]) -> dict[str, Counter[tuple[str, ...]]]:
    """By task, on which prompt sets settings were judged, and how many settings on each."""
    found: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for row in rows:
        if row.usable:
            sets = tuple(sorted(name for (name,) in distinct_refs(row.usable, "set")))
            found[row.setting["task"]][sets] += 1
    return found
