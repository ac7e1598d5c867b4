"""Files that are whole or absent, locks that end with their process, and errors that are ours.

A writer that is killed leaves a temporary file at most, or a torn last line of a journal; both are
recognised by their place, and are no damage.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import get_ident
from typing import Any, BinaryIO, TypeVar

import msgspec
import yaml

from sd35bench.errors import DiskFull, StoreError, StudyGone

T = TypeVar("T")
_TEMPORARY = re.compile(r"\.sd35bench-([0-9a-f]{8})-([0-9]{1,9})-.+\.tmp")


def decode_line(line: bytes, decoder: "msgspec.json.Decoder[T]", nan: bool = False) -> T:
    """Parse one JSON line to the decoder's type; unknown keys are ignored, NaN is with `nan` read.

    Raises: msgspec.ValidationError for another shape, ValueError for what is not JSON.
    """
    try:
        return decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # `json.dumps` writes a lone surrogate of a prompt as \\udXXX, which msgspec refuses.
        return msgspec.convert(parse_json(line, nan), decoder.type)


def read_yaml(path: Path) -> Any:
    """Read a YAML file of somebody's own.

    Raises: ValueError, one line, for what cannot be read or is no YAML (20,000 levels are none).
    """
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as exc:
        raise ValueError(" ".join(str(exc).split())) from exc


def parse_json(data: bytes, nan: bool = False) -> Any:
    """Parse JSON; NaN and Infinity are none but with `nan`, nor is what is nested too deep.

    Raises: ValueError.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data, parse_constant=float if nan else refuse)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def read_regular(path: Path, follow: bool = False) -> tuple[bytes, os.stat_result]:
    """Read a regular file, once; a pipe or a folder is refused without waiting.

    `follow`: a link is followed, else it is refused. Raises: StoreError that says what is there.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError as exc:
        raise StoreError(f"{path} is not there") from exc
    except OSError as exc:
        what = "it is a link" if exc.errno == errno.ELOOP else exc.strerror
        raise StoreError(f"{path} cannot be read: {what}") from exc
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path} cannot be read: it is no regular file")
        with open(handle, "rb", closefd=False) as file:
            return file.read(), found
    except OSError as exc:
        raise StoreError(f"{path} cannot be read: {exc.strerror}") from exc
    finally:
        os.close(handle)


def read_lines(path: Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    """Parse the lines of a JSON lines file; skip a torn last line, which a kill leaves.

    Raises: StoreError for any other line that is not JSON, or not of the expected type, or that
    `parse` refuses with one; it names file and line.
    """
    lines = read_regular(path, follow=True)[0].split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield parse(line)
        except StoreError as exc:
            raise StoreError(f"{path}:{number} {exc}") from exc
        except msgspec.ValidationError as exc:
            raise StoreError(
                f"{path}:{number} cannot be read by this version of sd35bench: {exc}; update"
                " sd35bench, or restore or delete that line"
            ) from exc
        except ValueError as exc:
            if number == len(lines):
                return
            raise StoreError(f"{path}:{number} is not JSON: restore or delete that line") from exc


def file_digest(path: Path) -> str:
    """SHA-256 of a file of any size, in hex. Raises: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(found: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file does: size, inode, and when its bytes and its entry changed (ns)."""
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def cache_folder(*names: str) -> Path:
    """A folder of ours in the user's cache: ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache").joinpath("sd35bench", *names)


def write_atomic(path: Path, data: bytes) -> None:
    """Write all or nothing: a temporary file on disk, then a rename.

    Raises: DiskFull, StoreError.
    """
    with _whole(path) as file:
        file.write(data)


def copy_atomic(source: Path, path: Path) -> None:
    """Copy a file of any size, all or nothing. Raises: DiskFull, StoreError."""
    with _whole(path) as file, open(source, "rb") as read:
        shutil.copyfileobj(read, file)


def append_whole(path: Path, data: bytes) -> None:
    """Add to a file, made if need be; where it cannot be done, the file stays as it was.

    Raises: DiskFull, StoreError.
    """
    before = path.stat().st_size if path.exists() else 0
    with disk_errors(path, cleanup=lambda: os.truncate(path, before)), open(path, "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(
        f".sd35bench-{_processes()}-{os.getpid()}-{path.name}.{get_ident()}.tmp"
    )
    with disk_errors(path, cleanup=lambda: temporary.unlink(missing_ok=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def is_abandoned(name: str) -> bool:
    """Whether a file's name is that of a temporary file of ours whose process is dead."""
    found = _TEMPORARY.fullmatch(name)
    return found is not None and found[1] == _processes() and not _is_alive(int(found[2]))


@functools.cache
def _processes() -> str:
    """Eight hex digits for what numbers processes: this machine, and its container."""
    with contextlib.suppress(OSError):
        return _digest(platform.node() + os.readlink("/proc/self/ns/pid"))
    return _digest(platform.node())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class LineFile:
    """A file of one writer's own: each line is whole and on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        """Nothing is created until the first line."""
        self.path = path
        self._handle: int | None = None
        self._bytes = 0

    def append(self, data: bytes) -> None:
        """Add a line, or leave the file as it was: a torn line may only be last.

        Raises: DiskFull, StoreError; StudyGone where the file was moved or deleted meanwhile.
        """
        with disk_errors(self.path):
            if self._handle is None:
                self._open()
            assert self._handle is not None
            self._require_linked(self._handle)
            try:
                if os.write(self._handle, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self._handle)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._handle, self._bytes)
                raise
            self._bytes += len(data)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self) -> None:
        """Open it, and have its name on disk as well."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle = os.open(self.path, flags, 0o644)
        self._bytes = os.fstat(self._handle).st_size
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _require_linked(self, handle: int) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(self.path)):
                return
        raise StudyGone(
            f"{self.path} was moved or deleted while it was written; put its study back and run"
            " the same command again"
        )


def is_full(error: BaseException | None) -> bool:
    """Whether the system says that there is no room, or that the quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_errors(path: Path, cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn the system's errors into ours, after `cleanup`. Raises: DiskFull, StoreError."""
    try:
        yield
    except OSError as exc:
        with contextlib.suppress(OSError):
            cleanup()
        if is_full(exc):
            raise DiskFull(
                f"the disk of {path.parent} is full; free some space and run the same command"
                " again: nothing that was stored is lost"
            ) from exc
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc


@contextlib.contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """Open a lock's file, made if need be; closing it gives the lock back.

    Raises: StoreError where something else has its name, or the folder cannot be written.
    """
    with disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        yield handle
    finally:
        os.close(handle)


def try_flock(handle: int, mode: int) -> bool:
    """Take the kernel's lock unless another process has it; says whether it was taken."""
    try:
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file; nothing is made where there is none."""
    if not path.is_file():
        return False
    with open_lock(path) as handle:
        return not try_flock(handle, fcntl.LOCK_EX)
