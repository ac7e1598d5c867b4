"""What a server is started with, frozen and validated by `sd35bench.config`; how it refuses."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd35bench.errors import SD35BenchError
from sd35bench.limits import Limits
from sd35bench.types import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model behind the protocol.

    `slugs` are all names that clients may call it by, its own first. `sizes` maps the protocol's
    aspect ratios to (width, height) in px, "1:1" first. `sampler` is the model's own, `steps` and
    `cfg` are what warming up runs. `takes_images` says whether the model on its backend does
    image-to-image.
    """

    name: str
    slugs: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int]]
    sampler: str
    steps: int
    cfg: float
    takes_images: bool


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
