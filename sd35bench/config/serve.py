"""What `sd35bench serve` takes: its fields, its schema, and the frozen settings that come out."""

import ipaddress
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, OmegaConf, open_dict

from sd35bench.backends.base import KINDS
from sd35bench.config.abilities import check_family, sampler_axis
from sd35bench.config.compose import explained, hydra_session, search_path
from sd35bench.config.fields import FIELDS, nearest
from sd35bench.config.files import choices
from sd35bench.config.models import model_spec, refuse_hosted_only
from sd35bench.config.options import checked_options
from sd35bench.config.overrides import expand_short_names, parse
from sd35bench.config.schema import BackendConf, ModelConf, PromptsConf
from sd35bench.config.takes import Field, Number, Switch, Text, integer
from sd35bench.errors import ConfigError
from sd35bench.limits import Limits
from sd35bench.server.settings import ServedModel, ServerSettings
from sd35bench.types import BackendSpec, Load, Task

__all__ = ["SERVE_FIELDS", "compose_serve", "freeze_serve"]

VENDOR_SLUGS = ("stable-diffusion-3.5-medium", "stable-diffusion-3-5-medium")
"""What the vendor's page and its documentation call the model; both are accepted here too."""

_PROTOCOL_RATIOS = (
    *("1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21"),
)
_GROUPS = ("model", "backend")
_OWN_FIELDS = (
    Field(name="host", takes=Text(), means="the address to listen on", default="127.0.0.1"),
    Field(
        name="port", takes=integer(0, 65535), means="the port; 0 takes a free one", default="8000"
    ),
    Field(
        name="no_auth",
        takes=Switch(),
        means="ask for no key; on a loopback host only",
        default="false",
    ),
    Field(
        name="key_file",
        takes=Text(),
        means="hashed keys, one a line; make_key adds one",
        default="none",
        nullable=True,
    ),
    Field(
        name="make_key",
        takes=Text(),
        means="make a key of this name, print it once, serve nothing",
        default="none",
        nullable=True,
    ),
    Field(
        name="allow_loopback",
        takes=Switch(),
        means="let image addresses lead to this machine",
        default="false",
    ),
    Field(
        name="requests_per_minute",
        takes=integer(1, 1_000_000),
        means="of each key, in any 60 s; null: no limit",
        default="60",
        nullable=True,
    ),
    Field(
        name="concurrency",
        takes=integer(1, 1_000_000),
        means="predictions that a key may have open; null: no limit",
        default="10",
        nullable=True,
    ),
    Field(
        name="state_dir",
        takes=Text(),
        means="where predictions and files are kept",
        default="results/serve-MODEL-BACKEND",
        nullable=True,
    ),
    Field(
        name="output_lifetime_s",
        takes=Number(kind=float, low=0, high=math.inf, above=True),
        means="seconds until an output is removed",
        default="3600",
    ),
    Field(
        name="keep_days",
        takes=Number(kind=float, low=0, high=36500, above=True),
        means="days until a prediction that is over is forgotten; null: never",
        default="none",
        nullable=True,
    ),
    Field(
        name="usd_per_image",
        takes=Number(kind=float, low=0, high=1e6),
        means="what metrics.cost says of an image",
        default="0",
    ),
    Field(
        name="balance_usd",
        takes=Number(kind=float, low=0, high=1e9),
        means="what each key may spend in all; then 402",
        default="none",
        nullable=True,
    ),
)
_SHARED = (
    *("threads", "deadline_s", "memory_limit_gb"),
    *("model.path", "model.weights", "model.layers", "model.text_encoders", "model.components"),
)
SERVE_FIELDS: dict[str, Field] = {
    **{field.name: field for field in _OWN_FIELDS},
    **{name: FIELDS[name] for name in _SHARED},
}


@dataclass
class ServeConf:
    """Everything that `sd35bench serve` takes; `prompts` is there because models name a set."""

    model: ModelConf = MISSING
    backend: BackendConf = MISSING
    prompts: PromptsConf = MISSING
    threads: int | None = None
    deadline_s: float | None = None
    memory_limit_gb: float | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    no_auth: bool = False
    key_file: str | None = None
    make_key: str | None = None
    allow_loopback: bool = False
    requests_per_minute: int | None = 60
    concurrency: int | None = 10
    state_dir: str | None = None
    output_lifetime_s: float = 3600.0
    keep_days: float | None = None
    usd_per_image: float = 0.0
    balance_usd: float | None = None


