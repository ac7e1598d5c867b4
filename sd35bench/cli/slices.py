"""`--where` and `--slice`: a study on some of its prompts, by the columns of their own file."""

from collections.abc import Callable, Iterable
from typing import Any

from sd35bench.cli.output import Answer, console, write_line
from sd35bench.cli.parser import Flag, Given
from sd35bench.errors import ConfigError, nearest
from sd35bench.study.columns import prompts, tags
from sd35bench.study.store import Study
from sd35bench.words import plural

WHERE = Flag(
    "--where NAME=VALUE",
    "only prompts with this value in a column of your prompt file; more after commas",
)
FLAGS = (WHERE, Flag("--slice NAME", "each value of a column of your prompt file by itself"))
MOST_SLICES = 50

Where = dict[str, str]


def asks_part(given: Given) -> bool:
    """Whether some of the prompts are asked for."""
    return given.has("--where") or given.has("--slice")


def parts_of(given: Given, study: Study) -> list[tuple[Where, Study]]:
    """The parts that the command line asks for, each with what its prompts have in common.

    Raises: ConfigError for a column or a value that no prompt has, and for too many slices.
    """
    known_tags = tags(study.records())
    where = _where(given.text("--where"))
    for name, value in where.items():
        _check(f"--where={name}={value}", name, known_tags)
        if value not in known_tags[name]:
            known = sorted(known_tags[name])[:10]
            raise ConfigError(
                f"--where={name}={value}: no prompt has it; there are {', '.join(known)}"
                f"{nearest(value, known)}"
            )
    part = study.part(where)
    name = given.text("--slice")
    if name is None:
        return [(where, part)]
    _check(f"--slice={name}", name, known_tags)
    values = sorted(tags(part.records()).get(name, ()))
    if len(values) > MOST_SLICES:
        raise ConfigError(f"--slice={name}: {len(values)} values; at most {MOST_SLICES} are shown")
    return [({**where, name: value}, part.part({name: value})) for value in values]


def answer_parts(
    given: Given,
    study: Study,
    make: Callable[[Study], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> Answer:
    """Make a document of every part; show it under a line that says which part it is.

    A part of which nothing can be said has `error`, why, in place of a document.
    """
    found: list[dict[str, Any]] = []
    for where, part in parts_of(given, study):
        records = part.records()
        count = len(prompts(records))
        head = {"where": where, "prompts": count}
        title = f"{said(where)}: {plural(count, 'prompt')}"
        if not given.as_json:
            write_line(f"\n## {title}\n" if given.has("--markdown") else f"\n{title}")
        try:
            document = make(part)
        except ConfigError as exc:
            found.append({**head, "error": str(exc)})
            console(given.as_json).say(f"{exc}")
            continue
        found.append({**head, **document})
        if not given.as_json:
            show(document)
    whole = {"study": study.name, "slice": given.text("--slice"), "parts": found}
    return Answer(document=whole if given.has("--slice") else found[0])


def said(where: Where) -> str:
    """A part in words: category=animals, colour=red."""
    return ", ".join(f"{name}={value}" for name, value in where.items())


def _where(text: str | None) -> Where:
    found = {}
    for word in filter(None, (text or "").split(",")):
        name, equals, value = (piece.strip() for piece in word.partition("="))
        if not (name and equals and value):
            raise ConfigError(f"--where={word}: expected NAME=VALUE, such as category=animals")
        found[name] = value
    return found


def _check(asked: str, name: str, columns: Iterable[str]) -> None:
    if name not in columns:
        known = ", ".join(sorted(columns))
        there = f"there are {known}" if known else "these prompts came without columns of their own"
        raise ConfigError(f"{asked}: no such column; {there}{nearest(name, list(columns))}")
