"""Optuna's journal in a study's folder, with locks that end with their process.

Optuna's own file lock is a symbolic link: a worker that is killed leaves it behind, and all others
wait 30 s for it. Ours is the kernel's (flock), which dies with its holder, so none can be stale.
A worker killed within a write leaves half a line, which would spoil the next one: the next
holder of the lock cuts it off. Readers take no lock; they stop at the last whole line.

Every worker also holds a lock of its own for as long as it lives. A setting that is "running" under
a name whose lock is free was left by a dead worker, and is taken over.
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sd35bench.disk import disk_errors, open_lock, try_flock
from sd35bench.errors import StoreError

FOLDER = "tune"


def open_journal(study_path: Path) -> JournalStorage:
    """Open the journal of a study's folder, made if need be.

    Raises: StoreError where it is damaged, or cannot be written.
    """
    folder = study_path / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / "journal.log"
    if path.exists() and not path.is_file():
        raise StoreError(f"{path} cannot be read: it is no regular file")
    lock = JournalLock(path)
    with disk_errors(path):
        lock.acquire()  # cut off what a killed writer left before anyone reads
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=cast(Any, lock)))
    except Exception as exc:  # Optuna replays the lines, and raises whatever they lead to
        raise StoreError(
            f"{path} is damaged ({type(exc).__name__}: {exc}); move {folder} away: the search then"
            " begins again, with the images that are there"
        ) from exc


class JournalLock:
    """The kernel's lock on a file beside the journal, as Optuna's file locks are used."""

    def __init__(self, journal: Path) -> None:
        """Nothing is locked until `acquire`."""
        self._journal = journal
        self._handle: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock, and mend the journal's end."""
        path = self._journal.with_name(self._journal.name + ".flock")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._cut_torn_line()
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        return True

    def release(self) -> None:
        """Give the lock back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _cut_torn_line(self) -> None:
        """Cut off half a line; writers hold the lock, so nobody is in the middle of one."""
        if not self._journal.exists():
            return
        with open(self._journal, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
        os.truncate(self._journal, whole)


class Worker:
    """A process among the workers of one search; `close` when it is done."""

    def __init__(self, study_path: Path) -> None:
        """Take a new name and hold its lock."""
        self.name = uuid.uuid4().hex[:12]
        self._folder = study_path / FOLDER / "workers"
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"{self.name}.lock"
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._handle, fcntl.LOCK_EX)

    def close(self) -> None:
        """Give the name back."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)

    @contextlib.contextmanager
    def claim_dead(self, name: str) -> Iterator[bool]:
        """Say whether worker `name` is dead; while inside, nobody else claims it."""
        path = self._folder / f"{name}.lock"
        if name == self.name:
            yield False
            return
        with open_lock(path) as handle:
            yield try_flock(handle, fcntl.LOCK_EX)
