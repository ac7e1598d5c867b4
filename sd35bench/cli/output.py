"""What a verb hands back, and how progress and tables reach the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from sd35bench.trials import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A verb's result: the JSON document (printed only with --json) and the exit code."""

    document: Any = None
    exit_code: int = 0


def console(as_json: bool = False) -> Console:
    """A console on stdout, or on stderr when stdout belongs to a JSON document."""
    return Console(stderr=as_json, highlight=False)


class RunProgress:
    """Draws one bar over the trials of a load; call it whenever something changed."""

    def __init__(self, bar: ProgressBar, title: str) -> None:
        """`bar` is shown by the caller."""
        self._bar = bar
        self._task = bar.add_task(title, total=None)
        self._title = title

    def __call__(self, now: Progress) -> None:
        """Move the bar; of what is billed, say how fast it goes and what it has cost."""
        finished = now.done + now.failed
        parts = [self._title]
        if now.cost_usd is not None:
            parts.append(f"{now.in_flight} in flight")
            if finished and now.minutes > 0:
                parts.append(f"{finished / now.minutes:.1f}/min")
            parts.append(f"{now.cost_usd:.2f} USD")
        if now.failed:
            parts.append(f"{now.failed} failed")
        self._bar.update(
            self._task, completed=finished, total=now.total, description=", ".join(parts)
        )


@contextmanager
def show_progress() -> Iterator[ProgressBar]:
    """A progress display on stderr; silent where stderr is not a terminal."""
    target = Console(stderr=True)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with ProgressBar(*columns, console=target, disable=not target.is_terminal) as bar:
        yield bar
