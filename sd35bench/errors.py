"""The exceptions that sd35bench raises on purpose; anything else is a bug and propagates.

    SD35BenchError
    ├── ConfigError              the user's input is wrong: names field, value and remedy
    ├── BackendError             turning a request into an image failed
    │   ├── UnsupportedRequest       this backend cannot do that, known before running
    │   ├── OutOfMemory              device or process memory ran out
    │   ├── InvalidImage             NaN latents, a black or constant image, a wrong size
    │   ├── OptimizationNotApplied   what was asked for is not what is in force
    │   └── RemoteError              a hosted service failed, refused, or answered nonsense
    │       ├── LostAnswer               … a create was sent and its answer lost: it may be billed
    │       └── UnsafeAddress            … a URL that must not be fetched
    ├── WorkerDied               the process that held the backend ended without an answer
    │   ├── WorkerLost               … with its machine: what it was asked may be asked again
    │   ├── WorkerHung               … it was ended: its deadline had passed
    │   └── WorkerTooLarge           … it was ended: its memory had passed the limit
    ├── JobsLost                 a launcher's job ended without an answer: what is missing is told
    ├── Paused                   a budget or a balance is used up; all that was made is kept
    ├── MetricError              a metric cannot be computed, and what it would need
    └── StoreError               a study on disk cannot be read or written
        ├── StudyLocked              another process is writing this study
        ├── StudyGone                paused: its folder was moved or deleted while it was written
        └── DiskFull                 paused: free some space and run the same command again

Messages say what was wrong, where, and what to do. Foreign errors become these at the edge,
with ``raise … from exc``.
"""

import functools
import re
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "ConfigError",
    "DiskFull",
    "InvalidImage",
    "JobsLost",
    "LostAnswer",
    "MetricError",
    "OptimizationNotApplied",
    "OutOfMemory",
    "Paused",
    "RemoteError",
    "SD35BenchError",
    "StoreError",
    "StudyGone",
    "StudyLocked",
    "UnsafeAddress",
    "UnsupportedRequest",
    "WorkerDied",
    "WorkerHung",
    "WorkerLost",
    "WorkerTooLarge",
    "count_error",
    "error_kind",
]


class SD35BenchError(Exception):
    """Base of everything that sd35bench raises on purpose."""


class ConfigError(SD35BenchError):
    """The user's input is wrong; the message names the field, the value and the remedy."""


class BackendError(SD35BenchError):
    """A backend could not turn a request into an image."""


class UnsupportedRequest(BackendError):
    """The backend cannot do what the request asks, and knew it before running."""


class OutOfMemory(BackendError):
    """Device or process memory ran out."""


class InvalidImage(BackendError):
    """The backend returned NaN latents, a black or constant image, or a wrong size."""


class OptimizationNotApplied(BackendError):
    """The optimisation that was asked for is not the one in force."""


class RemoteError(BackendError):
    """A hosted service could not be reached, refused, or answered what cannot be right."""


class LostAnswer(RemoteError):
    """A create was sent and its answer lost: the prediction may exist, and may be billed."""


class UnsafeAddress(RemoteError):
    """A URL leads where nothing may be fetched from: another scheme, a private address."""


class JobsLost(SD35BenchError):
    """A job that a Hydra launcher took elsewhere ended without an answer."""


class Paused(SD35BenchError):
    """A budget or a balance is used up; what was made is kept and the same command goes on."""


class WorkerDied(SD35BenchError):
    """The worker process that held a backend ended without an answer."""


class WorkerLost(WorkerDied):
    """The worker ended with its actor or its node; that says nothing of what it was asked."""


class WorkerHung(WorkerDied):
    """The worker gave no answer before its deadline and was ended."""


class WorkerTooLarge(WorkerDied):
    """The worker held more memory than the limit and was ended."""


class MetricError(SD35BenchError):
    """A metric cannot be computed; the message says what it would need."""


class StoreError(SD35BenchError):
    """A study on disk cannot be read or written."""


class StudyLocked(StoreError):
    """Another process is writing this study."""


class StudyGone(StoreError):
    """A study's folder was moved or deleted while it was written."""


class DiskFull(StoreError):
    """The disk is full; what was computed is kept and the same command resumes."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    from difflib import get_close_matches  # 10 ms, and only a refusal needs it

    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


_ID = re.compile(
    r"0x[0-9a-f]+|[0-9a-f]{8}(?:-[0-9a-f]{4,12}){4}|(?<=prediction )(?=\S*\d)[\w.:~-]*\w"
    r"|(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[a-z])[\w-]{16,}",
    re.IGNORECASE,
)
"""What tells two failures of one kind apart: addresses, names of predictions and of files."""


@functools.lru_cache(4096)
def error_kind(text: str) -> str:
    """A failure's message without the ids in it: those of equal failures are equal."""
    return _ID.sub("…", text)


def count_error(counts: dict[str, int], text: str, count: int = 1) -> None:
    """Count a failure with those of its kind, under its own words until a second one differs."""
    kind = error_kind(text)
    known = next((t for t in counts if error_kind(t) == kind), text)
    total = counts.get(known, 0) + count
    if known != text:
        del counts[known]
    counts[text if known == text else kind] = total
