"""What the protocol takes and answers: pydantic models, from which the OpenAPI document is made.

The input's model is made from the table of the request's fields; `_NARROWER` has the vendor's own
ranges, defaults and words. Numbers come as JSON numbers or as strings, as the vendor's page and its
documentation have them. A string is taken exactly where its pattern in the schema matches, so what
the schema allows is what is accepted. Nothing is guessed: unknown fields, booleans for numbers,
NaN, duplicate names and lone surrogates are refused, each by name.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import DocInfo, Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StrictStr,
    ValidationError,
    create_model,
)
from pydantic.json_schema import GenerateJsonSchema

from sd35bench.fields import FIELDS, MOST_SEED, allowed
from sd35bench.remote.inputs import Schema
from sd35bench.server.own_inputs import image_urls, own_request, own_schema, read_own
from sd35bench.server.predictions import Phase
from sd35bench.server.settings import (
    LONGEST_PROMPT,
    LONGEST_URL,
    Refusal,
    ServedModel,
    listed,
    refuse_unknown,
    shown,
)
from sd35bench.types import Request

DRAWN_SEEDS = 2**32
"""Seeds are drawn below this: any client can hold them, and torch's noise has no more."""

_UP_TO_50 = "[1-9]|[1-4][0-9]|50"
_UP_TO_100 = "[0-9]|[1-9][0-9]|100"
_ZERO_TO_20 = r"20(\.0{1,9})?|1?[0-9](\.[0-9]{1,9})?"
_ZERO_TO_1 = r"1(\.0{1,9})?|0(\.[0-9]{1,9})?"


def _up_to(most: int) -> str:
    """An expression of the whole numbers up to `most` (10 at least), without leading zeros."""
    digits = str(most)
    last = len(digits) - 1
    kinds = ["0", f"[1-9][0-9]{{0,{last - 1}}}", digits]
    for place, digit in enumerate(digits):
        least = 0 if place else 1
        if int(digit) > least:  # alike up to here, smaller at this place, anything behind it
            smaller = f"{digits[:place]}[{least}-{int(digit) - 1}]"
            kinds.append(f"{smaller}[0-9]{{{last - place}}}")
    return "|".join(kinds)


def _number(kind: type[int] | type[float], low: int, high: int, text: str, null: str = "") -> Any:
    """A number from `low` to `high`, or a string that `text` matches; `null`: or null."""
    doc = DocInfo(allowed(Annotated[kind, Interval(ge=low, le=high)]) + null)
    number: Any = Annotated[
        kind, Interval(ge=low, le=high), Field(strict=True), BeforeValidator(_whole(kind))
    ]
    string: Any = Annotated[StrictStr, Field(pattern=f"^({text})$")]
    # + 0 turns -0.0 into 0.0
    either = Annotated[number | string, AfterValidator(lambda value: kind(value) + 0)]
    return Annotated[either | None, doc] if null else Annotated[either, doc]


def _whole(kind: type) -> Callable[[Any], Any]:
    """JSON has one kind of number: 28.0 is an integer there."""
    if kind is float:
        return lambda value: value
    return lambda value: int(value) if isinstance(value, float) and value.is_integer() else value


_PROMPT = Annotated[
    StrictStr,
    Field(
        min_length=1,
        max_length=LONGEST_PROMPT,
        pattern="^[^\\u0000]*[^ \\t\\r\\n\\u0000][^\\u0000]*$",
    ),
    DocInfo("a text that is not empty, without null characters"),
]
_IMAGE = Annotated[
    Annotated[StrictStr, Field(max_length=LONGEST_URL), AfterValidator(lambda url: url or None)]
    | None,
    DocInfo(
        f"a URL of at most {LONGEST_URL} characters, or null; upload an image through"
        " POST /v1/upload/presign"
    ),
]
_NO_IMAGE = Annotated[
    Annotated[Literal[None, ""], AfterValidator(lambda url: url or None)],
    DocInfo("null: this model and backend make images from text only"),
]
_IMAGE_MEANS = "URL of an init image (jpeg, png, webp): image-to-image."

