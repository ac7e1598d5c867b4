"""Reading a caption back: text to what it asks for, without looking at any scene; its words."""

import re
from dataclasses import dataclass
from typing import Any, cast

from sd35bench.nano.world import (
    BACKGROUNDS,
    BESIDE,
    COLOURS,
    NUMBERS,
    PLACES,
    PLURALS,
    SHAPES,
    Background,
    Colour,
    Level,
    Place,
    Relation,
    Shape,
    Size,
)

_COLOUR = f"({'|'.join(COLOURS)})"
_THING = rf"a {_COLOUR} ({'|'.join(SHAPES)})"
_GROUND = f"({'|'.join(BACKGROUNDS)})"
_RELATION = f"({'|'.join((*BESIDE, 'in front of', 'behind'))})"
_WORDINGS = (
    re.compile(rf"(?P<body>.+) on (?:a )?(?P<ground>{_GROUND})(?: background)?"),
    re.compile(rf"(?P<ground>{_GROUND}) background with (?P<body>.+)"),
)
_SINGLE = re.compile(
    rf"a (?:(small|large) )?{_COLOUR} ({'|'.join(SHAPES)})(?: ({'|'.join(PLACES.values())}))?"
)
_COUNT = re.compile(rf"({'|'.join(NUMBERS.values())}) {_COLOUR} ({'|'.join(PLURALS.values())})")
_PAIR = re.compile(rf"{_THING} {_RELATION} {_THING}")
_LIST = re.compile(rf"{_THING}(?: and {_THING})+")

_PHRASES = (
    *("a", "and", "background", "on", "with", "small", "large", "in front of", "behind"),
    *COLOURS,
    *BACKGROUNDS,
    *SHAPES,
    *PLURALS.values(),
    *NUMBERS.values(),
    *PLACES.values(),
    *BESIDE,
)


@dataclass(frozen=True)
class Spec:
    """What a caption asks for. `kinds` has one (shape, colour) per object named."""

    level: Level
    kinds: tuple[tuple[Shape, Colour], ...]
    count: int
    background: Background
    size: Size | None = None
    place: Place | None = None
    relation: Relation | None = None


def words() -> list[str]:
    """Every word that a caption can contain, sorted: of the world, so that none is forgotten."""
    return sorted({word for phrase in _PHRASES for word in phrase.split()})


def parse(prompt: str) -> Spec:
    """What a caption of nano's world asks for. Raises: ValueError for any other text."""
    text = " ".join(prompt.lower().split())
    for wording in _WORDINGS:
        found = wording.fullmatch(text)
        spec = found and _read_body(found["body"], cast(Background, found["ground"]))
        if spec:
            return spec
    raise ValueError(
        f"prompt {prompt!r} is not a caption of nano's world; one is "
        "'a red circle left of a blue square on white'"
    )


def _groups(found: re.Match[str]) -> tuple[Any, ...]:
    """The groups, which the patterns restrict to names of the world."""
    return found.groups()


def _read_body(body: str, ground: Background) -> Spec | None:
    if found := _SINGLE.fullmatch(body):
        size, colour, shape, place = _groups(found)
        named: dict[str, Place] = {words: name for name, words in PLACES.items()}
        kinds = ((shape, colour),)
        return Spec("single", kinds, 1, ground, size, named[place] if place else None)
    if found := _COUNT.fullmatch(body):
        number, colour, plural = _groups(found)
        counts = {word: count for count, word in NUMBERS.items()}
        shapes: dict[str, Shape] = {plural: shape for shape, plural in PLURALS.items()}
        return Spec("count", ((shapes[plural], colour),), counts[number], ground)
    if found := _PAIR.fullmatch(body):
        colour, shape, relation, colour2, shape2 = _groups(found)
        level: Level = "relation" if relation in BESIDE else "overlap"
        kinds = ((shape, colour), (shape2, colour2))
        return Spec(level, kinds, 2, ground, relation=relation)
    if _LIST.fullmatch(body):
        named_kinds = tuple((shape, colour) for colour, shape in re.findall(_THING, body))
        return Spec("several", named_kinds, len(named_kinds), ground)
    return None
