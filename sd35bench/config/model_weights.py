"""From a model's configuration to its specification: a checkpoint found, or shapes for noise.

On top of a model a user puts LoRA files, another denoiser, another autoencoder: read off the
configuration, looked for on disk, and named by digest. torch is not needed, so that a wrong file is
refused in well under a second. `loading.lora` and `loading.parts` load them.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sd35bench.architectures import random_digest, random_parts, random_suffix
from sd35bench.config.models import ModelConf
from sd35bench.errors import ConfigError
from sd35bench.loading.checkpoint import (
    ADAPTER,
    PICKLED,
    find_checkpoint,
    find_components,
    path_digest,
    read_header,
    revision_of,
    settled_variant,
    whole_digest,
)
from sd35bench.types import NO_WEIGHTS, Change, ModelSpec

ON_TOP = ("lora", "transformer", "vae", "variant")
"""What changes a checkpoint's weights."""
LORA_FILES = ("pytorch_lora_weights.safetensors", ADAPTER[0])
"""What diffusers and PEFT call the file in a folder of theirs."""
WEIGHT_LIMIT = 100.0
REPLACED = ("transformer", "vae")
FILES = (".safetensors", ".gguf", *PICKLED)
_FP8 = ("F8_E4M3", "F8_E5M2")


def model_spec(model: ModelConf, needs_weights: bool = True) -> ModelSpec:
    """Find the model's weights and name them by digest.

    Raises: ConfigError where they are not here, or where the fields contradict each other.
    """
    _refuse_contradictions(model)
    if not needs_weights:
        return _without_weights(model)
    if model.weights == "random":
        return _random_spec(model)
    changes = read_changes(model)
    replaced = {c.kind for c in changes if c.kind != "lora"}
    path = find_checkpoint(model.name, model.path, model.hub_id, model.gated, without=replaced)
    if path.is_file() and model.variant is not None:
        raise ConfigError(
            f"model.variant={model.variant}: it acts on a diffusers folder, and {path} is one file;"
            " leave one of them out"
        )
    variant = settled_variant(path, model.variant)
    components: Path | None = None
    if path.is_file():
        if model.family != "sd3":
            raise ConfigError(
                f"model.path={path}: {model.name} loads from a diffusers folder only; give one"
            )
        components = find_components(path, model.components, model.hub_id)
    elif model.components is not None:
        raise ConfigError(
            f"model.components={model.components}: it acts only with model.path=FILE.safetensors,"
            f" and {path} is a folder; leave one of them out"
        )
    return replace(
        _without_weights(model),
        path=str(path),
        weights_digest=whole_digest(
            path, components, [(c.kind, c.path, c.weight) for c in changes], variant
        ),
        changes=changes,
        variant=variant,
        components=None if components is None else str(components),
        revision=revision_of(path),
    )


def model_notes(model: ModelConf, needs_weights: bool) -> tuple[str, ...]:
    """Say in plain words what was asked for in vain."""
    if needs_weights:
        return ()
    asked = {
        "model.path": model.path is not None,
        "model.weights": model.weights != "checkpoint",
        "model.layers": model.layers is not None,
        **{f"model.{name}": getattr(model, name) is not None for name in ON_TOP},
    }
    return tuple(
        f"{name} has no effect: this backend reads no weights"
        for name, is_set in asked.items()
        if is_set
    )


def _refuse_contradictions(model: ModelConf) -> None:
    """Refuse fields that would not act."""
    if model.weights == "random":
        for name in ("path", "components", *ON_TOP):
            value = getattr(model, name)
            if value is not None:
                raise ConfigError(
                    f"model.{name}={value}: weights=random reads no checkpoint; leave one of them"
                    " out"
                )
        return
    for name, value in (("layers", model.layers), ("text_encoders", model.text_encoders)):
        if value not in (None, False):
            raise ConfigError(
                f"model.{name}={str(value).lower()}: it acts only with model.weights=random, a"
                " checkpoint has its own"
            )


def _random_spec(model: ModelConf) -> ModelSpec:
    """Name a random model by its shapes; asking for the model's own depth is no cut."""
    parts = random_parts(model.name, model.layers)
    own = random_parts(model.name, None)["transformer"]["num_layers"]
    layers = None if model.layers == own else model.layers
    return replace(
        _without_weights(model),
        name=model.name + random_suffix(layers, model.text_encoders),
        weights_digest=random_digest(parts, model.text_encoders),
        weights="random",
        layers=layers,
        text_encoders=model.text_encoders,
    )


def _without_weights(model: ModelConf) -> ModelSpec:
    """What a specification says before any weights are known."""
    return ModelSpec(
        name=model.name,
        path="",
        weights_digest=NO_WEIGHTS,
        max_sequence_length=model.max_sequence_length,
        target_latency_s=model.target_latency_s,
        family=model.family,
    )


