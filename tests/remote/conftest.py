"""What tests that call the fault server as a hosted service share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sd35bench.remote import prediction
from sd35bench.remote.providers import PROVIDERS, provider_class
from sd35bench.study.store import Study, decode_rgb
from tests.remote.fault_server import FaultServer, serving


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Own limits, no key of the developer's, and decoding without a process for each image."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in PROVIDERS:
        monkeypatch.delenv(provider_class(name).key_variable, raising=False)
    monkeypatch.setattr(prediction, "decode_image", decode_rgb)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with serving() as found:
        yield found


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study.open(tmp_path, "study", create=True)
