"""Who is calling: keys kept as hashes, compared in constant time.

A key file has one line per key, ``sha256:<64 hex digits> <name>``; ``#`` begins a comment. Keys are
made here, from 256 random bits, so one round of SHA-256 hides them as well as any slow hash would:
there is nothing to guess. Every key of the file is compared for every request, so that the time
taken tells nothing about which one was close.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from sd35bench import plugins
from sd35bench.disk import file_stamp
from sd35bench.errors import ConfigError
from sd35bench.server.envelope import log

_LINE = re.compile(r"sha256:([0-9a-f]{64})\s+(\S{1,100})")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,100}")
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whose predictions are seen and whose limits count; `id` is no secret."""

    id: str
    name: str


ANYBODY = Caller(id="", name="anybody")
"""Everybody, where no key is asked for."""


class KeyRing:
    """The keys of one file, which is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        """Read a key file. Raises: ConfigError, naming the line, never quoting it."""
        self._path = path
        self._seen = _stamp(path)
        self._callers = _read(path)

    def caller(self, key: str) -> Caller | None:
        """Return whose key this is, or ``None``; takes as long either way."""
        self.reload(only_changed=True)
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(digest, given):
                found = caller
        return found

    def reload(self, only_changed: bool = False) -> None:
        """Read the file again; where it cannot be read the keys stay, and the log says so.

        A look at the file's time takes 2 µs, so every request takes it: a key that is removed is
        refused from the next request on.
        """
        seen = _stamp(self._path)
        if only_changed and seen == self._seen:
            return
        self._seen = seen
        try:
            self._callers = _read(self._path, may_be_empty=True)
        except ConfigError as exc:
            log("key file not read again", level=logging.ERROR, error=str(exc))
        else:
            log("key file read again", keys=len(self._callers))


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    try:
        return file_stamp(path.stat())
    except OSError:
        return ()


def _read(path: Path, may_be_empty: bool = False) -> dict[bytes, Caller]:
    """The callers of a key file by the SHA-256 of their keys. Raises: ConfigError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"key_file={path}: cannot be read: {exc}; {_remedy(path)}") from exc
    callers: dict[bytes, Caller] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"key_file={path}: line {number} is not 'sha256:<64 hex digits> <name>';"
                f" {_remedy(path)}"
            )
        callers[bytes.fromhex(found[1])] = Caller(id=found[1][:16], name=found[2])
    if not callers and not may_be_empty:
        raise ConfigError(f"key_file={path}: it holds no key; {_remedy(path)}")
    return callers


def make_key(name: str, path: Path) -> str:
    """Add a new key to a file, made if need be for this user alone, and return it: the only copy.

    Raises: ConfigError for a name that a line cannot hold, or a file that cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"make_key={name}: must be letters, digits, . _ @ - (at most 100)")
    key = f"sd35-{secrets.token_urlsafe(_KEY_BYTES)}"
    line = f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ends_whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with open(handle, "ab", buffering=0) as file:
            file.write((line if ends_whole else f"\n{line}").encode())
            os.fsync(file.fileno())
    except OSError as exc:
        raise ConfigError(f"key_file={path}: cannot be written: {exc.strerror}") from exc
    return key


def _remedy(path: Path) -> str:
    return f"make a key with: {plugins.command(f'serve make_key=NAME key_file={path}')}"
