"""What a server is started with, frozen and validated by `sd35bench.config`; how it refuses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd35bench.errors import SD35BenchError
from sd35bench.remote.inputs import Schema
from sd35bench.types import Load
from sd35bench.workers.limits import Limits

LONGEST_PROMPT = 10_000
LONGEST_URL = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind the protocol.

    `slugs` are all names that clients may call it by, its own first. `sizes` maps the protocol's
    aspect ratios to (width, height) in px, "1:1" first. `sampler` is the model's own, `steps` and
    `cfg` are what warming up runs. `takes_images` says whether the model on its backend does
    image-to-image. `schemas` has the inputs of slugs that take others than Stable Diffusion 3.5;
    `stands_in`: the model makes images in their place. Sides are multiples of `size_multiple` px.
    """

    name: str
    slugs: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]
    sampler: str
    steps: int
    cfg: float
    takes_images: bool
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    stands_in: bool = False
    size_multiple: int = 1
    max_side_px: int = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """One server: what it loads, where it listens, whom it lets in, what it keeps and for how long.

    `key_file` ``None`` lets everybody in, which is only allowed on a loopback `host`. `port` 0
    takes a free one. `requests_per_minute` and `concurrency` bound each key, ``None`` does not.
    `balance_usd` is what each key may spend at `usd_per_image`. Predictions that are over are
    forgotten after `keep_days`, ``None`` keeps them. `state_dir` holds the predictions
    and their files. `allow_loopback` lets image addresses lead to this machine.
    """

    load: Load
    model: ServedModel
    state_dir: Path
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    allow_loopback: bool = False
    requests_per_minute: int | None = 60
    concurrency: int | None = 10
    output_lifetime_s: float = 3600.0
    keep_days: float | None = None
    usd_per_image: float = 0.0
    balance_usd: float | None = None


class Refusal(SD35BenchError):
    """A request that is not done; the answer is ``{"error": message}`` with `status`."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """`message` goes to the client: it names field, value and remedy, and no secret."""
        super().__init__(message)
        self.status = status
        self.headers = {} if headers is None else dict(headers)


def refuse_unknown(prefix: str, given: Mapping[str, Any], known: Any) -> None:
    """Refuse fields that there are not. Raises: Refusal (400)."""
    unknown = [f"{prefix}{name[:60]}" for name in given if name not in known]
    if unknown:
        word = "field" if len(unknown) == 1 else "fields"
        raise Refusal(400, f"unknown {word} {listed(unknown[:10])}; known: {listed(known)}")


def shown(value: Any) -> str:
    """A client's value for a message: bounded, what a terminal or a log would obey escaped."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def listed(words: Any) -> str:
    """Words between commas, in ASCII."""
    return ", ".join(str(word).encode("ascii", "backslashreplace").decode() for word in words)
