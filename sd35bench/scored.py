"""That nothing of a large study was left to score, remembered until something changes.

To find that out takes loading the evaluators (10 s and 900 MB) and a look at every record. What was
found is kept in `view/scored.json` beside what it was found from: the journal, the scores, the
features, the image folders, which images were found whole, this code, and the caches in which
weights may appear. The verb `score` looks anew.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd35bench.disk import parse_json, read_regular, write_atomic
from sd35bench.errors import StoreError
from sd35bench.store import Study
from sd35bench.view import FOLDER

_CACHES = ("~/.cache/huggingface/hub", "~/.cache/clip", "~/.cache/torch/hub/checkpoints")
_SAY_WHERE = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME")
_PACKAGE = Path(__file__).parent


def read_scored(study: Study) -> dict[str, Any] | None:
    """What the last scoring said, where all is as it was then and it left nothing to do."""
    if not (study.path / FOLDER).is_dir():
        return None
    try:
        found = parse_json(read_regular(_file(study))[0])
        return found["said"] if found["state"] == _state(study) else None
    except (StoreError, ValueError, KeyError, TypeError):
        return None


def keep_scored(study: Study, said: dict[str, Any]) -> None:
    """Remember that nothing is left to score; of small studies, and of others, nothing is kept."""
    if said["total"] == 0 and (study.path / FOLDER).is_dir():
        data = json.dumps({"state": _state(study), "said": said}).encode()
        write_atomic(_file(study), data)


def _file(study: Study) -> Path:
    return study.path / FOLDER / "scored.json"


def _state(study: Study) -> str:
    parts: list[Any] = [study.image_changes(), [os.environ.get(name) for name in _SAY_WHERE]]
    for folder in ("journal", "scores", "features", "references"):
        parts += _listed(study.path / folder)
    for folder in (_PACKAGE / "metrics", _PACKAGE / "nano", _PACKAGE / "score.py"):
        parts += _listed(folder)
    for cache in (os.environ.get("HF_HUB_CACHE"), *_CACHES):
        path = Path(cache or "").expanduser()
        parts.append(path.stat().st_mtime_ns if cache and path.is_dir() else None)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _listed(path: Path) -> Iterator[list[Any]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file.suffix != ".pyc":
            found = file.stat()
            yield [str(file.relative_to(path)), found.st_size, found.st_mtime_ns]