def read_changes(model: ModelConf) -> tuple[Change, ...]:
    """Find every change that is asked for; LoRAs come last, in the order of their digests.

    Raises: ConfigError for a file that is not there, or not of its kind.
    """
    found = [
        _replacement(kind, text) for kind in REPLACED if (text := getattr(model, kind)) is not None
    ]
    loras = [] if model.lora is None else [_lora(*each) for each in _lora_files(model.lora)]
    return (*found, *sorted(loras, key=lambda c: (c.digest, c.weight)))


def notes_of(spec: ModelSpec) -> tuple[str, ...]:
    """Say in plain words what becomes of the weights at load."""
    return (*(_note(change) for change in spec.changes), *_fp8_notes(spec))


def _note(change: Change) -> str:
    name = f"model.{change.kind}={Path(change.path).name} ({change.digest[:12]})"
    if change.kind == "lora":
        return f"{name}: merged into the weights at load, times {change.weight:g}"
    widened = "; its weights are dequantised on load" if change.path.endswith(".gguf") else ""
    return f"{name}: in the place of the model's own {change.kind}{widened}"


def _fp8_notes(spec: ModelSpec) -> Iterator[str]:
    files = {"model.path": spec.path, **{f"model.{c.kind}": c.path for c in spec.changes}}
    for field, path in files.items():
        if not path.endswith(".safetensors"):
            continue
        count = sum(dtype in _FP8 for dtype in read_header(Path(path), field).values())
        if count:
            yield f"{field}: {count} fp8 tensors are dequantised on load; speed is not that of fp8"


def _replacement(kind: str, text: str) -> Change:
    field, path = f"model.{kind}", Path(text).expanduser().absolute()
    if path.is_dir():
        own = path / kind if (path / kind).is_dir() else path
        if not (own / "config.json").is_file():
            raise ConfigError(
                f"{field}={text}: no config.json there; give a folder in diffusers' format, or one"
                " file"
            )
        return Change(kind=kind, path=str(own), digest=path_digest(own))
    if not path.is_file():
        raise ConfigError(f"{field}={text}: no such file or folder")
    if path.suffix not in FILES or (path.suffix == ".gguf" and kind != "transformer"):
        known = ", ".join(s for s in FILES if s != ".gguf" or kind == "transformer")
        raise ConfigError(f"{field}={text}: must be a folder, or a file of {known}")
    if path.suffix == ".safetensors":
        read_header(path, field)
    if path.suffix == ".gguf":
        _need_gguf(text)
    return Change(kind=kind, path=str(path), digest=path_digest(path))


def _need_gguf(text: str) -> None:
    """Refuse a GGUF file where nothing reads it. Raises: ConfigError."""
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ConfigError(
            f"model.transformer={text}: the package gguf, which reads such files, is not installed;"
            " pip install 'gguf>=0.17'"
        )


def _lora_files(text: str) -> list[tuple[Path, float]]:
    """Files and weights; commas of a file that is there belong to its name."""
    found, held = [], ""
    for piece in text.split(","):
        held = f"{held},{piece}" if held else piece
        if _is_there(held) or _is_there(held.rpartition(":")[0]):
            found.append(held.strip())
            held = ""
    pieces = [piece.strip() for piece in text.split(",")] if held else found
    return [_lora_file(piece) for piece in pieces]


def _is_there(text: str) -> bool:
    return text.strip() != "" and Path(text.strip()).expanduser().exists()


def _lora_file(piece: str) -> tuple[Path, float]:
    path = Path(piece).expanduser().absolute()
    name, colon, word = piece.rpartition(":")
    if not colon or path.exists():
        return _lora_path(path, piece), 1.0
    path = Path(name).expanduser().absolute()
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if path.exists() and not (0 < abs(weight) <= WEIGHT_LIMIT):
        raise ConfigError(
            f"model.lora={piece}: the weight must be a number from -{WEIGHT_LIMIT:g} to"
            f" {WEIGHT_LIMIT:g} and not 0, as in FILE:0.8"
        )
    return _lora_path(path, piece), weight


def _lora_path(path: Path, piece: str) -> Path:
    """The file itself, or the one in a folder that diffusers or PEFT saved."""
    if path.is_dir():
        for name in LORA_FILES:
            if (path / name).is_file():
                return path / name
        raise ConfigError(f"model.lora={piece}: none of {', '.join(LORA_FILES)} in that folder")
    if not path.is_file():
        raise ConfigError(f"model.lora={piece}: no such file")
    return path


def _lora(path: Path, weight: float) -> Change:
    if path.suffix == ".safetensors":
        names = read_header(path, "model.lora")
        if not any("lora" in name for name in names):
            example = f", such as {min(names)}" if names else ""
            raise ConfigError(
                f"model.lora={path}: no LoRA in it: none of its {len(names)} tensors is called so"
                f"{example}; a whole denoiser goes to model.transformer="
            )
    elif path.suffix not in PICKLED:
        known = ", ".join((".safetensors", *PICKLED))
        raise ConfigError(f"model.lora={path}: must be a file of {known}")
    return Change(kind="lora", path=str(path), digest=path_digest(path), weight=weight)
