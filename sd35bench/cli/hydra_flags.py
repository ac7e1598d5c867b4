"""Hydra's own questions about a configuration, `--cfg` and `--info`: nothing is checked or run.

Hydra's `--cfg job` shows one point and refuses a sweep. Here a sweep is a job for each load, whose
axes are lists, so each job's configuration is shown: what `run` reads.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sd35bench.cli.output import Answer, console
from sd35bench.cli.parser import Flag, Given
from sd35bench.config.compose import CONFIG_NAME, explained, hydra_session, search_path
from sd35bench.config.overrides import written
from sd35bench.config.sweeper import sweep
from sd35bench.errors import ConfigError

PARTS = ("job", "hydra", "all")
TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAGS = (
    Flag("--cfg, -c " + "|".join(PARTS), "Hydra's: print the configuration, run nothing"),
    Flag("--resolve", "Hydra's, with --cfg: interpolations as their values"),
    Flag("--package, -p NODE", "Hydra's, with --cfg: one node of it, such as model"),
    Flag(
        "--info, -i " + "|".join(TOPICS[:3]) + "|...",
        "Hydra's: which files a configuration comes from",
    ),
    Flag(
        "--config-name, -cn NAME",
        "Hydra's: another primary file than run, such as one in --config-dir",
    ),
)


def root_of(given: Given) -> str:
    """The primary file's name."""
    name = given.text("--config-name")
    return CONFIG_NAME if name is None else name


def asks_hydra(given: Given) -> bool:
    """Whether the command line asks about the configuration instead of running it.

    Raises: ConfigError for a flag that goes with --cfg alone, and for two questions at once.
    """
    for name in ("--resolve", "--package"):
        if given.has(name) and not given.has("--cfg"):
            raise ConfigError(f"{name} goes with --cfg job, --cfg hydra or --cfg all")
    if given.has("--cfg") and given.has("--info"):
        raise ConfigError("--cfg and --info: ask one of them at a time")
    return given.has("--cfg") or given.has("--info")


def answer_hydra(given: Given) -> Answer:
    """Print what Hydra was asked.

    Raises: ConfigError for an unknown part, topic or node, and for what cannot be composed.
    """
    if given.has("--info"):
        said = _info(given, _one_of("--info", given, TOPICS))
        console(given.as_json).say(said.rstrip("\n"))
        return Answer(document={"info": said})
    part = _one_of("--cfg", given, PARTS)
    package = given.text("--package")
    nodes = [_node(config, package) for config in _configurations(given, part)]
    if given.has("--resolve"):
        with explained():
            for node in nodes:
                if OmegaConf.is_config(node):
                    OmegaConf.resolve(node)
    head = "" if package is None else f"# @package {package}\n"
    texts = [
        head + (OmegaConf.to_yaml(node) if OmegaConf.is_config(node) else f"{node}\n")
        for node in nodes
    ]
    console(given.as_json).print("---\n".join(texts), markup=False, soft_wrap=True, end="")
    return Answer(document={"cfg": [yaml.safe_load(text) for text in texts]})


class _Composed:
    """A task that keeps what the sweeper composed, and has nothing launched."""

    def __init__(self) -> None:
        self.configs: list[DictConfig] = []

    def prepare(self, configs: Sequence[DictConfig]) -> bool:
        """Keep the jobs' configurations."""
        self.configs = list(configs)
        return True

    def __call__(self, config: DictConfig) -> None:
        """Nothing is launched."""


def _configurations(given: Given, part: str) -> list[DictConfig]:
    if part == "job":
        task = _Composed()
        sweep(task, written(given.settings), given.config_dir, root_of(given))
        return task.configs
    with hydra_session(given.config_dir) as hydra, explained():
        return [hydra.get_sanitized_cfg(hydra.compose_config(**_asked(given)), part)]


def _asked(given: Given) -> dict[str, Any]:
    """What Hydra is told of a command line."""
    overrides = [*written(given.settings), *search_path(given.config_dir)]
    return {"config_name": root_of(given), "overrides": overrides, "run_mode": RunMode.MULTIRUN}


def _info(given: Given, topic: str) -> str:
    text = io.StringIO()
    with (
        hydra_session(given.config_dir) as hydra,
        explained(),
        _logging_kept(),
        contextlib.redirect_stdout(text),
    ):
        hydra.show_info(topic, **_asked(given))
    return text.getvalue()


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """Put the root logger back as it was: Hydra says its information through it."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers, root.level = handlers, level


def _node(config: DictConfig, package: str | None) -> Any:
    if package in (None, "_global_"):
        return config
    with explained():
        found = OmegaConf.select(config, package)
    if found is None:
        raise ConfigError(
            f"--package={package}: there is no such node; there are: {_names(config)}"
        )
    return found


def _names(config: DictConfig) -> str:
    return ", ".join(
        f"{n}" for n in config if OmegaConf.is_config(OmegaConf.select(config, f"{n}"))
    )


def _one_of(flag: str, given: Given, known: Sequence[str]) -> str:
    value = given.text(flag)
    if value is None or value not in known:
        raise ConfigError(f"{flag}={value}: must be one of {', '.join(known)}")
    return value
