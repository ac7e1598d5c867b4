"""Reading what a service says: any JSON in; a checked value, ``None`` or a RemoteError out.

What a call cannot go on without (an id, a status) raises; what merely informs (a time, a cost) is
``None`` where it is absent or cannot be true. Nothing here trusts a type, a length or a sign.
"""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sd35bench.errors import RemoteError
from sd35bench.fields import FIELDS, OF_MODEL, later_asked
from sd35bench.remote.providers.base import UNNAMED, Phase, Prediction
from sd35bench.types import Request

RATIOS = ("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21")
NINE_RATIOS = ("1:1", "16:9", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16", "9:21")
SAMPLER = "euler"
MOST_CFG = 20.0
MOST_STEPS = 50
QUALITY = FIELDS["output_quality"].unasked
"""The output quality of who asks for none."""
LARGEST_ANSWER = 64 * 2**20
"""Bytes of an answer with the image in it."""
BASE64_MAGIC = {"iVBORw0KGgo": "png", "/9j/": "jpeg", "UklGR": "webp"}
MOST_SECONDS = 86400.0
MOST_COST_USD = 1000.0
MOST_HEADERS = 32
MOST_URL = 8192
MOST_IMAGES = 16
MOST_SHOWN = 300
IMAGE_FIELDS = ("url", "image", "image_url", "images", "urls", "output", "outputs")
DEEPEST = 4
"""Levels of an output to look through: `{"output": {"images": [{"url": …}]}}` has as many."""
PREDICTION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}")
"""It becomes a part of a path: no slash, no dot in front, nothing to be escaped."""
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
HEADER_TEXT = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,2000}[\x21-\x7e])?")
REASONS = ("error_code", "code", "error_message", "message", "error", "detail", "details")


def shown(value: Any, most: int = MOST_SHOWN) -> str:
    """A value of unknown origin for a message: one line, bounded, control characters escaped."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(c if c.isprintable() else " " for c in text[: most * 4])
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}…"


def fields_of(body: Any, what: str) -> Mapping[str, Any]:
    """The body, if it is an object. Raises: RemoteError."""
    if not isinstance(body, Mapping):
        kind = "nothing" if body is None else f"a {type(body).__name__}"
        raise RemoteError(f"the service answered {what} with {kind}, not an object")
    return body


def id_of(body: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    """The prediction's id under the first of its names that is there. Raises: RemoteError."""
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or PREDICTION_ID.fullmatch(value) is None:
            raise RemoteError(f"{what}: {name}={shown(value, 80)!r} cannot be a prediction's id")
        return value
    raise RemoteError(f"{what}: no {' or '.join(names)} in it")


def phase_of(value: Any, words: Mapping[str, Phase], what: str) -> Phase:
    """What a status word means. Raises: RemoteError naming one that is not known."""
    if not isinstance(value, str) or value.strip().lower() not in words:
        raise RemoteError(
            f"{what}: status {shown(value, 80)!r} is unknown; known: {', '.join(words)}"
        )
    return words[value.strip().lower()]


def listed_phase(entry: Mapping[str, Any], words: Mapping[str, Phase]) -> Phase:
    """What a listed status means; one that is not known counts as waiting, so that it is polled."""
    status = entry.get("status")
    word = status.strip().lower() if isinstance(status, str) else ""
    return words.get(word, Phase.WAITING)


def measured(value: Any, most: float) -> float | None:
    """A number, or a text that is one, in [0, `most`]; anything else is not known."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > 40:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number + 0.0 if 0 <= number <= most else None  # not a number is neither


def model_name(value: Any) -> str | None:
    """A model's name as ours are; anything else is not known."""
    return value if isinstance(value, str) and MODEL_NAME.fullmatch(value) else None


def moment(value: Any) -> datetime | None:
    """An RFC 3339 time, UTC where it names no zone; ``None`` for a year that cannot be."""
    if not isinstance(value, str) or not 10 <= len(value) <= 40:
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    if not 2000 < found.year < 2200:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def queue_seconds(created: Any, started: Any) -> float | None:
    """Seconds between two times of one clock, the service's; ``None`` where they make no sense."""
    first, second = moment(created), moment(started)
    if first is None or second is None:
        return None
    return measured((second - first).total_seconds(), MOST_SECONDS)


