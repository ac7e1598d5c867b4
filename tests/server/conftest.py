"""Workers without a process, and Chromium for the tests of the page."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sd35bench.server import generation
from tests.server.page_server import Served, served
from tests.studies.in_process import hire


@pytest.fixture(scope="module")
def served_here() -> Iterator[None]:
    """Have servers of the fake backend make images in this process, for tests of the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "WorkerProcess", hire)
        yield


@pytest.fixture
def still(tmp_path: Path) -> Iterator[Served]:
    """A server whose predictions wait until the test ends them."""
    with served(tmp_path / "state") as server:
        yield server


@pytest.fixture
def visit(tabs) -> Iterator[Callable]:
    """Open the page; what it logs, throws, or asks of others must stay empty.

    Chromium itself logs a refused request: `refusals` says that some are expected.
    """
    noise: list[str] = []

    def go(server: Served, width: int = 1280, *, refusals: bool = False, **options):

        def heard(message) -> None:
            if not (refusals and message.text.startswith("Failed to load resource")):
                noise.append(f"console: {message.text}")

        def requested(request) -> None:
            if not request.url.startswith((server.url, "data:", "blob:")):
                noise.append(f"request: {request.url}")

        said = lambda e: noise.append(f"error: {e}")  # noqa: E731
        hears = {"console": heard, "pageerror": said, "request": requested}
        page = tabs.take(hears, width, 900, **options)
        page.set_default_timeout(60_000)
        page.goto(f"{server.url}/")
        return page

    yield go
    tabs.give_back()
    assert noise == []
