"""What a client may ask for: one table that reads the protocol's input and writes its schema.

Numbers come as JSON numbers or as strings, as the vendor's page and its documentation have them. A
string is taken exactly where its pattern in the schema matches, so that what the schema allows is
what is accepted. Nothing is guessed: unknown fields, booleans for numbers, NaN, duplicate names and
lone surrogates are refused, each by name.
"""

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sd35bench.server.refusals import Refusal
from sd35bench.server.settings import ServedModel
from sd35bench.types import Request

__all__ = ["Asked", "body_schema", "input_schema", "parse_json", "read_create", "to_request"]

LONGEST_PROMPT = 10_000
LONGEST_URL = 4096
SEEDS = 2**32
FORMATS = ("webp", "jpg", "png")
BODY_FIELDS = ("model", "version", "input", "webhook_url", "webhook_secret")

_UP_TO_50 = "[1-9]|[1-4][0-9]|50"
_UP_TO_100 = "[0-9]|[1-9][0-9]|100"
_ZERO_TO_20 = r"20(\.0{1,9})?|1?[0-9](\.[0-9]{1,9})?"
_ZERO_TO_1 = r"1(\.0{1,9})?|0(\.[0-9]{1,9})?"
_BELOW_2_32 = (
    "0|[1-9][0-9]{0,8}|[1-3][0-9]{9}|4([01][0-9]{8}|2([0-8][0-9]{7}|9([0-3][0-9]{6}|4([0-8][0-9]{5}"
    "|9([0-5][0-9]{4}|6([0-6][0-9]{3}|7([01][0-9]{2}|2([0-8][0-9]|9[0-5]))))))))"
)


