"""The tiny checkpoint, as the backends' tests have it."""

from tests.backends.conftest import tiny_path

__all__ = ["tiny_path"]
