"""A service's key: read from the environment or a private file, shown nowhere.

The key travels as a `Key`, which hides itself from everything that prints or pickles. Only the
place that sends it calls `reveal`.
"""

import os
import stat
from pathlib import Path
from typing import NoReturn

from sd35bench.errors import ConfigError

HIDDEN = "Key(…)"
MAX_LENGTH = 4096


class Key:
    """A secret that neither prints, compares, formats nor pickles."""

    __slots__ = ("_reveal",)

    def __init__(self, value: str) -> None:
        """`value` is kept in a closure, so that no debugger's table of attributes shows it."""
        self._reveal = lambda: value

    def reveal(self) -> str:
        """Return the secret, for the header that carries it."""
        return self._reveal()

    def __repr__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return HIDDEN

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled: each process reads it anew")


def read_key(variable: str, key_file: str | None) -> Key:
    """Read the key from `key_file`, or from the environment where none is given.

    Raises: ConfigError with the remedy where there is no key, or a file that others may read.
    """
    if key_file is None:
        text = os.environ.get(variable, "").strip()
        if not text:
            raise ConfigError(
                f"{variable} is not set: put the service's key into that environment variable, or"
                " into a file that only you can read and name it with remote.key_file=FILE"
            )
        return Key(_sound(text, variable))
    path = Path(key_file).expanduser()
    where = f"remote.key_file={key_file}"
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()[: MAX_LENGTH + 1].decode("ascii").strip()
    except OSError as exc:
        raise ConfigError(f"{where}: cannot be read ({exc.strerror})") from exc
    except UnicodeDecodeError:  # its text would hold the key
        raise ConfigError(f"{where}: holds no key: a key is one line of plain text") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{where}: others on this machine can read it; run chmod 600 on it and try again"
        )
    if not text:
        raise ConfigError(f"{where}: is empty; put the key of the service into it")
    return Key(_sound(text, where))


def _sound(text: str, where: str) -> str:
    """Refuse what no header can carry; the text itself is never shown."""
    if len(text) > MAX_LENGTH or not text.isascii() or not text.isprintable() or " " in text:
        raise ConfigError(f"{where}: holds no key: a key is one line of plain text without spaces")
    return text
