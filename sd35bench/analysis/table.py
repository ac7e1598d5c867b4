"""A study's records, sessions and scores, sorted into rows: one per setting and environment.

Figures from unlike environments are never pooled, so a setting that ran on two machines is two
rows. Guards come before every metric: a record counts for quality only if it is OK, its image is
there, was not found black, constant or of a wrong size when it was scored, and is not the very
file that another seed gave in the same setting. One pass over the records, one over the scores.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from sd35bench.analysis.settings import HELD_OUT, is_hosted, setting_fields, setting_key
from sd35bench.contention import Timed, choose, clock_text, read_contention, sentences
from sd35bench.measure import environment_id
from sd35bench.types import CUT, Record, Session, Status, content_hash

GUARD = "guard"
"""Name under which `score` keeps what the guards saw in an image: value 1 passed, 0 refused."""

REPEATED = "same image under different seeds"
MISSING = "image file missing"
DAMAGED = "image file damaged"
NAMED = 5
"""Damaged files whose names are said; `sd35bench verify` names all."""
RESUMED = "found again after a crash or a lost answer"
BESIDE = "ran beside others"
_BATCHED = "did not run at batch size 1"


class ScoreLike(Protocol):
    """One metric's value for one trial's image, as the store keeps it."""

    metric: str
    key: str
    image: str
    value: float | None
    detail: dict[str, Any]


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
    records: list[Record] = field(default_factory=list)
    timed: list[Record] = field(default_factory=list)
    usable: list[Record] = field(default_factory=list)
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
        return sum(r.status is not Status.OK for r in self.records)

    @property
    def hosted(self) -> bool:
        """Whether a hosted service made its images, so that no limit of this machine holds."""
        return is_hosted(self.records[0].trial.load)

    @property
    def ambiguous(self) -> int:
        """How many of the failed may have been made, and billed, all the same."""
        return sum(r.status is Status.AMBIGUOUS for r in self.records)

    @property
    def quality_batch_size(self) -> int | None:
        """The batch size that made most usable images; on a tie, the larger."""
        sizes = Counter(r.trial.batch_size for r in self.usable)
        return max(sizes, key=lambda size: (sizes[size], size)) if sizes else None

    def quality_records(self) -> list[Record]:
        """Usable records of the batch size that quality figures come from."""
        size = self.quality_batch_size
        return [r for r in self.usable if r.trial.batch_size == size]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a study, its sessions, and scores by metric and (trial key, image digest).

    `busy` says in sentences what other work did to the latencies, `clock` how quiet the machine
    was; `speed` is each session's median canary, relative to the machine's best.
    """

    rows: list[Row]
    sessions: dict[str, Session]
    scores: dict[str, dict[tuple[str, str], ScoreLike]]
    warnings: list[str]
    busy: list[str] = field(default_factory=list)
    clock: str | None = None
    speed: Mapping[str, float] = field(default_factory=dict)

    def score(self, metric: str, record: Record) -> ScoreLike | None:
        """Look up a record's score for the image that it has now."""
        return self.scores.get(metric, {}).get((record.trial.key, record.image or ""))


def read_table(study: Any, pool_hosts: bool = False) -> Table:
    """Sort a study (`sd35bench.store.Study`) into rows.

    `pool_hosts`: unlike hosts and devices with the same software share rows.
    """
    sessions = by_host(study.sessions(), pool_hosts)
    scores: dict[str, dict[tuple[str, str], ScoreLike]] = defaultdict(dict)
    for score in study.scores():
        scores[score.metric][score.key, score.image] = score
    refused = {where: str(s.detail.get("reason")) for where, s in _guarded(scores) if not s.value}
    images = study.images()
    damaged = {path.name.partition(".")[0]: path for path in images.damaged}
    rows = _rows(study.records(), sessions)
    found = read_contention(study.all_records(), sessions)
    for row in rows:
        _sort_out(row, refused, images.whole, damaged)
        row.clock = choose(row.timed, found)
        row.timed = row.clock.kept
    named = {r.image for row in rows for r in row.records}
    paths = [p.relative_to(study.path) for digest, p in damaged.items() if digest in named]
    warnings = [*damaged_text(paths), *_warnings(rows)]
    clocks = [row.clock for row in rows]
    busy, clock = sentences(clocks, found.speed), clock_text(clocks, found.speed)
    return Table(rows, sessions, dict(scores), warnings, busy, clock, found.speed)


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


