"""Where a model's weights are on this machine, and the digest that names them.

Weights are a folder in diffusers' format, or one safetensors file in the original layout together
with a folder (the components) that has what such a file lacks. The digest covers what is loaded,
and nothing else: of a folder `model_index.json` and the files of the components that it lists, of
a file the whole and what is taken from its components. So a model card, curves or an evaluator
beside them can change without making every earlier image look like another model's.

Nothing is downloaded here.
"""

import contextlib
import hashlib
import json
import re
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sd35bench.disk import (
    cache_folder,
    file_digest,
    file_stamp,
    parse_json,
    read_regular,
    write_atomic,
)
from sd35bench.errors import ConfigError, StoreError

NANO_WEIGHTS = Path(__file__).parents[1] / "nano" / "weights"
INDEX = "model_index.json"
REMEDY = "give a complete diffusers folder, or a .safetensors file"
CACHE_ABOVE_BYTES = 64_000_000
SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again within one tick of its clock."""
LAYOUT = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
"""Prefixes of the parts' keys in a single file. Source: Stability-AI/sd3.5, sd3_infer.py."""
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "")
"""What files put before a denoiser's keys; trainers and ComfyUI's own savers leave it out."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
VARIANTS = ("bf16", "fp16", "fp32")
"""Spellings in weight files' names, as in model.bf16.safetensors, the likeliest first."""
EXCLUDED = ("sd3*", "text_encoders/*", "*fp16*", "*.md")
"""What a download can leave out: the same weights once more, in other layouts and dtypes."""
HEADER_LIMIT_BYTES = 100_000_000
_DIGEST = re.compile("[0-9a-f]{64}")


def find_checkpoint(
    name: str,
    path: str | None,
    hub_id: str | None,
    gated: bool = True,
    without: Collection[str] = (),
) -> Path:
    """Find a folder or a file: the given path, the package's nano, or the Hub's local cache.

    `without` names parts of a folder that nobody will load.

    Raises: ConfigError with the steps to get the weights, or naming what is missing there.
    """
    if path is not None:
        given = Path(path).expanduser().absolute()
        if given.is_file():
            _refuse_other_layouts(given)
            return given
        if not (given / INDEX).is_file():
            raise ConfigError(
                f"model.path={path}: no {INDEX} there; give a folder in diffusers' format, or one"
                " .safetensors file"
            )
        _refuse_incomplete(given, without)
        return given.resolve()
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
            f" {_steps(name, hub_id, gated)}"
        )
    _refuse_incomplete(cached, without)
    return cached


def find_components(path: Path, components: str | None, hub_id: str | None) -> Path:
    """Find the folder with what the file at `path` lacks: the given one, or the Hub's cache.

    Raises: ConfigError naming every part that is missing.
    """
    if components is not None:
        folder = Path(components).expanduser().absolute()
    else:
        cached = None if hub_id is None else _in_hub_cache(hub_id)
        if cached is None:
            raise ConfigError(
                f"model.path={path} is a single file: give model.components=FOLDER, a diffusers"
                " folder with the tokenizers, the scheduler and the text encoders that the file"
                " lacks"
            )
        folder = cached
    if not (folder / INDEX).is_file():
        raise ConfigError(f"model.components={folder}: no {INDEX} there")
    missing = [
        f"{part}/{'config.json' if config_only else ''}"
        for part, config_only in parts_of_components(path, folder).items()
        if not _has_part(folder / part, config_only)
    ]
    if missing:
        raise ConfigError(
            f"model.components={folder}: lacks {', '.join(missing)}, which {path.name} does not"
            " bring; give a folder that has them"
        )
    return folder


def parts_in_file(path: Path) -> dict[str, str]:
    """Parts of the pipeline whose weights a single safetensors file brings: part -> key prefix.

    Raises: ConfigError where the file is no readable safetensors.
    """
    keys = read_header(path)
    found = {
        part: prefix
        for part, prefix in LAYOUT.items()
        if any(key.startswith(prefix) for key in keys)
    }
    bare = denoiser_prefix(keys, "joint_blocks.")
    return found if "transformer" in found or bare is None else {**found, "transformer": bare}


def denoiser_prefix(keys: Collection[str], first: str) -> str | None:
    """What stands before `first`, the beginning of a denoiser's own keys, if any has it."""
    starts = (p for p in DENOISER_PREFIXES if any(key.startswith(p + first) for key in keys))
    return next(starts, None)


