"""`sd35bench list` and `rm`: the studies of a results folder, and one of them removed.

`rm` renames a study before it deletes anything, so that an interrupted removal leaves no half of a
study under its name; `rm` again removes what is left.
"""

import fcntl
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.cli.study import written_at
from sd35bench.disk import disk_errors, is_locked, open_lock, try_flock
from sd35bench.errors import ConfigError, SD35BenchError, StudyLocked
from sd35bench.report.render import Table, print_document, text_table
from sd35bench.study.columns import texts
from sd35bench.study.store import Study
from sd35bench.types import Status
from sd35bench.words import MISSING, size, usd

REMOVED = ".removed-"
_RANKS = {"last written, UTC": 4, "size": 3, "cost": 2, "failed": 1}
"""Columns that a narrow terminal leaves out, the highest first; a study's name stays whole."""


# list ---------------------------------------------------------------------------------------------


def list_studies(given: Given) -> Answer:
    """List every study of the results folder; one that cannot be read says why."""
    root = given.results_dir
    rows = [_row(root, path.parent.name) for path in sorted(root.glob("*/study.json"))]
    out = console(given.as_json)
    if rows:
        print_document([_table(rows)], out)
    else:
        out.print(f"no study in {root}; sd35bench run makes one", markup=False, soft_wrap=True)
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
            size(row["bytes"]),
            usd(row["cost_usd"]),
            MISSING if row["written_at"] is None else row["written_at"][:16].replace("T", " "),
        )
        for row in rows
    ]
    columns = text_table(titles, shown, ("images", "failed", "size", "cost"))
    return Table(columns=tuple(replace(c, rank=_RANKS.get(c.title, 0)) for c in columns))


def _whole(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


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
    out.print(f"removed: {', '.join(given.words)}; {size(freed)}", markup=False, soft_wrap=True)
    return Answer(document={"removed": given.words, "bytes": freed})


def _removable(root: Path, name: str) -> Path:
    """The folder of a study that is a study of ours, nobody's link, and at rest."""
    path = root / name
    if "/" in name or name.startswith("."):
        raise ConfigError(f"rm {name}: give a study's name, not a path")
    if not (path / "study.json").is_file():
        there = ", ".join(sorted(p.parent.name for p in root.glob("*/study.json"))) or "none"
        raise ConfigError(f"study {name!r} is not in {root}; there: {there}")
    if path.is_symlink():
        raise ConfigError(f"rm {name}: {path} is a link; remove the link or its target by hand")
    with open_lock(path / ".lock") as handle:
        if not try_flock(handle, fcntl.LOCK_EX):
            raise StudyLocked(f"another process writes to study {name!r}; wait for it, or end it")
    return path


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
        with open_lock(path / ".lock") as handle, disk_errors(path):
            if not try_flock(handle, fcntl.LOCK_EX):
                raise StudyLocked(f"another process writes to study {path.name!r}; it stays")
            path.rename(gone)
    with disk_errors(gone):
        shutil.rmtree(gone)


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
        flags=(Flag(name="--yes", means="remove without a question"), RESULTS_DIR),
    ),
}