def image_urls(output: Any) -> tuple[str, ...]:
    """The URLs in an output, whatever its shape: a text, a list, an object, or those nested."""
    found: dict[str, None] = {}
    for url in _urls(output, DEEPEST):
        found[url] = None
        if len(found) == MOST_IMAGES:
            break
    return tuple(found)


def _urls(output: Any, levels: int) -> Iterator[str]:
    if isinstance(output, str):
        if output.startswith(("https://", "http://", "data:image/")):
            yield output
    elif levels == 0:
        return
    elif isinstance(output, list):
        for item in output[:MOST_IMAGES]:
            yield from _urls(item, levels - 1)
    elif isinstance(output, Mapping):
        for name in IMAGE_FIELDS:
            yield from _urls(output.get(name), levels - 1)


def settled(prediction: Prediction, output: Any) -> Prediction:
    """The prediction, or its failure where it says success and shows no image.

    It is over, and its cost stands: an error raised here would lose sight of that.
    """
    if prediction.phase is not Phase.SUCCEEDED or prediction.outputs:
        return prediction
    error = f"it succeeded, but its output has no image's URL: {shown(output, 120)}"
    return replace(prediction, phase=Phase.FAILED, error=error)


def web_url(value: Any, what: str) -> str:
    """A text that is meant to be a URL; whether it may be used is not said. Raises: RemoteError."""
    if not isinstance(value, str) or not value.startswith(("https://", "http://")):
        raise RemoteError(f"{what}={shown(value, 80)!r} is no URL")
    if len(value) > MOST_URL:
        raise RemoteError(f"{what} is a URL of {len(value)} characters, more than {MOST_URL}")
    return value


def checked_headers(value: Any, what: str) -> dict[str, str]:
    """Headers that can be sent as they are; none at all is fine. Raises: RemoteError."""
    if value is None:
        return {}
    headers = fields_of(value, what)
    for name, text in headers.items():
        fine = isinstance(text, str) and HEADER_TEXT.fullmatch(text) is not None
        if not fine or not isinstance(name, str) or HEADER_NAME.fullmatch(name) is None:
            raise RemoteError(f"{what}: {shown(name, 80)!r} is no header that can be sent")
    if len(headers) > MOST_HEADERS:
        raise RemoteError(f"{what}: {len(headers)} headers, more than {MOST_HEADERS}")
    return dict(headers)


