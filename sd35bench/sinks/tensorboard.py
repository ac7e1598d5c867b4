"""TensorBoard: a folder of event files for each setting, without TensorFlow and without torch.

Its HParams page shows settings and figures side by side. Files of an earlier call are replaced, so
that no figure is there twice.
"""

import importlib
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from sd35bench.sinks.base import Entry, Sink, front_markdown


class TensorboardSink(Sink):
    """Settings as runs: asked → hparams, figures → scalars, images, and the front as text."""

    def __init__(self, study: str, folder: Path) -> None:
        """Remove what an earlier call wrote."""
        super().__init__(study, folder)
        imported: Any = importlib.import_module
        proto = "tensorboard.compat.proto"
        self._event = imported(f"{proto}.event_pb2").Event
        self._summary = imported(f"{proto}.summary_pb2").Summary
        self._tensor = imported(f"{proto}.tensor_pb2").TensorProto
        self._hparams = imported("tensorboard.plugins.hparams.summary_v2").hparams_pb
        self._text = imported("tensorboard.plugins.text.metadata").create_summary_metadata
        self._writer = imported("tensorboard.summary.writer.event_file_writer").EventFileWriter
        shutil.rmtree(folder, ignore_errors=True)

    def put_setting(self, entry: Entry) -> None:
        """A run with its hparams, scalars and images."""
        with self._run(entry.id) as put:
            asked = {k: v for k, v in entry.asked.items() if isinstance(v, str | int | float)}
            chosen = {"chosen for": ", ".join(entry.chosen_for), "on front": str(entry.on_front)}
            put(self._hparams({**asked, **chosen}, trial_id=entry.id))
            value = self._summary.Value
            put(
                self._summary(
                    value=[value(tag=n, simple_value=v) for n, v in entry.figures.items()]
                )
            )
            for number, picture in enumerate(entry.pictures):
                put(self._summary(value=[self._image(f"images/{number}", picture.path)]))

    def put_front(self, front: Sequence[Entry]) -> None:
        """A text in a run of the study as a whole, and which figures the HParams page shows."""
        with self._run("the whole study") as put:
            tensor = self._tensor(dtype="DT_STRING", string_val=[front_markdown(front).encode()])
            value = self._summary.Value(
                tag="front", tensor=tensor, metadata=self._text("front", "fastest first")
            )
            put(self._summary(value=[value]))

    def _image(self, tag: str, path: Path) -> Any:
        with Image.open(path) as image:
            width, height = image.size
        found = self._summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes()
        )
        return self._summary.Value(tag=tag, image=found)

    @contextmanager
    def _run(self, name: str) -> Iterator[Any]:
        writer = self._writer(str(self.folder / name.replace("/", "-")))
        try:
            yield lambda summary: writer.add_event(
                self._event(summary=summary, wall_time=time.time(), step=0)
            )
        finally:
            writer.close()
