"""How one run calls a hosted service: frozen, validated, without the key."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sd35bench.remote.inputs import Schema


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
