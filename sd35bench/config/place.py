"""Where images are made: here, or by a hosted service, whose settings are checked; where scored.

Where images cost money nothing is guessed: a base URL that is not the provider's own needs a price
and the model's name there, unless it is on this machine, where they are 0 and the model's own name.
"""

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from sd35bench.config.models import FIELDS, ModelConf, RunConf, check_field
from sd35bench.config.overrides import RAY_OPTIONS, WORKERS, parse
from sd35bench.engine import Engine, hosted_engine, local_engine, ray_engine
from sd35bench.errors import ConfigError, nearest
from sd35bench.loopback import is_loopback
from sd35bench.remote.inputs import Schema, takes, takes_size
from sd35bench.remote.providers import is_provider, provider_class
from sd35bench.remote.providers.base import RemoteSettings
from sd35bench.types import Scalar
from sd35bench.workers.limits import Limits

if TYPE_CHECKING:
    from sd35bench.workers.features import Spread

LATENCY_ELSEWHERE_S = 8.0
"""What the hosted service's page says an image takes."""
LATENCY_HERE_S = 0.1
THREADS = 1
"""What a hosted trial's identity says: this machine's threads make none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The engine of a job, and what of its place is part of a trial's identity."""

    engine: Engine
    options: Mapping[str, Scalar]
    threads: int
    notes: tuple[str, ...] = ()


def place_of(
    conf: RunConf,
    schema: Schema,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    timed_limit: int,
) -> Place:
    """Choose the engine by the backend's kind, and check all that it needs.

    `schema`: the hosted model's own input; `timed_limit`: how many trials of each setting are timed
    alone. Raises: ConfigError, one line, naming field, value and remedy.
    """
    if not is_provider(conf.backend.kind):
        return _local(conf, batch_sizes)
    settings = _remote_settings(conf, schema, sizes, batch_sizes, timed_limit)
    return Place(
        engine=hosted_engine(settings),
        # What makes a service another backend: its place, and the model's name there.
        options={"base_url": settings.base_url, "slug": settings.slug},
        threads=THREADS,
        notes=_remote_notes(conf),
    )


def _local(conf: RunConf, batch_sizes: Sequence[int]) -> Place:
    limits = Limits(
        deadline_s=conf.deadline_s,
        memory_limit_bytes=conf.memory_limit_bytes,
        max_failures=conf.max_failures,
        starts=conf.starts,
        keep_latents=conf.keep_latents,
        contention=conf.contention,
    )
    alone = 1 in batch_sizes and conf.timed_limit is not None
    return Place(
        engine=_engine(conf, limits),
        options={},
        threads=threads_of(conf.threads),
        notes=("timed_limit has no effect at batch_size=1: every trial is timed",) * alone,
    )


def threads_of(asked: int | None) -> int:
    """The threads of a worker: those that were asked for, else one for each core in sight.

    Raises: ConfigError for more than there are cores: they would wait for one another.
    """
    cores = len(os.sched_getaffinity(0))
    if asked is not None and asked > cores:
        raise ConfigError(
            f"threads={asked}: this process sees {cores} CPU cores; give at most {cores}, or leave"
            " threads out for all of them"
        )
    return cores if asked is None else asked


def _engine(conf: RunConf, limits: Limits) -> Engine:
    price = conf.backend.usd_per_image
    if conf.engine == "processes":
        return local_engine(limits, price, 1 if conf.workers is None else conf.workers)
    from sd35bench.workers.cluster import RaySettings

    ray = conf.ray
    settings = RaySettings(address=ray.address, init=ray.init, actor=ray.actor)
    return ray_engine(limits, price, "auto" if conf.workers is None else conf.workers, settings)