class _Wrong(Exception):
    """A value that its field does not take; says what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Number:
    """A number in a range, or the same as a string that `text` matches."""

    kind: type[int] | type[float]
    low: int
    high: int
    text: str
    default: int | float | None
    means: str
    nullable: bool = False

    def read(self, value: Any) -> int | float | None:
        if value is None and self.nullable:
            return None
        if isinstance(value, str):
            if re.fullmatch(self.text, value, re.ASCII) is None:
                raise _Wrong(self._allowed())
            return self.kind(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Wrong(self._allowed())
        whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
        if not self.low <= value <= self.high or (self.kind is int and not whole):
            raise _Wrong(self._allowed())
        return self.kind(value) + 0  # + 0 turns -0.0 into 0.0

    def _allowed(self) -> str:
        word = "an integer" if self.kind is int else "a number"
        null = ", or null" if self.nullable else ""
        return f"{word} from {self.low} to {self.high}{null}"

    def schema(self) -> dict[str, Any]:
        number = {
            "type": "integer" if self.kind is int else "number",
            "minimum": self.low,
            "maximum": self.high,
        }
        choices = [number, {"type": "string", "pattern": f"^({self.text})$"}]
        if self.nullable:
            choices.append({"type": "null"})
        return {"anyOf": choices, "default": self.default, "description": self.means}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One of a few words."""

    words: tuple[str, ...]
    means: str

    @property
    def default(self) -> str:
        return self.words[0]

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise _Wrong(f"one of {', '.join(self.words)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "enum": list(self.words),
            "default": self.default,
            "description": self.means,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    """The text of the image; there is no default."""

    default: None = None

    def read(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip(" \t\r\n"):
            raise _Wrong("a text that is not empty")
        if len(value) > LONGEST_PROMPT:
            raise _Wrong(f"at most {LONGEST_PROMPT} characters, not {len(value)}")
        if "\0" in value:
            raise _Wrong("a text without null characters")
        return value

    def schema(self) -> dict[str, Any]:
        return {
            "type": "string",
            "minLength": 1,
            "maxLength": LONGEST_PROMPT,
            "pattern": "^[^\\u0000]*[^ \\t\\r\\n\\u0000][^\\u0000]*$",
            "description": "What the image shows.",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """The address of an init image, or none."""

    taken: bool
    default: None = None

    def read(self, value: Any) -> str | None:
        if value is None or value == "":
            return None
        if not self.taken:
            raise _Wrong("null: this model and backend make images from text only")
        if not isinstance(value, str) or len(value) > LONGEST_URL:
            raise _Wrong(
                f"a URL of at most {LONGEST_URL} characters, or null; upload an image through"
                " POST /v1/upload/presign"
            )
        return value

    def schema(self) -> dict[str, Any]:
        means = "URL of an init image (jpeg, png, webp): image-to-image."
        if not self.taken:
            return {"enum": [None, ""], "default": None, "description": f"{means} Not served here."}
        return {
            "type": ["string", "null"],
            "maxLength": LONGEST_URL,
            "default": None,
            "description": means,
        }


def _fields(model: ServedModel) -> dict[str, Any]:
    return {
        "prompt": _Prompt(),
        "aspect_ratio": _Choice(words=tuple(model.sizes), means="Width to height."),
        "cfg": _Number(
            kind=float, low=0, high=20, text=_ZERO_TO_20, default=5.0,
            means="Classifier-free guidance: how closely the image follows the prompt.",
        ),
        "steps": _Number(
            kind=int, low=1, high=50, text=_UP_TO_50, default=40, means="Denoising steps."
        ),
        "prompt_strength": _Number(
            kind=float, low=0, high=1, text=_ZERO_TO_1, default=0.85,
            means="Denoising strength in image-to-image; 1.0 destroys all of the init image. It is"
            " accepted and ignored without an image, and must be above 0 with one.",
        ),
        "seed": _Number(
            kind=int, low=0, high=SEEDS - 1, text=_BELOW_2_32, default=None, nullable=True,
            means="Seed of the starting noise; null draws one and reports it.",
        ),
        "image": _Image(taken=model.takes_images),
        "output_format": _Choice(words=FORMATS, means="The image file."),
        "output_quality": _Number(
            kind=int, low=0, high=100, text=_UP_TO_100, default=90,
            means="Of jpg and webp; png has none.",
        ),
    }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A create that can be done: `input` has every field, typed, with its seed drawn."""

    slug: str
    input: dict[str, Any]

    @property
    def image(self) -> str | None:
        """The address of the init image."""
        return self.input["image"]


def parse_json(data: bytes) -> Any:
    """Decode a body strictly. Raises: Refusal (400)."""
    try:
        text = data.decode("utf-8")
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise Refusal(400, "the body is nested too deeply") from exc
    except ValueError as exc:  # UnicodeDecodeError and JSONDecodeError are kinds of it
        reason = str(exc)[:200] if not isinstance(exc, UnicodeDecodeError) else "not UTF-8"
        raise Refusal(400, f"the body is not valid JSON: {reason}") from exc


def read_create(
    body: Any, model: ServedModel, draw_seed: Callable[[], int] = lambda: secrets.randbelow(SEEDS)
) -> Asked:
    """Read a create's body; every wrong field of the input is named at once.

    Raises: Refusal, 404 for a model that is not served, 400 for everything else.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object with 'model' and 'input'")
    _refuse_unknown("", body, BODY_FIELDS)
    _check_envelope(body)
    slug = body["model"]
    if slug not in model.slugs:
        raise Refusal(404, f"Model not found: {_shown(slug)}; served here: {_list(model.slugs)}")
    found = _read_input(body["input"], model)
    if found["seed"] is None:
        found["seed"] = draw_seed()
    return Asked(slug=slug, input=found)


def to_request(asked: Mapping[str, Any], model: ServedModel, init_image: str | None) -> Request:
    """Turn a read input into our request; `init_image` is the SHA-256 of the init image's file."""
    width, height = model.sizes[asked["aspect_ratio"]]
    return Request(
        prompt=asked["prompt"],
        steps=asked["steps"],
        cfg=asked["cfg"],
        seed=asked["seed"],
        width=width,
        height=height,
        init_image=init_image,
        prompt_strength=None if init_image is None else asked["prompt_strength"],
        sampler=model.sampler,
        output_format=asked["output_format"],
        output_quality=asked["output_quality"],
    )


def input_schema(model: ServedModel) -> dict[str, Any]:
    """The JSON Schema of `input`, as ``GET /v1/model`` tells it."""
    return {
        "type": "object",
        "properties": {name: field.schema() for name, field in _fields(model).items()},
        "required": ["prompt"],
        "additionalProperties": False,
    }


def body_schema(model: ServedModel) -> dict[str, Any]:
    """The JSON Schema of a create's body."""
    return {
        "type": "object",
        "properties": {
            "model": {"type": "string", "enum": list(model.slugs)},
            "version": {"type": ["string", "null"], "description": "Accepted; not used."},
            "input": input_schema(model),
            "webhook_url": {"enum": [None, ""], "description": "Webhooks are not served: poll."},
            "webhook_secret": {"type": ["string", "null"], "description": "Accepted; not used."},
        },
        "required": ["model", "input"],
        "additionalProperties": False,
    }


def _check_envelope(body: Mapping[str, Any]) -> None:
    """Check what lies around the input."""
    if not isinstance(body.get("model"), str):
        raise Refusal(400, "model: must be given, as a text")
    for name in ("version", "webhook_secret"):
        if not isinstance(body.get(name), str | None):
            raise Refusal(400, f"{name}={_shown(body[name])}: must be a text or null")
    if body.get("webhook_url") not in (None, ""):
        raise Refusal(400, "webhook_url: webhooks are not served; leave it out and poll instead")
    if not isinstance(body.get("input"), dict):
        raise Refusal(400, "input: must be given, as a JSON object with at least 'prompt'")


def _read_input(given: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    fields = _fields(model)
    _refuse_unknown("input.", given, fields)
    if "prompt" not in given:
        raise Refusal(400, "input.prompt: must be given")
    found: dict[str, Any] = {}
    wrong = []
    for name, field in fields.items():
        try:
            found[name] = field.read(given[name]) if name in given else field.default
            _encodable(found[name])
        except _Wrong as exc:
            wrong.append(f"input.{name}={_shown(given[name])}: must be {exc}")
    if wrong:
        raise Refusal(400, "; ".join(wrong))
    if found["image"] is not None and found["prompt_strength"] == 0:
        raise Refusal(
            400,
            "input.prompt_strength=0: must be above 0 with an image, at 0 nothing is left to"
            " denoise",
        )
    return found


def _refuse_unknown(prefix: str, given: Mapping[str, Any], known: Any) -> None:
    unknown = [f"{prefix}{name[:60]}" for name in given if name not in known]
    if unknown:
        word = "field" if len(unknown) == 1 else "fields"
        raise Refusal(400, f"unknown {word} {_list(unknown[:10])}; known: {_list(known)}")


def _encodable(value: Any) -> None:
    """Refuse half of a surrogate pair, which no UTF-8 answer could repeat."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise _Wrong("text without lone surrogates") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is given twice")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)  # escapes what a terminal or a log would obey
    return text if len(text) <= 60 else f"{text[:60]}…"


def _list(words: Any) -> str:
    return ", ".join(str(word).encode("ascii", "backslashreplace").decode() for word in words)
