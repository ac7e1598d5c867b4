"""Files that are named by the SHA-256 of their bytes, held against their names.

A stored file may have been swapped, cut, flipped or made a link since it was written. So it is
opened without following links, only where it is a regular file (a pipe would be waited for), read
once, and hashed. What was found whole is remembered in `.checked.json` by size, inode and times of
change: of 20,000 files that did not change only the times are asked, and none is read.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sd35bench.disk import file_stamp, read_regular, write_atomic
from sd35bench.errors import StoreError

CHECKED = ".checked.json"
DAMAGED = ".damaged"
"""Ending of a damaged file's name once a whole one has taken its place."""
_STORED = re.compile(r"[0-9a-f]{64}\.[a-z]+")
_Stamp = tuple[int, ...]
_STAMPS = msgspec.json.Decoder(dict[str, _Stamp])
"""Size, inode, times of change in ns; empty: its bytes were found to be others."""


def read_named(path: Path) -> bytes:
    """Read a file whose name begins with its digest. Raises: StoreError where it is damaged."""
    return _read_named(path)[0]


def is_named(path: Path) -> bool:
    """Whether a file has the name of a stored one: 64 hex digits and an ending."""
    return _STORED.fullmatch(path.name) is not None


def _read_named(path: Path) -> tuple[bytes, os.stat_result]:
    data, found = read_regular(path)
    if hashlib.sha256(data).hexdigest() != path.name.partition(".")[0]:
        what = "it is empty" if not data else "its bytes are not those that its name was made from"
        raise StoreError(f"{path} is damaged: {what}")
    return data, found


@dataclass(slots=True)
class Scan:
    """Digests of a folder's whole files, and what is wrong with each of the others, by its path."""

    whole: set[str] = field(default_factory=set)
    damaged: dict[Path, str] = field(default_factory=dict)


class StoredFiles:
    """One folder `ab/<sha256>.<suffix>` of a study, whose whole files are known by their stamps."""

    def __init__(self, folder: Path, suffixes: tuple[str, ...]) -> None:
        """`suffixes`: the endings that names may have. The first use reads what was checked."""
        self._folder = folder
        self._suffixes = suffixes
        self._known: dict[str, _Stamp] | None = None
        self._changed = False

    def scan(self) -> Scan:
        """Look at every file; what has changed since it was checked is read.

        Raises: StoreError where the folder cannot be read.
        """
        found, known = Scan(), self._stamps()
        for entry in self._entries():
            digest = entry.name.partition(".")[0]
            at = entry.stat(follow_symlinks=False)
            if known.get(digest) == file_stamp(at):
                found.whole.add(digest)
            elif _STORED.fullmatch(entry.name):
                try:
                    self.read(Path(entry.path))
                except StoreError as exc:
                    found.damaged[Path(entry.path)] = str(exc)
                else:
                    found.whole.add(digest)
        self.save()
        return found

    def read(self, path: Path) -> bytes:
        """Read a file and remember that it was whole. Raises: StoreError where it is not."""
        try:
            data, found = _read_named(path)
        except StoreError:
            self._forget(path)
            raise
        self.note(path, found)
        return data

    def note(self, path: Path, found: os.stat_result | None = None) -> None:
        """Remember that a file is whole: it was just written, or read."""
        with contextlib.suppress(OSError):
            mark = file_stamp(path.lstat() if found is None else found)
            digest = path.name.partition(".")[0]
            if self._stamps().get(digest) != mark:
                self._stamps()[digest] = mark
                self._changed = True

    def _forget(self, path: Path) -> None:
        digest = path.name.partition(".")[0]
        if self._stamps().get(digest, ()) != ():
            self._stamps()[digest] = ()
            self._changed = True

    def path(self, digest: str) -> Path | None:
        """Path of a whole file, or ``None`` where there is none. Raises: StoreError if damaged."""
        path = self.find(digest)
        if not os.path.lexists(path):
            return None
        if not self._is_known(digest, path.lstat()):
            self.read(path)
        return path

    def bytes_of(self, digest: str) -> bytes | None:
        """A file's bytes, or ``None`` where there is none. Raises: StoreError if damaged."""
        path = self.find(digest)
        return self.read(path) if os.path.lexists(path) else None

    def find(self, digest: str) -> Path:
        """Where a file is, or would be."""
        stem = self._folder / digest[:2] / digest
        paths = [stem.with_name(f"{digest}{suffix}") for suffix in self._suffixes]
        return next((path for path in paths if os.path.lexists(path)), paths[0])

    def names(self) -> dict[str, str]:
        """The name of the file of each digest that is there, by listing the folder once."""
        there = [entry.name for entry in self._entries() if entry.is_file()]
        ranks = {suffix: rank for rank, suffix in enumerate(self._suffixes)}
        there.sort(key=lambda name: -ranks.get(name[name.find(".") :], len(ranks)))
        return {name.partition(".")[0]: name for name in there}  # the first ending stays

    def put(self, data: bytes, suffix: str) -> str:
        """Keep a file under its digest and return that; a damaged one is moved out of its way.

        Raises: DiskFull, StoreError.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._folder / digest[:2] / f"{digest}{suffix}"
        with contextlib.suppress(StoreError):
            self.read(path)
            return digest
        if os.path.lexists(path):
            os.replace(path, path.with_name(path.name + DAMAGED))
        write_atomic(path, data)
        self.note(path)
        return digest

    def save(self) -> None:
        """Keep what was checked; where that cannot be written, it is checked again some day."""
        if self._changed and self._folder.is_dir():
            known = {**self._load(), **self._stamps()}
            with contextlib.suppress(StoreError):
                write_atomic(self._checked, json.dumps(known).encode())
                self._changed = False

    def changes(self) -> list[list[int]]:
        """What changes where a file is added or removed, or `scan` or `read` found one changed."""
        paths = sorted(path for path in self._folder.glob("*") if path.is_dir())
        found = [path.stat() for path in (*paths, self._checked) if path.exists()]
        return [[at.st_size, at.st_mtime_ns] for at in found]

    @property
    def _checked(self) -> Path:
        return self._folder.parent / f".{self._folder.name}{CHECKED}"

    def _stamps(self) -> dict[str, _Stamp]:
        if self._known is None:
            self._known = self._load()
        return self._known

    def _load(self) -> dict[str, _Stamp]:
        try:
            return _STAMPS.decode(read_regular(self._checked)[0])
        except (StoreError, msgspec.MsgspecError, RecursionError):
            return {}

    def _is_known(self, digest: str, found: os.stat_result) -> bool:
        return self._stamps().get(digest) == file_stamp(found)

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        try:
            parts = [part.path for part in os.scandir(self._folder) if part.is_dir()]
            for part in parts:
                for entry in os.scandir(part):
                    if entry.name.endswith(self._suffixes):
                        yield entry
        except FileNotFoundError:
            return
        except OSError as exc:
            raise StoreError(f"cannot read {self._folder}: {exc.strerror}") from exc