def parts_of_components(path: Path, folder: Path) -> dict[str, bool]:
    """Parts that a single file needs from its components; ``True``: only the configuration.

    The transformer is never among them: its configuration shows in the shapes of its weights.

    Raises: ConfigError where the components' index leaves out a text encoder that the file has.
    """
    brought = parts_in_file(path)
    index = _read_index(folder)
    parts: dict[str, bool] = {}
    for part, entry in index.items():
        if part.startswith("_") or part in ("transformer", "image_encoder", "feature_extractor"):
            continue
        if isinstance(entry, list) and entry[0] is not None:
            parts[part] = part in brought
        elif part in brought:
            raise ConfigError(
                f"model.components={folder}: its {INDEX} leaves {part} out, but {path.name} has"
                " it; give components of the same kind"
            )
    for part in ("scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        parts.setdefault(part, part in brought)
    return parts


def revision_of(path: Path) -> str | None:
    """The Hub's commit that a folder or file came from, where the Hub's tools left a trace.

    Source: huggingface_hub, the cache's `snapshots/COMMIT/` and the first line of
    `.cache/huggingface/download/FILE.metadata` in a folder made by `--local-dir`.
    """
    folder, name = (path.parent, path.name) if path.is_file() else (path, INDEX)
    trace = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    try:
        return trace.read_text().split("\n")[0].strip()
    except OSError:
        return folder.name if folder.parent.name == "snapshots" else None


def variant_of(part: Path, asked: str | None = None) -> str | None:
    """The variant to load of a part's folder: the one asked for where it is there.

    Unasked, the one whose weights come in no plain file, as in Sana's bf16 repository.
    """
    names = [p.name for p in part.glob("*.safetensors")] if part.is_dir() else []
    spelt = {v for v in VARIANTS for name in names if f".{v}." in name or f".{v}-" in name}
    if asked in spelt:
        return asked
    plain = [n for n in names if not any(f".{v}." in n or f".{v}-" in n for v in spelt)]
    return next((v for v in VARIANTS if v in spelt), None) if spelt and not plain else None


def settled_variant(folder: Path, asked: str | None) -> str | None:
    """The variant that has to be asked for; ``None`` where it is what is loaded anyway.

    Raises: ConfigError where no part has it.
    """
    if asked is None:
        return None
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir()]
    having = [part for part in parts if variant_of(part, asked) == asked]
    if not having:
        raise ConfigError(
            f"model.variant={asked}: no part of {folder} has files such as"
            f" model.{asked}.safetensors; leave it out, or take another folder"
        )
    return None if all(variant_of(part) == asked for part in having) else asked


ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
"""PEFT's names for a LoRA's file, and for the settings beside it that its scale stands in."""


def whole_digest(
    path: Path,
    components: Path | None,
    changes: Sequence[tuple[str, str, float]],
    variant: str | None,
) -> str:
    """Digest of weights with what is put on top; without anything `weights_digest`'s.

    `changes`: kind, path and weight of each; see `types.Change`.
    """
    own = weights_digest(path, components, {k for k, place, _ in changes if Path(place).is_dir()})
    if not changes and variant is None:
        return own
    each = [[kind, path_digest(Path(place)), weight] for kind, place, weight in changes]
    return hashlib.sha256(json.dumps([own, each, variant]).encode()).hexdigest()


