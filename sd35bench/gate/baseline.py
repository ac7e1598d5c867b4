"""Baselines: a study's sides in a small JSON file that can be committed and compared against.

One line per trial: its pair and prompt (hashes), process start, whether it failed, latency, image
digest and scores. Prompts and images are not in it. An image's digest is enough to see that a
candidate's image is the same; how far another one is from it needs the image, which lies in the
folder beside the file where the file was made with images.

A set metric is no number per image, and its paired difference needs the features of both sides:
they lie beside the file (``main.features.npz`` of ``main.json``), by image digest, 50 kB for 256
images of nano and 2 MB of Inception. Its reference is not: the candidate's study has the same.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd35bench import words
from sd35bench.disk import parse_json, read_regular
from sd35bench.errors import ConfigError, StoreError
from sd35bench.fields import ASKED, FIELDS, NUMBERS, completed
from sd35bench.gate.sides import FeatureReader, Features, SetScore, Side, Start, told_apart
from sd35bench.study.columns import floats

SCHEMA = 1
_KIND = "sd35bench baseline"
_COLUMNS = ("pair", "prompt", "start", "failed", "latency_s", "image")
_DIGITS = 9
_ABOUT_SET = ("extractor", "statistic", "min_images", "reference", "parameters")


def images_folder(path: Path) -> Path:
    """Where a baseline file's images are, if it was made with images."""
    return path.with_suffix(".images")


def features_file(path: Path) -> Path:
    """Where a baseline file's features are, if it was made from a study with set metrics."""
    return path.with_suffix(".features.npz")


def baseline_features(sides: Sequence[Side]) -> bytes | None:
    """Pack the features of the sides' set metrics (.npz); ``None`` where none has a reference."""
    arrays: dict[str, Any] = {}
    for name in sorted({s.extractor for side in sides for s in _referenced(side)}):
        found: dict[str, NDArray] = {}
        for side in sides:
            for score in (s for s in _referenced(side) if s.extractor == name):
                kept = score.read_features()
                digests = (side.images[i] for i in np.flatnonzero(score.rows))
                found |= {d: kept[d] for d in digests if d is not None and d in kept}
        arrays[f"digests/{name}"] = np.array(list(found), np.bytes_)
        arrays[f"features/{name}"] = np.array(list(found.values()), np.float32)
    if not arrays:
        return None
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def baseline_text(sides: Sequence[Side]) -> str:
    """Write sides as JSON text, one trial a line, so that a change shows as lines."""
    head = json.dumps({"kind": _KIND, "schema": SCHEMA, "study": sides[0].study})
    parts = ",\n".join(_side_text(side) for side in sides)
    return f'{head[:-1]}, "sides": [\n{parts}\n]}}\n'


def read_baseline(path: Path) -> list[Side]:
    """Read a baseline file. Raises: ConfigError where it is none, or of another schema."""
    try:
        raw = parse_json(read_regular(path, follow=True)[0])
    except (StoreError, ValueError) as exc:
        raise ConfigError(f"baseline {path}: cannot be read: {exc}") from exc
    if not isinstance(raw, Mapping) or raw.get("kind") != _KIND:
        raise ConfigError(f"baseline {path}: not made by sd35bench baseline make")
    if raw.get("schema") != SCHEMA:
        raise ConfigError(
            f"baseline {path}: schema {raw.get('schema')!r}, this version reads {SCHEMA}; make it"
            " again with sd35bench baseline make"
        )
    try:
        reader = cache(partial(_read_features, features_file(path)))
        return told_apart([_side(str(raw["study"]), entry, reader) for entry in raw["sides"]])
    except (KeyError, TypeError, ValueError, IndexError) as exc:
        raise ConfigError(f"baseline {path}: damaged: {exc!r}; make it again") from exc