_NARROWER: dict[str, tuple[Any, Any, str]] = {
    "prompt": (_PROMPT, ..., "What the image shows."),
    "cfg": (
        _number(float, 0, 20, _ZERO_TO_20),
        5.0,
        "Classifier-free guidance: how closely the image follows the prompt.",
    ),
    "steps": (_number(int, 1, 50, _UP_TO_50), 40, "Denoising steps."),
    "prompt_strength": (
        _number(float, 0, 1, _ZERO_TO_1),
        0.85,
        "Denoising strength in image-to-image; 1.0 destroys all of the init image. It is accepted"
        " and ignored without an image, and must be above 0 with one.",
    ),
    "seed": (
        _number(int, 0, MOST_SEED, _up_to(MOST_SEED), null=", or null"),
        None,
        "Seed of the starting noise; null draws one and reports it.",
    ),
    "output_format": (Literal["webp", "jpg", "png"], "webp", "The image file."),
    "output_quality": (_number(int, 0, 100, _UP_TO_100), 90, "Of jpg and webp; png has none."),
}
"""Fields that the vendor's protocol takes otherwise than our command line: type, default, words."""

_ORDER = (
    *("prompt", "aspect_ratio", "cfg", "steps", "prompt_strength", "seed", "image"),
    *("output_format", "output_quality"),
)
"""The order of the vendor's page; a field that is not there comes last."""


@cache
def _input_types(ratios: tuple[str, ...], takes_images: bool) -> dict[str, Any]:
    """Every field of the input: annotation, default and words, by name."""
    image = (_IMAGE, None, _IMAGE_MEANS)
    if not takes_images:
        image = (_NO_IMAGE, None, f"{_IMAGE_MEANS} Not served here.")
    found: dict[str, tuple[Any, Any, str]] = {
        "aspect_ratio": (Literal[ratios], ratios[0], "Width to height."),
        "image": image,
    }
    for name, field in FIELDS.items():
        if field.sent and name != "init_image":
            found[name] = _NARROWER.get(name, (field.takes, field.quiet, field.means))
    return dict(sorted(found.items(), key=lambda item: (*_ORDER, item[0]).index(item[0])))


class _Untitled(GenerateJsonSchema):
    """Leaves out titles that only repeat the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


class _Body(BaseModel):
    """A create's body; the input is read by a model of its own, which depends on what is served."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    version: str | None = Field(None, description="Accepted; not used.")
    input: dict[str, Any]
    webhook_url: Literal[None, ""] = Field(None, description="Webhooks are not served: poll.")
    webhook_secret: str | None = Field(None, description="Accepted; not used.")


