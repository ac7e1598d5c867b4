"""The command-line parser of all verbs: flags, words and NAME=VALUE settings, and the help text.

A verb declares a `Command`; `parse` reads arguments by it and `help_text` is written from it. Flags
may stand anywhere on the line and are never abbreviated. It imports no other module of the package,
so that help and refusals are fast.
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd35bench.errors import ConfigError, nearest

if TYPE_CHECKING:
    from sd35bench.cli.output import Answer

WIDTH = 24
"""Columns of a name in the help; its meaning stands beside it."""
COLUMNS = 98


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag as the help has it: ``--metric NAMES``, ``-m, --multirun``; and what it means."""

    typed: str
    means: str

    @property
    def names(self) -> list[str]:
        """Its name, and further ones that may be typed for it."""
        return [word for word in self.typed.replace(",", " ").split() if word.startswith("-")]

    @property
    def name(self) -> str:
        """The name that `Given` has it under."""
        return self.names[0]

    @property
    def value(self) -> str:
        """The word for its value, "" where it takes none."""
        last = self.typed.split()[-1]
        return "" if last.startswith("-") else last


MARKDOWN = Flag("--markdown", "print it as Markdown, for a document")
RESULTS_DIR = Flag("--results-dir DIR", "folder of the studies (results)")
CONFIG_DIR = Flag(
    "--config-dir DIR", "a folder with YAML files of your own (DIR/model/mine.yaml ...)"
)
PLUGIN_DIR = Flag(
    "--plugin-dir DIR", "a folder with Python code of your own, which a YAML's `kind` may name"
)
DRY_RUN = Flag("--dry-run", "print what it would do and take; write and load nothing")
YES = Flag("--yes", "agree to spend money, where a backend costs any")
QUIET = Flag("--quiet", "no progress and no remarks: failures and the answer alone")
VERBOSE = Flag("--verbose", "a line of progress at every change, not every 30 s")
_ALWAYS = (
    CONFIG_DIR,
    PLUGIN_DIR,
    Flag("--json", "one JSON document on stdout, everything else on stderr"),
    Flag("--help, -h", "this text"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """The arguments of one verb; `flags` are those that were given, with their values."""

    verb: str
    words: list[str]
    settings: list[str]
    flags: dict[str, str]
    as_json: bool

    def has(self, flag: str) -> bool:
        """Whether a flag was given."""
        return flag in self.flags

    def text(self, flag: str) -> str | None:
        """The value of a flag, ``None`` where it was not given."""
        return self.flags.get(flag)

    def whole(self, flag: str) -> int | None:
        """The value of a flag as a whole number. Raises: ConfigError."""
        text = self.flags.get(flag)
        return None if text is None else whole(flag, text)

    def number(self, flag: str) -> float | None:
        """The value of a flag as a number. Raises: ConfigError."""
        text = self.flags.get(flag)
        return None if text is None else number(flag, text)

    @property
    def config_dir(self) -> Path | None:
        """The user's own YAML folder. Raises: ConfigError where there is no such folder."""
        text = self.flags.get("--config-dir")
        if text is not None and not Path(text).is_dir():
            raise ConfigError(f"--config-dir={text}: there is no such folder")
        return None if text is None else Path(text)

    @property
    def results_dir(self) -> Path:
        """The folder of the studies."""
        return Path(self.flags.get("--results-dir", "results"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What one verb takes, and what its help says.

    `words` are its positional arguments in order: in capitals where the user chooses, in brackets
    where it may be left out, with dots where more may follow, in lower case where only this very
    word is allowed. `settings` is how the usage line writes its NAME=VALUE arguments, "" where it
    takes none. `details(config_dir)` makes the part of the help that is read from tables and files.
    """

    call: "Callable[[Given], Answer]"
    examples: str
    about: str = ""
    words: tuple[str, ...] = ()
    settings: str = ""
    flags: tuple[Flag, ...] = ()
    details: Callable[[Path | None], str] = lambda _: ""


def number(name: str, text: str) -> float:
    """Read a finite number. Raises: ConfigError, which says whose it is."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise ConfigError(f"{name}={text}: must be a number")
    return found


def whole(name: str, text: str) -> int:
    """Read a whole number. Raises: ConfigError, which says whose it is."""
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text}: must be a whole number")
    return int(text)


def name_of(setting: str) -> str:
    """The name of NAME=VALUE."""
    return setting.partition("=")[0]


def flags_of(command: Command) -> tuple[Flag, ...]:
    """Every flag that a verb takes."""
    return (*command.flags, *_ALWAYS)


def parse(verb: str, command: Command, arguments: Sequence[str], as_json: bool) -> Given:
    """Read the arguments of a verb.

    Raises: ConfigError, one line, for an unknown flag, a flag without its value, or words that the
    verb does not take.
    """
    flags = {name: f for f in flags_of(command) for name in f.names}
    words: list[str] = []
    settings: list[str] = []
    found: dict[str, str] = {}
    rest = iter(arguments)
    for text in rest:
        text = _results_dir(text, rest, RESULTS_DIR.name in flags)
        if not text.startswith("-"):
            is_setting = command.settings and ("=" in text or not command.words)
            (settings if is_setting else words).append(text)
            continue
        name, equals, value = text.partition("=")
        flag = flags.get(name)
        if flag is None:
            raise ConfigError(f"unknown flag {name}{nearest(name, flags)}; see {verb} --help")
        if equals and not flag.value:
            raise ConfigError(f"{name} takes no value; see {verb} --help")
        if flag.value:
            value = value if equals else next(rest, "")
            if not value or (not equals and value.startswith("-")):
                raise ConfigError(f"{name} needs a value, {name} {flag.value}; see {verb} --help")
        found[flag.name] = value
    given = Given(verb=verb, words=words, settings=settings, flags=found, as_json=as_json)
    if not given.has("--help"):
        _check_words(given, command)
    if given.has(QUIET.name) and given.has(VERBOSE.name):
        raise ConfigError("--quiet and --verbose contradict each other; give one")
    return given


def _results_dir(text: str, rest: Iterator[str], is_flag: bool) -> str:
    """`results_dir=DIR` and `--results-dir DIR` are one, whichever of them a verb has."""
    name, equals, value = text.partition("=")
    if name.strip("-").replace("_", "-") != "results-dir" or not (equals or text.startswith("--")):
        return text
    if not equals and not is_flag:
        value = next(rest, "")
    return f"results_dir={value}" if not is_flag else f"--results-dir{equals}{value}"


def help_text(verb: str, means: str, command: Command, config_dir: Path | None = None) -> str:
    """The help of one verb; `means` is its line in the list of verbs."""
    usage = " ".join(filter(None, (verb, *command.words, command.settings, "[FLAGS]")))
    flags = [in_columns(flag.typed, flag.means) for flag in flags_of(command)]
    parts = (
        f"sd35bench {verb}: {means}",
        f"Usage: sd35bench {usage}",
        command.about,
        "Examples:\n" + textwrap.indent(command.examples.strip("\n"), "  "),
        "Flags:\n" + "\n".join(flags),
        command.details(config_dir),
    )
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def in_columns(head: str, text: str) -> str:
    """`head`, and `text` wrapped in a column beside it; below it where `head` is too long."""
    margin = " " * (WIDTH + 2)
    body = textwrap.fill(
        text, COLUMNS, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    first = f"  {head:<{WIDTH}}"
    return f"{first}\n{body}" if len(first) > len(margin) else first + body.removeprefix(margin)


def _check_words(given: Given, command: Command) -> None:
    """Refuse too many words, too few, or others than those that are fixed."""
    fewest = sum(not word.startswith("[") for word in command.words)
    most = math.inf if command.words[-1:] and "..." in command.words[-1] else len(command.words)
    usage = " ".join((given.verb, *command.words))
    if not fewest <= len(given.words) <= most:
        shown = " ".join(given.words) if given.words else "nothing"
        raise ConfigError(f"expected `sd35bench {usage}`, not {shown!r}; see {given.verb} --help")
    for word, wanted in zip(given.words, command.words, strict=False):
        if wanted.islower() and word != wanted:
            raise ConfigError(
                f"expected `sd35bench {usage}`, not {word!r}{nearest(word, [wanted])}; see"
                f" {given.verb} --help"
            )
