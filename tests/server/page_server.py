"""The real application on a free port, with nobody who makes images: the test does, by hand."""

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd35bench.server.predictions import Prediction, Query
from sd35bench.server.serving import Server, bind, open_state
from sd35bench.server.state import ServerState
from tests.server.live import START_S, make_settings

__all__ = ["Served", "picture", "served"]


def picture(width: int = 88, height: int = 48, color: str = "teal") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Served:
    """A running server whose predictions wait until they are ended here."""

    url: str
    state: ServerState

    def listed(self) -> list[Prediction]:
        """All predictions of a server without keys, the newest first."""
        return self.state.store.listing("", Query()).predictions

    def finish(self, data: bytes) -> None:
        """End the oldest prediction with its image, as the generator would."""
        work = self.state.store.take()
        assert work is not None
        self.state.store.processing(work.id)
        path = self.state.files.put_output(work.id, data, "png")
        self.state.store.succeed(work.id, path, 0.25)

    def fail(self, reason: str) -> None:
        """Fail the oldest prediction."""
        work = self.state.store.take()
        assert work is not None
        self.state.store.fail(work.id, "error", reason)


@contextlib.contextmanager
def served(folder: Path, **fields: Any) -> Iterator[Served]:
    """Serve until the end of the block; `fields` are settings."""
    settings = make_settings(folder, **{"requests_per_minute": None, **fields})
    ready = threading.Event()
    with contextlib.closing(bind(settings)) as bound, open_state(settings) as state:
        server = Server(state, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert ready.wait(START_S)
            yield Served(f"http://127.0.0.1:{bound.getsockname()[1]}", state)
        finally:
            server.should_exit = True
            thread.join()
