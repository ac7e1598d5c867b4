"""What a hosted model takes: its input schema, declared in its YAML, and requests put into it.

A model without a declaration takes the input of Stable Diffusion 3.5 (`providers.wire`). Every
other model says for each field of its input what it is called on the wire, how it travels, its
range, its default, and which of our fields it comes from. What a run may ask, what is sent, what
is recorded as not sent, and what `sd35bench serve` takes all follow from that one list.

A field comes from a field of `Request`, from `aspect_ratio` (the size's word), from `extra.NAME`
(what only this model has), or from `images.ROLE` (the URL of an input image).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sd35bench.errors import nearest
from sd35bench.fields import FIELDS, later_asked
from sd35bench.types import Request, Scalar

Kind = Literal["text", "int", "float", "int-text", "float-text", "image"]
"""How a value travels; the page writes some numbers as JSON strings ("14", "4.5")."""
EXTRA, IMAGE = "extra.", "images."
SIZE = ("width", "height")
ALWAYS = ("steps", "cfg", "sampler", "shift", "max_sequence_length", *SIZE, "output_format")
"""Fields that every request has a value of, so that it is said when they are not sent."""
ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One field of a hosted model's input.

    `name` is the wire's, `source` ours, `kind` how it travels. `low` and `high` bound a number,
    `choices` are the texts it may be, `words` maps our word for a value to the wire's. `needs`
    names the input that must be sent for this one to act. `drawn` is the seed that means a random
    one. `local` is the value that the model's local pipeline does, where it does only one.
    """

    name: str
    source: str
    kind: Kind = "text"
    default: Scalar = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Scalar, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    required: bool = False
    drawn: Scalar = None
    local: Scalar = None

    @property
    def extra(self) -> str | None:
        """Its name behind `extra.`, if that is where it comes from."""
        return self.source.removeprefix(EXTRA) if self.source.startswith(EXTRA) else None

    @property
    def role(self) -> str | None:
        """Its name behind `images.`, if that is where it comes from."""
        return self.source.removeprefix(IMAGE) if self.source.startswith(IMAGE) else None

    @property
    def number(self) -> type | None:
        """`int` or `float` for a number."""
        return {"int": int, "float": float}.get(self.kind.removesuffix("-text"))

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return ("one of " if len(self.choices) > 1 else "") + ", ".join(map(str, self.choices))
        if self.number is None:
            return "the URL of an image" if self.kind == "image" else "a text"
        word = "an integer" if self.number is int else "a number"
        return word if self.low is None else f"{word} from {self.low:g} to {self.high:.15g}"

    def checked(self, value: Any) -> Scalar:
        """The value as its kind. Raises: ValueError saying what is allowed."""
        found = value
        if self.number is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"must be {self.allowed}")
            found = self.number(value)
            low, high = self.low, self.high
            if found != value or (low is not None and found < low):
                raise ValueError(f"must be {self.allowed}")
            if high is not None and found > high:
                raise ValueError(f"must be {self.allowed}")
            found += 0  # -0.0 would be another value than 0.0
        elif not isinstance(value, str):
            found = "" if value is None else str(value)
        if self.choices and found not in self.choices:
            raise ValueError(f"must be {self.allowed}{nearest(str(found), map(str, self.choices))}")
        return found

    def wire(self, value: Scalar) -> Scalar:
        """A checked value as it travels."""
        if self.kind.endswith("-text") and value is not None:
            return f"{value:.15g}" if isinstance(value, float) else str(value)
        return value


Schema = tuple[Input, ...]


def takes(schema: Schema, source: str) -> bool:
    """Whether an input comes from this field of ours."""
    return any(item.source == source for item in schema)


def takes_size(schema: Schema) -> bool:
    """Whether the size can be said, as pixels or as a ratio."""
    return takes(schema, "aspect_ratio") or takes(schema, "width")


def unsent(schema: Schema) -> tuple[str, ...]:
    """Fields that every request has and that this model has no input for."""
    sized = takes_size(schema)
    return tuple(n for n in ALWAYS if not (takes(schema, n) or (n in SIZE and sized)))


def refusal(schema: Schema, request: Request, ratios: Mapping[tuple[int, int], str]) -> str | None:
    """Why a request cannot be put into the model's input, or nothing where it can."""
    return next(_refusals(schema, request, ratios), None)


def _refusals(
    schema: Schema, request: Request, ratios: Mapping[tuple[int, int], str]
) -> Iterator[str]:
    """Everything that is wrong, in order."""
    for name in ("negative_prompt", "skip_layer_guidance", "shift", "init_image"):
        if not takes(schema, name) and getattr(request, name) != FIELDS[name].quiet:
            yield f"{name}: the model has no input for it; leave it out"
    if not takes(schema, "max_sequence_length") and request.max_sequence_length is not None:
        yield "max_sequence_length: the model has no input for it; use max_sequence_length=null"
    for name in later_asked(request):
        if name not in ("extra", "images") and not takes(schema, name):
            yield f"{name}: the model has no input for it; leave it out"
    for name in (*(EXTRA + n for n, _ in request.extra), *(IMAGE + n for n, _ in request.images)):
        if not takes(schema, name):
            yield f"{name}: {no_such(schema, name)}"
    for item in schema:
        try:
            if item.role is None:
                value = _value(item, request, ratios, {})
                if item.words or value is not item.drawn:
                    item.checked(value)
            elif item.required and item.role not in dict(request.images):
                yield f"{item.source}: is missing; give {item.source}=FILE"
        except ValueError as exc:
            value = getattr(request, item.source, None)
            said = item.source if value is None else f"{item.source}={value}"
            yield f"{said}: {exc}"


def no_such(schema: Schema, name: str) -> str:
    """Say that a model has no such extra or image, and which it has."""
    kind = EXTRA if name.startswith(EXTRA) else IMAGE
    known = [item.source for item in schema if item.source.startswith(kind)]
    has = f"it has {', '.join(known)}" if known else "it has none"
    return f"the model has no such input; {has}{nearest(name, known)}"


def payload(
    schema: Schema, request: Request, ratios: Mapping[tuple[int, int], str], urls: Mapping[str, str]
) -> dict[str, Any]:
    """The model's whole input; nothing that acts is left to the service's defaults.

    `urls`: of the input images, by role.
    """
    found = {item.name: _value(item, request, ratios, urls) for item in schema}
    sent = {name for name, value in found.items() if value is not ABSENT}
    return {
        item.name: item.wire(found[item.name])
        for item in schema
        if item.name in sent and (item.needs is None or item.needs in sent)
    }


def _value(
    item: Input, request: Request, ratios: Mapping[tuple[int, int], str], urls: Mapping[str, str]
) -> Any:
    """An input's value before it is checked. Raises: ValueError for a word that there is not."""
    if item.role is not None:
        return urls.get(item.role, ABSENT)
    if item.extra is not None:
        return dict(request.extra).get(item.extra, item.default)
    if item.source == "aspect_ratio":
        found = ratios.get((request.width, request.height))
        if found is None:
            raise ValueError(f"{request.width}x{request.height} px is none; must be {item.allowed}")
        return found
    value = getattr(request, item.source)
    if not item.words:
        return float(value) if item.number is float and value is not None else value
    if value not in item.words:
        raise ValueError(f"must be one of {', '.join(item.words)}")
    return item.words[value]


def defaults(schema: Schema) -> dict[str, Scalar]:
    """What is sent for extras that nobody asked for, by wire name."""
    return {item.name: item.default for item in schema if item.extra is not None}


def roles(schema: Schema) -> Sequence[str]:
    """The roles of input images."""
    return [item.role for item in schema if item.role is not None]
