"""Who is calling: keys kept as hashes, compared in constant time.

A key file has one line per key, ``sha256:<64 hex digits> <name>``; ``#`` begins a comment. Keys are
made here, from 256 random bits, so one round of SHA-256 hides them as well as any slow hash would:
there is nothing to guess. Every key of the file is compared for every request, so that the time
taken tells nothing about which one was close.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35bench.errors import ConfigError

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
    """The keys of one file."""

    def __init__(self, callers: Mapping[str, Caller]) -> None:
        """`callers` by the SHA-256 (hex) of their keys."""
        self._callers = {bytes.fromhex(digest): caller for digest, caller in callers.items()}

    @classmethod
    def read(cls, path: Path) -> "KeyRing":
        """Read a key file. Raises: ConfigError, naming the line, never quoting it."""
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"key_file={path}: cannot be read: {exc}; {_remedy(path)}") from exc
        callers: dict[str, Caller] = {}
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
            callers[found[1]] = Caller(id=found[1][:16], name=found[2])
        if not callers:
            raise ConfigError(f"key_file={path}: it holds no key; {_remedy(path)}")
        return cls(callers)

    def caller(self, key: str) -> Caller | None:
        """Return whose key this is, or ``None``; takes as long either way."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(digest, given):
                found = caller
        return found


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
    return f"make a key with: sd35bench serve make_key=NAME key_file={path}"