_BODY_WRONG = {
    "model": "model: must be given, as a text",
    "webhook_url": "webhook_url: webhooks are not served; leave it out and poll instead",
    "input": "input: must be given, as a JSON object with at least 'prompt'",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A create that can be done: `input` has every field, typed, with its seed drawn.

    `schema` is the slug's own, empty for Stable Diffusion 3.5's.
    """

    slug: str
    input: dict[str, Any]
    schema: Schema = ()

    @property
    def image(self) -> str | None:
        """The address of the init image."""
        return None if self.schema else self.input["image"]

    @property
    def role_images(self) -> dict[str, str]:
        """Addresses of a model's own input images, by the input's name."""
        return image_urls(self.schema, self.input)


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
    body: Any,
    model: ServedModel,
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(DRAWN_SEEDS),
) -> Asked:
    """Read a create's body; every wrong field of the input is named at once.

    Raises: Refusal, 404 for a model that is not served, 400 for everything else.
    """
    if not isinstance(body, dict):
        raise Refusal(400, "the body must be a JSON object with 'model' and 'input'")
    refuse_unknown("", body, _Body.model_fields)
    try:
        asked = _Body.model_validate(body)
    except ValidationError as exc:
        name = str(exc.errors(include_url=False)[0]["loc"][0])
        said = f"{name}={shown(body.get(name))}: must be a text or null"
        raise Refusal(400, _BODY_WRONG.get(name, said)) from exc
    if asked.model not in model.slugs:
        served = listed(model.slugs)
        raise Refusal(404, f"Model not found: {shown(asked.model)}; served here: {served}")
    if asked.model in model.schemas:
        schema = model.schemas[asked.model]
        found = read_own(asked.input, schema, model, draw_seed)
        return Asked(slug=asked.model, input=found, schema=schema)
    found = _read_input(asked.input, model)
    if found["seed"] is None:
        found["seed"] = draw_seed()
    return Asked(slug=asked.model, input=found)


def request_of(asked: Asked, model: ServedModel, init_image: str | None) -> Request:
    """Turn a create into our request; `init_image` is the SHA-256 of the init image's file.

    Raises: Refusal (400) for a size that the model does not make.
    """
    if asked.schema:
        return own_request(asked.input, asked.schema, model)
    return to_request(asked.input, model, init_image)


def to_request(asked: Mapping[str, Any], model: ServedModel, init_image: str | None) -> Request:
    """Turn a read input into our request; `init_image` is the SHA-256 of the init image's file."""
    width, height = model.sizes[asked["aspect_ratio"]]
    fields = {name: value for name, value in asked.items() if name in FIELDS}
    fields["prompt_strength"] = None if init_image is None else asked["prompt_strength"]
    return Request(
        **fields, width=width, height=height, init_image=init_image, sampler=model.sampler
    )


def input_schema(model: ServedModel, slug: str | None = None) -> dict[str, Any]:
    """The JSON Schema of `input`, as ``GET /v1/model`` tells it of a slug."""
    if slug is not None and slug in model.schemas:
        return own_schema(model.schemas[slug], model)
    return _input_model(model).model_json_schema(schema_generator=_Untitled)


def body_schema(model: ServedModel) -> dict[str, Any]:
    """The JSON Schema of a create's body."""
    schema = _Body.model_json_schema(schema_generator=_Untitled)
    del schema["description"]
    schema["properties"]["model"]["enum"] = list(model.slugs)
    own = [input_schema(model, slug) for slug in model.schemas]
    usual = input_schema(model)
    different = {json.dumps(each): each for each in (usual, *own)}
    schema["properties"]["input"] = {"anyOf": [*different.values()]} if own else usual
    return schema


def _input_model(model: ServedModel) -> type[BaseModel]:
    return _made_model(tuple(model.sizes), model.takes_images)


@cache
def _made_model(ratios: tuple[str, ...], takes_images: bool) -> type[BaseModel]:
    fields: dict[str, Any] = {
        name: (takes, Field(default, description=means))
        for name, (takes, default, means) in _input_types(ratios, takes_images).items()
    }
    return create_model("Input", __config__=ConfigDict(extra="forbid"), **fields)


def _read_input(given: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    types = _input_types(tuple(model.sizes), model.takes_images)
    refuse_unknown("input.", given, types)
    if "prompt" not in given:
        raise Refusal(400, "input.prompt: must be given")
    try:
        found = _input_model(model).model_validate(given).model_dump()
    except ValidationError as exc:
        wrong: dict[str, str] = {}
        for error in exc.errors(include_url=False):
            name = str(error["loc"][0])
            wanted = _wanted(error["type"], given[name], types[name][0])
            wrong.setdefault(name, f"input.{name}={shown(given[name])}: must be {wanted}")
        raise Refusal(400, "; ".join(wrong.values())) from exc
    if found["image"] is not None and found["prompt_strength"] == 0:
        raise Refusal(
            400,
            "input.prompt_strength=0: must be above 0 with an image, at 0 nothing is left to"
            " denoise",
        )
    return found


def _wanted(error: str, value: Any, takes: Any) -> str:
    """What a field takes, in words; of a prompt, what is wrong with it."""
    if error == "string_unicode":
        return "text without lone surrogates"
    if takes is _PROMPT and error == "string_too_long":
        return f"at most {LONGEST_PROMPT} characters, not {len(value)}"
    if takes is _PROMPT and error == "string_pattern_mismatch" and "\0" in value:
        return "a text without null characters"
    return allowed(takes)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} is given twice")
    return found


# What is answered -------------------------------------------------------------------------------

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Accepted(BaseModel):
    """A create, or a cancel, that was taken."""

    status: Literal["success", "cancelled"]
    message: str
    predictionID: str  # noqa: N815


class Failure(BaseModel):
    """Why a prediction has no image."""

    error_code: str | None
    error_message: str | None


Output = Annotated[
    Annotated[str, Field(json_schema_extra={"format": "uri"})] | Failure | None,
    Field(description="The image's URL; after a failure its code and message; else null."),
]


class Metrics(BaseModel):
    """Seconds of the worker, and USD."""

    predict_time: float | None
    cost: float | None


class Urls(BaseModel):
    """Where to poll and to cancel."""

    get: str
    cancel: str


class PredictionView(BaseModel):
    """What a poll answers."""

    id: str
    model: str
    made_by: str | None = Field(
        description="The model that makes the image; null where another one was served by then."
    )
    input: dict[str, JsonValue] = Field(description="Every field, with its seed drawn.")
    status: Phase
    output: Output
    logs: str | None
    metrics: Metrics
    urls: Urls
    created_at: Time
    started_at: Time | None
    completed_at: Time | None


class Ended(PredictionView):
    """What the synchronous run answers; it calls an error a failure."""

    predictionID: str  # noqa: N815
    status: Literal["success", "failed", "cancelled"]


class Execution(BaseModel):
    """What a listing says of one prediction; the vendor's has no input."""

    id: str
    model: str
    input: dict[str, JsonValue]
    status: Phase
    execution_cost: float | None
    run_time: float | None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    output: Output


class Listing(BaseModel):
    """One page of a key's predictions, the newest first."""

    executions: list[Execution]
    total_count: int = Field(ge=0)
    offset: int = Field(ge=0)
    limit: int = Field(ge=1, le=100)


class ModelView(BaseModel):
    """What is served, and what its input takes."""

    title: str
    slug: str
    version: str
    request_schema: dict[str, JsonValue]


class Health(BaseModel):
    """Whether the server is ready, and how many predictions are open."""

    status: Literal["ready", "no worker", "stopping"]
    model: str
    backend: str
    auth: bool
    queue: int = Field(ge=0)


class Error(BaseModel):
    """Why a request was not done."""

    error: str


_REASONS = {
    400: "The request is wrong; the error names the field, its value and what is allowed",
    401: "No key, or an unknown one",
    402: "The balance does not cover what is in flight",
    403: "Not from this address",
    404: "No such prediction, model or page",
    408: "The body did not come in time",
    409: "The prediction is over already",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "Too many requests, or too many predictions in flight; nothing was created",
    500: "The server failed; its log knows the request id",
    503: "The server is shutting down",
    504: "The image is still being made: poll for it",
}
CREATE_REFUSALS = (400, 401, 402, 404, 408, 413, 415, 429, 503)


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What refusals with these statuses look like, for the OpenAPI document."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"model": Error, "description": _REASONS[status]}
        if status in (429, 503):
            header = {"schema": {"type": "integer"}, "description": "Seconds to wait"}
            found[status]["headers"] = {"Retry-After": header}
    return found


def query_parameter(name: str, means: str, **schema: Any) -> dict[str, Any]:
    """A parameter of the query, for the OpenAPI document; the route reads it itself."""
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": means}