def path_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's content, or over a folder's files with their relative paths.

    A LoRA's file by PEFT counts with the settings beside it.
    """
    cache = _Cache()
    beside = path.with_name(ADAPTER[1])
    if path.name == ADAPTER[0] and beside.is_file():
        both = f"{cache.file_hash(path)} {cache.file_hash(beside)}"
        digest = hashlib.sha256(both.encode()).hexdigest()
    elif path.is_file():
        digest = cache.file_hash(path)
    else:
        total = hashlib.sha256()
        for file in _part_files(path.parent, path.name):
            total.update(f"{file.relative_to(path).as_posix()}\0{cache.file_hash(file)}\n".encode())
        digest = total.hexdigest()
    cache.save()
    return digest


def weights_digest(
    path: Path, components: Path | None = None, without: Collection[str] = ()
) -> str:
    """SHA-256 (hex) over the sorted relative paths and contents of what is loaded.

    `without` names parts of a folder that nobody loads.
    Large files' hashes are cached by path, size and time of change under ~/.cache/sd35bench.
    """
    if components is None:
        named = [(file.relative_to(path).as_posix(), file) for file in _loaded_files(path, without)]
    else:
        named = [
            (file.relative_to(components).as_posix(), file)
            for file in _component_files(path, components)
            if file.parent.name not in without
        ]
        named.append(("", path))  # whatever the file is called
    cache = _Cache()
    total = hashlib.sha256()
    for name, file in sorted(named):
        total.update(f"{name}\0{cache.file_hash(file)}\n".encode())
    cache.save()
    return total.hexdigest()


def _steps(name: str, hub_id: str, gated: bool) -> str:
    excluded = " ".join(f"--exclude '{pattern}'" for pattern in EXCLUDED)
    steps = [
        f"hf download {hub_id} {excluded} --local-dir models/{name}",
        f"add model.path=models/{name}",
    ]
    if gated:
        steps = [f"accept the licence at https://huggingface.co/{hub_id}", "hf auth login", *steps]
    return " ".join(f"({number}) {step}" for number, step in enumerate(steps, start=1))


def _refuse_incomplete(folder: Path, without: Collection[str]) -> None:
    """Refuse a folder whose download ended early: a part, or a shard of its weights, is missing."""
    for name, entry in _read_index(folder).items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if name not in without and not _has_part(folder / name, config_only=False):
            raise ConfigError(
                f"model.path={folder}: {name}/ is missing or incomplete; complete the download, or"
                " give another folder"
            )


def _has_part(part: Path, config_only: bool) -> bool:
    if config_only:
        return (part / "config.json").is_file()
    files = [path for path in part.glob("*") if path.is_file()] if part.is_dir() else []
    shards = {shard for file in files for shard in _shards(file)}
    return bool(files) and all((part / shard).is_file() for shard in shards)


def _shards(file: Path) -> Iterable[str]:
    """Names of the weight files that a sharded part's index lists."""
    if ".safetensors.index." not in file.name:
        return ()
    try:
        return set(json.loads(file.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise ConfigError(f"model.path={file}: cannot be read: {exc}") from exc


def _refuse_other_layouts(path: Path) -> None:
    """Refuse a single file that is not SD3's original layout."""
    if path.suffix == ".gguf":
        raise ConfigError(
            f"model.path={path}: a GGUF file holds a denoiser alone; give it as"
            f" model.transformer={path}, and the rest of the model as model.path=FOLDER"
        )
    if path.suffix in PICKLED:
        raise ConfigError(
            f"model.path={path}: a pickled checkpoint may run code and is not read; convert it to"
            " .safetensors"
        )
    if "transformer" not in parts_in_file(path):
        raise ConfigError(
            f"model.path={path}: no key begins with {LAYOUT['transformer']!r} or joint_blocks.;"
            " give a file in Stability's original layout (sd3.5_medium.safetensors), or a diffusers"
            " folder; a denoiser in diffusers' layout goes to model.transformer="
        )


def read_header(path: Path, field: str = "model.path") -> dict[str, str]:
    """A safetensors file's tensors: name -> dtype. 8 bytes of length, then that much JSON.

    Raises: ConfigError, which names the `field`.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > HEADER_LIMIT_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return {name: str(t["dtype"]) for name, t in header.items() if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as exc:
        raise ConfigError(
            f"{field}={path}: no readable safetensors file ({exc}); give a .safetensors file or"
            " a diffusers folder"
        ) from exc


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as exc:
        raise ConfigError(f"model.path={folder}: {INDEX} cannot be read: {exc}; {REMEDY}") from exc
    if not isinstance(index, dict):
        raise ConfigError(f"model.path={folder}: {INDEX} cannot be read: no object in it; {REMEDY}")
    return index


def _loaded_files(folder: Path, without: Collection[str]) -> Iterator[Path]:
    """`model_index.json` and the files of the components that it names."""
    index = _read_index(folder)
    yield folder / INDEX
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[0] is None:
            continue
        if name not in without:
            yield from _part_files(folder, name)


def _component_files(path: Path, folder: Path) -> Iterator[Path]:
    """What a single file takes from its components."""
    yield folder / INDEX
    for part, config_only in parts_of_components(path, folder).items():
        if config_only:
            yield folder / part / "config.json"
        else:
            yield from _part_files(folder, part)


def _part_files(folder: Path, part: str) -> Iterator[Path]:
    for path in sorted((folder / part).rglob("*")):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(name.startswith(".") for name in inside):
            yield path


def _in_hub_cache(hub_id: str) -> Path | None:
    """A snapshot in the Hub's local cache, if `hf download` has put one there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, INDEX)
    return Path(found).parent if isinstance(found, str) else None


_hashed: dict[str, str] = {}
"""Small files of this process: nano's 22 MB take 0.1 s, and every configuration asks for them."""


class _Cache:
    """Hashes by path, size, inode and time of change: of small files in memory, else on disk."""

    def __init__(self) -> None:
        self._path = cache_folder() / "digests.json"
        self._known: dict[str, str] | None = None
        self._changed = False

    def file_hash(self, path: Path) -> str:
        stat = path.stat()
        key = "|".join(map(str, (path.resolve(), *file_stamp(stat))))
        if stat.st_size < CACHE_ABOVE_BYTES:
            found = _hashed.get(key) or file_digest(path)
            if time.time_ns() - stat.st_ctime_ns > SETTLED_NS:
                _hashed[key] = found
            return found
        if self._known is None:
            self._known = self._read()
        if key not in self._known:
            self._known[key] = file_digest(path)
            self._changed = True
        return self._known[key]

    def save(self) -> None:
        """Write the cache if it changed; a cache that cannot be written costs only time."""
        if self._changed:
            with contextlib.suppress(StoreError):
                write_atomic(self._path, json.dumps(self._known).encode())

    def _read(self) -> dict[str, str]:
        try:
            known = parse_json(read_regular(self._path, follow=True)[0])
            hashes = known.items()
        except (StoreError, ValueError, AttributeError):
            return {}
        return {k: v for k, v in hashes if isinstance(v, str) and _DIGEST.fullmatch(v)}