def _remote_settings(
    conf: RunConf,
    schema: Schema,
    sizes: Sequence[tuple[int, int]],
    batch_sizes: Sequence[int],
    single_stream: int,
) -> RemoteSettings:
    remote, provider = conf.remote, conf.backend.kind
    base_url, here = _base_url(conf)
    own = base_url == provider_class(provider).base_url
    if any(size != 1 for size in batch_sizes):
        raise ConfigError(
            f"batch_size={max(batch_sizes)}: backend={conf.backend.name} makes one image a request;"
            " leave batch_size out (remote.concurrency says how many run side by side)"
        )
    latency_s = remote.expected_latency_s
    if latency_s is None:
        guess_s = LATENCY_HERE_S if here else LATENCY_ELSEWHERE_S
        target_s = conf.model.target_latency_s
        latency_s = guess_s if target_s is None else target_s
    settled: dict[str, Any] = {
        "base_url": base_url,
        "slug": _slug(conf, own, here),
        "usd_per_image": _price(conf, own, here),
        "init_image_url": _init_image_url(conf),
        "expected_latency_s": latency_s,
        "output_hosts": _output_hosts(remote.output_hosts),
        "accept_size": _size(remote.accept_size),
    }
    return RemoteSettings(
        **{**vars(remote), **settled},  # the others are taken as they are
        provider=provider,
        single_stream=single_stream,
        default_steps=conf.model.steps,
        aspect_ratios=_ratios(
            conf.model,
            conf.backend.name,
            schema,
            () if provider_class(provider).takes_px else sizes,
        ),
        inputs=schema,
    )


def _remote_notes(conf: RunConf) -> tuple[str, ...]:
    """Say in plain words what acts on this machine only, and was asked for in vain."""
    asked = {
        "threads": conf.threads is not None,
        "starts": conf.starts != 1,
        "workers": conf.workers is not None,
        "engine": conf.engine != "processes",
        "keep_latents": conf.keep_latents,
        "contention": conf.contention != "retime",
        "deadline_s": conf.deadline_s is not None,
        "memory_limit_gb": conf.memory_limit_gb is not None,
    }
    why = f"backend={conf.backend.name} makes its images elsewhere"
    return tuple(f"{name} has no effect: {why}" for name, is_set in asked.items() if is_set)


def _base_url(conf: RunConf) -> tuple[str, bool]:
    """The base URL without a trailing slash, and whether it is on this machine."""
    given = conf.remote.base_url
    if given is None:
        return provider_class(conf.backend.kind).base_url, False
    where = f"remote.base_url={_shown(given)}"
    try:
        parts = urlsplit(given)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"{where}: is no URL ({exc})") from exc
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{where}: holds a user or a password; keys go into an environment variable or a file"
        )
    if parts.scheme not in ("https", "http") or not host:
        raise ConfigError(f"{where}: must be https://HOST, or http://127.0.0.1:PORT")
    if parts.query or parts.fragment or "?" in given or "#" in given:
        raise ConfigError(f"{where}: leave out what follows the path (? or #)")
    if re.search(r"\s|\\", given):
        raise ConfigError(f"{where}: holds a space or a backslash")
    here = is_loopback(host)
    if here and not conf.remote.allow_loopback:
        raise ConfigError(f"{where}: is on this machine; add remote.allow_loopback=true")
    if parts.scheme == "http" and not here:
        raise ConfigError(f"{where}: the key would travel in the clear; write https://")
    return f"{parts.scheme}://{_netloc(parts)}{parts.path.rstrip('/')}", here


def _netloc(parts: SplitResult) -> str:
    """One spelling of host and port: a study asked for in another would be bought again."""
    host = f"{parts.hostname}"
    host = "127.0.0.1" if host == "localhost" else host
    host = f"[{ipaddress.ip_address(host)}]" if ":" in host else host
    own = {"https": 443, "http": 80}[parts.scheme]
    return host if parts.port in (None, own) else f"{host}:{parts.port}"


def _output_hosts(text: str | None) -> tuple[str, ...]:
    hosts = () if text is None else tuple(text.lower().split())
    for host in hosts:
        if re.fullmatch(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)+", host) is None:
            raise ConfigError(
                f"remote.output_hosts={text}: must be names of hosts between spaces, such as"
                " cdn.example.org or .example.org"
            )
    return hosts


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if found is None:
        raise ConfigError(f"remote.accept_size={text}: must be WIDTHxHEIGHT in px, as 1024x1024")
    return int(found[1]), int(found[2])


def _shown(url: str) -> str:
    """A URL as messages may quote it: without user and password, without a query."""
    bare = re.sub(r"//[^/?#]*@", "//…@", url, count=1)
    return re.sub(r"[?#].*", "?…", bare, flags=re.DOTALL)


