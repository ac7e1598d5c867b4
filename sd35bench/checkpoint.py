"""Where a model's weights are on this machine, and the digest that names them.

The digest covers what diffusers loads, and nothing else: `model_index.json` and the files of the
components that it lists. So a model card, curves or an evaluator beside them can change without
making every earlier image look like another model's.

Nothing is downloaded here.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sd35bench.errors import ConfigError

__all__ = ["NANO_WEIGHTS", "find_checkpoint", "weights_digest"]

NANO_WEIGHTS = Path(__file__).parent / "nano" / "weights"
INDEX = "model_index.json"
CACHE_ABOVE_BYTES = 64_000_000


def find_checkpoint(name: str, path: str | None, hub_id: str | None) -> Path:
    """Find a diffusers folder: the given path, the package's nano, or the Hub's local cache.

    Raises: ConfigError with the steps to get the weights.
    """
    if path is not None:
        folder = Path(path).expanduser()
        if not (folder / INDEX).is_file():
            raise ConfigError(
                f"model.path={path}: no {INDEX} there; give a folder in diffusers' format"
            )
        return folder.resolve()
    if hub_id is None:
        if not (NANO_WEIGHTS / INDEX).is_file():
            raise ConfigError(
                f"model={name}: its weights are not in {NANO_WEIGHTS}; reinstall sd35bench, or"
                " give model.path=FOLDER"
            )
        return NANO_WEIGHTS
    cached = _in_hub_cache(hub_id)
    if cached is None:
        raise ConfigError(
            f"model={name}: its weights are not on this machine and nothing is downloaded unasked:"
            f" (1) accept the licence at https://huggingface.co/{hub_id}"
            " (2) hf auth login"
            f" (3) hf download {hub_id} --exclude 'sd3*' '*.md' --local-dir models/{name}"
            f" (4) add model.path=models/{name}"
        )
    return cached


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) over the sorted relative paths and contents of what diffusers loads.

    Large files' hashes are cached by path, size and time of change under ~/.cache/sd35bench.
    """
    files = sorted(_loaded_files(folder), key=lambda path: path.relative_to(folder).as_posix())
    cache = _Cache()
    total = hashlib.sha256()
    for path in files:
        content = cache.file_hash(path)
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    cache.save()
    return total.hexdigest()


def _loaded_files(folder: Path) -> Iterator[Path]:
    """`model_index.json` and the files of the components that it names."""
    index = folder / INDEX
    try:
        components = json.loads(index.read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model.path={folder}: {INDEX} cannot be read: {exc}") from exc
    yield index
    for name, entry in components.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        for path in sorted((folder / name).rglob("*")):
            inside = path.relative_to(folder).parts
            if path.is_file() and not any(part.startswith(".") for part in inside):
                yield path


def _in_hub_cache(hub_id: str) -> Path | None:
    """A complete snapshot in the Hub's local cache, if `hf download` has put one there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, INDEX)
    return Path(found).parent if isinstance(found, str) else None


class _Cache:
    """Hashes of large files by path, size, inode and time of change; small ones are just read."""

    def __init__(self) -> None:
        root = os.environ.get("XDG_CACHE_HOME")
        base = Path(root) if root else Path.home() / ".cache"
        self._path = base / "sd35bench" / "digests.json"
        self._known: dict[str, str] | None = None
        self._changed = False

    def file_hash(self, path: Path) -> str:
        stat = path.stat()
        if stat.st_size < CACHE_ABOVE_BYTES:
            return _hash_file(path)
        if self._known is None:
            self._known = self._read()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_ino}|{stat.st_mtime_ns}|{stat.st_ctime_ns}"
        if key not in self._known:
            self._known[key] = _hash_file(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """Write the cache if it changed; a cache that cannot be written costs only time."""
        if not self._changed:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._path)
        except OSError:
            return

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