def _side_text(side: Side) -> str:
    names = sorted(side.metrics)
    about = {
        "setting": side.setting,
        "environment": side.environment,
        "floor_levels": side.floor_levels,
        "random_weights": side.random_weights,
        "starts": [_known(asdict(start)) for start in side.starts],
        "sets": {
            name: {about: getattr(score, about) for about in _ABOUT_SET}
            for name, score in sorted(side.sets.items())
        },
        "elsewhere": [f"{int(pair):016x}" for pair in side.elsewhere],
        "elsewhere_differs": list(side.elsewhere_differs),
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


def _referenced(side: Side) -> list[SetScore]:
    """Set metrics that can be judged: those with images enough for a reference."""
    return [score for score in side.sets.values() if score.reference is not None]


def _set_score(
    raw: Mapping[str, Any], images: Sequence[str | None], reader: FeatureReader
) -> SetScore:
    about = {name: raw[name] for name in _ABOUT_SET}
    return SetScore(
        **about,
        rows=np.array([image is not None for image in images], bool),
        read_features=lambda: reader(about["extractor"]),
    )


def _read_features(path: Path, extractor: str) -> Features:
    """Nothing where the file is not there. Raises: ConfigError for one that cannot be read."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as data:
            if f"digests/{extractor}" not in data.files:
                return {}
            digests, rows = data[f"digests/{extractor}"], data[f"features/{extractor}"]
    except Exception as exc:  # numpy and zipfile raise a dozen kinds for damaged bytes
        raise ConfigError(
            f"{path} cannot be read: {exc}; make the baseline again with sd35bench baseline make"
        ) from exc
    return dict(zip(digests.astype(np.str_).tolist(), rows, strict=True))


def _side(study: str, raw: Mapping[str, Any], reader: FeatureReader) -> Side:
    setting = _required(raw["setting"])
    if not isinstance(raw["environment"], Mapping):
        raise TypeError(f"environment {raw['environment']!r} is no mapping")
    names = raw["columns"]
    if tuple(names[: len(_COLUMNS)]) != _COLUMNS:
        raise ValueError(f"columns {names}")
    columns = {n: [row[i] for row in raw["rows"]] for i, n in enumerate(names)}
    return Side(
        study=study,
        setting=setting,
        environment=dict(raw["environment"]),
        floor_levels=raw["floor_levels"],
        random_weights=bool(raw["random_weights"]),
        starts=tuple(Start(**start) for start in raw["starts"]),
        pairs=_hashes(columns["pair"]),
        prompts=_hashes(columns["prompt"]),
        start=np.array(columns["start"], np.int64),
        failed=np.array(columns["failed"], bool),
        latency_s=floats(columns["latency_s"]),
        images=tuple(columns["image"]),
        # Files of earlier versions do not say which set metrics there were.
        sets={n: _set_score(v, columns["image"], reader) for n, v in raw.get("sets", {}).items()},
        metrics={name: floats(columns[name]) for name in names[len(_COLUMNS) :]},
        elsewhere=_hashes(raw.get("elsewhere", [])),
        elsewhere_differs=tuple(map(str, raw.get("elsewhere_differs", []))),
    )


def _required(found: Any) -> dict[str, Any]:
    """A setting with all that a comparison reads of it. Raises: TypeError, KeyError."""
    if not isinstance(found, Mapping):
        raise TypeError(f"setting {found!r} is no mapping")
    setting = completed(found)
    for name in ("setting", "backend", *ASKED):
        if name not in setting:
            raise KeyError(f"setting.{name}")
    for name in NUMBERS:
        value = setting[name]
        unknown = value is None and FIELDS[name].quiet is None
        if not unknown and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise TypeError(f"setting.{name} {value!r} is no number")
    return setting


def _known(start: dict[str, Any]) -> dict[str, Any]:
    """A start without a speed that is not known: earlier versions read no such field."""
    return start if start["speed"] is not None else {k: v for k, v in start.items() if k != "speed"}


def _rounded(value: float) -> float | None:
    return float(words.digits(value, _DIGITS)) if np.isfinite(value) else None


def _hashes(values: Sequence[str]) -> NDArray[np.uint64]:
    return np.array([int(v, 16) for v in values], np.uint64)
