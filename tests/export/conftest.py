"""Exports are of the backends' tiny checkpoint."""

from tests.backends.conftest import load, tiny_graph, tiny_path

__all__ = ["load", "tiny_graph", "tiny_path"]
