"""Baselines: a study's sides in a small JSON file that can be committed and compared against.

One line per trial: its pair and prompt (hashes), process start, whether it failed, latency, image
digest and scores. Prompts and images are not in it. An image's digest is enough to see that a
candidate's image is the same; how far another one is from it needs the image, which lies in the
folder beside the file where the file was made with images.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench.analysis.sides import Side, Start
from sd35bench.errors import ConfigError

__all__ = ["SCHEMA", "baseline_text", "images_folder", "read_baseline"]

SCHEMA = 1
_KIND = "sd35bench baseline"
_COLUMNS = ("pair", "prompt", "start", "failed", "latency_s", "image")
_DIGITS = 9


def images_folder(path: Path) -> Path:
    """Where a baseline file's images are, if it was made with images."""
    return path.with_suffix(".images")


def baseline_text(sides: Sequence[Side]) -> str:
    """Write sides as JSON text, one trial a line, so that a change shows as lines."""
    head = json.dumps({"kind": _KIND, "schema": SCHEMA, "study": sides[0].study})
    parts = ",\n".join(_side_text(side) for side in sides)
    return f'{head[:-1]}, "sides": [\n{parts}\n]}}\n'


def read_baseline(path: Path) -> list[Side]:
    """Read a baseline file. Raises: ConfigError where it is none, or of another schema."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"baseline {path}: cannot be read: {exc}") from exc
    if not isinstance(raw, Mapping) or raw.get("kind") != _KIND:
        raise ConfigError(f"baseline {path}: not made by sd35bench baseline make")
    if raw.get("schema") != SCHEMA:
        raise ConfigError(
            f"baseline {path}: schema {raw.get('schema')!r}, this version reads {SCHEMA}; make it"
            " again with sd35bench baseline make"
        )
    try:
        return [_side(str(raw["study"]), entry) for entry in raw["sides"]]
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise ConfigError(f"baseline {path}: damaged: {exc!r}; make it again") from exc


def _side_text(side: Side) -> str:
    names = sorted(side.metrics)
    about = {
        "setting": side.setting,
        "environment": side.environment,
        "floor_levels": side.floor_levels,
        "random_weights": side.random_weights,
        "starts": [asdict(start) for start in side.starts],
        "columns": [*_COLUMNS, *names],
    }
    rows = (
        [
            f"{int(side.pairs[i]):016x}",
            f"{int(side.prompts[i]):016x}",
            int(side.start[i]),
            bool(side.failed[i]),
            _rounded(side.latency_s[i]),
            side.images[i],
            *(_rounded(side.metrics[name][i]) for name in names),
        ]
        for i in range(len(side.pairs))
    )
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return f'{json.dumps(about, allow_nan=False)[:-1]}, "rows": [\n{lines}\n]}}'


def _side(study: str, raw: Mapping[str, Any]) -> Side:
    names = raw["columns"]
    if tuple(names[: len(_COLUMNS)]) != _COLUMNS:
        raise ValueError(f"columns {names}")
    columns = {n: [row[i] for row in raw["rows"]] for i, n in enumerate(names)}
    return Side(
        study=study,
        setting=raw["setting"],
        environment=raw["environment"],
        floor_levels=raw["floor_levels"],
        random_weights=bool(raw["random_weights"]),
        starts=tuple(Start(**start) for start in raw["starts"]),
        pairs=_hashes(columns["pair"]),
        prompts=_hashes(columns["prompt"]),
        start=np.array(columns["start"], np.int64),
        failed=np.array(columns["failed"], bool),
        latency_s=_floats(columns["latency_s"]),
        images=tuple(columns["image"]),
        metrics={name: _floats(columns[name]) for name in names[len(_COLUMNS) :]},
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None


def _hashes(values: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([int(v, 16) for v in values], np.uint64)


def _floats(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if v is None else v for v in values], np.float64)
