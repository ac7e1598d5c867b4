"""Loading is tested on the backends' tiny checkpoint."""

from tests.backends.conftest import eager, fresh, tiny_path

__all__ = ["eager", "fresh", "tiny_path"]
