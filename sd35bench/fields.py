"""The request's fields, once: what each takes, what it decides, and how it is said.

Everything that has to know the fields of a `Request` reads this table: the command line and its
ranges, the grid of a plan, trial keys, settings, pairs, warm-ups, the hosted protocol, the words
of tables and titles. A new field is one line in `Request` and one entry here; a field that changes
the image is also read by a backend, or in `evaluations.guidance_of`, and stands in `plan._IDLE` if
it can be without effect.

A field that is added gets a *neutral* value: what every image had before the field existed. It is
fixed for ever, whatever a configuration's default becomes, and it is `Request`'s default, so that
old journals read the same. Only at that value the field is left out of trial keys and settings, so
that old trials keep theirs. The first fields are always in the key (`KEYED`).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import DocInfo, Interval

from sd35bench.core.guidance import RULES
from sd35bench.evaluations import SAMPLERS, read_interval, read_step_cache, skip_layer_text
from sd35bench.types import (
    Load,
    PromptRef,
    Request,
    SkipLayerGuidance,
    Trial,
    content_hash,
    from_json,
    to_json,
)

MOST_SEED = 2**64 - 1
"""The largest seed; torch takes as many."""
KEYED: Any = object()
"""In place of a neutral value: the field is in the key whatever its value is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of a request.

    Four values are near to a default:

    default    what help says of a command line without the field, in words
    unasked    what a request has then; ``None`` is the model's own value, or none
    neutral    left out of keys and settings: what images had before the field existed
    quiet      left out of titles: the default of `Request`
    """

    name: str
    takes: Any
    """Its type and range on the command line: an annotation."""
    means: str
    default: str
    unasked: Any = None
    neutral: Any = KEYED
    setting: bool = True
    """Whether two values of it make two settings."""
    pair: bool = False
    """Whether two images must share it to be compared one by one."""
    work: Callable[[Request], Any] | None = None
    """The part of it that decides how long a call takes: calls alike in this share a warm-up."""
    sent: bool = False
    """Whether the hosted protocol has it."""
    label: str = ""
    """Its column's title, where that is not its name."""
    said: str = ""
    """Its value in words, where no column says which field it is of."""
    grid: float | None = None
    """The distance of neighbouring values in a search."""
    axis: bool = True
    """Whether it can be swept."""
    typed: bool = True
    """Whether it is a name of the command line."""
    reads: Callable[[Any], str] | None = None
    """Turns a text into its one spelling, or raises ValueError."""

    @property
    def nullable(self) -> bool:
        """Whether ``None`` may be asked for: then it is what a request has unasked."""
        return self.unasked is None

    @property
    def quiet(self) -> Any:
        """The value that words leave out: `Request`'s default; `KEYED` where it has none."""
        return _DEFAULTS[self.name]


_DEFAULTS = {
    f.name: KEYED if f.default is dataclasses.MISSING else f.default
    for f in dataclasses.fields(Request)
}

