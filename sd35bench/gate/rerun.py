"""More process starts of both sides in alternation, which a verdict on latency rests on.

A machine warms up, slows down and is shared, so what ran in the morning says little about what ran
in the afternoon. Each round starts one process of either side, one right after the other, the first
side in turn (A B, B A, A B …), and makes the same images again, one at a time. They go into studies
of their own, `NAME.rerun-1` and on, since a trial that is done is never done twice in one study.
"""

import re
from collections.abc import Callable, Sequence

from sd35bench.errors import ConfigError
from sd35bench.fields import setting_identity
from sd35bench.plan import Batch, Plan
from sd35bench.study.store import Study, study_names
from sd35bench.types import Record, Status
from sd35bench.workers.process import run_plan

IMAGES_PER_START = 48
"""At least 40 are needed for a p95; a round should stay short, so that both sides share it."""
_NUMBER = re.compile(r"\.rerun-(\d+)$")

Told = Callable[[int, int, str], None]
"""Called before each process start: which round, of how many, and which study."""


def rerun(
    baseline: Study, candidate: Study, rounds: int, told: Told = lambda _i, _n, _name: None
) -> None:
    """Make `rounds` more process starts of every load of both studies, in alternation.

    Raises: ConfigError where a study cannot be run again: `rounds` below 1, hosted images, no image
    made alone, or another environment (other code, another machine) now; what `run_plan` raises.
    """
    if rounds < 1:
        raise ConfigError(f"--rerun={rounds}: must be a whole number of at least 1")
    if baseline.path == candidate.path:
        raise ConfigError("--rerun: baseline and candidate are one study; name two")
    sides = [(study, _plans(study)) for study in (baseline, candidate)]
    root = baseline.path.parent
    taken = max((_number(s) for study, _ in sides for s in reruns_of(study)), default=0)
    for number in range(rounds):
        for study, plans in sides if number % 2 == 0 else sides[::-1]:
            told(number, rounds, study.name)
            fresh = Study.open(root, f"{study.name}.rerun-{taken + number + 1}", create=True)
            for plan in plans:
                run_plan(plan, fresh)
            _require_same_environment(study, fresh)


def reruns_of(study: Study) -> list[Study]:
    """Find the reruns of a study that lie beside it, in their order."""
    root = study.path.parent
    alike = (name for name in study_names(root) if _NUMBER.sub("", name) == study.name != name)
    return sorted((Study.open(root, name) for name in alike), key=_number)


def _require_same_environment(study: Study, fresh: Study) -> None:
    """Refuse to time other code, or another machine, in the place of what is judged."""
    known = {s.environment_id: s.environment for s in study.sessions().values()}
    for session in fresh.sessions().values():
        if session.environment_id not in known:
            before = list(known.values())[-1] if known else {}
            now = session.environment
            unlike = sorted(k for k in {*before, *now} if before.get(k) != now.get(k))
            raise ConfigError(
                f"--rerun: study {study.name!r} was made in another environment, which differs in"
                f" {', '.join(unlike)}: a rerun here would time something else; make the study"
                " again, or run more starts where it was made"
            )


def _number(study: Study) -> int:
    match = _NUMBER.search(study.name)
    return 0 if match is None else int(match.group(1))


def _plans(study: Study) -> list[Plan]:
    """One plan per load: the first images that it made alone, without their neighbours."""
    made = (r for r in study.records() if r.status is Status.OK)
    records = [r for r in made if r.trial.batch_size == r.batch_actual == 1]
    if any(r.remote is not None for r in records):
        raise ConfigError(
            f"--rerun: study {study.name!r} was made by a hosted service, which costs money; run"
            " it again yourself, under another study name"
        )
    if not records:
        raise ConfigError(
            f"--rerun: study {study.name!r} has no image made alone; run it with batch_size=1 or"
            " timed_limit=N"
        )
    by_load: dict[str, list[Record]] = {}
    for record in records:
        by_load.setdefault(record.trial.load.key, []).append(record)
    return [_plan(study, part) for part in by_load.values()]


def _plan(study: Study, records: Sequence[Record]) -> Plan:
    """Up to `IMAGES_PER_START` images of each setting, in the order in which they ran."""
    counts: dict[object, int] = {}
    kept = []
    for record in sorted(records, key=lambda r: r.started_at):
        setting = setting_identity(record.trial.request)
        counts[setting] = counts.get(setting, 0) + 1
        if counts[setting] <= IMAGES_PER_START:
            kept.append(record.trial)
    inits = {t.request.init_image for t in kept if t.request.init_image is not None}
    return Plan(
        load=kept[0].load,
        batches=tuple(Batch((trial,)) for trial in kept),
        inits={digest: study.read_init_file(digest) for digest in sorted(inits)},
    )
