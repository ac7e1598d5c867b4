"""Hydra at arm's length: start it, compose, and turn its errors into one line of ours."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from sd35bench.config.files import PLUGIN_GROUPS, config_dir, folders, unwritten
from sd35bench.config.group_files import check_group_file
from sd35bench.config.kept import KeepingLoader, store
from sd35bench.config.models import (
    FIELDS,
    RUN,
    SWEEPER_MODULE,
    BackendConf,
    ModelConf,
    PromptsConf,
    defaults_of,
)
from sd35bench.errors import ConfigError, nearest

CONFIG_NAME = "run"


def compose(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Compose one configuration, without Hydra's own node; `models.read` checks it.

    Raises: ConfigError, one line.
    """
    with hydra_session() as hydra, explained():
        config = hydra.compose_config(
            config_name=CONFIG_NAME,
            overrides=[*overrides, *search_path(extra), "hydra.mode=RUN"],
            run_mode=RunMode.RUN,
        )
        with open_dict(config):
            del config["hydra"]
        return config


@contextmanager
def explained() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a `ConfigError` of one line."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as exc:
        raise ConfigError(_one_line(exc)) from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"not valid YAML: {' '.join(str(exc).split())}") from exc


@contextmanager
def hydra_session(roots: Path | None = None) -> Iterator[Any]:
    """Start Hydra on our folder with our schema; gives its `Hydra` object.

    `roots`: a folder of the user's own, in which Hydra looks for the primary file too. It does not
    look for that one in `hydra.searchpath`, which it reads from it.
    """
    _register()
    with initialize_config_dir(str(config_dir()), job_name="sd35bench", version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        places = hydra.config_loader.config_search_path
        if roots is not None:
            places.append("sd35bench", f"file://{roots.resolve()}", anchor="main")
        hydra.config_loader = KeepingLoader(places)
        yield hydra


def _register() -> None:
    """Put every field's default where run.yaml's defaults list finds it."""
    nodes: list[dict[str, Any]] = [{"name": "schema", "node": defaults_of(RUN)}]
    for group, model in (("model", ModelConf), ("backend", BackendConf), ("prompts", PromptsConf)):
        nodes.append({"group": group, "name": "schema", "node": defaults_of(model)})
    for group in PLUGIN_GROUPS:
        for name in unwritten(group):
            own = {"kind": name} if group == "prompts" else {"kind": name, "name": name}
            base = PromptsConf if group == "prompts" else BackendConf
            nodes.append({"group": group, "name": name, "node": {**defaults_of(base), **own}})
    sweeper = {"_target_": f"{SWEEPER_MODULE}.GroupingSweeper"}
    own = {"group": "hydra/sweeper", "name": "grouping", "provider": "sd35bench"}
    store([*nodes, {**own, "node": sweeper}])


def search_path(extra: Path | None) -> list[str]:
    """The override that adds plug-in packages' and the user's own YAML, once they were looked at.

    Raises: ConfigError, naming file and line, for what a group may not carry.
    """
    added = folders(extra)[1:]
    for folder in added:
        for path in sorted(folder.rglob("*.yaml")):
            check_group_file(path, folder)
    places = ",".join(f'"file://{folder.resolve()}"' for folder in added)
    return [f"hydra.searchpath=[{places}]"] if added else []


def _one_line(exc: BaseException) -> str:
    """Say which field of which file was wrong, from whichever exception of the chain knows it."""
    found = re.match(r"In '[\w./-]+': ", str(exc))
    where = found.group(0) if found else ""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return where + _about_key(cause)
        cause = cause.__cause__ if cause.__cause__ is not None else cause.__context__
    return re.sub(r"\s*\n\s*", "; ", str(exc).strip())


def _about_key(exc: OmegaConfBaseException) -> str:
    name = str(exc.full_key or exc.key or "configuration").replace("backend.options.", "backend.")
    first = str(exc.msg or exc).strip().splitlines()[0]
    if "not in" in first and "Key" in first:
        leaf = name.rpartition(".")[2]
        return f"{name}: unknown field{nearest(leaf, FIELDS)}"
    return f"{name}: {first}"
