"""What a large study's files say, remembered until one of them changes.

    view/scored.json   that nothing was left to score: finding that out takes loading the evaluators
                       (10 s and 900 MB) and a look at every record
    view/shown.json    the document of `show`

Each is kept beside a digest of what it was found from: the files of the study by size, inode and
times, which images were found whole, and the code; of scoring also the caches in which weights may
appear, of `show` the numeric libraries. The verb `score` looks anew.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd35bench.disk import file_stamp, parse_json, read_regular, write_atomic
from sd35bench.errors import StoreError
from sd35bench.study.store import Study
from sd35bench.study.view import FOLDER

_CACHES = ("~/.cache/huggingface/hub", "~/.cache/clip", "~/.cache/torch/hub/checkpoints")
_SAY_WHERE = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME")
_PACKAGE = Path(__file__).parents[1]
_SCORED, _SHOWN = "scored.json", "shown.json"


def read_scored(study: Study) -> dict[str, Any] | None:
    """What the last scoring said, where all is as it was then and it left nothing to do."""
    return _read(study, _SCORED, _scoring(study)) if _keeps(study) else None


def keep_scored(study: Study, said: dict[str, Any]) -> None:
    """Remember that a large study has nothing left to score."""
    if said["total"] == 0 and _keeps(study):
        _keep(study, _SCORED, _scoring(study), said)


def kept_show(
    study: Study, make: Callable[[], dict[str, Any]], looked: bool = False
) -> dict[str, Any]:
    """A study's whole `show` document: as it is kept, or else made, and kept of a large study.

    `looked`: the images were looked at by this command already.
    """
    if study.is_part or not _keeps(study):
        return make()
    if not looked:
        study.images()  # a file that was changed in place is found by looking, and noted
    state = _showing(study)
    found = _read(study, _SHOWN, state)
    if found is None:
        found = make()
        _keep(study, _SHOWN, state, found)
    return found


def _keeps(study: Study) -> bool:
    return (study.path / FOLDER).is_dir()


def _read(study: Study, name: str, state: str) -> dict[str, Any] | None:
    try:
        found = parse_json(read_regular(study.path / FOLDER / name)[0])
        return found["said"] if found["state"] == state else None
    except (StoreError, ValueError, KeyError, TypeError):
        return None


def _keep(study: Study, name: str, state: str, said: dict[str, Any]) -> None:
    data = json.dumps({"state": state, "said": said}).encode()
    with contextlib.suppress(StoreError):  # a study that cannot be written is looked at again
        write_atomic(study.path / FOLDER / name, data)


def _scoring(study: Study) -> str:
    """What scoring follows from."""
    parts: list[Any] = [[os.environ.get(name) for name in _SAY_WHERE]]
    for cache in (os.environ.get("HF_HUB_CACHE"), *_CACHES):
        path = Path(cache or "").expanduser()
        parts.append(path.stat().st_mtime_ns if cache and path.is_dir() else None)
    code = (_PACKAGE / "metrics", _PACKAGE / "nano", _PACKAGE / "score.py")
    return _digest(study, code, parts)


def _showing(study: Study) -> str:
    """What `show` follows from."""
    libraries = [importlib.metadata.version(name) for name in ("numpy", "scipy")]
    return _digest(study, (_PACKAGE, study.path / "machine"), [study.name, libraries])


def _digest(study: Study, more: tuple[Path, ...], parts: list[Any]) -> str:
    parts.append(study.image_changes())
    folders = (study.path / name for name in ("journal", "scores", "features", "references"))
    for path in (*folders, *more):
        parts += _listed(path)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _listed(path: Path) -> Iterator[list[Any]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file.suffix != ".pyc":
            yield [str(file.relative_to(path)), *file_stamp(file.stat())]
