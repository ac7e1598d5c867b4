"""Exported models kept under the user's cache, named by what went into them.

A folder's name is the digest of its recipe: weights, this package's code, library versions, dtype,
quantisation. So a change of any of them makes another artifact and nothing stale is ever loaded.
A folder appears whole or not at all (written aside, then renamed), and its manifest lists every
file's size and SHA-256, so that what was cut short or changed afterwards is noticed and made again.

Nothing is ever deleted unasked, except what is broken.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sd35bench.disk import cache_folder, file_digest, file_stamp, write_atomic
from sd35bench.errors import BackendError, StoreError
from sd35bench.types import content_hash

MANIFEST = "manifest.json"
VERIFIED = "verified.json"
LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript")
RUNTIMES = {
    "onnx": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino", "nncf"),
    "core": (),
}
DIGEST_LENGTH = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that an artifact depends on.

    `runtime`: "onnx", "openvino" or "core". `dtype`: that of the weights before quantisation.
    `quantisation`: "none" or "int8". `excluded`: patterns of layers that stay unquantised.
    `layers`: the model's number of blocks where it is not its own. `made_for`: a digest of the
    CPU that it is for, and of code that shapes it beside this package's.
    """

    runtime: str
    model: str
    weights_digest: str
    dtype: str
    layers: int | None = None
    quantisation: str = "none"
    excluded: str = ""
    made_for: str = ""

    @property
    def digest(self) -> str:
        """Content hash of the recipe, the exporting code and the libraries' versions."""
        facts = {**asdict(self), "code": _code_digest(), "versions": library_versions(self.runtime)}
        return content_hash(facts)[:DIGEST_LENGTH]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder with an exported model, and its manifest.

    `cached`: whether it was there already. `seconds`: what making it took, ``None`` if cached.
    """

    folder: Path
    manifest: Mapping[str, Any]
    cached: bool
    seconds: float | None = None

    @property
    def bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the maker said about the model (opset, parity, quantised layers)."""
        return self.manifest["facts"]


def artifact_root() -> Path:
    """The folder of all artifacts: ``$XDG_CACHE_HOME/sd35bench/export``, else ``~/.cache/...``."""
    return cache_folder("export")


def find_artifact(recipe: Recipe) -> Artifact | None:
    """Return the recipe's artifact if it is there and whole."""
    folder = artifact_root() / recipe.runtime / recipe.digest
    manifest = _read_json(folder / MANIFEST)
    if manifest is None or manifest.get("digest") != recipe.digest:
        return None
    if not _is_whole(folder, manifest):
        return None
    return Artifact(folder=folder, manifest=manifest, cached=True)


def make_artifact(recipe: Recipe, build: Callable[[Path], dict[str, Any]]) -> Artifact:
    """Return the recipe's artifact, made by `build` where there is none.

    `build` writes its files into the folder that it is given and returns the manifest's facts. A
    second process that wants the same artifact waits for the first.

    Raises: BackendError where the cache cannot be written; whatever `build` raises.
    """
    import time

    target = artifact_root() / recipe.runtime / recipe.digest
    with _cache_errors(target), locked(target):
        found = find_artifact(recipe)
        if found is not None:
            return found
        started = time.perf_counter()
        shutil.rmtree(target, ignore_errors=True)  # broken, or it would have been found
        for stale in target.parent.glob(f"{target.name}.*.tmp"):  # the lock is ours: nobody's
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{target.name}.", suffix=".tmp", dir=target.parent, ignore_cleanup_errors=True
        ) as temporary:
            folder = Path(temporary) / "artifact"
            folder.mkdir()
            facts = build(folder)
            manifest = {
                "digest": recipe.digest,
                "recipe": asdict(recipe),
                "versions": library_versions(recipe.runtime),
                "files": _describe(folder),
                "facts": facts,
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
            os.rename(folder, target)
        _remember_verified(target, manifest)
        seconds = time.perf_counter() - started
        return Artifact(folder=target, manifest=manifest, cached=False, seconds=seconds)


def library_versions(runtime: str) -> dict[str, str]:
    """Versions of what shapes an artifact of `runtime`; a library that is absent is left out."""
    found = {}
    for name in (*LIBRARIES, *RUNTIMES[runtime]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def _code_digest() -> str:
    """SHA-256 over this package's own modules."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
    }


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file is as the manifest says.

    Hashing 9 GB takes some 10 s, so a file that has not been touched since it was last hashed
    (same size, inode and times) is not hashed again.
    """
    known = _read_json(folder / VERIFIED)
    hashed = False
    for name, entry in manifest["files"].items():
        try:
            stamp = _stamp(folder / name)
        except OSError:
            return False
        if stamp[0] != entry["bytes"]:
            return False
        if known is None or known.get(name) != stamp:
            if file_digest(folder / name) != entry["sha256"]:
                return False
            hashed = True
    if hashed:
        _remember_verified(folder, manifest)
    return True


def _remember_verified(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Note the files' stamps; where that cannot be written, they are only hashed again."""
    with contextlib.suppress(OSError, StoreError):
        stamps = {name: _stamp(folder / name) for name in manifest["files"]}
        write_atomic(folder / VERIFIED, json.dumps(stamps).encode())


def _stamp(path: Path) -> list[int]:
    return [*file_stamp(path.stat())]  # as JSON has it


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of an artifact's folder; it ends with the process that holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f"{target.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cache_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        full = exc.errno == errno.ENOSPC
        remedy = "free some space there" if full else "make it writable"
        raise BackendError(
            f"the exported model cannot be written to {target.parent}: {exc}; {remedy}, or set"
            " XDG_CACHE_HOME to another folder"
        ) from exc
