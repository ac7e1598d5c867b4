"""From a diffusers folder to a loaded pipeline, and the proof of what was loaded.

Loading never reaches for the network, refuses a folder with parts missing by name before torch
touches it, and refuses weights that would leave parameters at random values.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
import transformers
import transformers.utils.logging as transformers_logging
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3,
    pipeline_stable_diffusion_3_img2img,
)
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    StableDiffusion3Pipeline,
)
from safetensors import SafetensorError
from torch import nn

from sd35bench.errors import BackendError, OptimizationNotApplied

__all__ = [
    "DTYPES",
    "hush_truncation_warnings",
    "load_pipeline",
    "prove_device",
    "prove_dtypes",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
TRUNCATION_LOGGERS = (
    pipeline_stable_diffusion_3.__name__,
    pipeline_stable_diffusion_3_img2img.__name__,
    "transformers.tokenization_utils_base",
)
TRUNCATION_WARNINGS = (
    "The following part of your input was truncated",
    "Token indices sequence length is longer",
)
REMEDY = "point model.path at a complete diffusers folder (model_index.json and its parts)"


def load_pipeline(path: Path, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Load an SD3 pipeline from a diffusers folder on disk; never from the network.

    Raises: BackendError for a missing, incomplete or broken folder.
    """
    index = read_index(path)
    with _quiet_loading():
        try:
            pipe = StableDiffusion3Pipeline.from_pretrained(
                path, dtype=dtype, local_files_only=True, **_text_encoders(path, index, dtype)
            )
        except LOAD_ERRORS as exc:
            raise BackendError(f"model.path={path} cannot be loaded: {exc}; {REMEDY}") from exc
    for part, module in _modules(pipe):
        # diffusers leaves a parameter without weights on the meta device, and only warns.
        missing = [name for name, p in module.named_parameters() if p.is_meta]
        _refuse_missing(path / part, missing)
    return pipe


def read_index(path: Path) -> dict[str, Any]:
    """Read the folder's index and look for every part that it names.

    Raises: BackendError naming the first part that is missing.
    """
    index_path = path / "model_index.json"
    try:
        index = json.loads(index_path.read_text())
    except (OSError, ValueError) as exc:
        raise BackendError(f"model.path={path}: no readable model_index.json; {REMEDY}") from exc
    wanted = [n for n, part in index.items() if not n.startswith("_") and part != [None, None]]
    for name in wanted:
        if not (path / name).is_dir() or not any((path / name).iterdir()):
            raise BackendError(f"model.path={path}: {name}/ is missing or empty; {REMEDY}")
    return index


def _text_encoders(path: Path, index: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders with their loading reports; a part that is left out is ``None``.

    Inside a pipeline's `from_pretrained` transformers would fill missing weights at random and
    only warn, and a folder saved without T5 would not load at all.

    Raises: BackendError where a weight is missing.
    """
    encoders: dict[str, Any] = {}
    for part, entry in index.items():
        if not part.startswith(("text_encoder", "tokenizer")):
            continue
        if entry[0] is None:
            encoders[part] = None
        if part.startswith("tokenizer") or entry[0] != "transformers":
            continue
        model_class = getattr(transformers, entry[1])
        encoders[part], report = model_class.from_pretrained(
            path / part, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        _refuse_missing(path / part, report["missing_keys"])
    return encoders


def _refuse_missing(part: Path, names: Iterable[str]) -> None:
    missing = sorted(names)
    if missing:
        raise BackendError(
            f"model.path: {part} lacks {len(missing)} weights, first {missing[0]}; {REMEDY}"
        )


def prove_dtypes(pipe: Any, asked: str) -> dict[str, str]:
    """Return each component's floating-point dtype, the commonest by elements first.

    transformers keeps T5's output projections in fp32 under fp16, so a minority may differ in
    the text encoders; the transformer and the VAE must be uniform.

    Raises: OptimizationNotApplied where a component is not mainly, or these two not wholly, in
    the dtype asked for.
    """
    found = {}
    for name, module in _modules(pipe):
        sizes: Counter[torch.dtype] = Counter()
        for parameter in module.parameters():
            if parameter.is_floating_point():
                sizes[parameter.dtype] += parameter.numel()
        dtypes = [dtype for dtype, _ in sizes.most_common()]
        uniform = name in ("transformer", "vae")
        if dtypes[0] is not DTYPES[asked] or (uniform and len(dtypes) > 1):
            raise OptimizationNotApplied(f"dtype={asked} asked, {name} has {dtypes}")
        found[name] = "+".join(_short(dtype) for dtype in dtypes)
    return found


def prove_device(pipe: Any, asked: torch.device) -> str:
    """Return the device that holds every parameter.

    Raises: OptimizationNotApplied where a parameter lies elsewhere.
    """
    for name, module in _modules(pipe):
        strays = {p.device for p in module.parameters()} - {asked}
        if strays:
            raise OptimizationNotApplied(f"device={asked} asked, {name} has parts on {strays}")
    return str(asked)


def hush_truncation_warnings() -> None:
    """Drop the libraries' warnings about prompts cut short: every record says it already."""
    for name in TRUNCATION_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_truncation)


def _is_no_truncation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(TRUNCATION_WARNINGS)


def _modules(pipe: Any) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in pipe.components.items() if isinstance(m, nn.Module)]


def _short(dtype: torch.dtype) -> str:
    names = {value: key for key, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
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
