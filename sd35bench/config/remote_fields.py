"""The override names under `remote.`: how hosted services are called, and what that may cost."""

from sd35bench.config.takes import Choice, Field, Number, Switch, Text, integer

__all__ = ["REMOTE_FIELDS"]

REMOTE_FIELDS = (
    Field(
        name="remote.base_url",
        takes=Text(allowed="https://HOST, or http://127.0.0.1:PORT with remote.allow_loopback"),
        means="where the hosted protocol is spoken",
        default="the provider's",
        nullable=True,
    ),
    Field(
        name="remote.slug",
        takes=Text(),
        means="the model's name there",
        default="the model's hosted name",
        nullable=True,
    ),
    Field(
        name="remote.key_file",
        takes=Text(),
        means="a file that holds the key, instead of the environment variable",
        default="none",
        nullable=True,
    ),
    Field(
        name="remote.auth",
        takes=Choice(words=("x-api-key", "bearer")),
        means="eachlabs: the header that carries the key",
        default="x-api-key",
    ),
    Field(
        name="remote.allow_loopback",
        takes=Switch(),
        means="let base_url and downloads be plain http on this machine",
        default="false",
    ),
    Field(
        name="remote.concurrency",
        takes=integer(1, 100),
        means="predictions in flight at once; the first timed_limit prompts run at 1, for latency",
        default="10",
    ),
    Field(
        name="remote.requests_per_minute",
        takes=integer(1, 1_000_000),
        means="creates and polls in any 60 s, over all processes of this machine",
        default="60",
    ),
    Field(
        name="remote.timeout_s",
        takes=Number(kind=float, low=0, high=1e6, above=True),
        means="seconds that one prediction may take in all",
        default="300",
    ),
    Field(
        name="remote.max_cost_usd",
        takes=Number(kind=float, low=0, high=1e9),
        means="a study's budget: pauses before it is passed",
        default="none",
        nullable=True,
    ),
    Field(
        name="remote.confirm_above_usd",
        takes=Number(kind=float, low=0, high=1e9),
        means="a bill above this asks for --yes",
        default="1",
    ),
    Field(
        name="remote.usd_per_image",
        takes=Number(kind=float, low=0, high=1e6),
        means="the price that budgets count with",
        default="the listed one; 0 on loopback",
        nullable=True,
    ),
    Field(
        name="remote.on_ambiguous",
        takes=Choice(words=("keep", "resubmit")),
        means="a create whose answer was lost and that the service does not list: keep it so, or"
        " create (and perhaps pay) again",
        default="keep",
    ),
    Field(
        name="remote.init_image_url",
        takes=Text(),
        means="where the service finds init_image, instead of an upload",
        default="none",
        nullable=True,
    ),
    Field(
        name="remote.expected_latency_s",
        takes=Number(kind=float, low=0, high=1e6, above=True),
        means="when to poll first; adapts to what is seen",
        default="the model's target latency",
        nullable=True,
    ),
)
