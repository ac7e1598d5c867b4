"""Studies from machines that share nothing, united in one.

Whatever a study holds is a file that one writer made and nobody changes, or a file named by its
digest. So a merge copies files: what is there already is left alone, the journal goes last, and a
merge that was interrupted or repeated ends in the same study. Sources are read only.

Shards keep their names, which no two processes share; should two have one name and unlike bytes,
the second gets its digest into the name. A trial that several sources made is read once, as in any
study: an image wins over a failure, else the newest shard does. Where they disagree, in status or
in the image, the trial is named.
"""

import contextlib
import fcntl
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sd35bench.disk import open_lock, read_regular, try_flock, write_atomic
from sd35bench.errors import ConfigError, StoreError, StudyLocked
from sd35bench.study.content_files import is_named, read_named
from sd35bench.study.store import SCHEMA, Study

_BY_DIGEST = ("inits", "latents", "images")
_BY_NAME = (
    *("refused/*", "references/*.npz", "features/*/*.npz", "machine/*.json", "looks.json"),
    *("scores/*.jsonl", "remote/*.jsonl", "journal/*.jsonl"),
)
"""What is copied under its own name, in this order: what nothing refers to yet comes first."""
_APPENDED = ("scores", "remote", "journal")
_DERIVED = ("report.html", "recommended.yaml", "view", "records.parquet", "scores.parquet")
_KNOWN = {*_BY_DIGEST, *(p.partition("/")[0] for p in _BY_NAME), *_DERIVED, "study.json", "trash"}
Side = tuple[str, str, str | None]
"""What a study says of a trial: the study's name, the status, the image."""


@dataclass(slots=True)
class Merged:
    """What was copied, by kind, and what has to be said: disagreements, damage, what stayed."""

    duplicates: int = 0
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    copied: Counter[str] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def merge_studies(sources: Sequence[Path], target: Path) -> Merged:
    """Unite the studies at `sources` in the one at `target`, which is made if need be.

    Raises: ConfigError where a source is no study, or is the target; StudyLocked where something
    writes to one of them; StoreError for a damaged journal, before anything is copied.
    """
    _check(sources, target)
    with contextlib.ExitStack() as stack:
        for path in sources:
            stack.enter_context(_quiet(path))
        studies = [Study.open(path.parent, path.name) for path in sources]
        sides = {str(path): _sides(s) for path, s in zip(sources, studies, strict=True)}
        into = Study.open(target.parent, target.name, create=True)
        handle = stack.enter_context(open_lock(into.path / ".lock"))
        if not try_flock(handle, fcntl.LOCK_EX):
            raise StudyLocked(f"another process writes to study {into.name!r}; wait for it")
        found = Merged()
        before = {str(target): _sides(into), **sides}
        for study in studies:
            _copy_digests(study, into, found)
        for pattern in _BY_NAME:
            for study in studies:
                _copy_names(study.path, into.path, pattern, found)
        into.save_checked()
        _compare(before, _sides(Study(into.path)), found)
        for study in studies:
            names = {p.name for p in study.path.iterdir() if not p.name.startswith(".")}
            found.left_out += [str(study.path / name) for name in sorted(names - _KNOWN)]
    return found


def _check(sources: Sequence[Path], target: Path) -> None:
    seen: set[Path] = set()
    for path in sources:
        if not (path / "study.json").is_file():
            raise ConfigError(f"{path} is no study: it has no study.json")
        if path.resolve() == target.resolve():
            raise ConfigError(f"{path} is what is merged into; leave it out of the sources")
        if path.resolve() in seen:
            raise ConfigError(f"{path} was given twice")
        seen.add(path.resolve())


@contextlib.contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Keep runs out of a source; a study without a lock's file has no run, and none is made."""
    try:
        handle = os.open(path / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        yield
        return
    except OSError as exc:
        raise StoreError(f"cannot read {path / '.lock'}: {exc.strerror}") from exc
    try:
        if not try_flock(handle, fcntl.LOCK_EX):
            raise StudyLocked(f"another process writes to study {path}; wait for it, then merge")
        yield
    finally:
        os.close(handle)


def _sides(study: Study) -> dict[str, tuple[str, str | None]]:
    """Status and image of every trial. Raises: StoreError for a damaged journal."""
    return {r.trial.key: (r.status.value, r.image) for r in study.records()}


def _copy_digests(study: Study, into: Study, found: Merged) -> None:
    """Copy files that are named by their digests, each once; damaged ones are named and stay."""
    for kind in _BY_DIGEST:
        for path in sorted((study.path / kind).glob("*/*")):
            if not is_named(path):
                continue
            with contextlib.suppress(StoreError):
                if read_named(into.find_stored(kind, path.stem)):
                    continue
            try:
                into.put_stored(kind, read_named(path), path.suffix)
            except StoreError as exc:
                if os.path.lexists(path) and "is damaged" in str(exc):
                    found.damaged.append(str(path))
                    continue
                raise
            found.copied[kind] += 1


def _copy_names(source: Path, target: Path, pattern: str, found: Merged) -> None:
    """Copy files under their names; of two with one name the longer one goes on the shorter."""
    kind = pattern.partition("/")[0]
    for path in sorted(source.glob(pattern)):
        if path.name.startswith(".") or not path.is_file():
            continue
        data, place = read_regular(path, follow=True)[0], target / path.relative_to(source)
        known = read_regular(place)[0] if os.path.lexists(place) else None
        if known is not None and kind in _APPENDED and data.startswith(known) and data != known:
            known = None
        elif known is not None and kind in _APPENDED and known.startswith(data):
            continue
        elif known is not None and known != data:
            if kind in ("looks.json", "references", "refused"):
                found.left_out.append(f"{path}: {place} is another one and stays")
                continue
            name = f"{path.stem}.{hashlib.sha256(data).hexdigest()[:12]}{path.suffix}"
            place = place.with_name(name)
            known = read_regular(place)[0] if place.is_file() else None
            if known != data:
                found.renamed.append(f"{path} → {place.name}")
        if known != data:
            write_atomic(place, data)
            found.copied[kind] += 1


def _compare(
    sides: dict[str, dict[str, tuple[str, str | None]]],
    after: dict[str, tuple[str, str | None]],
    found: Merged,
) -> None:
    """Count the trials that several studies have alike, and name those in which they differ."""
    by_key: dict[str, list[Side]] = defaultdict(list)
    for path, trials in sides.items():
        for key, said in trials.items():
            by_key[key].append((path, *said))
    for key, many in by_key.items():
        if len(many) < 2:
            continue
        if len({side[1:] for side in many}) == 1:
            found.duplicates += 1
        else:
            said = [{"study": s, "status": status, "image": image} for s, status, image in many]
            status, image = after[key]
            found.conflicts.append(
                {"key": key, "sides": said, "counts": {"status": status, "image": image}}
            )


def merge_document(found: Merged, sources: Sequence[Path], into: Study) -> dict[str, Any]:
    """What `merge --json` prints."""
    return {
        "study": into.name,
        "schema": SCHEMA,
        "sources": [str(path) for path in sources],
        "records": len(into.records()),
        **asdict(found),
        "copied": dict(sorted(found.copied.items())),
    }
