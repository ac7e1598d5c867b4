"""`sd35bench clean`: what a study holds and no record names is listed, or moved to its trash.

No other verb deletes anything that it did not make. A file may be unnamed because a writer was
killed, but also because a shard of the journal is missing for a moment, or because two studies
share one folder of images: so it is moved, with a manifest that says where it came from.
"""

import fcntl
import json
import re
from pathlib import Path
from typing import Any

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import RESULTS_DIR, Command, Flag, Given
from sd35bench.disk import disk_errors, is_abandoned, open_lock, try_flock, write_atomic
from sd35bench.errors import StudyLocked
from sd35bench.study.journal import new_shard_id
from sd35bench.study.store import Study

SHOWN = 20
TRASH = "trash"
_OLD_TEMPORARY = re.compile(r"[0-9a-f]{64}\.(png|jpg|webp|npz|img)\.[0-9]+\.tmp")
"""As versions before 2026-11-30 named what a killed writer left."""


def clean(given: Given) -> Answer:
    """List what no record names; with --apply move it to the trash.

    Raises: StoreError where there is no such study, StudyLocked where something writes to it.
    """
    study = Study.open(given.results_dir, given.words[0])
    with open_lock(study.path / ".lock") as handle:
        if not try_flock(handle, fcntl.LOCK_EX):
            raise StudyLocked(
                f"another process writes to study {study.name!r}; wait for it, and clean it then"
            )
        files = _found(study)
        trash = _move(study, files) if given.has("--apply") and files else None
    document = {
        "study": study.name,
        "files": [str(path.relative_to(study.path)) for path in files],
        "bytes": sum(size for size in files.values()),
        "moved_to": None if trash is None else str(trash),
    }
    _print(console(given.as_json), document)
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


def _print(out: Any, document: dict[str, Any]) -> None:
    names = document["files"]
    for name in names[:SHOWN]:
        out.print(name, markup=False, soft_wrap=True)
    if len(names) > SHOWN:
        out.print(f"and {len(names) - SHOWN} more")
    size = f"{len(names)} files that no record names, {document['bytes'] / 1e6:.1f} MB"
    if document["moved_to"] is not None:
        out.print(f"{size}: moved to {document['moved_to']}", markup=False, soft_wrap=True)
    elif names:
        out.print(f"{size}; restore the journal if a shard is missing, or add --apply")
    else:
        out.print("nothing to clean: a record names every image")


COMMANDS = {
    "clean": Command(
        call=clean,
        words=("STUDY",),
        examples="""
sd35bench clean demo            list files of images that no record names
sd35bench clean demo --apply    move them to demo's trash/, with a manifest
""",
        flags=(
            Flag(name="--apply", means="move the files; without it they are only listed"),
            RESULTS_DIR,
        ),
    )
}
