"""What a provider is: pure translation between our requests and one service's wire; its settings.

`RemoteSettings` say how one run calls a service: frozen, validated, without the key.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from sd35bench import words
from sd35bench.errors import RemoteError
from sd35bench.remote.inputs import Schema
from sd35bench.types import Request

UNNAMED = "unnamed"
"""The id of a prediction of a service that names none: it cannot be asked after."""


class Phase(StrEnum):
    """Where a prediction stands, whatever the service calls it."""

    WAITING = "waiting"
    RUNNING = "running"
    READY = "ready"  # it ended, and only the answer to `Provider.result` says how
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will change."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP request to the service; `path` begins with a slash and follows the base URL.

    `content` is the body where it is not `json`. `timeout_s` and `max_body_bytes` are for an answer
    that comes late and is large, as one with the image in it; ``None`` is the transport's own.
    """

    method: str
    path: str
    json: Any = None
    content: bytes = b""
    timeout_s: float | None = None
    max_body_bytes: int | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a service says of a prediction; ``None`` is what it did not say.

    `outputs` are URLs of images. `queue_s` is only set where the service tells when it started.
    `input` is what it was created with, `created_at` (aware) when, `seed` what it says it used,
    `made_by` the model that it names as the one at work.
    """

    id: str
    phase: Phase
    outputs: tuple[str, ...] = ()
    error: str | None = None
    predict_s: float | None = None
    queue_s: float | None = None
    cost_usd: float | None = None
    input: Mapping[str, Any] | None = None
    created_at: datetime | None = None
    seed: int | None = None
    made_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Where an init image's bytes are to be PUT, and the URL that the model then gets."""

    put_url: str
    public_url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """What the client needs beyond the plan; made by `sd35bench.config`.

    `base_url` has no trailing slash, no credentials and no query. `slug` is the model's name at
    the service. `aspect_ratios` maps (width, height) in px to the protocol's word for it.
    `usd_per_image` is the price that budgets count with where the service names none.
    `output_hosts` may serve outputs too; images of `accept_size` (width, height) px are taken for
    what was asked. `expected_latency_s` is when a prediction is first asked after, until some have
    been seen. `inputs` is the model's own input schema, empty for Stable Diffusion 3.5's.
    `default_steps` is the model's, which a request has where nobody asked for another number.
    `single_stream` is how many trials of each setting run alone, for latencies, before the rest
    runs at `concurrency`.
    """

    provider: str
    base_url: str
    slug: str
    key_file: str | None = None
    auth: str = "x-api-key"
    allow_loopback: bool = False
    concurrency: int = 10
    requests_per_minute: int = 60
    timeout_s: float = 300.0
    max_cost_usd: float | None = None
    confirm_above_usd: float = 1.0
    usd_per_image: float = 0.0
    on_ambiguous: str = "keep"
    init_image_url: str | None = None
    expected_latency_s: float = 8.0
    single_stream: int = 4
    output_hosts: tuple[str, ...] = ()
    accept_size: tuple[int, int] | None = None
    default_steps: int | None = None
    aspect_ratios: Mapping[tuple[int, int], str] = field(default_factory=dict)
    inputs: Schema = ()