_FIELDS = (
    Field(
        name="prompt",
        takes=str,
        means="what the image shows",
        default="the prompt set's",
        setting=False,
        pair=True,
        sent=True,
        axis=False,
        typed=False,
    ),
    Field(
        name="steps",
        takes=Annotated[int, Interval(ge=1, le=1000)],
        means="denoising steps",
        default="the model's",
        work=lambda r: r.effective_steps,
        sent=True,
        said="{} steps",
        grid=1,
    ),
    Field(
        name="cfg",
        takes=Annotated[float, Interval(ge=0, le=100)],
        means="classifier-free guidance; off at <= 1",
        default="the model's",
        work=lambda r: r.cfg > 1,
        sent=True,
        grid=0.5,
    ),
    Field(
        name="prompt_strength",
        takes=Annotated[float, Interval(gt=0, le=1)],
        means="image-to-image: how much of the init image is destroyed",
        default="the model's, with init images",
        sent=True,
        label="strength",  # a column's title is narrow; a sentence says the field's own name
        said="prompt_strength {}",
        grid=0.05,
    ),
    Field(
        name="sampler",
        takes=Literal[SAMPLERS],
        means="the solver; heun calls the denoiser twice a step",
        default="the model's",
        work=lambda r: r.sampler,
        said="{}",
    ),
    Field(
        name="shift",
        takes=Annotated[float, Interval(gt=0, le=100)],
        means="timestep shift of the noise schedule",
        default="the model's",
        grid=0.5,
    ),
    Field(
        name="skip_layer_guidance",
        takes=str,
        means="a preset (stability, diffusers) or 7-8-9@2.5:0.01-0.2; text-to-image, cfg > 1",
        default="none",
        unasked="none",
        work=lambda r: r.skip_layer_guidance,
        said="skip {}",
    ),
    Field(
        name="guidance",
        takes=Literal[RULES],
        means="how cfg guides: cfg-zero-star fits its scale, apg projects; cfg > 1",
        default="cfg",
        unasked="cfg",
        neutral="cfg",
        work=lambda r: r.guidance,
        said="{}",
    ),
    Field(
        name="zero_init_steps",
        takes=Annotated[int, Interval(ge=0, le=1000)],
        means="cfg-zero-star: first steps at which nothing moves",
        default="1",
        unasked=1,
        neutral=1,
        work=lambda r: r.zero_init_steps,
        said="{} zero-init steps",
        grid=1,
    ),
    Field(
        name="apg_eta",
        takes=Annotated[float, Interval(ge=0, le=1)],
        means="apg: how much of guidance along the prompt's velocity is kept",
        default="0",
        unasked=0.0,
        neutral=0.0,
        grid=0.1,
    ),
    Field(
        name="apg_norm",
        takes=Annotated[float, Interval(ge=0, le=1e6)],
        means="apg: the largest norm of guidance before its scale; 0: no limit",
        default="0",
        unasked=0.0,
        neutral=0.0,
        grid=1,
    ),
    Field(
        name="apg_momentum",
        takes=Annotated[float, Interval(ge=-1, le=1)],
        means="apg: what of the earlier steps' guidance is added; the paper's is negative",
        default="0",
        unasked=0.0,
        neutral=0.0,
        grid=0.25,
    ),
    Field(
        name="guidance_interval",
        takes=Annotated[str, DocInfo("LO-HI with 0 <= LO < HI <= 1, such as 0.1-0.7")],
        means="fractions of the steps between which guidance acts; elsewhere half the work",
        default="0-1",
        unasked="0-1",
        neutral="0-1",
        work=lambda r: r.guidance_interval,
        said="guided {}",
        reads=read_interval,
    ),
    Field(
        name="step_cache",
        takes=Annotated[str, DocInfo("none, N (every N-th step), or the steps, such as 0-1-3-6-9")],
        means="which steps are evaluated; the others are predicted",
        default="none",
        unasked="none",
        neutral="none",
        work=lambda r: r.step_cache,
        reads=read_step_cache,
    ),
    Field(
        name="max_sequence_length",
        takes=Annotated[int, Interval(ge=1, le=512)],
        means="T5 tokens that a prompt is padded or cut to",
        default="the model's",
        work=lambda r: r.max_sequence_length,
        said="{} tokens",
    ),
    Field(
        name="negative_prompt",
        takes=str,
        means="what the image should not show; needs cfg > 1",
        default="empty",
        unasked="",
        setting=False,
        pair=True,
    ),
    Field(
        name="seed",
        takes=Annotated[int, Interval(ge=0, le=MOST_SEED)],
        means="seed of the starting noise",
        default="0",
        unasked=0,
        setting=False,
        pair=True,
        sent=True,
    ),
    Field(
        name="width",
        takes=Annotated[int, Interval(ge=1, le=16384)],
        means="px, a multiple of the model's patch",
        default="the model's",
        pair=True,
        work=lambda r: r.width,
    ),
    Field(
        name="height",
        takes=Annotated[int, Interval(ge=1, le=16384)],
        means="px, a multiple of the model's patch",
        default="the model's",
        pair=True,
        work=lambda r: r.height,
    ),
    Field(
        name="init_image",
        takes=str,
        means="a PNG, JPEG or WEBP file: image-to-image for every prompt",
        default="none",
        setting=False,
        pair=True,
        work=lambda r: r.task,
        sent=True,
        axis=False,
    ),
    Field(
        name="output_format",
        takes=Literal["png", "jpg", "webp"],
        means="format of the image file",
        default="png",
        unasked="png",
        work=lambda r: r.output_format,
        sent=True,
        said="{}",
    ),
    Field(
        name="output_quality",
        takes=Annotated[int, Interval(ge=0, le=100)],
        means="quality of jpg and webp files; png has none",
        default="90",
        unasked=90,
        sent=True,
        label="quality",
    ),
    Field(
        name="extra",
        takes=str,
        means="inputs that only a hosted model has: extra.NAME=VALUE",
        default="the model's",
        unasked=(),
        neutral=(),
        said="{}",
        typed=False,
    ),
    Field(
        name="images",
        takes=str,
        means="input images of a hosted model by role: images.ROLE=FILE",
        default="none",
        unasked=(),
        neutral=(),
        said="{}",
        typed=False,
    ),
    Field(
        name="prompt_2",
        takes=str,
        means="what the second CLIP encoder reads",
        default="the prompt",
        neutral=None,
        setting=False,
        pair=True,
        axis=False,
        typed=False,
    ),
    Field(
        name="prompt_3",
        takes=str,
        means="what T5 reads",
        default="the prompt",
        neutral=None,
        setting=False,
        pair=True,
        axis=False,
        typed=False,
    ),
    Field(
        name="prompt_weights",
        takes=str,
        means="words of the prompt and their weights: red cube:1.3; blue:0.5",
        default="none",
        neutral=None,
        setting=False,
        pair=True,
        axis=False,
        typed=False,
    ),
)

