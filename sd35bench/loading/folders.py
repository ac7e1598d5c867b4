"""Loading a folder in diffusers' format: every part that its index names, or a refusal.

Loading never reaches for the network, refuses a folder with parts missing by name before torch
touches it, and refuses weights that would leave parameters at random values.
"""

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import diffusers.utils.logging as diffusers_logging
import torch
import transformers
import transformers.utils.logging as transformers_logging
from safetensors import SafetensorError
from torch import nn

from sd35bench.architectures import PIPELINES
from sd35bench.errors import BackendError
from sd35bench.loading.checkpoint import variant_of
from sd35bench.types import ModelSpec

LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
REMEDY = "point model.path at a complete diffusers folder (model_index.json and its parts)"


def load_folder(
    spec: ModelSpec,
    dtype: torch.dtype,
    without: Collection[str] = (),
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Load a family's pipeline from a diffusers folder on disk; never from the network.

    `without`: parts that are left out, as the pipeline allows; `parts`: those that are there
    already, in the place of the folder's own.

    Raises: BackendError for a missing, incomplete or broken folder, or one of another family.
    """
    path, family = Path(spec.path), spec.family
    index = read_index(path, parts=None, there=parts) | {part: [None, None] for part in without}
    wanted = PIPELINES[family]
    if index.get("_class_name") != wanted:
        raise BackendError(
            f"model.path={path} holds a {index.get('_class_name')}, this model is a {wanted};"
            " name the model that the folder holds, or another folder"
        )
    names = [part for part in index if part not in parts]
    variants = {v for n in names if (v := variant_of(path / n, spec.variant)) is not None}
    arguments: dict[str, Any] = {"variant": sorted(variants)[0]} if variants else {}
    with quiet_loading():
        try:
            arguments.update(_text_encoders(path, index, dtype, spec.variant))
            arguments.update(parts)
            pipe = getattr(diffusers, wanted).from_pretrained(
                path, dtype=dtype, local_files_only=True, **arguments
            )
        except LOAD_ERRORS as exc:
            raise BackendError(f"model.path={path} cannot be loaded: {exc}; {REMEDY}") from exc
    for part, module in modules(pipe):
        if part in parts:
            continue
        # diffusers leaves a parameter without weights on the meta device, and only warns.
        missing = [name for name, p in module.named_parameters() if p.is_meta]
        refuse_missing(path / part, missing)
    return pipe


def read_index(
    path: Path, parts: Iterable[str] | None = None, there: Collection[str] = ()
) -> dict[str, Any]:
    """Read the folder's index and look for every part that it names, or only for `parts`.

    Parts in `there` are not looked for.

    Raises: BackendError naming the first part that is missing.
    """
    index_path = path / "model_index.json"
    try:
        index = json.loads(index_path.read_text())
    except (OSError, ValueError) as exc:
        raise BackendError(f"model.path={path}: no readable model_index.json; {REMEDY}") from exc
    named = [n for n, part in index.items() if not n.startswith("_") and part != [None, None]]
    for name in named if parts is None else parts:
        if name in there:
            continue
        if not (path / name).is_dir() or not any((path / name).iterdir()):
            raise BackendError(f"model.path={path}: {name}/ is missing or empty; {REMEDY}")
    return index


def load_text_part(
    part: Path, class_name: str, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """Load one text encoder by its class in transformers, with its loading report.

    Inside a pipeline's `from_pretrained` transformers would fill missing weights at random and
    only warn.

    Raises: BackendError where a weight is missing.
    """
    encoder, report = getattr(transformers, class_name).from_pretrained(
        part,
        dtype=dtype,
        variant=variant_of(part, variant),
        local_files_only=True,
        output_loading_info=True,
    )
    refuse_missing(part, report["missing_keys"])
    return encoder


def load_diffusers_part(part: Path, class_name: str, dtype: torch.dtype) -> nn.Module:
    """Load one of diffusers' models, sharded or not.

    Raises: BackendError where a weight is missing.
    """
    model: Any = getattr(diffusers, class_name).from_pretrained(
        part, dtype=dtype, variant=variant_of(part), local_files_only=True
    )
    refuse_missing(part, [name for name, p in model.named_parameters() if p.is_meta])
    return model


def refuse_missing(part: Path, names: Iterable[str]) -> None:
    """Refuse a part whose weights do not cover its parameters.

    Raises: BackendError naming the part and the first of `names`.
    """
    missing = sorted(names)
    if missing:
        raise BackendError(
            f"model.path: {part} lacks {len(missing)} weights, first {missing[0]}; {REMEDY}"
        )


def modules(pipe: Any) -> list[tuple[str, nn.Module]]:
    """Return the pipeline's components that have parameters, by name."""
    return [(n, m) for n, m in pipe.components.items() if isinstance(m, nn.Module)]


def _text_encoders(
    path: Path, index: dict[str, Any], dtype: torch.dtype, variant: str | None
) -> dict[str, Any]:
    """Load the text encoders; a part that is left out is ``None``, or nothing would load."""
    encoders: dict[str, Any] = {}
    for part, entry in index.items():
        if not part.startswith(("text_encoder", "tokenizer")):
            continue
        if entry[0] is None:
            encoders[part] = None
        if part.startswith("tokenizer") or entry[0] != "transformers":
            continue
        encoders[part] = load_text_part(path / part, entry[1], dtype, variant)
    return encoders


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep the libraries' progress bars off the terminal while loading."""
    libraries = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
