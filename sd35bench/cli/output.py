"""What a verb hands back, and how progress and tables reach the terminal."""

import codecs
import contextlib
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar

from sd35bench import words
from sd35bench.cli.parser import QUIET, VERBOSE, Given
from sd35bench.trials import Progress

if TYPE_CHECKING:
    from sd35bench.report.render import Part


DONE, FAILED, WRONG_INPUT, RESUMABLE, OTHER = range(5)
"""Exit codes. FAILED: what was checked is not as it should be; RESUMABLE: run the same again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A verb's result: the JSON document (printed only with --json) and the exit code."""

    document: Any = None
    exit_code: int = DONE


_loudness: ContextVar[str] = ContextVar("loudness", default="")


@contextmanager
def loudness(given: Given) -> Iterator[None]:
    """Say as much of the work as ``--quiet`` or ``--verbose`` ask for."""
    asked = (flag.name for flag in (QUIET, VERBOSE) if given.has(flag.name))
    token = _loudness.set(next(asked, ""))
    try:
        yield
    finally:
        _loudness.reset(token)


def is_quiet() -> bool:
    """Whether only failures and the answer are to be printed."""
    return _loudness.get() == QUIET.name


def remark(text: str, as_json: bool = False) -> None:
    """Print a line that a person can do without."""
    if not is_quiet():
        console(as_json).say(text)


class Terminal(Console):
    """A console whose reader may leave: a closed pipe is neither an error nor a verdict."""

    def on_broken_pipe(self) -> None:
        """Print no more, and let the verb finish its files and its exit code; rich would exit 1."""
        self.quiet = True
        leave_stdout()

    def say(self, *lines: str) -> None:
        """Print lines as they are: without markup, and never broken."""
        for line in lines:
            self.print(line, markup=False, soft_wrap=True)


def console(as_json: bool = False) -> Terminal:
    """A console on stdout, or on stderr when stdout belongs to a JSON document."""
    return Terminal(stderr=as_json, highlight=False)


def write_line(text: str) -> None:
    """Print to stdout, whether or not anybody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        leave_stdout()


def print_parts(parts: "Iterable[Part]", as_markdown: bool = False) -> None:
    """Print a document in one of its two forms."""
    from sd35bench.report.render import markdown_document, print_document

    if as_markdown:
        write_line(markdown_document(parts).rstrip("\n"))
    else:
        print_document(parts, console())


def append_summary(path: Path, parts: "Iterable[Part]") -> None:
    """Add a document to a file as Markdown: a step summary is one file that every step adds to.

    Raises: DiskFull, StoreError.
    """
    from sd35bench.disk import append_whole
    from sd35bench.report.render import markdown_document

    append_whole(path, markdown_document(parts).encode("utf-8", "replace"))


def leave_stdout() -> None:
    """Drop what is still to be flushed, once stdout has no reader."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


_PLAIN = str.maketrans(
    {
        "·": "|", "×": "x", "–": "-", "−": "-", "→": "->", "≥": ">=", "≤": "<=", "≠": "!=",
        "±": "+-", "…": "...", "▲": "^", "▼": "v", "─": "-", "│": "|", "•": "*", "µ": "u",
        "²": "^2", "Δ": "d", "Σ": "S", "∞": "inf", "↑": "^", "↓": "v", "°": " deg",
    }
)  # fmt: skip


def write_plainly(stream: Any) -> None:
    """Let a stream whose encoding lacks a character write the nearest one, not a traceback."""
    codecs.register_error("sd35bench.plain", _nearest)
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="sd35bench.plain")


def _nearest(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    text = unicodedata.normalize("NFKD", text)
    return "".join(
        c if ord(c) < 128 else "?" for c in text if not unicodedata.combining(c)
    ), error.end


class RunProgress:
    """Draws one bar over the trials of a load; call it whenever something changed."""

    def __init__(self, bar: ProgressBar, title: str) -> None:
        """`bar` is shown by the caller."""
        self._bar = bar
        self._task = bar.add_task(title, total=None)
        self._title = title
        self._began = time.monotonic()
        self._told = 0

    def __call__(self, now: Progress) -> None:
        """Move the bar; of what is billed, say how fast it goes and what it has cost.

        Of several workers, say how fast they go, and what each does.
        """
        finished = now.done + now.failed
        is_known = finished and now.minutes > 0
        rate = [f"{words.number(finished / now.minutes, 1)}/min"] if is_known else []
        parts = [self._title]
        if now.cost_usd is not None:
            parts += [f"{now.in_flight} in flight", *rate, words.bill(now.cost_usd)]
        if now.doing:
            parts += rate
        if now.failed:
            parts.append(f"{now.failed} failed")
        lines = [f"  worker {number}: {what}" for number, what in enumerate(now.doing)]
        said = "\n".join([", ".join(parts), *lines])
        self._bar.update(self._task, completed=finished, total=now.total, description=said)
        if finished != self._told:
            self._told = finished
            tell(self._bar, self._task, self._began)


def tell(bar: ProgressBar, task_id: TaskID, began: float) -> None:
    """With ``--verbose``, print where a task stands that began then (`time.monotonic`)."""
    if _loudness.get() == VERBOSE.name:
        task = next(task for task in bar.tasks if task.id == task_id)
        line = progress_line(task, (time.monotonic() - began) / 60)
        bar.console.print(line, markup=False, soft_wrap=True)


LINE_S = 30.0
"""How often a log file gets a line of progress."""


@contextmanager
def show_progress() -> Iterator[ProgressBar]:
    """A progress display on stderr; where that is no terminal, a line every `LINE_S`."""
    target = Console(stderr=True, quiet=is_quiet())
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = ProgressBar(*columns, console=target, disable=is_quiet() or not target.is_terminal)
    has_lines = not target.is_terminal and _loudness.get() == ""
    with bar, _lines(bar, target) if has_lines else contextlib.nullcontext():
        yield bar


@contextmanager
def _lines(bar: ProgressBar, target: Console) -> Iterator[None]:
    """Print where every task stands, again and again, from a thread of its own."""
    ended, began = threading.Event(), time.monotonic()

    def work() -> None:
        while not ended.wait(LINE_S):
            minutes = (time.monotonic() - began) / 60
            for task in bar.tasks:
                if not task.finished:
                    target.print(progress_line(task, minutes), markup=False, soft_wrap=True)

    thread = threading.Thread(target=work, name="progress-lines", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def progress_line(task: Task, minutes: float) -> str:
    """Where a task stands `minutes` after its start: done of total, rate, and what is left."""
    what = task.description.replace("\n", ";")
    if task.total is None:
        return f"{what}: starting (loading, warming up), {words.number(minutes, 1)} min"
    done = f"{what}: {words.number(task.completed, 0)} of {words.number(task.total, 0)}"
    if not task.completed or minutes <= 0:
        return f"{done}, {words.number(minutes, 1)} min"
    rate = task.completed / minutes
    left = words.number((task.total - task.completed) / rate, 1)
    return f"{done}, {words.number(rate, 1)}/min, about {left} min left"
