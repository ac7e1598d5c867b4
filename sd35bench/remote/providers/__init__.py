"""Hosted services by name: a provider is a module that translates requests to a wire and back.

A provider sends nothing itself. It says what to send (`Call`) and reads what came back; the
transport, limits, polling, retries, downloads and accounting are the same for all of them.
"""

from sd35bench import plugins
from sd35bench.backends.base import KINDS
from sd35bench.remote.providers.base import Provider

PROVIDERS = {
    "deepinfra": "sd35bench.remote.providers.deepinfra:DeepInfra",
    "eachlabs": "sd35bench.remote.providers.eachlabs:Eachlabs",
    "fal": "sd35bench.remote.providers.fal:Fal",
    "replicate": "sd35bench.remote.providers.replicate:Replicate",
    "stability": "sd35bench.remote.providers.stability:Stability",
}
"""Also the `kind` of the backends that call them."""


def is_provider(kind: str) -> bool:
    """Whether a backend of this kind calls a hosted service.

    Raises: ConfigError where only the class could tell, and cannot be had.
    """
    if kind in PROVIDERS or kind in KINDS:
        return kind in PROVIDERS
    if plugins.is_place(kind):
        return issubclass(plugins.load_class("backends", kind, object), Provider)
    return kind in plugins.entry_points("providers")


def provider_class(name: str) -> type[Provider]:
    """Import a provider's module, a plug-in's too, and return its class.

    Raises: ConfigError for an unknown name, and for a plug-in that cannot be had.
    """
    return plugins.load_own("providers", name, Provider, PROVIDERS)
