"""Files that are whole or absent, locks that end with their process, and errors that are ours.

A writer that is killed leaves a temporary file at most, or a torn last line of a journal; both are
recognised by their place, and are no damage.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from sd35bench.errors import DiskFull, StoreError

T = TypeVar("T")


def decode_line(line: bytes, decoder: "msgspec.json.Decoder[T]") -> T:
    """Parse one JSON line to the decoder's type; unknown keys are ignored."""
    try:
        return decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        # `json.dumps` writes a lone surrogate of a prompt as \\udXXX, which msgspec refuses.
        return msgspec.convert(json.loads(line), decoder.type)


def read_lines(path: Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    """Parse the lines of a JSON lines file; skip a torn last line, which a kill leaves.

    Raises: StoreError for any other line that is not JSON, or not of the expected type.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            yield parse(line)
        except msgspec.ValidationError as exc:
            raise StoreError(
                f"{path}:{number} cannot be read by this version of sd35bench: {exc}"
            ) from exc
        except ValueError as exc:
            if number == len(lines):
                return
            raise StoreError(f"{path}:{number} is not JSON: restore or delete that line") from exc


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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, cleanup=lambda: temporary.unlink(missing_ok=True)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


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
    """Open a lock's file, made if need be; closing it gives the lock back."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
