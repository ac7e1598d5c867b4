"""The results that the page is made from: one JSON file per table, written cell by cell."""

import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd35bench.disk import write_atomic
from sd35bench.machine.measure import environment

__all__ = ["FOLDER", "keep", "read"]

FOLDER = Path(__file__).parent / "results"
_TOLD = ("commit", "dirty", "cpu_model", "torch", "diffusers")


def read(table: str, folder: Path = FOLDER) -> dict[str, Any]:
    """A table's rows by name; none where it was never made."""
    path = folder / f"{table}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def keep(table: str, row: str, found: dict[str, Any], folder: Path = FOLDER) -> None:
    """Put one row into a table's file, with where and when it was made."""
    where = environment(threads=1)
    made = {
        "at": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        **{name: where.get(name) for name in _TOLD if name in where},
    }
    rows = {**read(table, folder), row: {**found, "made": made}}
    folder.mkdir(exist_ok=True)
    text = json.dumps(dict(sorted(rows.items())), indent=1, allow_nan=False) + "\n"
    write_atomic(folder / f"{table}.json", text.encode())
