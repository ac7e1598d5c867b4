"""The contract over every registered provider, and what the registry itself promises."""

import pytest

from sd35bench.config import choices, compose
from sd35bench.errors import ConfigError
from sd35bench.remote.providers import PROVIDERS, provider_class
from tests.remote.contract import ProviderContract


@pytest.mark.parametrize("name", PROVIDERS)
class TestProviders(ProviderContract):
    def test_a_backend_of_its_kind_has_a_price_and_only_what_it_can_do(self, name):
        assert name in choices("backend")
        backend = compose([f"backend={name}"]).backend
        assert backend.kind == name
        assert not backend.needs_weights
        assert backend.usd_per_image > 0
        assert list(backend.samplers) == ["euler"]
        assert not backend.skip_layers

    def test_the_model_that_this_is_about_has_a_name_there(self, name):
        assert compose(["model=sd35-medium"]).model.hosted[name]


def test_an_unknown_provider_is_named():
    with pytest.raises(ConfigError, match="deepinfra, eachlabs, fal, replicate, stability"):
        provider_class("nobody")