def texts(value: Any) -> str | None:
    """A reason in words: a text, or the texts of a list or of an object's values, joined."""
    if isinstance(value, str):
        return shown(value) if value.strip() else None
    if isinstance(value, Mapping):
        parts = [f"{value[name]}" for name in REASONS if isinstance(value.get(name), str | int)]
    elif isinstance(value, list):
        parts = [item for item in value[-MOST_IMAGES:] if isinstance(item, str)]
    else:
        return None
    joined = shown(": ".join(part for part in parts if part.strip()))
    return joined if joined else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The inputs of a service, where they are not those of the schema that most hosts share.

    `ratios` ``None``: any size in px. `steps` ``None``: it has no such input, and chooses itself.
    `seed` and the others: from … to. `takes` has what may be there or not: `negative_prompt`,
    `init_image`, `output_quality`.
    """

    ratios: tuple[str, ...] | None = RATIOS
    formats: tuple[str, ...] = ("webp", "jpg", "png")
    steps: tuple[int, int] | None = (1, MOST_STEPS)
    cfg: tuple[float, float] = (0.0, MOST_CFG)
    takes: tuple[str, ...] = ("init_image", "output_quality")


SCHEMA = Offer()


def refusal_of(
    request: Request,
    sizes: Mapping[tuple[int, int], str],
    offer: Offer = SCHEMA,
    default_steps: int | None = None,
) -> str | None:
    """Why a service cannot make a request: it has no input, or no room, for what is asked.

    `sizes`: the protocol's word for each (width, height) in px. `default_steps`: the number that
    nobody asked for, recorded as not sent where the service chooses its own.
    """
    return next(_refusals(request, sizes, offer, default_steps), None)


def _refusals(
    request: Request,
    sizes: Mapping[tuple[int, int], str],
    offer: Offer,
    default_steps: int | None,
) -> Iterator[str]:
    """Everything that is wrong, in order."""
    steps, (least_cfg, most_cfg) = request.steps, offer.cfg
    if request.negative_prompt != "" and "negative_prompt" not in offer.takes:
        yield "negative_prompt: the protocol has none; leave it out"
    if request.init_image is not None and "init_image" not in offer.takes:
        yield "init_image: the protocol has none; take prompts without one"
    if request.skip_layer_guidance is not None:
        yield "skip_layer_guidance: the protocol has none; use skip_layer_guidance=none"
    if request.sampler != SAMPLER:
        yield (
            f"sampler={request.sampler}: the service's own cannot be chosen; use sampler={SAMPLER}"
        )
    for name in OF_MODEL:
        if getattr(request, name) is not None:
            yield f"{name}: the protocol has none; use {name}=null"
    for name in later_asked(request):
        if not FIELDS[name].sent:
            yield f"{name}: the protocol has none; leave it out"
    if offer.steps is None and steps != default_steps:
        yield f"steps={steps}: the service chooses their number; leave steps out"
    if offer.steps is not None and not offer.steps[0] <= steps <= offer.steps[1]:
        yield f"steps={steps}: the service takes {offer.steps[0]} to {offer.steps[1]}"
    if not least_cfg <= request.cfg <= most_cfg:
        yield f"cfg={request.cfg:g}: the service takes {least_cfg:g} to {most_cfg:g}"
    size = request.width, request.height
    if offer.ratios is not None and sizes.get(size) not in offer.ratios:
        yield (
            f"width={size[0]}, height={size[1]}: the service takes aspect ratios only;"
            f" give aspect_ratio, one of {', '.join(offer.ratios)}"
        )
    file, quality = request.output_format, request.output_quality
    if file not in offer.formats:
        made, use = " or ".join(offer.formats), offer.formats[-1]
        yield f"output_format={file}: the service makes {made}; use output_format={use}"
    if "output_quality" not in offer.takes and file != "png" and quality != QUALITY:
        yield f"output_quality={quality}: the service chooses it; leave it out"
    strength = request.prompt_strength
    if strength is not None and not 0 < strength <= 1:
        yield f"prompt_strength={strength}: must be in (0, 1], at 0 nothing is left to denoise"


def check_image_url(request: Request, image_url: str | None) -> None:
    """See that an init image and its URL come together. Raises: ValueError."""
    if (image_url is None) != (request.init_image is None):
        raise ValueError("an init image needs its URL, and a URL an init image")


def named_input(request: Request, image_url: str | None, size: Mapping[str, Any]) -> dict[str, Any]:
    """The input of services that name it as diffusers does; `size` is in the service's words."""
    check_image_url(request, image_url)
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        **size,
        "num_inference_steps": request.steps,
        "guidance_scale": request.cfg,
        "seed": request.seed,
        "num_images": 1,
    }


def answered_images(images: Any) -> tuple[str, ...]:
    """The images inside an answer, as data URIs; a bare base64 text is one of a file's bytes."""
    found = images if isinstance(images, list) else [images]
    whole = (_data_uri(image) for image in found[:MOST_IMAGES] if isinstance(image, str))
    return tuple(uri for uri in whole if uri is not None)


def _data_uri(image: str) -> str | None:
    if image.startswith("data:image/"):
        return image
    kind = next((kind for magic, kind in BASE64_MAGIC.items() if image.startswith(magic)), None)
    return None if kind is None else f"data:image/{kind};base64,{image}"


def data_of(value: Any) -> tuple[str, bytes] | None:
    """Media type and bytes of a data URI that was made here; ``None`` for any other value."""
    if not isinstance(value, str) or not value.startswith("data:image/"):
        return None
    kind, _, text = value.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(text)


def request_id(value: Any) -> str:
    """What an answer calls its request; a service need not name it, nor can it be asked after."""
    known = isinstance(value, str) and PREDICTION_ID.fullmatch(value) is not None
    return value if known else UNNAMED


def seed_of(value: Any) -> int | None:
    """The seed that a service says it used; anything else is not known."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def schema_input(
    request: Request, sizes: Mapping[tuple[int, int], str], image_url: str | None
) -> dict[str, Any]:
    """Every field of the model's input schema, which its hosts share; nothing is left to defaults.

    `image` and `prompt_strength` act together or not at all.
    """
    check_image_url(request, image_url)
    inputs = {
        "prompt": request.prompt,
        "aspect_ratio": sizes[request.width, request.height],
        "cfg": request.cfg,
        "steps": request.steps,
        "seed": request.seed,
        "output_format": request.output_format,
        "output_quality": request.output_quality,
    }
    if image_url is not None:
        inputs |= {"image": image_url, "prompt_strength": request.prompt_strength}
    return inputs
