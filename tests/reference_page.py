"""docs/reference.md: every field and every record, from the schemas that the code reads.

python -m tests.reference_page     writes the page; a test fails where it is out of date
"""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sd35bench import types
from sd35bench.config.models import FIELDS, Known
from sd35bench.config.serve import SERVE_FIELDS
from sd35bench.fields import FIELDS as REQUEST_FIELDS
from sd35bench.fields import KEYED
from sd35bench.recommend.profiles import Profile

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
RECORDS = (
    *(types.Record, types.Trial, types.Request, types.SkipLayerGuidance, types.PromptRef),
    *(types.Load, types.ModelSpec, types.Change, types.BackendSpec),
    *(types.Timings, types.Memory, types.Flops, types.GpuState, types.Surroundings),
    *(types.RemoteCall, types.Session, types.CanaryFacts, types.Score),
)
NODES = ("model.", "prompts.", "remote.", "ray.")
TITLES = ("field", "takes", "default", "what it is")
HEAD = """# Reference

Made by `python -m tests.reference_page` from the code's own schemas; do not edit it.
`sd35bench run --help` and `sd35bench serve --help` print the fields, too.
"""
DECIDES = """A *setting* is what is compared; a *pair* is two images that may be held against each
other one by one. A field that came later is left out of a trial's key at its neutral value, so
that old studies keep their keys.
"""
KEPT = """A study is a folder. Its journal holds one JSON object a line: sessions and records, with
the fields below. Units are suffixes; unknown is `null`, never 0. Times are wall seconds.
"""


def cell(value: Any) -> str:
    """A text as a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """A Markdown table."""
    for row in (titles, ["---"] * len(titles), *rows):
        yield "| " + " | ".join(cell(value) for value in row) + " |"


def known(fields: Iterable[Known]) -> Iterator[tuple[str, ...]]:
    """What the command line takes; what `-m` sweeps has a star."""
    for f in fields:
        yield f"`{f.name}=`{' *' if f.axis else ''}", f.allowed, f.default, f.means


def of_runs() -> Iterator[str]:
    """The fields of `run`, by where they belong, and those of `serve`."""
    own = [f for f in FIELDS.values() if not f.name.startswith(NODES)]
    asked = [f for f in own if f.name in REQUEST_FIELDS]
    yield from ("## Fields of a run", "", "`-m` sweeps those with a star.", "")
    yield from ("### Asked for each image", "", *table(TITLES, known(asked)), "")
    yield from ("### Of the run", "")
    yield from (*table(TITLES, known(f for f in own if f not in asked)), "")
    for node in NODES:
        found = [f for f in FIELDS.values() if f.name.startswith(node)]
        yield from (f"### Names that begin with `{node}`", "", *table(TITLES, known(found)), "")
    found = [f for name, f in SERVE_FIELDS.items() if name not in FIELDS]
    yield from ("## Fields of `serve` alone", "", *table(TITLES, known(found)), "")


def of_identity() -> Iterator[str]:
    """What each field of a request decides."""
    yield from ("## What a field of a request decides", "", DECIDES)
    titles = ("field", "setting", "pair", "work of a call", "hosted protocol", "neutral value")
    rows = (
        (
            f"`{f.name}`",
            *("yes" if flag else "" for flag in (f.setting, f.pair, f.work is not None, f.sent)),
            "" if f.neutral is KEYED else f"`{f.neutral!r}`",
        )
        for f in REQUEST_FIELDS.values()
    )
    yield from (*table(titles, rows), "")


def of_class(cls: type) -> Iterator[str]:
    """A record or a profile: what its docstring says, then its fields, types and defaults."""
    yield from (f"### {cls.__name__}", "", inspect.cleandoc(cls.__doc__ or "").replace("``", "`"))
    yield ""
    fields: Any = dataclasses.fields(cls)
    rows = ((f"`{f.name}`", f"`{type_text(f.type)}`", default(f)) for f in fields)
    yield from (*table(("field", "type", "default"), rows), "")


def type_text(annotation: Any) -> str:
    """An annotation as it is written in the code."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", ()):
        return annotation.__name__
    names = ("sd35bench.types.", "collections.abc.", "typing.")
    text = str(annotation)
    for name in names:
        text = text.replace(name, "")
    return text.replace("str | int | float | bool | None", "Scalar")


def default(field: Any) -> str:
    """A field's default; empty where it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def page() -> str:
    """The whole page."""
    lines = [HEAD, *of_runs(), *of_identity(), "## Profiles", "", *of_class(Profile)]
    lines += ["## Records", "", KEPT]
    for cls in RECORDS:
        lines += of_class(cls)
    values = ((f"`{s.value}`",) for s in types.Status)
    lines += ["### Status", "", types.Status.__doc__, "", *table(("value",), values)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
