import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    """Give SIGTERM back: Ray takes it where a test starts it, and keeps it afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
