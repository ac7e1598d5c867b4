"""Studies as wholes: `list`, `rm`, `merge` from several machines, `clean` and `verify` their files.

`rm` renames a study before it deletes anything, so that an interrupted removal leaves no half of a
study under its name; `rm` again removes what is left. `clean` lists what no record names, or moves
it to the study's trash with a manifest that says where it came from: a file may be unnamed because
a writer was killed, but also because a shard of the journal is missing for a moment, or because two
studies share one folder of images. No other verb deletes anything that it did not make.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd35bench import words
from sd35bench.cli.output import DONE, FAILED, Answer, Terminal, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.cli.study import written_at
from sd35bench.disk import disk_errors, is_abandoned, is_locked, open_lock, try_flock, write_atomic
from sd35bench.errors import ConfigError, SD35BenchError, StudyLocked
from sd35bench.report.render import Table, print_document, text_table
from sd35bench.study.columns import texts
from sd35bench.study.journal import new_shard_id
from sd35bench.study.store import Study, study_names
from sd35bench.types import Status

REMOVED = ".removed-"
TRASH = "trash"
SHOWN_FILES, SHOWN_CONFLICTS = 20, 10
_RANKS = {"last written, UTC": 4, "size": 3, "cost": 2, "failed": 1}
"""Columns that a narrow terminal leaves out, the highest first; a study's name stays whole."""
_OLD_TEMPORARY = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp|npz|img)\.[0-9]+\.tmp")
"""As versions before 2026-11-30 named what a killed writer left."""


# list ---------------------------------------------------------------------------------------------


def list_studies(given: Given) -> Answer:
    """List every study of the results folder; one that cannot be read says why."""
    root = given.results_dir
    rows = [_row(root, name) for name in study_names(root)]
    out = console(given.as_json)
    if rows:
        print_document([_table(rows)], out)
    else:
        out.say(f"no study in {root}; sd35bench run makes one")
    return Answer(document={"results_dir": str(root), "studies": rows})


def _row(root: Path, name: str) -> dict[str, Any]:
    """What is known of one study; ``None`` is unknown, never 0."""
    row: dict[str, Any] = {"study": name, "bytes": _bytes(root / name), "error": None}
    row |= {"images": None, "failed": None, "cost_usd": None, "written_at": None}
    try:
        study = Study.open(root, name)
        counts = Counter(texts(study.records(), "status"))
        row["state"] = "being written" if is_locked(study.path / ".lock") else "ended"
        row["images"] = counts.pop(Status.OK, 0)
        row["failed"] = sum(counts.values())
        row["cost_usd"] = _cost(study)
        if at := written_at(study):
            row["written_at"] = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    except SD35BenchError as exc:
        row |= {"state": "unreadable", "error": str(exc)}
    return row


def _cost(study: Study) -> float | None:
    """Dollars of all calls whose cost is known; ``None`` where no service was called."""
    if not (study.path / "remote").is_dir():
        return None
    calls = [record.remote for record in study.all_records()]
    return math.fsum(c.cost_usd for c in calls if c is not None and c.cost_usd is not None)


def _bytes(folder: Path) -> int:
    """Bytes of all files below a folder; links count for themselves."""
    found = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.lstat(Path(base) / name).st_size
            except FileNotFoundError:  # a writer's temporary file
                continue
    return found


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    titles = ("study", "state", "images", "failed", "size", "cost", "last written, UTC")
    shown = [
        (
            row["study"],
            row["state"],
            _whole(row["images"]),
            _whole(row["failed"]),
            words.size(row["bytes"]),
            words.usd(row["cost_usd"]),
            (row["written_at"] or words.MISSING)[:16].replace("T", " "),
        )
        for row in rows
    ]
    columns = text_table(titles, shown, ("images", "failed", "size", "cost"))
    return Table(columns=tuple(replace(c, rank=_RANKS.get(c.title, 0)) for c in columns))


def _whole(value: int | None) -> str:
    return words.MISSING if value is None else words.count(value)


# rm -----------------------------------------------------------------------------------------------


def remove(given: Given) -> Answer:
    """Remove studies with all their files; on a terminal after a question, else with --yes.

    Raises: ConfigError without an answer or where there is no such study, StudyLocked
    where something writes to one. Nothing is removed unless all can be.
    """
    root = given.results_dir
    studies = [_removable(root, name) for name in given.words]
    rows = [_row(root, name) for name in given.words]
    out = console(given.as_json)
    print_document([_table(rows)], out)
    if not given.has("--yes") and not _agreed(len(studies)):
        raise ConfigError("nothing was removed; add --yes to remove without a question")
    for path in (*studies, *sorted(root.glob(f"{REMOVED}*"))):
        _delete(path)
    freed = sum(row["bytes"] for row in rows)
    out.say(f"removed: {', '.join(given.words)}; {words.size(freed)}")
    return Answer(document={"removed": given.words, "bytes": freed})


