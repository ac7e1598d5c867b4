"""The tiny checkpoint, as the backends' tests have it."""

from tests.backends.conftest import tiny_path
from tests.kept_models import kept_models

__all__ = ["kept_models", "tiny_path"]