def compose_serve(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Check the overrides one by one, then compose; `extra` is the user's own YAML folder.

    Raises: ConfigError, one line.
    """
    for text in overrides:
        _check_override(text, extra)
    store = ConfigStore.instance()
    store.store(name="serve_schema", node=ServeConf)
    with hydra_session() as hydra, explained():
        config = hydra.compose_config(
            config_name="serve",
            overrides=[*expand_short_names(overrides), *search_path(extra)],
            run_mode=RunMode.RUN,
        )
        with open_dict(config):
            del config["hydra"]
        return config


def freeze_serve(config: DictConfig) -> ServerSettings:
    """Validate everything and return the frozen settings.

    Raises: ConfigError, one line, naming field, value and remedy.
    """
    refuse_hosted_only(config.model)
    conf: Any = OmegaConf.to_object(config)
    assert isinstance(conf, ServeConf)
    if conf.backend.kind not in KINDS:
        raise ConfigError(
            f"backend={conf.backend.name}: it calls a hosted service; serve needs a backend that"
            " runs here, such as backend=eager"
        )
    check_family(conf.model, conf.backend)
    _check_access(conf)
    _check_balance(conf)
    gigabytes = conf.memory_limit_gb
    return ServerSettings(
        load=_load(conf),
        model=_served_model(conf.model, conf.backend),
        state_dir=_state_dir(conf),
        limits=Limits(
            deadline_s=conf.deadline_s,
            memory_limit_bytes=None if gigabytes is None else round(gigabytes * 1e9),
        ),
        host=conf.host,
        port=conf.port,
        key_file=None if conf.key_file is None else Path(conf.key_file).expanduser(),
        allow_loopback=conf.allow_loopback,
        requests_per_minute=conf.requests_per_minute,
        concurrency=conf.concurrency,
        output_lifetime_s=conf.output_lifetime_s,
        keep_days=conf.keep_days,
        usd_per_image=conf.usd_per_image,
        balance_usd=conf.balance_usd,
    )


def _check_override(text: str, extra: Path | None) -> None:
    override = parse(text)
    name = override.get_key_element()
    if override.is_add() or override.is_force_add() or override.is_delete():
        raise ConfigError(f"{text}: fields are neither added nor deleted; write NAME=VALUE")
    if override.is_sweep_override():
        raise ConfigError(f"{text}: a server takes one value; a text with a comma goes in quotes")
    value: Any = override.value()
    value = getattr(value, "text", value)  # a quoted string
    if name in _GROUPS:
        known = choices(name, extra)
        if value not in known:
            hint = nearest(f"{value}", known)
            raise ConfigError(f"{text}: must be one of {', '.join(known)}{hint}")
    elif name in SERVE_FIELDS:
        field = SERVE_FIELDS[name]
        if not (value is None and field.nullable) and field.takes.check(value) is None:
            raise ConfigError(f"{text}: must be {field.takes.allowed}")
    elif not name.startswith("backend."):  # a backend's options are checked against its YAML
        hint = nearest(name, [*SERVE_FIELDS, *_GROUPS])
        raise ConfigError(f"{text}: serve takes no {name!r}{hint} (see serve --help)")


def _check_access(conf: ServeConf) -> None:
    """Ask for keys, or for a host that only this machine reaches."""
    if conf.no_auth and conf.key_file is not None:
        raise ConfigError(
            f"no_auth=true and key_file={conf.key_file} contradict each other: give one of them"
        )
    if conf.no_auth and not _is_loopback(conf.host):
        raise ConfigError(
            f"no_auth=true: only on a loopback host, and host={conf.host} may be reached by others;"
            " give key_file=FILE, or host=127.0.0.1"
        )
    if not conf.no_auth and conf.key_file is None:
        raise ConfigError(
            "key_file: give the file of the keys that may use this server (make one with: sd35bench"
            " serve make_key=NAME key_file=FILE), or no_auth=true to ask for none"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_balance(conf: ServeConf) -> None:
    if conf.balance_usd is not None and conf.usd_per_image == 0:
        raise ConfigError(
            f"balance_usd={conf.balance_usd:g}: it acts only with usd_per_image above 0; give both"
        )


def _load(conf: ServeConf) -> Load:
    options = checked_options("backend", conf.backend.options, conf.backend.allowed)
    return Load(
        model=model_spec(conf.model, conf.backend.needs_weights),
        backend=BackendSpec(name=conf.backend.name, kind=conf.backend.kind, options=options),
        threads=conf.threads if conf.threads is not None else len(os.sched_getaffinity(0)),
    )


def _state_dir(conf: ServeConf) -> Path:
    if conf.state_dir is not None:
        return Path(conf.state_dir).expanduser()
    return Path("results") / f"serve-{conf.model.name}-{conf.backend.name}"


def _served_model(model: ModelConf, backend: BackendConf) -> ServedModel:
    ratios = {name: sides for name, sides in model.aspect_ratios.items() if name != "1:1"}
    sizes = {"1:1": model.aspect_ratios.get("1:1", [model.width, model.height]), **ratios}
    image_to_image = Task.IMAGE_TO_IMAGE.value
    return ServedModel(
        name=model.name,
        slugs=tuple(dict.fromkeys((model.name, *VENDOR_SLUGS))),
        sizes={
            name: (sizes[name][0], sizes[name][1]) for name in _PROTOCOL_RATIOS if name in sizes
        },
        sampler=sampler_axis(model, backend, ())[0],
        steps=model.steps,
        cfg=float(model.cfg),
        takes_images=image_to_image in model.tasks and image_to_image in backend.tasks,
    )