FIELDS: dict[str, Field] = {field.name: field for field in _FIELDS}
"""Every field of `Request`, in the order in which a person would name them."""

SETTING = tuple(f.name for f in _FIELDS if f.setting)
"""Fields that make a setting, the unit that is compared."""
PAIR = tuple(f.name for f in _FIELDS if f.pair)
"""Fields that two images must share to be compared one by one."""
ASKED = ("task", *SETTING)
"""The part of a setting's row that says what was asked, not who ran it."""
GRIDS = {f.name: f.grid for f in _FIELDS if f.grid is not None}
"""Distance of neighbouring values of an axis that can be searched."""

CURVES = ("steps", "cfg", "prompt_strength")
"""Fields that charts have as axes and curves, and that titles say first."""
SIZE = ("width", "height")
_OF_LOADS = {
    **dict.fromkeys(("model", "backend", "weights", "task", "what"), "{}"),
    "weights_digest": "weights {}",
    "environment_id": "environment {}",
}
"""How fields that are no request's are said, where that is not their name and value."""
_LATER = tuple(f for f in _FIELDS if f.neutral is not KEYED)
GUIDES = {
    name: FIELDS[name].neutral
    for name in (
        *("guidance", "zero_init_steps", "apg_eta", "apg_norm", "apg_momentum"),
        *("guidance_interval", "step_cache"),
    )
}
"""Fields that change how the denoiser's outputs are made and combined, and their neutral values."""


# What is the same -------------------------------------------------------------------------------


def make_trial(*, load: Load, request: Request, batch_size: int, prompt: PromptRef) -> Trial:
    """Build a trial; its key hashes the request, the load and the batch size, not the prompt's id.

    The key's 20 hex digits (80 bits) make an accidental clash in 10^9 trials less likely
    than 10^-6.
    """
    key = content_hash([request_identity(request), load.key, batch_size])[:20]
    return Trial(key=key, load=load, request=request, batch_size=batch_size, prompt=prompt)


def request_identity(request: Request) -> dict[str, Any]:
    """Everything that was asked for, JSON-ready; later fields only off their neutral value."""
    found = to_json(request)
    for field in _LATER:
        if getattr(request, field.name) == field.neutral:
            del found[field.name]
    return found


def setting_identity(request: Request) -> tuple[Any, ...]:
    """What two requests of one setting share, hashable; later fields only off their neutral value.

    The task is there because an init image without a strength is another setting than none.
    """
    found: list[Any] = [request.task.value]
    for name, field in _SETTING_FIELDS:
        value = getattr(request, name)
        if field.neutral is KEYED:
            found.append(_plain(value, name in _FLOATS))
        elif value != field.neutral:
            found.append((name, value))
    return tuple(found)


def pair_identity(request: Request) -> tuple[Any, ...]:
    """What two images share that are compared; later fields only off their neutral value."""
    values = ((name, getattr(request, name)) for name in _LATER_PAIR)
    later = (item for item in values if item[1] != FIELDS[item[0]].neutral)
    return (*(getattr(request, name) for name in FIRST_PAIR), *later)


def pair_fields(identity: tuple[Any, ...]) -> dict[str, Any]:
    """The fields (`PAIR`) that made a `pair_identity`; later fields with their neutral value."""
    later = {name: FIELDS[name].neutral for name in _LATER_PAIR}
    first = len(FIRST_PAIR)
    return {**dict(zip(FIRST_PAIR, identity, strict=False)), **later, **dict(identity[first:])}


def work_identity(request: Request) -> tuple[Any, ...]:
    """What decides the work of a call: requests alike in this need one warm-up."""
    return tuple(field.work(request) for field in _FIELDS if field.work is not None)


def asked_fields(request: Request) -> dict[str, Any]:
    """A setting's fields (`ASKED`) as columns of a row, JSON-ready."""
    values = {name: _column(getattr(request, name)) for name in SETTING}
    return {"task": request.task.value, **values}


def _column(value: Any) -> Any:
    """A field's value as JSON; pairs are an object."""
    return dict(value) if isinstance(value, tuple) else to_json(value)


