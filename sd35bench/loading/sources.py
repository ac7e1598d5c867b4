"""From a model's specification to a loaded pipeline, and the proof of what was loaded.

Three sources, one result: a folder in diffusers' format, a single file in the original layout,
or seeded noise in the true shapes. `pipe.facts` says which.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion_3 import (
    pipeline_stable_diffusion_3,
    pipeline_stable_diffusion_3_img2img,
)
from torch import nn

from sd35bench.errors import OptimizationNotApplied
from sd35bench.loading.folders import load_folder, modules
from sd35bench.loading.lora import merge_lora
from sd35bench.loading.parts import replaced_parts
from sd35bench.loading.random_weights import load_random
from sd35bench.loading.single_file import load_single_file
from sd35bench.types import ModelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRUNCATION_LOGGERS = (
    pipeline_stable_diffusion_3.__name__,
    pipeline_stable_diffusion_3_img2img.__name__,
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha",
    "transformers.tokenization_utils_base",
)
TRUNCATION_WARNINGS = (
    "The following part of your input was truncated",
    "Token indices sequence length is longer",
)


def load_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | None = None,
    without: Collection[str] = (),
    instead: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Load the specified model as its family's pipeline; never from the network.

    `pipe.facts` is what `in_force` should say about the weights; `pipe.random_text` makes text
    embeddings where there is no tokenizer, else it is ``None``. Checkpoints are loaded on the
    CPU; random weights are made on `device`, where one is given. `without` names optional parts
    of a diffusers folder that are not loaded; modules `instead` take the place of a checkpoint's.

    Raises: BackendError for a missing, incomplete or broken checkpoint, OutOfMemory where random
    weights would not fit.
    """
    if spec.weights == "random":
        return load_random(spec, dtype, device)
    path, dequantised = Path(spec.path), dict[str, str]()
    replaced = {**replaced_parts(spec, dtype, dequantised), **instead}
    if spec.components is not None:
        pipe = load_single_file(path, Path(spec.components), dtype, replaced)
        layout, dequantised = "single file", {**pipe.dequantised, **dequantised}
    else:
        pipe, layout = load_folder(spec, dtype, without, replaced), "diffusers folder"
    pipe.random_text = None
    pipe.facts = {
        "weights": "checkpoint",
        "format": layout,
        "revision": spec.revision,
        **({} if spec.variant is None else {"variant": spec.variant}),
        **{c.kind: f"{Path(c.path).name} {c.digest[:12]}" for c in spec.changes},
        **({"dequantised": dequantised} if dequantised else {}),
    }
    loras = [merge_lora(pipe, change) for change in spec.changes if change.kind == "lora"]
    pipe.facts |= {"lora": loras} if loras else {}
    return pipe


def prove_dtypes(pipe: Any, asked: str) -> dict[str, str]:
    """Return each component's floating-point dtype, the commonest by elements first.

    transformers keeps T5's output projections in fp32 under fp16, so a minority may differ in
    the text encoders; the transformer and the VAE must be uniform.

    Raises: OptimizationNotApplied where a component is not mainly, or these two not wholly, in
    the dtype asked for.
    """
    found = {}
    for name, module in modules(pipe):
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
    for name, module in modules(pipe):
        strays = {p.device for p in module.parameters()} - {asked}
        if strays:
            raise OptimizationNotApplied(f"device={asked} asked, {name} has parts on {strays}")
    return str(asked)


def silence_truncation_warnings() -> None:
    """Drop the libraries' warnings about prompts cut short: every record says it already."""
    for name in TRUNCATION_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_truncation)


def _is_no_truncation(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(TRUNCATION_WARNINGS)


def _short(dtype: torch.dtype) -> str:
    names = {value: key for key, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))
