"""Exports are of the backends' tiny checkpoint."""

from tests.backends.conftest import load, tiny_graph, tiny_path
from tests.kept_models import kept_models

__all__ = ["kept_models", "load", "tiny_graph", "tiny_path"]
