"""What `sd35bench serve` takes: its fields, its schema, and the frozen settings that come out."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from sd35bench import plugins
from sd35bench.config.compose import compose
from sd35bench.config.files import choices, config_dir
from sd35bench.config.freeze import check_backend, check_family, sampler_axis
from sd35bench.config.model_inputs import declared, refuse_elsewhere
from sd35bench.config.model_weights import model_spec
from sd35bench.config.models import LoadConf, ModelConf, Text, defaults_of, known, names_of, read
from sd35bench.config.overrides import checked_options, parse, written
from sd35bench.config.place import threads_of
from sd35bench.errors import ConfigError, nearest
from sd35bench.loopback import is_loopback
from sd35bench.remote.inputs import Schema
from sd35bench.remote.providers import is_provider
from sd35bench.remote.providers.wire import RATIOS
from sd35bench.server.settings import ServedModel, ServerSettings
from sd35bench.types import BackendSpec, Load, Task
from sd35bench.workers.limits import Limits

VENDOR_SLUGS = ("stable-diffusion-3.5-medium", "stable-diffusion-3-5-medium")
"""What the vendor's page and its documentation call the model; both are accepted here too."""

VENDOR_PAGE = ("sd35-medium", "pixart-xl-2", "sana", "ideogram-v2-turbo", "omni-zero-couples")
"""The models that the vendor's page names."""

PROTOCOL = "eachlabs"
"""The provider whose protocol is spoken."""

_GROUPS = ("model", "backend")


class ServeConf(LoadConf):
    """Everything that `sd35bench serve` takes; `prompts` is there because models name a set."""

    host: Text = known("127.0.0.1", "the address to listen on")
    port: Annotated[int, Interval(ge=0, le=65535)] = known(8000, "the port; 0 takes a free one")
    no_auth: bool = known(False, "ask for no key; on a loopback host only")
    key_file: Text | None = known(None, "hashed keys, one a line; make_key adds one")
    make_key: Text | None = known(None, "make a key of this name, print it once, serve nothing")
    allow_loopback: bool = known(False, "let image addresses lead to this machine")
    requests_per_minute: Annotated[int, Interval(ge=1, le=1_000_000)] | None = known(
        60, "of each key, in any 60 s; null: no limit"
    )
    concurrency: Annotated[int, Interval(ge=1, le=1_000_000)] | None = known(
        10, "predictions that a key may have open; null: no limit"
    )
    results_dir: Text = known("results", "the folder of state_dir, where that is not given")
    state_dir: Text | None = known(
        None, "where predictions and files are kept", "RESULTS_DIR/serve-MODEL-BACKEND"
    )
    output_lifetime_s: Annotated[float, Interval(gt=0)] = known(
        3600.0, "seconds until an output is removed", "3600"
    )
    keep_days: Annotated[float, Interval(gt=0, le=36500)] | None = known(
        None, "days until a prediction that is over is forgotten; null: never"
    )
    usd_per_image: Annotated[float, Interval(ge=0, le=1e6)] = known(
        0.0, "what metrics.cost says of an image", "0"
    )
    balance_usd: Annotated[float, Interval(ge=0, le=1e9)] | None = known(
        None, "what each key may spend in all; then 402"
    )
    stand_in_for: Text | None = known(
        None,
        "hosted models, between spaces, whose names and inputs are taken while the served model"
        " makes the images; page: all of the vendor's page",
    )


SERVE_FIELDS = {
    field.name: field
    for field in names_of(ServeConf)
    if not field.name.startswith("prompts.") and field.name != "model.target_latency_s"
}


