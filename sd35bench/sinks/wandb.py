"""Weights & Biases, offline: a run for each setting, grouped by study, sent by `wandb sync`.

Nothing leaves the machine unless `WANDB_MODE=online` says so; `WANDB_PROJECT` and the others are
W&B's own. A setting's run has the same id every time, so that what is synced later replaces it.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd35bench.sinks.base import FRONT_COLUMNS, Entry, Sink, front_rows
from sd35bench.types import Scalar, content_hash


class WandbSink(Sink):
    """Settings as runs: asked → config, figures → summary; images, front and report as media."""

    def __init__(self, study: str, folder: Path) -> None:
        """Make the folder, without which W&B writes to the working folder."""
        super().__init__(study, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = importlib.import_module("wandb")

    def put_setting(self, entry: Entry) -> None:
        """A run with its config, summary and images."""
        with self._run(entry.id, entry.name, entry.asked) as run:
            run.summary.update(entry.figures)
            run.summary.update({"on_front": entry.on_front, "chosen_for": [*entry.chosen_for]})
            if entry.pictures:
                images = [self._wandb.Image(str(p.path), caption=p.caption) for p in entry.pictures]
                run.log({"images": images})

    def put_front(self, front: Sequence[Entry]) -> None:
        """A table in a run of the study as a whole."""
        with self._run("the whole study", "the whole study", {}) as run:
            table = self._wandb.Table(columns=[*FRONT_COLUMNS], data=front_rows(front))
            run.log({"front": table})

    def put_file(self, path: Path) -> None:
        """The report, in a run of its own, which may not be reopened offline."""
        with self._run("report", "report", {}) as run:
            run.log({"report": self._wandb.Html(path.read_text(encoding="utf-8"))})

    def _run(self, setting: str, name: str, asked: dict[str, Scalar]) -> Any:
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "sd35bench"),
            group=self.study,
            name=name,
            id=content_hash([self.study, setting])[:16],
            resume="allow" if os.environ.get("WANDB_MODE") == "online" else None,
            config=asked,
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=self._wandb.Settings(silent=True, console="off"),
        )
