"""Structured logs: one JSON object a line on stderr, for requests, predictions and the server.

What must not leak is not logged: no header, no query, no body, no prompt; and the names of files,
which are permissions, are cut off their paths.
"""

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

__all__ = ["JsonFormatter", "configure_logs", "log", "shown_path"]

_LOGGER = logging.getLogger("sd35bench.server")
_SECRET_PATHS = ("/uploads/", "/outputs/")


class JsonFormatter(logging.Formatter):
    """Format a record, ours or another library's, as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; `fields` of the record are merged in."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            entry["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(entry, default=str)


def configure_logs() -> None:
    """Send our lines and uvicorn's to stderr, as JSON; uvicorn's only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("sd35bench.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log(event: str, *, level: int = logging.INFO, failed: bool = False, **fields: Any) -> None:
    """Write one line; with `failed` the exception being handled goes along."""
    _LOGGER.log(level, event, extra={"fields": fields}, exc_info=failed)


def shown_path(path: str) -> str:
    """A request's path without the names that would let a reader of logs fetch a file."""
    for head in _SECRET_PATHS:
        if path.startswith(head):
            return f"{head}…"
    return path[:200]
