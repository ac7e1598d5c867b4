"""Hydra at arm's length: start it, compose, and turn its errors into one line of ours.

Composing has a memory: files are parsed and merged once, and again when one has changed. A
composition is 20 YAML files and 500 nodes in pure Python, 0.25 s. A sweep makes two of each job's
and one of each companion's, most of them of the same files, and only then puts the command line's
values on top. So what the files come to is kept here, by the groups that were chosen and the state
of all files of the search path (path, size, time of change, inode); every composition gets a copy
and its values. What is kept is kept pickled: a copy of 500 nodes takes 2.5 ms, and 13 by deepcopy.
"""

import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from sd35bench.config.files import (
    PLUGIN_GROUPS,
    check_group_file,
    config_dir,
    file_state,
    folders,
    unwritten,
)
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
KEPT = 8
"""States of the files that are kept, each with all that was composed of it."""
_FILE = "file://"
_repositories: dict[Any, "_Repository"] = {}
_stored: list[str] = []


def compose(
    overrides: Sequence[str], extra: Path | None = None, name: str = CONFIG_NAME
) -> DictConfig:
    """Compose the configuration `name`, without Hydra's own node; `models.read` checks it.

    Raises: ConfigError, one line.
    """
    with hydra_session() as hydra, explained():
        config = hydra.compose_config(
            config_name=name,
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


class KeepingLoader(ConfigLoaderImpl):
    """Composes what Hydra's own loader composes, without reading unchanged files again."""

    def _load_configuration_impl(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        flags = (run_mode, from_shell, validate_sweep_overrides)
        parsed, repo = self._parse_overrides_and_create_caching_repo(config_name, overrides)
        if validate_sweep_overrides:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        values = [each for each in parsed if _is_value(each, repo)]
        others = [str(each.input_line) for each in parsed if each not in values]
        if any(".env_copy" in text for text in others):  # Hydra copies the environment of now
            return super()._load_configuration_impl(config_name, overrides, *flags)
        key = (*flags, *others)
        if key not in repo.composed:
            made = super()._load_configuration_impl(config_name, others, *flags)
            repo.composed[key] = pickle.dumps(made)
        config: DictConfig = pickle.loads(repo.composed[key])
        plain = [each for each in values if not each.is_sweep_override()]
        self._apply_overrides_to_config(plain, config)
        own = [each for each in parsed if not each.is_hydra_override()]
        node = config.hydra
        node.overrides.task = [each.input_line for each in own]
        node.runtime.cwd = os.getcwd()
        style = node.job.config.override_dirname
        node.job.override_dirname = get_overrides_dirname(
            own, style.exclude_keys, style.item_sep, style.kv_sep
        )
        return config

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Override], "_Repository"]:
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        places = [(each.provider, each.path) for each in self.config_search_path.get_path()]
        for override in parsed:
            if override.get_key_element() == "hydra.searchpath":
                value: Any = override.value()
                places += [("override", str(path)) for path in value]
        key = (config_name, *places, *_stored, *_files(str(path) for _, path in places))
        if key not in _repositories:
            if len(_repositories) >= KEPT:
                _repositories.clear()
            repository = _Repository(self.repository)
            self._process_config_searchpath(config_name, parsed, repository)
            _repositories[key] = repository
        return parsed, _repositories[key]

    def _compose_config_from_defaults_list(
        self, defaults: list[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        assert isinstance(repo, _Repository)
        given = CachingConfigRepository(repo.delegate)
        given.cache = pickle.loads(pickle.dumps(repo.cache))  # merging changes what it is given
        return super()._compose_config_from_defaults_list(defaults, given)


class _Repository(CachingConfigRepository):
    """The files as they were read, and what they came to by what was chosen."""

    def __init__(self, delegate: Any) -> None:
        super().__init__(delegate)
        self.composed: dict[Any, bytes] = {}


def _is_value(override: Override, repo: IConfigRepository) -> bool:
    """Whether an override is put on top of the files, or for a sweep left out; else it chooses."""
    if override.is_hydra_override():
        return False
    if override.is_sweep_override() or isinstance(override.value(), dict):
        return True
    return not repo.group_exists(override.key_or_group)


def store(nodes: Sequence[dict[str, Any]]) -> None:
    """Put nodes into Hydra's store, by `ConfigStore.store`'s arguments, unless they are there."""
    known = ConfigStore.instance()
    said = repr(nodes)
    if _stored != [said] or "schema.yaml" not in known.repo:
        for each in nodes:
            known.store(**each)
        _stored[:] = [said]


def _files(places: Iterable[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """Which YAML files there are, in which state."""
    for place in places:
        if place.startswith(_FILE):
            paths = Path(place.removeprefix(_FILE)).rglob("*.yaml")
            yield from map(file_state, sorted(paths))