def compose_serve(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Check the overrides one by one, then compose; `extra` is the user's own YAML folder.

    Raises: ConfigError, one line.
    """
    for text in overrides:
        _check_override(text, extra)
    ConfigStore.instance().store(name="serve_schema", node=defaults_of(ServeConf))
    return compose(written(overrides), extra, "serve")


def freeze_serve(config: DictConfig) -> ServerSettings:
    """Validate everything and return the frozen settings.

    Raises: ConfigError, one line, naming field, value and remedy.
    """
    refuse_elsewhere(config.model, config.backend)
    conf = read(ServeConf, config)
    check_backend(conf.backend)
    if is_provider(conf.backend.kind):
        raise ConfigError(
            f"backend={conf.backend.name}: it calls a hosted service; serve needs a backend that"
            " runs here, such as backend=eager"
        )
    check_family(conf.model, conf.backend)
    _check_access(conf)
    _check_balance(conf)
    return ServerSettings(
        load=_load(conf),
        model=_served_model(conf),
        state_dir=_state_dir(conf),
        limits=Limits(deadline_s=conf.deadline_s, memory_limit_bytes=conf.memory_limit_bytes),
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
    elif name not in SERVE_FIELDS and not name.startswith(
        "backend."
    ):  # a backend's options are checked against its YAML
        hint = nearest(name, [*SERVE_FIELDS, *_GROUPS])
        raise ConfigError(f"{text}: serve takes no {name!r}{hint} (see serve --help)")


def _check_access(conf: ServeConf) -> None:
    """Ask for keys, or for a host that only this machine reaches."""
    if conf.no_auth and conf.key_file is not None:
        raise ConfigError(
            f"no_auth=true and key_file={conf.key_file} contradict each other: give one of them"
        )
    if conf.no_auth and not is_loopback(conf.host):
        raise ConfigError(
            f"no_auth=true: only on a loopback host, and host={conf.host} may be reached by others;"
            " give key_file=FILE, or host=127.0.0.1"
        )
    if not conf.no_auth and conf.key_file is None:
        raise ConfigError(
            "key_file: give the file of the keys that may use this server (make one with:"
            f" {plugins.command('serve make_key=NAME key_file=FILE')}), or no_auth=true to ask for"
            " none"
        )


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
        threads=threads_of(conf.threads),
    )


def _state_dir(conf: ServeConf) -> Path:
    if conf.state_dir is not None:
        return Path(conf.state_dir).expanduser()
    return Path(conf.results_dir).expanduser() / f"serve-{conf.model.name}-{conf.backend.name}"


def _served_model(conf: ServeConf) -> ServedModel:
    model, backend = conf.model, conf.backend
    ratios = {name: sides for name, sides in model.aspect_ratios.items() if name != "1:1"}
    sizes = {"1:1": model.aspect_ratios.get("1:1", [model.width, model.height]), **ratios}
    image_to_image = Task.IMAGE_TO_IMAGE.value
    schemas = _stood_in_for(conf) if conf.stand_in_for is not None else _own_schemas(model)
    return ServedModel(
        name=model.name,
        slugs=tuple(dict.fromkeys((model.name, *VENDOR_SLUGS, *schemas))),
        sizes={name: (sizes[name][0], sizes[name][1]) for name in RATIOS if name in sizes},
        sampler=sampler_axis(model, backend, ())[0],
        steps=model.steps,
        cfg=float(model.cfg),
        takes_images=image_to_image in model.tasks and image_to_image in backend.tasks,
        schemas={slug: schema for slug, schema in schemas.items() if schema},
        stands_in=conf.stand_in_for is not None,
        size_multiple=model.size_multiple,
        max_side_px=model.max_side_px,
    )


def _own_schemas(model: ModelConf) -> dict[str, Schema]:
    """What a model with an input of its own takes under its names, with its own defaults."""
    own = {
        "steps": model.steps,
        "cfg": model.cfg,
        "width": model.width,
        "height": model.height,
        "negative_prompt": "",
        "aspect_ratio": "1:1",
    }
    schema = declared(model)
    for item in schema:
        if item.source == "sampler":
            own["sampler"] = item.words[model.samplers[0]]
    full = tuple(replace(item, default=own.get(item.source, item.default)) for item in schema)
    return dict.fromkeys((model.name, model.hosted.get(PROTOCOL, model.name)), full)


def _stood_in_for(conf: ServeConf) -> dict[str, Schema]:
    """Names and inputs of the models that the served one stands in for.

    Raises: ConfigError for one that no hosted service has.
    """
    asked = f"{conf.stand_in_for}"
    found: dict[str, Schema] = {}
    files = sorted((config_dir() / "model").glob("*.yaml"))
    hosted = {path.stem: model for path in files if (model := _hosted(path)) is not None}
    for name in VENDOR_PAGE if asked == "page" else asked.split():
        if name not in hosted:
            raise ConfigError(
                f"stand_in_for={name}: must be page, or of {', '.join(hosted)}"
                f"{nearest(name, hosted)}"
            )
        found |= _own_schemas(hosted[name])
    return found


def _hosted(path: Path) -> ModelConf | None:
    """A model's YAML, if some hosted service has it."""
    plain: Any = OmegaConf.to_container(OmegaConf.load(path))
    del plain["defaults"]
    return ModelConf.model_validate(plain) if "hosted" in plain else None
