"""What a sink is: a tracker that gets the summary of a study after a verb.

The study stays the truth. A sink gets an `Entry` for each setting (what was asked, its figures, a
few images), the Pareto front, and the report's file; it is sent all of it again after every verb,
and replaces what it has under the same id where its tracker can. What it raises is said in one
line and changes neither a trial nor an exit code. Trackers are imported when a sink is made.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd35bench import plugins, words
from sd35bench.types import Scalar

SINKS = {
    "mlflow": "sd35bench.sinks.mlflow:MlflowSink",
    "tensorboard": "sd35bench.sinks.tensorboard:TensorboardSink",
    "trackio": "sd35bench.sinks.trackio:TrackioSink",
    "wandb": "sd35bench.sinks.wandb:WandbSink",
}
"""Name → module and class; each name is the extra that installs its tracker, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image of a setting: its file in the study, and what was asked for."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One setting in one environment.

    `id` is its id in `show --json`, `name` says it in words. `asked` are its fields, `figures` the
    numbers of its row as `sd35bench data` names them, and `quality` where settings were compared.
    `on_front` is ``None`` where nothing was compared; `chosen_for` names profiles.
    """

    id: str
    name: str
    asked: dict[str, Scalar]
    figures: dict[str, float]
    on_front: bool | None = None
    chosen_for: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()


class Sink(ABC):
    """One tracker, made for one call of one verb, and closed after it."""

    def __init__(self, study: str, folder: Path) -> None:
        """`study` is its name; `folder` is the sink's own inside the study, for what stays here."""
        self.study, self.folder = study, folder

    @abstractmethod
    def put_setting(self, entry: Entry) -> None:
        """Send one setting."""

    def put_front(self, front: Sequence[Entry]) -> None:
        """Send the settings on the front, the fastest first; called after all settings."""
        return

    def put_file(self, path: Path) -> None:
        """Send the report."""
        return

    def close(self) -> None:
        """Finish; called once, after an error too."""
        return


def sink_names(text: str | None) -> list[str]:
    """Names between commas, ours and plug-ins'. Raises: ConfigError for one that is no sink."""
    names = [name for name in dict.fromkeys((text or "").split(",")) if name]
    for name in names:
        if name not in SINKS:
            load_sink(name)
    return names


def load_sink(name: str) -> type[Sink]:
    """The class of a sink. Raises: ConfigError for a name that is none, as `load_own`."""
    return plugins.load_own("sinks", name, Sink, SINKS)


FRONT_COLUMNS = ("setting", "latency_s", "quality", "chosen for")


def front_rows(front: Sequence[Entry]) -> list[list[str | float | None]]:
    """The front as a table with `FRONT_COLUMNS`."""
    return [
        [e.name, e.figures.get("latency_s_p50"), e.figures.get("quality"), ", ".join(e.chosen_for)]
        for e in front
    ]


def front_markdown(front: Sequence[Entry]) -> str:
    """The front as a Markdown table."""
    rows = [FRONT_COLUMNS, ["---"] * len(FRONT_COLUMNS), *front_rows(front)]
    lines = (" | ".join("" if c is None else _cell(c) for c in row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _cell(value: str | float) -> str:
    return words.digits(value, 4) if isinstance(value, float) else str(value).replace("|", "\\|")