def _removable(root: Path, name: str) -> Path:
    """The folder of a study, no link and at rest. Raises: ConfigError, StudyLocked."""
    path = root / name
    if "/" in name or name.startswith("."):
        raise ConfigError(f"rm {name}: give a study's name, not a path")
    if not (path / "study.json").is_file():
        there = ", ".join(study_names(root)) or "none"
        raise ConfigError(f"study {name!r} is not in {root}; there: {there}")
    if path.is_symlink():
        raise ConfigError(f"rm {name}: {path} is a link; remove the link or its target by hand")
    with _at_rest(path, "wait for it, or end it"):
        return path


@contextlib.contextmanager
def _at_rest(path: Path, remedy: str) -> Iterator[None]:
    """Hold a study's lock. Raises: StudyLocked where something writes to it."""
    with open_lock(path / ".lock") as handle:
        if not try_flock(handle, fcntl.LOCK_EX):
            raise StudyLocked(f"another process writes to study {path.name!r}; {remedy}")
        yield


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        return False
    what = "this study" if count == 1 else f"these {count} studies"
    sys.stderr.write(f"Remove {what} with all files? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _delete(path: Path) -> None:
    """Rename, then delete; a study that a writer has taken meanwhile stays."""
    if path.name.startswith(REMOVED):
        gone = path
    else:
        gone = path.with_name(f"{REMOVED}{path.name}-{os.getpid()}")
        with _at_rest(path, "it stays"), disk_errors(path):
            path.rename(gone)
    with disk_errors(gone):
        shutil.rmtree(gone)


# merge --------------------------------------------------------------------------------------------


def merge(given: Given) -> Answer:
    """Unite studies; trials in which they disagree are named.

    Raises: ConfigError where a source is no study, StudyLocked where something writes to one.
    """
    from sd35bench.study.merge import merge_document, merge_studies

    name = given.text("--into")
    if name is None or "/" in name:
        raise ConfigError("merge needs the name of the study to unite in, --into NAME")
    sources = [_find(given.results_dir, word) for word in given.words]
    target = given.results_dir / name
    found = merge_studies(sources, target)
    document = merge_document(found, sources, Study.open(given.results_dir, name))
    _print_merged(console(given.as_json).say, document)
    return Answer(document=document)


def _find(root: Path, word: str) -> Path:
    """A source by its name in the results folder, or by its path."""
    return next((p for p in (root / word, Path(word)) if (p / "study.json").is_file()), Path(word))


def _print_merged(say: Callable[[str], None], document: dict[str, Any]) -> None:
    for conflict in document["conflicts"][:SHOWN_CONFLICTS]:
        sides = "; ".join(
            f"{s['study']}: {s['status']} {(s['image'] or '')[:12]}" for s in conflict["sides"]
        )
        counts = conflict["counts"]
        said = f"{counts['status']} {(counts['image'] or '')[:12]}".strip()
        say(f"conflict in trial {conflict['key']}: {sides} → {said} counts")
    more = len(document["conflicts"]) - SHOWN_CONFLICTS
    if more > 0:
        say(f"and {more} more conflicts; --json names all")
    for text in document["damaged"]:
        say(f"damaged, not copied: {text}")
    for kind in ("renamed", "left_out"):
        for text in document[kind]:
            say(f"{kind.replace('_', ' ')}: {text}")
    copied = ", ".join(f"{n} {kind}" for kind, n in document["copied"].items())
    say(
        f"study {document['study']}: {document['records']} trials,"
        f" {document['duplicates']} in several studies alike, {len(document['conflicts'])} in"
        f" conflict; copied: {copied or 'nothing, all was there'}"
    )


# clean and verify ---------------------------------------------------------------------------------


def clean(given: Given) -> Answer:
    """List what no record names; with --apply move it to the trash.

    Raises: StoreError where there is no such study, StudyLocked where something writes to it.
    """
    study = Study.open(given.results_dir, given.words[0])
    with _at_rest(study.path, "wait for it, and clean it then"):
        files = _found(study)
        trash = _move(study, files) if given.has("--apply") and files else None
    document = {
        "study": study.name,
        "files": [str(path.relative_to(study.path)) for path in files],
        "bytes": sum(size for size in files.values()),
        "moved_to": None if trash is None else str(trash),
    }
    _print_left(console(given.as_json), document)
    return Answer(document=document)


def _found(study: Study) -> dict[Path, int]:
    """Unnamed images and latents, and what killed writers left; each with its bytes."""
    left = [
        path
        for folder in ("images", "latents", "inits")
        for path in (study.path / folder).glob("*/*.tmp")
        if is_abandoned(path.name) or _OLD_TEMPORARY.fullmatch(path.name)
    ]
    # Links are somebody's arrangement, and what lies behind a linked folder is another study's.
    linked = {f for f in ("images", "latents", "inits") if (study.path / f).is_symlink()}
    files = [
        p
        for p in (*study.unnamed(), *left)
        if p.is_file() and p.relative_to(study.path).parts[0] not in linked
    ]
    return {path: path.stat().st_size for path in sorted(files) if not path.is_symlink()}


def _move(study: Study, files: dict[Path, int]) -> Path:
    """Move files to a folder of their own in the trash; its manifest is written first."""
    root = study.path / TRASH
    trash = root / new_shard_id(root)
    names = [{"path": str(p.relative_to(study.path)), "bytes": b} for p, b in files.items()]
    write_atomic(trash / "manifest.json", json.dumps({"files": names}, indent=1).encode())
    for path in files:
        target = trash / path.relative_to(study.path)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return trash


def _print_left(out: Terminal, document: dict[str, Any]) -> None:
    names = document["files"]
    out.say(*names[:SHOWN_FILES])
    if len(names) > SHOWN_FILES:
        out.print(f"and {len(names) - SHOWN_FILES} more")
    size = f"{len(names)} files that no record names, {words.size_in(document['bytes'], 'MB')}"
    if document["moved_to"] is not None:
        out.say(f"{size}: moved to {document['moved_to']}")
    elif names:
        out.print(f"{size}; restore the journal if a shard is missing, or add --apply")
    else:
        out.print("nothing to clean: a record names every image")


def verify(given: Given) -> Answer:
    """Check a study's files; exit code 1 where something is damaged or missing.

    Raises: ConfigError where there is no such study.
    """
    from sd35bench.verify import document, verify_study

    path = given.results_dir / given.words[0]
    if not os.path.isdir(path):
        raise ConfigError(f"study {given.words[0]!r} is not in {given.results_dir}")
    found = document(path.name, verify_study(path), path)
    _print_verified(console(given.as_json), found)
    return Answer(document=found, exit_code=DONE if found["whole"] else FAILED)


def _print_verified(out: Terminal, found: dict[str, Any]) -> None:
    out.say(*(f"{problem['what']} → {problem['remedy']}" for problem in found["problems"]))
    checked = ", ".join(f"{count} {kind}" for kind, count in found["checked"].items())
    verdict = "whole" if found["whole"] else f"{len(found['problems'])} problems"
    out.print(f"study {found['study']}: {verdict}; looked at: {checked}", markup=False)


COMMANDS = {
    "list": Command(
        call=list_studies,
        examples="""
sd35bench list                        studies of results/: images, failures, size, cost
sd35bench list --results-dir /data    those of another folder
""",
        flags=(RESULTS_DIR,),
    ),
    "rm": Command(
        call=remove,
        words=("STUDY", "[STUDY ...]"),
        about="""All files of the studies are deleted, paid images too; nothing is if one of them
is being written or is no study. `clean` removes only what no record names.""",
        examples="""
sd35bench rm first               asks, then removes results/first
sd35bench rm first second --yes
""",
        flags=(Flag("--yes", "remove without a question"), RESULTS_DIR),
    ),
    "merge": Command(
        call=merge,
        words=("STUDY", "[STUDY ...]"),
        about="""Studies are named, or given as paths of folders that came from other machines.
Nothing of them is changed. A trial that several have is kept once: an image wins over a failure,
else the newest shard does; trials with unlike images or statuses are named. An interrupted merge
is finished by the same command. Studies that something writes to are refused.""",
        examples="""
sd35bench merge gpu1 gpu2 --into all
sd35bench merge /mnt/a/results/grid /mnt/b/results/grid --into grid
sd35bench merge more --into grid            adds to a study that is there
""",
        flags=(Flag("--into NAME", "the study to unite in"), RESULTS_DIR),
    ),
    "clean": Command(
        call=clean,
        words=("STUDY",),
        examples="""
sd35bench clean demo            list files of images that no record names
sd35bench clean demo --apply    move them to demo's trash/, with a manifest
""",
        flags=(Flag("--apply", "move the files; without it they are only listed"), RESULTS_DIR),
    ),
    "verify": Command(
        call=verify,
        words=("STUDY",),
        about="""Reads every file that a result stands on, once, and writes nothing: the journal,
images by their digests, features, references, scores, and what was paid for. Exit code 0 where all
is whole, 1 where something is not.""",
        examples="""
sd35bench verify demo           each damaged or missing file, and what puts it right
sd35bench verify demo --json | jq -r '.problems[].file'
""",
        flags=(RESULTS_DIR,),
    ),
}
