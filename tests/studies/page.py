"""The hosted models of the vendor's page as their YAML declares them, without Hydra."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

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
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    found: dict[str, Any] = {}
    for base in own.pop("defaults"):
        if isinstance(base, str) and base not in ("schema", "_self_"):
            found = group_file(group, base)
    merged: Any = OmegaConf.to_container(OmegaConf.merge(found, own))
    return merged


def model_conf(name: str) -> ModelConf:
    return ModelConf(**group_file("model", name))


def backend_conf(name: str) -> BackendConf:
    return BackendConf(**group_file("backend", name))


@cache
def schema_of(name: str) -> Schema:
    return declared(model_conf(name))