class Provider(ABC):
    """One service's dialect.

    `read_*` take a decoded JSON body of any shape and raise RemoteError, never anything else,
    where it cannot be what the protocol promises. `output_hosts` are the hosts, besides the base
    URL's own when that is not the service's, that images may be fetched from (a leading dot takes
    subdomains). `unsent` names the fields of `Request` that the protocol cannot carry;
    `most_seed` is the largest seed that the service is known to take.

    `synchronous`: the create is answered with the image, or how it failed; there is nothing to
    poll. `lists`: predictions can be looked up by their input after an answer was lost.
    `takes_px`: sizes go in px, not as aspect ratios. `wrong_key` are the statuses that mean the
    key. `data_uri_bytes` is the largest init image that may go along without an upload.
    """

    name: ClassVar[str]
    base_url: ClassVar[str]
    key_variable: ClassVar[str]
    output_hosts: ClassVar[tuple[str, ...]]
    unsent: ClassVar[tuple[str, ...]]
    most_seed: ClassVar[int] = 2**32 - 1
    synchronous: ClassVar[bool] = False
    lists: ClassVar[bool] = True
    takes_px: ClassVar[bool] = False
    wrong_key: ClassVar[tuple[int, ...]] = (401, 403)
    data_uri_bytes: ClassVar[int] = 256_000  # replicate.com/docs, "Input files"

    def __init__(self, settings: RemoteSettings) -> None:
        self.settings = settings

    def headers(self, key: str) -> dict[str, str]:
        """The headers that carry the key: a bearer token; none where there is no key."""
        return {} if key == "" else {"Authorization": f"Bearer {key}"}

    @abstractmethod
    def refusal(self, request: Request) -> str | None:
        """Say why the service cannot make this request, or nothing where it can."""

    @abstractmethod
    def input(self, request: Request, image_url: str | None) -> dict[str, Any]:
        """Every parameter, spelled out; never left to the service's defaults."""

    def input_with(
        self, request: Request, image_url: str | None, images: Mapping[str, str]
    ) -> dict[str, Any]:
        """`input`, with the URLs of a model's input images by role, where it has such."""
        return self.input(request, image_url)

    def not_sent(self) -> tuple[str, ...]:
        """Names of fields that were left to the service."""
        return self.unsent

    @abstractmethod
    def create(self, inputs: Mapping[str, Any]) -> Call:
        """Ask for a prediction."""

    @abstractmethod
    def read_created(self, body: Any) -> Prediction:
        """Read a create's answer: an id, and a phase that is at least WAITING."""

    def poll(self, prediction_id: str) -> Call:
        """Ask how a prediction stands."""
        raise self._lacks("predictions to ask after")

    def read_prediction(self, body: Any) -> Prediction:
        """Read a poll's answer."""
        raise self._lacks("predictions to ask after")

    def result(self, prediction_id: str) -> Call:
        """Ask for the outcome of a prediction that is READY."""
        raise self._lacks("results of their own")

    def read_result(self, body: Any, polled: Prediction) -> Prediction:
        """Read the outcome of the prediction that the poll said was READY."""
        raise self._lacks("results of their own")

    def listing(self, since: datetime, until: datetime, page: str | None) -> Call:
        """Ask for predictions created in a time window, up to 100; `page` is None for the first.

        A service that cannot be asked for a window lists all, the latest first.
        """
        raise self._lacks("a list of predictions")

    def read_listing(self, body: Any) -> tuple[list[Prediction], str | None]:
        """Read a listing; the second item is the next page's `page`, ``None`` after the last.

        A listed prediction without `input` has to be polled to be recognised. A service can name
        the same page again and again: who asks stops at one that was seen.
        """
        raise self._lacks("a list of predictions")

    def presign(self, content_type: str) -> Call | None:
        """Ask where to upload an init image; ``None`` where it goes along, or by its URL."""
        return None

    def read_presigned(self, body: Any) -> Upload:
        """Read a presign's answer."""
        raise self._lacks("a route to upload an init image; give its URL")

    def _lacks(self, what: str) -> RemoteError:
        return RemoteError(f"{self.name} has no {what}")

    def reset_s(self, reason: str) -> float | None:
        """Seconds until a rate limit resets, where only the text of a 429 says so."""
        return None

    def same_input(self, listed: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
        """Whether a listed prediction was created with what was sent; numbers may come as text."""
        return all(name in listed and _text(listed[name]) == _text(sent[name]) for name in sent)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()):
        return str(int(value))  # a seed may have 20 digits
    try:
        return words.digits(float(value), 12)
    except (TypeError, ValueError):
        return str(value)