def completed(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A row's setting as it was written before later fields existed, with their neutral values."""
    return {**{f.name: _column(f.neutral) for f in _LATER if f.setting}, **setting}


def later_asked(request: Request) -> list[str]:
    """Names of later fields that are off their neutral value."""
    return [f.name for f in _LATER if getattr(request, f.name) != f.neutral]


def is_unasked(name: str, value: Any) -> bool:
    """Whether a run asks for this value of a field without being told to."""
    field = FIELDS[name]
    return value == field.quiet if field.unasked is None else value in (field.unasked, None)


FIRST_PAIR = tuple(name for name in PAIR if FIELDS[name].neutral is KEYED)
"""Those of them that every pair has, in the order of `pair_identity`."""
_LATER_PAIR = tuple(name for name in PAIR if FIELDS[name].neutral is not KEYED)
_SETTING_FIELDS = tuple((f.name, f) for f in _FIELDS if f.setting)
_FLOATS = frozenset(f.name for f in _FIELDS if get_args(f.takes)[:1] == (float,))
_INTS = frozenset(f.name for f in _FIELDS if get_args(f.takes)[:1] == (int,))
NUMBERS = tuple(name for name in SETTING if name in _FLOATS | _INTS)
"""Fields of a setting whose values are numbers."""
OF_MODEL = tuple(
    f.name
    for f in map(FIELDS.__getitem__, NUMBERS)
    if f.quiet is None and f.neutral is KEYED and not f.sent
)
"""Numbers that a model has of its own, where a request asks for none."""


def _plain(value: Any, is_float: bool) -> Any:
    if isinstance(value, SkipLayerGuidance):
        return (tuple(value.layers), value.scale, value.start, value.stop)
    return float(value) if is_float and value is not None else value


# How it is said ---------------------------------------------------------------------------------


def label(name: str) -> str:
    """What a column of this field is called."""
    field = FIELDS.get(name)
    return field.label if field is not None and field.label else name.replace("_", " ")


def value_text(value: Any) -> str:
    """A value as a person types it: 4 for 4.0, skip-layer guidance as the command line takes it.

    Pairs are NAME VALUE; of a file's digest the first 8 digits.
    """
    if isinstance(value, Mapping) and "layers" in value:
        value = from_json(SkipLayerGuidance, value)
    if isinstance(value, Mapping | tuple):
        said = [f"{n} {_short(value_text(v))}" for n, v in dict(value).items()]
        return ", ".join(said) if said else "none"
    if isinstance(value, SkipLayerGuidance):
        return skip_layer_text(value)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def field_words(name: str, value: Any) -> str:
    """A field's value where no column says what it is: "4 steps", "cfg 4", "shift 3"."""
    field = FIELDS.get(name)
    known = _OF_LOADS.get(name, "") if field is None else field.said
    said = known if known else f"{label(name)} {{}}"
    return said.format(_short(value_text(value)))


def unusual_words(setting: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those fields of a row that are not as usual, each in words."""
    known = ((name, setting.get(name)) for name in names)
    return [
        field_words(name, value)
        for name, value in known
        if value is not None and not (name in FIELDS and value in _left_out(name))
    ]


def describe(setting: Mapping[str, Any], beside: Iterable[Mapping[str, Any]] = ()) -> str:
    """A setting in a few words: what is not as usual; size and backend where `beside` differs."""
    said = unusual_words(setting, (n for n in SETTING if n not in SIZE))
    others = list(beside)
    if any(o[n] != setting[n] for o in others for n in SIZE):
        said.append(f"{setting['width']}x{setting['height']}")
    if "backend" in setting and any(o["backend"] != setting["backend"] for o in others):
        said.append(f"on {setting['backend']}")
    return ", ".join(said)


def _left_out(name: str) -> tuple[Any, ...]:
    quiet = FIELDS[name].quiet
    return (None, quiet, _column(quiet))


def _short(text: str) -> str:
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text


def allowed(takes: Any) -> str:
    """What an annotation takes, in words: "an integer from 1 to 1000", "one of png, jpg, webp"."""
    said = [m.documentation for m in getattr(takes, "__metadata__", ()) if isinstance(m, DocInfo)]
    if said:
        return said[-1]
    if get_origin(takes) is Literal:
        choices = get_args(takes)
        return ("" if len(choices) == 1 else "one of ") + ", ".join(map(str, choices))
    base = get_args(takes)[0] if get_origin(takes) is Annotated else takes
    if base is bool:
        return "true or false"
    if base is str:
        return "a text"
    word = "an integer" if base is int else "a number"
    found = [m for m in getattr(takes, "__metadata__", ()) if isinstance(m, Interval)]
    return word + _range_text(found[0]) if found else word


def _range_text(found: Any) -> str:
    if found.gt is not None:
        return f" above {found.gt:g}" if found.le is None else f" in ({found.gt:g}, {found.le:g}]"
    if found.le is None or math.isinf(found.le):
        return f" of at least {found.ge:g}"
    most = found.le if isinstance(found.le, int) else f"{found.le:.15g}"  # a seed has 20 digits
    return f" from {found.ge:.15g} to {most}"
