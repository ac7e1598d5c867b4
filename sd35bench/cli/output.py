"""What a verb hands back, and how progress and tables reach the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sd35bench.remote.standing import Standing
from sd35bench.types import Record, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A verb's result: the JSON document (printed only with --json) and the exit code."""

    document: Any = None
    exit_code: int = 0


def console(as_json: bool = False) -> Console:
    """A console on stdout, or on stderr when stdout belongs to a JSON document."""
    return Console(stderr=as_json, highlight=False)


class TrialProgress:
    """Draws one bar over the trials of a load; call it once per record."""

    def __init__(self, bar: Progress, title: str) -> None:
        """`bar` is shown by the caller."""
        self._bar = bar
        self._task = bar.add_task(title, total=None)
        self._title = title
        self._failed = 0

    def __call__(self, done: int, total: int, record: Record) -> None:
        """Move the bar."""
        self._failed += record.status is not Status.OK
        failed = f", {self._failed} failed" if self._failed else ""
        self._bar.update(
            self._task, completed=done, total=total, description=f"{self._title}{failed}"
        )


class RemoteProgress:
    """Draws one bar over a hosted service's trials; call it whenever something changed."""

    def __init__(self, bar: Progress, title: str) -> None:
        """`bar` is shown by the caller."""
        self._bar = bar
        self._task = bar.add_task(title, total=None)
        self._title = title

    def __call__(self, now: Standing) -> None:
        """Move the bar; say what is in flight, how fast it goes and what it has cost."""
        finished = now.done + now.failed
        parts = [self._title, f"{now.in_flight} in flight"]
        if finished and now.minutes > 0:
            parts.append(f"{finished / now.minutes:.1f}/min")
        parts.append(f"{now.cost_usd:.2f} USD")
        if now.failed:
            parts.append(f"{now.failed} failed")
        self._bar.update(
            self._task, completed=finished, total=now.total, description=", ".join(parts)
        )


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A progress display on stderr; silent where stderr is not a terminal."""
    target = Console(stderr=True)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=target, disable=not target.is_terminal) as bar:
        yield bar
