"""The hosted models of the vendor's page as their YAML declares them, without Hydra."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import _utils

from sd35bench.config.files import config_dir
from sd35bench.config.model_inputs import declared
from sd35bench.config.models import BackendConf, ModelConf
from sd35bench.remote.inputs import Schema

OWN = ("pixart-xl-2", "sana", "ideogram-v2-turbo", "omni-zero-couples")
"""Models with an input schema of their own."""


@cache
def group_file(group: str, name: str) -> dict[str, Any]:
    """A group's YAML with what it inherits from others of its group."""
    path = Path(config_dir()) / group / f"{name}.yaml"
    own = yaml.load(path.read_text("utf-8"), Loader=_utils.get_yaml_loader())
    found: dict[str, Any] = {}
    for base in own.pop("defaults"):
        if isinstance(base, str) and base not in ("schema", "_self_"):
            found = group_file(group, base)
    return _merged(found, own)


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` over `base`, and so in what both have below a name."""
    found = {**base, **own}
    for name in base.keys() & own.keys():
        if isinstance(base[name], dict) and isinstance(own[name], dict):
            found[name] = _merged(base[name], own[name])
    return found


def model_conf(name: str) -> ModelConf:
    return ModelConf(**group_file("model", name))


def backend_conf(name: str) -> BackendConf:
    return BackendConf(**group_file("backend", name))


@cache
def schema_of(name: str) -> Schema:
    return declared(model_conf(name))
