"""What models other than Stable Diffusion 3.5 take: their declared inputs, read as strictly.

One model makes the images. Where it is the one that was asked for, an input that its pipeline has
not is taken at the one value that it does anyway (`Input.local`). Where it stands in for another
(`stand_in_for`), every input is read and checked, images are fetched, sizes become the nearest that
it has, and what it cannot do has no effect: what is tested is the way there and back.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sd35bench.remote.inputs import Input, Schema, takes
from sd35bench.server.settings import (
    LONGEST_PROMPT,
    LONGEST_URL,
    Refusal,
    ServedModel,
    refuse_unknown,
    shown,
)
from sd35bench.types import Request

_NUMBER = "^-?[0-9]{1,20}(\\.[0-9]{1,9})?$"


def read_own(
    given: Mapping[str, Any], schema: Schema, model: ServedModel, draw_seed: Callable[[], int]
) -> dict[str, Any]:
    """Every input, typed, with its seed drawn; every wrong one is named at once.

    Raises: Refusal (400).
    """
    refuse_unknown("input.", given, {item.name: item for item in schema})
    found: dict[str, Any] = {}
    wrong = []
    for item in schema:
        try:
            found[item.name] = _read(item, given, model)
            if item.source == "seed" and found[item.name] is None:
                found[item.name] = draw_seed() % (int(item.high or 0) + 1)
        except ValueError as exc:
            value = f"={shown(given[item.name])}" if item.name in given else ""
            wrong.append(f"input.{item.name}{value}: {exc}")
    wrong += [] if wrong else _missing_partners(schema, found)
    if wrong:
        raise Refusal(400, "; ".join(wrong))
    return found


def image_urls(schema: Schema, found: Mapping[str, Any]) -> dict[str, str]:
    """Addresses of input images, by the input's name."""
    named = ((item.name, found[item.name]) for item in schema if item.role is not None)
    return {name: url for name, url in named if url is not None}


def own_request(found: Mapping[str, Any], schema: Schema, model: ServedModel) -> Request:
    """Turn a read input into our request. Raises: Refusal (400) for a size that there is not."""
    by_source = {item.source: (item, found[item.name]) for item in schema}

    def value(source: str, default: Any) -> Any:
        return by_source[source][1] if source in by_source else default

    sampler = model.sampler
    if "sampler" in by_source and not model.stands_in:
        item, word = by_source["sampler"]
        sampler = next(ours for ours, theirs in item.words.items() if theirs == word)
    width, height = _size(value, schema, model)
    return Request(
        prompt=value("prompt", ""),
        negative_prompt=value("negative_prompt", ""),
        steps=value("steps", model.steps),
        cfg=value("cfg", model.cfg),
        seed=value("seed", 0),
        width=width,
        height=height,
        sampler=sampler,
    )


def own_schema(schema: Schema, model: ServedModel) -> dict[str, Any]:
    """The JSON Schema of the input."""
    return {
        "type": "object",
        "properties": {item.name: _property(item, model) for item in schema},
        "required": [item.name for item in schema if item.required or item.source == "prompt"],
        "additionalProperties": False,
    }


def _read(item: Input, given: Mapping[str, Any], model: ServedModel) -> Any:
    """One input's value, typed. Raises: ValueError saying what is allowed."""
    if item.name not in given:
        if item.source == "prompt" or item.required:
            raise ValueError("must be given")
        return None if item.role is not None else _default(item, model)
    value = given[item.name]
    if item.role is not None:
        return _url(value, item)
    if item.source == "seed" and value in (None, item.drawn) and value is not False:
        return None
    is_text = item.number is None
    found = _text(value, item) if is_text else item.checked(_number(value, item))
    if item.local is not None and not model.stands_in and found != item.local:
        raise ValueError(f"must be {item.local}: the model that is served here does nothing else")
    return found


def _default(item: Input, model: ServedModel) -> Any:
    here = item.local is not None and not model.stands_in
    return item.local if here else item.default


def _number(value: Any, item: Input) -> Any:
    """JSON has one kind of number, and the page writes some of them as texts."""
    if isinstance(value, str):
        if re.fullmatch(_NUMBER, value) is None:
            raise ValueError(f"must be {item.allowed}")
        value = float(value) if "." in value else int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _text(value: Any, item: Input) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be {item.allowed}")
    choices = tuple(item.words.values()) if item.words else item.choices
    if choices and value not in choices:
        raise ValueError(f"must be one of {', '.join(map(str, choices))}")
    if len(value) > LONGEST_PROMPT:
        raise ValueError(f"must be at most {LONGEST_PROMPT} characters, not {len(value)}")
    if "\0" in value:
        raise ValueError("must be a text without null characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("must be text without lone surrogates")
    if item.source == "prompt" and not value.strip(" \t\r\n"):
        raise ValueError("must be a text that is not empty")
    return value


def _url(value: Any, item: Input) -> str | None:
    if value in (None, "") and not item.required:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_URL:
        raise ValueError(f"must be a URL of at most {LONGEST_URL} characters")
    return value


def _missing_partners(schema: Schema, found: Mapping[str, Any]) -> Iterator[str]:
    """Images that act only with another, which was not given."""
    for item in schema:
        alone = item.needs is not None and found[item.needs] is None
        if item.role is not None and found[item.name] is not None and alone:
            yield f"input.{item.name}: it acts only with input.{item.needs}"


def _size(value: Callable[[str, Any], Any], schema: Schema, model: ServedModel) -> tuple[int, int]:
    """The asked size, or the nearest shape of a model that stands in."""
    ratio = value("aspect_ratio", "1:1")
    if not takes(schema, "width"):
        if ratio in model.sizes:
            return model.sizes[ratio]
        wide, high = map(int, ratio.split(":"))
        return _nearest(model, wide / high)
    width, height = value("width", 0), value("height", 0)
    if model.stands_in:
        return _nearest(model, width / height if width > 0 and height > 0 else 1.0)
    for name, side in (("width", width), ("height", height)):
        if side % model.size_multiple or not model.size_multiple <= side <= model.max_side_px:
            raise Refusal(
                400,
                f"input.{name}={side}: must be a multiple of {model.size_multiple} from"
                f" {model.size_multiple} to {model.max_side_px}",
            )
    return width, height


def _nearest(model: ServedModel, shape: float) -> tuple[int, int]:
    def apart(size: tuple[int, int]) -> float:
        found = size[0] / size[1] / shape
        return max(found, 1 / found)

    return min(model.sizes.values(), key=apart)


def _property(item: Input, model: ServedModel) -> dict[str, Any]:
    """One input's JSON Schema."""
    default = _default(item, model)
    told: dict[str, Any] = {} if item.source == "prompt" else {"default": item.wire(default)}
    if item.role is not None:
        kind = {"type": ["string", "null"], "maxLength": LONGEST_URL}
        return {**kind, "description": "URL of an image (jpeg, png, webp)."}
    if item.number is None:
        choices = list(item.words.values()) if item.words else list(item.choices)
        bounds = {"enum": choices} if choices else {"maxLength": LONGEST_PROMPT}
        return {"type": "string", **bounds, **told}
    number: dict[str, Any] = {"type": "integer" if item.number is int else "number"}
    if item.low is not None:
        number |= {"minimum": item.low, "maximum": item.high}
    either = [number, {"type": "string", "pattern": _NUMBER}]
    either += [{"type": "null"}] if item.source == "seed" else []
    either += [{"const": item.drawn}] if item.drawn is not None else []
    return {"anyOf": either, **told}
