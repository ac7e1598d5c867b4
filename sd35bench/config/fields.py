"""The override names of `run`, one line each: type, range, meaning. Help and checks read them.

What depends on the model (sizes, aspect ratios, token lengths) or on the prompts is checked in
`freeze`, where these are known.
"""

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sd35bench.config.remote_fields import REMOTE_FIELDS
from sd35bench.config.takes import Choice, Field, Number, Switch, Text, integer
from sd35bench.errors import ConfigError
from sd35bench.evaluations import SAMPLERS
from sd35bench.types import Scalar

__all__ = ["FIELDS", "Field", "check_field", "nearest"]

STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


_FIELDS: Iterable[Field] = (
    Field(
        name="steps",
        takes=integer(1, 1000),
        means="denoising steps",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="cfg",
        takes=Number(kind=float, low=0, high=100),
        means="classifier-free guidance; off at <= 1",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="prompt_strength",
        takes=Number(kind=float, low=0, high=1, above=True),
        means="image-to-image: how much of the init image is destroyed",
        default="the model's, with init images",
        axis=True,
        nullable=True,
    ),
    Field(
        name="seed",
        takes=integer(0, 2**32 - 1),
        means="seed of the starting noise",
        default="0",
        axis=True,
    ),
    Field(
        name="width",
        takes=integer(1, 16384),
        means="px, a multiple of the model's size",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="height",
        takes=integer(1, 16384),
        means="px, a multiple of the model's size",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="aspect_ratio",
        takes=Text(),
        means="instead of width and height: 1:1, 16:9, 9:16 ...",
        default="none",
        axis=True,
        nullable=True,
    ),
    Field(
        name="sampler",
        takes=Choice(words=SAMPLERS),
        means="the solver; heun calls the denoiser twice a step",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="shift",
        takes=Number(kind=float, low=0, high=100, above=True),
        means="the flow's timestep shift",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="max_sequence_length",
        takes=integer(1, 512),
        means="T5 tokens",
        default="the model's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="negative_prompt",
        takes=Text(empty=True),
        means="what to stay away from; needs cfg > 1",
        default="empty",
        axis=True,
    ),
    Field(
        name="skip_layer_guidance",
        takes=Text(),
        means="a preset (stability, diffusers) or 7-8-9@2.5:0.01-0.2; text-to-image, cfg > 1",
        default="none",
        axis=True,
    ),
    Field(
        name="skip_layer_scale",
        takes=Number(kind=float, low=0, high=100, above=True),
        means="another scale than the preset's",
        default="the preset's",
        axis=True,
        nullable=True,
    ),
    Field(
        name="output_format",
        takes=Choice(words=("png", "jpg", "webp")),
        means="the image file",
        default="png",
        axis=True,
    ),
    Field(
        name="output_quality",
        takes=integer(0, 100),
        means="of jpg and webp; png has none",
        default="90",
        axis=True,
    ),
    Field(
        name="threads",
        takes=integer(1, 1024),
        means="CPU threads of the worker",
        default="all cores",
        axis=True,
        nullable=True,
    ),
    Field(
        name="init_image",
        takes=Text(),
        means="a PNG, JPEG or WEBP file: image-to-image for every prompt",
        default="none",
        nullable=True,
    ),
    Field(
        name="batch_size",
        takes=integer(1, 1024),
        means="images made together; latency is that of batch 1, throughput that of each size",
        default="1",
        axis=True,
    ),
    Field(
        name="timed_limit",
        takes=integer(0, 1_000_000),
        means="for latencies: with batch_size > 1, prompts that run once more at batch 1; with a"
        " hosted backend, images of each setting that run alone",
        default="4",
        nullable=True,
    ),
    Field(
        name="order_seed",
        takes=integer(0, 2**32 - 1),
        means="seed of the order in which trials run",
        default="0",
    ),
    Field(
        name="starts",
        takes=integer(1, 100),
        means="worker processes that share the trials, one after the other",
        default="1",
    ),
    Field(
        name="deadline_s",
        takes=Number(kind=float, low=0, high=1e6, above=True),
        means="seconds until a batch counts as hung; ten times that to load and warm up",
        default="20 x its warm-up, >= 120; 1800 to start",
        nullable=True,
    ),
    Field(
        name="memory_limit_gb",
        takes=Number(kind=float, low=0, high=1e5, above=True),
        means="GB (1e9 bytes) of memory (RSS) that the worker process may hold",
        default="none",
        nullable=True,
    ),
    Field(
        name="max_failures",
        takes=integer(1, 1_000_000),
        means="worker deaths of one backend after which its remaining trials are skipped",
        default="3",
    ),
    Field(
        name="keep_latents",
        takes=Switch(),
        means="keep latents after the first and the last step, for their relative error",
        default="false",
    ),
    Field(
        name="noise_floor",
        takes=Text(),
        means="a backend to run again with another batch size and thread count, for drift",
        default="none",
        nullable=True,
    ),
    Field(
        name="study",
        takes=Text(allowed="letters, digits, . _ - (at most 100)", pattern=STUDY_NAME),
        means="name under which results are kept",
        default="default",
    ),
    Field(name="results_dir", takes=Text(), means="folder of the studies", default="results"),
    Field(
        name="prompts.path",
        takes=Text(),
        means="the file of a prompt set",
        default="none",
        nullable=True,
    ),
    Field(
        name="prompts.split",
        takes=Choice(words=("tune", "heldout", "all")),
        means="which part of the set",
        default="the set's",
    ),
    Field(
        name="prompts.task",
        takes=Choice(words=("t2i", "edit", "overlap")),
        means="nano: text-to-image, edits of init images, or the hardest scenes",
        default="t2i",
    ),
    Field(
        name="prompts.limit",
        takes=integer(1, math.inf),
        means="the first so many prompts",
        default="the set's",
        nullable=True,
    ),
    Field(
        name="prompts.seed",
        takes=integer(0, 2**32 - 1),
        means="seed of a generated set",
        default="0",
    ),
    Field(
        name="prompts.columns.prompt", takes=Text(), means="a file's column name", default="prompt"
    ),
    Field(
        name="prompts.columns.negative_prompt",
        takes=Text(),
        means="a file's column name",
        default="negative_prompt",
    ),
    Field(
        name="prompts.columns.init_image",
        takes=Text(),
        means="a file's column name",
        default="init_image",
    ),
    Field(name="prompts.columns.id", takes=Text(), means="a file's column name", default="id"),
    Field(
        name="model.path",
        takes=Text(),
        means="the weights: a folder in diffusers' format, or one .safetensors file",
        default="the package's, or the Hub's cache",
        nullable=True,
    ),
    Field(
        name="model.weights",
        takes=Choice(words=("checkpoint", "random")),
        means="random: the true shapes with seeded noise for weights, no download, no quality",
        default="checkpoint",
    ),
    Field(
        name="model.layers",
        takes=integer(1, 1000),
        means="with random weights: this many transformer blocks of true width",
        default="the model's",
        nullable=True,
    ),
    Field(
        name="model.text_encoders",
        takes=Switch(),
        means="with random weights: build the text encoders too, instead of random embeddings",
        default="false",
    ),
    Field(
        name="model.components",
        takes=Text(),
        means="with model.path=FILE.safetensors: the folder with what the file lacks",
        default="none",
        nullable=True,
    ),
    *REMOTE_FIELDS,
    Field(
        name="model.target_latency_s",
        takes=Number(kind=float, low=0, high=1e6, above=True),
        means="latency that the report holds others against",
        default="the model's",
        nullable=True,
    ),
)

FIELDS: dict[str, Field] = {field.name: field for field in _FIELDS}


def check_field(name: str, value: Any) -> Scalar:
    """Return the value as the field's type.

    Raises: ConfigError naming field, value and what is allowed.
    """
    field = FIELDS[name]
    if value is None and field.nullable:
        return None
    checked = field.takes.check(value)
    if checked is None:
        shown = "null" if value is None else f"{value}"
        raise ConfigError(f"{name}={shown}: must be {field.takes.allowed}")
    return checked


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