def _slug(conf: RunConf, own: bool, here: bool) -> str:
    provider = conf.backend.kind
    if conf.remote.slug is not None:
        return conf.remote.slug
    if here:
        return conf.model.name
    if provider in conf.model.hosted:
        return conf.model.hosted[provider]
    place = f"{provider} has no known name for it" if own else "its name there is not known"
    raise ConfigError(
        f"model={conf.model.name} backend={conf.backend.name}: {place}; take model=sd35-medium,"
        " give remote.slug=NAME, or serve it on this machine (sd35bench serve) and give"
        " remote.base_url"
    )


def _price(conf: RunConf, own: bool, here: bool) -> float:
    if conf.remote.usd_per_image is not None:
        return conf.remote.usd_per_image
    prices = conf.model.usd_per_image
    if own and conf.backend.kind in prices:
        return prices[conf.backend.kind]
    if own and not conf.model.inputs:
        return conf.backend.usd_per_image
    if own:
        raise ConfigError(
            f"remote.usd_per_image: what an image of {conf.model.name} costs at"
            f" {conf.backend.kind} is not known, and budgets count with it; give it"
        )
    if here:
        return 0.0
    raise ConfigError(
        "remote.usd_per_image: what an image costs at this remote.base_url is not known, and"
        " budgets count with it; give it (0 where it is free)"
    )


def _init_image_url(conf: RunConf) -> str | None:
    url = conf.remote.init_image_url
    if url is None:
        return None
    where = f"remote.init_image_url={_shown(url)}"
    if urlsplit(url).scheme not in ("https", "http"):
        raise ConfigError(f"{where}: must be a URL that the service can fetch (https://…)")
    return url


def _ratios(
    model: ModelConf, backend: str, schema: Schema, sizes: Sequence[tuple[int, int]]
) -> Mapping[tuple[int, int], str]:
    """(width, height) → the protocol's word, for all that the model knows."""
    known = {(side[0], side[1]): ratio for ratio, side in reversed(model.aspect_ratios.items())}
    if schema and not takes_size(schema):
        odd = [size for size in sizes if size != (model.width, model.height)]
        if odd:
            raise ConfigError(
                f"width={odd[0][0]} height={odd[0][1]}: {model.name} has no input for the size;"
                " leave it out"
            )
        return known
    for size in () if takes(schema, "width") else sizes:
        if size not in known:
            said = ", ".join(f"{r} ({w}x{h})" for r, (w, h) in model.aspect_ratios.items())
            raise ConfigError(
                f"width={size[0]} height={size[1]}: backend={backend} knows aspect ratios only;"
                f" give aspect_ratio=, one of {said}"
            )
    return known


def spread_of(overrides: Sequence[str]) -> "AbstractContextManager[Spread | None]":
    """The workers that `workers=`, `threads=`, `engine=` and `ray.…=` ask for; none where none do.

    Raises: ConfigError for a wrong value, and for Ray's options without `engine=ray`. Entered:
    ConfigError for more workers than fit, and where no Ray answers.
    """
    words = [text for text in overrides if text.startswith(WORKERS)]
    given: dict[str, Any] = {}
    for text in words:
        override = parse(text)
        name, value = override.get_key_element(), override.value()
        if name not in FIELDS and not name.startswith(RAY_OPTIONS):
            raise ConfigError(f"{text}: unknown field {name!r}{nearest(name, [*FIELDS])}")
        given[name] = value if name.startswith(RAY_OPTIONS) else check_field(name, value)
    if not given:
        return nullcontext()
    workers, threads = given.get("workers"), given.get("threads")
    threads_of(threads)
    if given.get("engine", "processes") != "ray":
        from sd35bench.workers.features import local_spread

        unread = [name for name in given if name.startswith("ray.")]
        if unread:
            raise ConfigError(f"{unread[0]}: it acts with engine=ray only; add engine=ray")
        return local_spread(1 if workers is None else workers, threads)
    from sd35bench.workers.cluster import RaySettings, ray_spread

    init, actor = (
        {name.removeprefix(head): v for name, v in given.items() if name.startswith(head)}
        for head in RAY_OPTIONS
    )
    settings = RaySettings(address=given.get("ray.address"), init=init, actor=actor)
    return ray_spread("auto" if workers is None else workers, threads, settings)