def keep_records(rows: Iterable[Row], keep: Callable[[Record], bool]) -> list[Row]:
    """Rows with the records that are kept; rows without any are gone."""
    found = []
    for row in rows:
        records = [r for r in row.records if keep(r)]
        if records:
            part = Row(row.setting, row.environment_id, records)
            part.timed = [r for r in row.timed if keep(r)]
            part.clock = row.clock
            part.usable = [r for r in row.usable if keep(r)]
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
        splits[row.setting["task"]].update(r.trial.prompt.split for r in row.records)
    mixed = {task for task, found in splits.items() if HELD_OUT in found and len(found) > 1}
    if not mixed:
        return rows, 0

    def keep(record: Record) -> bool:
        held = record.trial.prompt.split == HELD_OUT
        return not held or record.trial.request.task.value not in mixed

    whole = [row for row in rows if row.setting["task"] not in mixed]
    parts = keep_records((row for row in rows if row.setting["task"] in mixed), keep)
    left = sum(len(r.records) for r in rows) - sum(len(r.records) for r in (*whole, *parts))
    return [*whole, *parts], left


def why_untimed(record: Record) -> str | None:
    """Say why an OK record's time is no latency of one image alone; ``None`` where it is one.

    A hosted call that ran beside others of this client shared the service with them; one that was
    found again was not watched all the time.
    """
    if record.remote is not None and record.remote.resumed:
        return RESUMED
    if record.remote is not None and record.remote.in_flight != 1:
        return BESIDE
    alone = record.trial.batch_size == 1 and record.batch_actual == 1
    return None if alone and record.timings is not None else _BATCHED


def ambiguous_text(count: int) -> str:
    """What ambiguous trials are, and what to do about them."""
    return f"{count} ambiguous: may have been billed; run again to look for them"


def repeated_seeds(records: Iterable[Record]) -> set[str]:
    """Image digests that different seeds gave in one setting: the seed had no effect there."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for record in records:
        if record.image is not None:
            seeds[record.image].add(record.trial.request.seed)
    return {digest for digest, found in seeds.items() if len(found) > 1}


def _guarded(scores: Mapping[str, dict[tuple[str, str], ScoreLike]]):
    return scores.get(GUARD, {}).items()


def _rows(records: Iterable[Record], sessions: Mapping[str, Session]) -> list[Row]:
    rows: dict[tuple[str, str | None], Row] = {}
    homeless: list[tuple[str, Record]] = []
    first: dict[str, Row] = {}
    for record in records:
        setting = setting_key(record.trial)
        session = sessions.get(record.session_id)
        if session is None and record.status is not Status.OK:
            homeless.append((setting, record))  # the worker died before it could describe itself
            continue
        environment = None if session is None else session.environment_id
        row = rows.get((setting, environment))
        if row is None:
            row = rows[setting, environment] = Row(setting_fields(record), environment)
            first.setdefault(setting, row)
        row.records.append(record)
    for setting, record in homeless:
        if setting not in first:
            first[setting] = rows[setting, None] = Row(setting_fields(record), None)
        first[setting].records.append(record)
    return list(rows.values())


def _sort_out(
    row: Row,
    refused: Mapping[tuple[str, str], str],
    whole: Container[str],
    damaged: Container[str],
) -> None:
    """Fill in which of a row's records are timed, usable or excluded."""
    ok = [r for r in row.records if r.status is Status.OK and r.image is not None]
    repeated = repeated_seeds(ok)
    for record in ok:
        assert record.image is not None
        reason = refused.get((record.trial.key, record.image))
        if reason is None and record.image in repeated:
            reason = REPEATED
        if record.image not in whole and (reason is None or record.image in damaged):
            reason = DAMAGED if record.image in damaged else MISSING
        if reason is None:
            row.usable.append(record)
        else:
            row.excluded[reason] += 1
        why = why_untimed(record)
        # A file that is gone and an ignored seed say nothing against the time that was measured.
        if why is None and reason in (None, MISSING, DAMAGED, REPEATED):
            row.timed.append(record)
        elif why is not None and record.remote is not None:
            row.untimed[why] += 1


def _warnings(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    excluded: Counter[str] = sum((row.excluded for row in rows), Counter())
    found = [f"{n} images left out of every metric: {why}" for why, n in excluded.most_common()]
    failed, ambiguous = (sum(getattr(r, name) for r in rows) for name in ("failed", "ambiguous"))
    if failed > ambiguous:
        count = failed - ambiguous
        found.append(f"{count} trials failed; they count in `failed` and nowhere else")
    if ambiguous:
        found.append(ambiguous_text(ambiguous))
    asked = {r.trial.request.prompt for row in rows for r in row.records}
    cut = {r.trial.request.prompt for row in rows for r in row.records if r.truncated_tokens}
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


def _prompt_sets(rows: Iterable[Row]) -> dict[str, Counter[tuple[str, ...]]]:
    """By task, on which prompt sets settings were judged, and how many settings on each."""
    found: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for row in rows:
        if row.usable:
            sets = tuple(sorted({r.trial.prompt.set for r in row.usable}))
            found[row.setting["task"]][sets] += 1
    return found
