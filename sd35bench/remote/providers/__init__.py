"""Hosted services by name: a provider is a module that translates requests to a wire and back.

A provider sends nothing itself. It says what to send (`Call`) and reads what came back; the
transport, limits, polling, retries, downloads and accounting are the same for all of them.
"""

import importlib

from sd35bench.errors import ConfigError
from sd35bench.remote.providers.base import Provider

__all__ = ["PROVIDERS", "provider_class"]

PROVIDERS = {
    "deepinfra": "sd35bench.remote.providers.deepinfra:DeepInfra",
    "eachlabs": "sd35bench.remote.providers.eachlabs:Eachlabs",
    "fal": "sd35bench.remote.providers.fal:Fal",
    "replicate": "sd35bench.remote.providers.replicate:Replicate",
    "stability": "sd35bench.remote.providers.stability:Stability",
}
"""Also the `kind` of the backends that call them."""


def provider_class(name: str) -> type[Provider]:
    """Import a provider's module and return its class.

    Raises: ConfigError for an unknown name.
    """
    if name not in PROVIDERS:
        raise ConfigError(f"provider {name!r} is unknown; known: {', '.join(sorted(PROVIDERS))}")
    module_name, class_name = PROVIDERS[name].split(":")
    return getattr(importlib.import_module(module_name), class_name)
