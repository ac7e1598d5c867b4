"""Trackio: a project for each study, a run for each setting, resumed under its name.

It is kept where `trackio show` looks, which `TRACKIO_DIR` and `TRACKIO_SPACE_ID` change.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd35bench.sinks.base import Entry, Sink, front_markdown


class TrackioSink(Sink):
    """Settings as runs: asked → config, figures and images → one log each time it is sent."""

    def __init__(self, study: str, folder: Path) -> None:
        """Name the project, in letters that are allowed in one."""
        super().__init__(study, folder)
        self._trackio: Any = importlib.import_module("trackio")
        self._project = f"sd35bench-{re.sub('[^A-Za-z0-9_-]', '-', study)}"

    def put_setting(self, entry: Entry) -> None:
        """A run; two environments of one setting have unlike names."""
        run = self._run(f"{entry.name} ({entry.id})", dict(entry.asked))
        images = {
            f"image_{number}": self._trackio.Image(str(picture.path), caption=picture.caption)
            for number, picture in enumerate(entry.pictures)
        }
        on_front = {} if entry.on_front is None else {"on_front": int(entry.on_front)}
        run.log({**entry.figures, **on_front, **images})
        run.finish()

    def put_front(self, front: Sequence[Entry]) -> None:
        """A table in a run of the study as a whole."""
        run = self._run("the whole study", {})
        run.log({"front": self._trackio.Markdown(front_markdown(front))})
        run.finish()

    def _run(self, name: str, asked: dict[str, Any]) -> Any:
        return self._trackio.init(
            project=self._project,
            name=name,
            config=asked,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
